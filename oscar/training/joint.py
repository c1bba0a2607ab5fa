"""Stage `joint`: hyper-encoders and denoiser together, one rate per pass (paper section 3.4, stage 2)."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oscar.codec import OscarCodec, channel_rms, rescale
from oscar.config import ConfigError, CriticConfig, TrainConfig
from oscar.models.discriminator import LatentDiscriminator, PublishedHead
from oscar.rates import RatePoint
from oscar.timesteps import LearnedMapping
from oscar.training.losses import ImageLoss, cosine_loss_channel, generator_loss
from oscar.training.rate_order import choose_rates
from oscar.training.stage import Pass, Stage, check_posterior, encode_latents
from oscar.training.tables import estimate_frequencies, perplexity
from oscar.training.timesteps import LearnedTimesteps


class JointStage(Stage):
    """Image, edge, cosine and adversarial losses on the one-step reconstruction.

    The critic sees the denoised latent with its graph, so that its gradient reaches denoiser and bottleneck, but where
    `stage.critic.feature_gradient` is false, as published.
    """

    def __init__(self, codec: OscarCodec, config: TrainConfig):
        super().__init__()
        stage = config.stage
        self.codec = codec
        self.stage = stage
        if stage.vae != "frozen":
            codec.backbone.source = None  # it becomes another backbone, which the checkpoint must bundle
        if stage.sample_latents:
            check_posterior(codec.backbone)
        codec.bottleneck.set_training(**config.bottleneck.training_options())
        self.draw_weights = stage.draw_weights(codec.rates)
        config.validation.rate_points(codec.rates)  # those of `init_from` are known only here
        self.image_loss = ImageLoss.of(stage)
        self.metrics = ("loss", *self.image_loss.weights, "latent", "cosine", "commitment", "gan", "critic")
        self.timesteps = None
        if isinstance(codec.mapping, LearnedMapping):
            self.timesteps = LearnedTimesteps(codec.mapping, codec.rates, len(codec.backbone.schedule))
            self.metrics += ("timestep",)
        by_rate = ("loss", "cosine", "perplexity")
        self.metrics += tuple(f"{name}_{rate.bpp:.4f}" for name in by_rate for rate in codec.rates)
        if stage.gan > 0:
            critic = build_critic(codec, stage.critic)
            check_features(codec, critic, config.data.crop)
            object.__setattr__(self, "critic", critic)  # kept out of this module's parameters
        self._last: tuple[Tensor, ...] = ()
        self.freeze()

    def trained_modules(self) -> list[nn.Module]:
        modules: list[nn.Module] = [self.codec.bottleneck]
        if self.stage.denoiser == "trained":
            modules.append(self.codec.denoiser)
        if self.timesteps is not None:
            modules.append(self.timesteps)
        return modules + self.codec.backbone.vae_modules(self.stage.vae)

    def forward(self, images: Tensor, turn: Pass) -> dict[str, Tensor]:
        turn.seed_torch()
        (rate,) = choose_rates(turn, self.codec.rates, self.draw_weights, 1, self.stage.rate_order)
        with torch.set_grad_enabled(self.stage.vae == "all"):
            # a sample for the codec and a fresh one for the critic, or the mode for both
            latent, *others = encode_latents(self.codec.backbone, images, turn, 2 * self.stage.sample_latents)
        quantised = self.codec.bottleneck(latent, rate)
        # Norms and targets carry no gradient: a trained encoder could else grow its latents until the denoiser hardly
        # counts, or drift towards what is easy to quantise.
        target = latent.detach()
        timestep = self.timestep(rate, quantised.z_hat, target)
        x0 = self.codec.denoiser(rescale(quantised.z_hat, channel_rms(target)), timestep)
        loss, terms = self.image_loss(self.codec.backbone.decode(x0), images)
        terms["latent"] = F.mse_loss(x0.float(), target.float())
        terms["cosine"] = cosine_loss_channel(quantised.z_hat, target)
        terms["commitment"] = quantised.commitment
        for name in ("latent", "cosine", "commitment"):
            loss = loss + getattr(self.stage, name) * terms[name]
        if self.timesteps is not None:
            terms["timestep"] = timestep.detach()
        if self.critic is not None:
            terms["gan"] = generator_loss(self.critic(x0, self.codec.denoiser.prompt, turn.noise(x0.device)))
            loss = loss + self.stage.gan * terms["gan"]
            self._last = (others[0].detach() if others else target, x0.detach())
        terms[f"loss_{rate.bpp:.4f}"] = loss.detach()
        terms[f"cosine_{rate.bpp:.4f}"] = terms["cosine"].detach()
        terms[f"perplexity_{rate.bpp:.4f}"] = perplexity(self.codec.bottleneck.at(rate).usage())
        return {"loss": loss, **terms}

    def timestep(self, rate: RatePoint, z_hat: Tensor, latent: Tensor) -> Tensor | int:
        """The timestep of this pass: learned, one of each picture (B,), or the rate's."""
        if self.timesteps is not None:
            return self.timesteps(rate)
        if self.codec.mapping.per_picture:
            return self.codec.measure_timesteps(z_hat.detach(), latent)
        return self.codec.mapping(rate)

    def critic_inputs(self) -> tuple[Tensor, ...]:
        prompt = self.codec.denoiser.prompt
        return (*self._last, None if prompt is None else prompt.detach())

    def current_codec(self) -> OscarCodec:
        """The codec as it stands, at the timesteps learned so far."""
        if self.timesteps is not None:
            self.codec.set_mapping(self.timesteps.to_mapping())
        return self.codec

    def finish(self, batches) -> None:
        estimate_frequencies(self.current_codec(), batches, self.stage.table_batches)

    def save(self, folder: Path, provenance: dict | None = None) -> None:
        self.codec.provenance = provenance
        self.codec.save_pretrained(folder)


def build_critic(codec: OscarCodec, config: CriticConfig) -> LatentDiscriminator:
    """The critic on a copy of the codec's UNet without adapters; a prompt of its own is as long as the denoiser's."""
    tokens = codec.denoiser.prompt.shape[1] if config.prompt == "own" and codec.denoiser.prompt is not None else 0
    return LatentDiscriminator(
        codec.backbone.plain_unet(), codec.backbone.schedule.alphas_cumprod, config.lora_rank, head=config.head,
        timesteps=tuple(config.timesteps), lora_alpha=config.lora_alpha, lora_init=config.lora_init,
        lora_layers=config.lora_layers, prompt_tokens=tokens, feature_gradient=config.feature_gradient,
    )  # fmt: skip


def check_features(codec: OscarCodec, critic: LatentDiscriminator, crop: int) -> None:
    """Refuse crops whose features are too small for the critic's head.

    Raises:
        ConfigError: naming the smallest crop.
    """
    step = codec.backbone.factor * codec.backbone.unet_multiple  # pixels per position of the features
    least = step * getattr(critic.head, "MIN_SIDE", 1)
    if crop < least:
        raise ConfigError(f"data.crop is {crop}, but stage.critic.head 'published' needs features of "
                          f"{PublishedHead.MIN_SIDE}x{PublishedHead.MIN_SIDE}; allowed: {least} or more")  # fmt: skip
