"""Give a trained model of nano's kind more latent channels and residual blocks, to be trained on from where it is.

    python scripts/widen.py runs/nano/more/final --channels 128 --decoder-blocks 1 2 2 --out runs/nano/widened

The new channels begin as the next frequencies of the autoencoder's block transform, and are coded last, as a group of
their own; nothing that is there looks at them yet. New residual blocks begin as the identity. So what the model made
of an image is still in it.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from oscar import OscarCodec
from oscar.bottlenecks.hyperprior import HyperpriorBottleneck
from oscar.bottlenecks.rounded_layers import SCALE_MIN
from oscar.models.backbone import Backbone
from oscar.models.conv_autoencoder import AutoencoderConv, cosine_transform
from oscar.models.denoiser import Denoiser
from oscar.utils.errors import exit_code

_CHROMA_SHARE = 0.12  # of all channels, each plane: chrominance has less in its high frequencies than luminance
_SEEN = 0.3  # of a frequency's energy, in the span of what the encoder's linear part has
_FIRST_SCALE = 0.2  # that the new channels are expected to have: next to no bits for those that are rounded to zero


def widen(codec: OscarCodec, channels: int, decoder_blocks: Sequence[int] | None = None) -> OscarCodec:
    """A codec with more latent channels that makes of an image what `codec` does, and little more.

    Args:
        codec: with `AutoencoderConv` and a hyperprior.
        channels: latent channels of the result, at least the codec's.
        decoder_blocks: residual blocks of the decoder at each resolution, at least the codec's; None leaves them.

    Raises:
        ValueError: for a codec of another kind, or fewer channels or blocks than it has.
    """
    vae, bottleneck = codec.backbone.vae, codec.bottleneck
    if not isinstance(vae, AutoencoderConv) or not isinstance(bottleneck, HyperpriorBottleneck):
        raise ValueError(
            f"the model has {type(vae).__name__} and a bottleneck of kind {bottleneck.kind}; "
            "allowed: AutoencoderConv and hyperprior"
        )
    blocks = list(decoder_blocks or vae.config.decoder_blocks)
    had = list(vae.config.decoder_blocks)
    if len(blocks) != len(had) or any(new < old for new, old in zip(blocks, had, strict=True)):
        raise ValueError(f"decoder_blocks are {blocks}; allowed: {len(had)} numbers, none below those of {had}")
    if channels < bottleneck.latent_channels:
        raise ValueError(f"channels is {channels}; allowed: {bottleneck.latent_channels} and more")
    backbone = Backbone.from_configs(
        vae={**vae.config, "latent_channels": channels, "decoder_blocks": blocks},
        unet={**codec.backbone.unet.config, "in_channels": channels, "out_channels": channels},
        scheduler=codec.backbone.schedule.config,
    )
    _widen_vae(vae, backbone.vae, last_group=bottleneck.groups[-1])
    _copy(codec.backbone.unet, backbone.unet)
    added = channels - bottleneck.latent_channels
    options = {**bottleneck.options, "groups": [*bottleneck.groups, *([added] if added else [])]}
    wide = HyperpriorBottleneck(channels, **options)
    _widen_bottleneck(bottleneck, wide)
    denoiser = Denoiser(backbone.unet, backbone.schedule, **codec.denoiser.options)
    return OscarCodec(backbone, wide, denoiser, codec.mapping, provenance=codec.provenance)


@torch.no_grad()
def _copy(source: nn.Module, target: nn.Module) -> None:
    """Copy parameters and buffers of one name, those that are larger in `target` to their first places; the rest of
    these is 0."""
    own = source.state_dict()
    for name, value in target.state_dict().items():
        if name in own:
            value.zero_()[tuple(slice(side) for side in own[name].shape)] = own[name]


@torch.no_grad()
def _widen_vae(source: AutoencoderConv, target: AutoencoderConv, last_group: int) -> None:
    had, side = source.config.latent_channels, source.spatial_compression_ratio
    _copy(source.encoder, target.encoder)
    _copy(source.decoder.blocks, target.decoder.blocks)
    old, reading = list(source.decoder.layers), 0
    for layer in target.decoder.layers:
        if reading < len(old) and _goes_with(old[reading], layer):
            _copy(old[reading], layer)
            reading += 1
    assert reading == len(old)
    down, up = source.encoder.blocks[1].weight, source.decoder.blocks[0].weight
    new = _further_frequencies(down.flatten(1), target.config.latent_channels - had, side)
    target.encoder.blocks[1].weight[had:] = (new * _mean_norm(down[-last_group:]))[:, :, None, None]
    scale = _mean_norm(up[:, -last_group:].transpose(0, 1))
    target.decoder.blocks[0].weight[:, had:] = (new.t() * scale)[:, :, None, None]


def _further_frequencies(rows: Tensor, count: int, side: int) -> Tensor:
    """The lowest frequencies of blocks that linear maps (C, 3 side^2) do not see yet, orthonormal (count, 3 side^2)."""
    planes, span = cosine_transform(side), torch.linalg.qr(rows.t())[0]
    unseen = [plane[(plane @ span).square().sum(dim=1) < _SEEN] for plane in planes]
    share = int(_CHROMA_SHARE * (len(rows) + count))
    red, blue = (max(0, min(share - (side**2 - len(plane)), count // 2)) for plane in unseen[1:])
    return torch.cat([plane[:own] for plane, own in zip(unseen, (count - red - blue, red, blue), strict=True)])


def _goes_with(old: nn.Module, new: nn.Module) -> bool:
    """Whether a layer of the wider autoencoder takes the place of `old`: all do but residual blocks that were added."""
    widths = [getattr(layer, "first", layer) for layer in (old, new)]
    return type(old) is type(new) and getattr(widths[0], "out_channels", 0) == getattr(widths[1], "out_channels", 0)


def _mean_norm(rows: Tensor) -> Tensor:
    return rows.flatten(1).norm(dim=1).mean()


@torch.no_grad()
def _widen_bottleneck(source: HyperpriorBottleneck, target: HyperpriorBottleneck) -> None:
    had, last = source.latent_channels, source.groups[-1]
    _copy(source, target)
    for name in ("log_gain", "log_inverse"):
        getattr(target, name)[:, had:] = getattr(source, name)[:, -last:].mean(dim=1, keepdim=True)
    for predictor in target.predictors[len(source.predictors) :]:
        predictor.last_bias[predictor.own :] *= math.log(_FIRST_SCALE / SCALE_MIN) / math.log(1 / SCALE_MIN)
    target.update()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="name, folder or hub id of the trained model")
    parser.add_argument("--channels", type=int, required=True, help="latent channels")
    parser.add_argument("--decoder-blocks", type=int, nargs="+", help="residual blocks of the decoder, coarsest last")
    parser.add_argument("--out", type=Path, required=True, help="folder of the result, for init_from")
    options = parser.parse_args(arguments)

    def run() -> None:
        torch.manual_seed(0)
        codec = OscarCodec.from_pretrained(options.model)
        widen(codec, options.channels, options.decoder_blocks).save_pretrained(options.out)
        print(f"{options.out}: {options.channels} latent channels")

    return exit_code("widen", run)


if __name__ == "__main__":
    sys.exit(main())
