"""Stage `joint`: bottleneck and denoiser together (paper section 3.4, stage 2)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oscar.bottlenecks import Draw
from oscar.codec import OscarCodec
from oscar.config import ConfigError, CriticConfig, TrainConfig
from oscar.models.discriminator import LatentDiscriminator, PublishedHead
from oscar.registry import STAGES
from oscar.timesteps import LearnedMapping
from oscar.training.losses import ImageLoss, generator_loss
from oscar.training.stages.base import CodecStage, check_posterior, encode_latents
from oscar.training.timesteps import LearnedTimesteps
from oscar.utils.rng import StepRng


@STAGES.register("joint")
class JointStage(CodecStage):
    """Image and edge losses on the one-step reconstruction, the bottleneck's own losses, and an adversarial one.

    The critic sees the denoised latent with its graph, so that its gradient reaches denoiser and bottleneck; the
    published code computes the critic's features without gradient, so that it does not.
    """

    def __init__(self, codec: OscarCodec, config: TrainConfig):
        super().__init__(codec, config)
        stage = config.stage
        if stage.vae != "frozen":
            codec.backbone.source = None  # it becomes another backbone, which the checkpoint must bundle
        if stage.sample_latents:
            check_posterior(codec.backbone)
        self.image_loss = ImageLoss.of(stage)
        self.metrics = ("loss", *self.image_loss.weights, "latent", "gan", "critic", *codec.bottleneck.columns())
        self.timesteps = None
        if isinstance(codec.mapping, LearnedMapping):
            self.timesteps = LearnedTimesteps(codec.mapping, codec.bottleneck.points, len(codec.backbone.schedule))
            self.metrics += ("timestep",)
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

    def forward(self, images: Tensor, rng: StepRng) -> dict[str, Tensor]:
        rng.seed_torch()
        with torch.set_grad_enabled(self.stage.vae == "all"):
            # a sample for the codec and a fresh one for the critic, or the mode for both
            latent, *others = encode_latents(self.codec.backbone, images, rng, 2 * self.stage.sample_latents)
        (draw,) = self.codec.bottleneck.draw(rng, latent, every=False)
        output = self.codec.bottleneck(latent, draw.point)
        target = latent.detach()
        timestep = self.timestep(draw, output.z_hat, target)
        x0 = self.codec.denoiser(output.z_hat, timestep)
        decoded = self.codec.backbone.decode(x0)
        if output.weight is None:
            loss, terms = self.image_loss(decoded, images)
            terms["latent"] = F.mse_loss(x0.float(), target.float())
            loss = loss + self.stage.latent * terms["latent"]
        else:
            distortions, terms = self.image_loss.by_image(decoded, images)
            latent_distortions = (x0.float() - target.float()).square().mean(dim=(1, 2, 3))
            terms["latent"] = latent_distortions.detach().mean()
            loss = output.weight * (distortions + self.stage.latent * latent_distortions)
        loss, statistics = self.weigh(output, loss)
        if self.timesteps is not None:
            terms["timestep"] = timestep.detach()
        if self.critic is not None:
            logits = self.critic(x0, self.codec.denoiser.prompt, rng.noise(x0.device))
            terms["gan"] = generator_loss(logits)
            loss = loss + self.stage.gan * generator_loss(logits, output.weight)
            self._last = (others[0].detach() if others else target, x0.detach())
        return self.logged({"loss": loss, **terms, **statistics}, draw, {"loss": loss.detach(), **statistics})

    def timestep(self, draw: Draw, z_hat: Tensor, latent: Tensor) -> Tensor | float:
        """The timestep of this pass: learned, one of each image (B,), or the operating point's."""
        if self.timesteps is not None:
            return self.timesteps(draw.point)
        if self.codec.mapping.per_image:
            return self.codec.backbone.schedule.measure(z_hat.detach(), latent)
        return self.codec.bottleneck.timesteps(self.codec.mapping, draw.point, latent)

    def critic_inputs(self) -> tuple[Tensor, ...]:
        prompt = self.codec.denoiser.prompt
        return (*self._last, None if prompt is None else prompt.detach())

    def current_codec(self) -> OscarCodec:
        """The codec as it stands, at the timesteps learned so far."""
        if self.timesteps is not None:
            self.codec.set_mapping(self.timesteps.to_mapping())
        return self.codec

    @torch.no_grad()
    def finish(self, batches: Iterable[Tensor]) -> None:
        codec = self.current_codec().eval()
        latents = (codec.backbone.encode(batch) for batch in itertools.islice(batches, self.stage.table_batches))
        codec.bottleneck.finish(latents, None)
        codec.forget_fingerprint()


def build_critic(codec: OscarCodec, config: CriticConfig) -> LatentDiscriminator:
    """The critic on a copy of the codec's UNet without adapters; a prompt of its own is as long as the denoiser's."""
    tokens = codec.denoiser.prompt.shape[1] if config.prompt == "own" and codec.denoiser.prompt is not None else 0
    return LatentDiscriminator(
        codec.backbone.plain_unet(),
        codec.backbone.schedule.alphas_cumprod,
        config.lora_rank,
        head=config.head,
        timesteps=tuple(config.timesteps),
        lora_alpha=config.lora_alpha,
        lora_init=config.lora_init,
        lora_layers=config.lora_layers,
        prompt_tokens=tokens,
        feature_gradient=config.feature_gradient,
    )


def check_features(codec: OscarCodec, critic: LatentDiscriminator, crop: int) -> None:
    """Refuse crops whose features are too small for the critic's head.

    Raises:
        ConfigError: naming the smallest crop.
    """
    step = codec.backbone.factor * codec.backbone.unet_multiple  # pixels per position of the features
    least = step * getattr(critic.head, "MIN_SIDE", 1)
    if crop < least:
        raise ConfigError(
            f"data.crop is {crop}, but stage.critic.head 'published' needs features of "
            f"{PublishedHead.MIN_SIDE}x{PublishedHead.MIN_SIDE}; allowed: {least} or more"
        )
