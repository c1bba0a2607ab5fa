"""From a typed configuration to the stage that it describes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import torch.utils.checkpoint
from torch import nn

from oscar import checkpoint, model_folder
from oscar.bottlenecks import Bottleneck
from oscar.codec import OscarCodec
from oscar.config import CacheLatentsConfig, ConfigError, TrainConfig
from oscar.inference.loading import part_files
from oscar.models.backbone import Backbone, read_configs, reading
from oscar.models.denoiser import Denoiser
from oscar.registry import STAGES
from oscar.timesteps import mapping_from_config
from oscar.training.resolve import check_shape, resolve
from oscar.training.stages.base import Stage


def build_stage(config: TrainConfig) -> Stage:
    """The stage with its networks, on the CPU.

    Raises:
        ConfigError, CheckpointError, BackboneError, WeightsUnavailable: where something named cannot be had.
        ValueError: for timesteps that do not exist or do not fit.
    """
    # Denormal gradients slow a CPU down several times. Worker threads inherit the flag when the first parallel step
    # makes them, so this comes before any.
    torch.set_flush_denormal(True)
    if config.trainer.threads is not None:
        torch.set_num_threads(config.trainer.threads)
    torch.backends.cudnn.deterministic = config.trainer.cudnn_deterministic
    torch.backends.cuda.matmul.allow_tf32 = config.trainer.tf32
    torch.manual_seed(config.seed)
    config = resolve(config)
    stage = _build(config)
    if config.trainer.gradient_checkpointing:
        checkpoint_activations(stage)
    if config.trainer.compile:
        for network in networks(stage):
            network.compile()
    return stage


def _build(config: TrainConfig) -> Stage:
    kind = STAGES.find(config.stage.name)
    if not kind.trains_codec:
        return kind(build_backbone(config), config)
    whole = needs_unet(config)
    stage = kind(build_codec(config, whole), config)
    if not whole:
        stage.build_whole = partial(_build_again, config)
    return stage


def needs_unet(config: TrainConfig) -> bool:
    """Whether a resolved run computes with the UNet, or draws its random weights; validation decodes, and so does."""
    drawn = config.backbone.source is None and config.init_from is None
    used = STAGES[config.stage.name].computes_with_unet or config.validation.enabled
    return used or drawn or config.denoiser.prompt_init == "text"


def _build_again(config: TrainConfig) -> OscarCodec:
    """The codec as `build_codec` makes it at the start of a run."""
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        return build_codec(config)


def networks(stage: Stage) -> list[nn.Module]:
    """What takes the time of a stage, and is compiled: networks without random draws and side effects."""
    found: list[nn.Module] = []
    for module in stage.modules():
        if isinstance(module, Backbone):
            found += [module.vae.encoder, module.vae.decoder, *([] if module.unet is None else [module.unet])]
        elif isinstance(module, Bottleneck):
            found += module.compiled_networks()
    if stage.critic is not None:
        found.append(stage.critic.trunk)
    return found


def checkpoint_activations(stage: Stage) -> None:
    """Have diffusers' blocks keep no activations, as its `enable_gradient_checkpointing` does for whole models.

    Raises:
        ConfigError: if there is no such block.
    """
    modules = [*stage.modules(), *(stage.critic.modules() if stage.critic is not None else ())]
    blocks = [module for module in modules if hasattr(module, "gradient_checkpointing")]
    if not blocks:
        raise ConfigError(
            "trainer.gradient_checkpointing is true, but no network of this backbone supports it; allowed: false"
        )
    for block in blocks:
        block.gradient_checkpointing = True
        block._gradient_checkpointing_func = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)


def build_backbone(config: TrainConfig | CacheLatentsConfig, unet: bool = True) -> Backbone:
    """The backbone of `source`, without its UNet unless `unet`; or random weights in the configured shapes.

    Raises:
        ConfigError: for a shape that `source` does not have.
        BackboneError: if `source` cannot be read.
    """
    backbone = config.backbone
    if backbone.source is not None:
        loaded = Backbone.from_pretrained(backbone.source, unet)
        check_shape(backbone, read_configs(backbone.source), f"backbone.source {backbone.source!r}")
        return loaded
    return Backbone.from_configs(backbone.vae, backbone.unet, backbone.scheduler)


def build_codec(config: TrainConfig, unet: bool = True) -> OscarCodec:
    """The codec of a resolved configuration: that of `init_from` with what the run changes, or a new one.

    Without `unet` it has no denoiser, and the UNet's weights are only looked for.
    """
    mapping = mapping_from_config(config.timesteps)
    if not unet:
        _find_unet(config)
    if config.init_from is not None:
        codec = _continue(config, unet)
        codec.set_mapping(mapping)
        codec.forget_fingerprint()
    else:
        architecture = {
            "bottleneck": config.bottleneck.describe(),
            "denoiser": config.denoiser.options(),
            "timesteps": mapping.to_config(),
        }
        try:
            codec = OscarCodec(*checkpoint.build(architecture, build_backbone(config, unet)))
        except ValueError as error:
            raise ConfigError(str(error)) from None
    if config.denoiser.prompt_init == "text":
        if codec.backbone.source is None:
            raise ConfigError("denoiser.prompt_init is 'text', but backbone.source is unset; allowed: noise")
        codec.denoiser.init_prompt_from_text(codec.backbone.source)
    return codec


def _find_unet(config: TrainConfig) -> None:
    """Have the UNet's files here, which the end of the run reads: nodes that compute are often offline.

    Raises:
        BackboneError: if they are not to be had.
    """
    source = config.backbone.source or str(model_folder.locate(config.init_from))
    with reading(source):
        if not part_files(source, "unet") and Path(source).is_dir() and not list((Path(source) / "unet").glob("*.bin")):
            raise ValueError("the weights of unet are not there")


def _continue(config: TrainConfig, unet: bool) -> OscarCodec:
    """The codec of `init_from`, with what a run changes: fewer rates, a new prompt or denoiser."""
    codec = OscarCodec.from_pretrained(config.init_from, config.backbone.source, unet)
    if codec.denoiser is not None and codec.denoiser.options != config.denoiser.options():
        codec.denoiser.discard()
        codec.denoiser = Denoiser(codec.backbone.unet, codec.backbone.schedule, **config.denoiser.options())
    elif config.denoiser.prompt_init == "noise" and codec.denoiser is not None:
        codec.denoiser.init_prompt_from_noise()
    try:
        codec.bottleneck.adapt(config.bottleneck)
    except ValueError as error:
        raise ConfigError(f"bottleneck: {error}") from None
    return codec
