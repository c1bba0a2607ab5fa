"""The latent critic: the backbone UNet's first half, with LoRA and a small head (paper, stage 2)."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

TIMESTEPS = (20, 980)  # of 1000, from the first to before the second (paper, stage 2)
PAPER_STEPS = 1000


class LatentDiscriminator(nn.Module):
    """Tells real latents from decoded ones at a random noise level.

    A latent is re-noised at a timestep drawn per sample and passes conv_in, the down blocks and the middle block of a
    copy of the backbone's UNet, then a convolutional head that gives a logit per position. Gradients reach the input
    latent, which is how the codec learns from the critic; the published code cuts them (`feature_gradient=False`).

    Args:
        unet: a diffusers `UNet2DConditionModel` without LoRA layers; it is deep-copied in part and stays untouched.
            Blocks with and without cross-attention are supported, as is a missing middle block; extra conditioning is
            not.
        alphas_cumprod: noise schedule, (T,).
        lora_rank: rank of the trained LoRA layers on every convolution and linear layer but those of the timestep; None
            trains the copied blocks in full.
        head: module from the last features (B, C, h', w') to logits (B, 1, ...), or the name of one: "light" builds
            `LogitHead`, "published" `PublishedHead`. Its input channels are `feature_channels(unet)`.
        timesteps: range of timesteps of a schedule of 1000, scaled to T; the end is left out.
        lora_alpha, lora_init, lora_layers: see `oscar.config.CriticConfig`.
        prompt_tokens: tokens of a prompt of the critic's own, from noise; 0 takes the prompt that it is called with.
        feature_gradient: whether gradients pass the UNet; otherwise the head alone gets any.

    Raises:
        ValueError: if the UNet already has LoRA layers or wants conditioning other than a prompt and a timestep, or an
            argument is out of range.
    """

    def __init__(
        self,
        unet: nn.Module,
        alphas_cumprod: Tensor,
        lora_rank: int | None = 16,
        head: nn.Module | str = "light",
        timesteps: tuple[int, int] = TIMESTEPS,
        lora_alpha: float | None = None,
        lora_init: str = "gaussian",
        lora_layers: str = "denoiser",
        prompt_tokens: int = 0,
        feature_gradient: bool = True,
    ) -> None:
        super().__init__()
        check_conditioning(unet)
        total = len(alphas_cumprod)
        if not 0 <= timesteps[0] < timesteps[1] <= PAPER_STEPS:
            allowed = f"it must be a range within 0 to {PAPER_STEPS}"
            raise ValueError(f"timesteps = {tuple(timesteps)} is not allowed; {allowed}")
        self.first = min(round(timesteps[0] * total / PAPER_STEPS), total - 1)
        self.end = max(round(timesteps[1] * total / PAPER_STEPS), self.first + 1)
        # the schedule belongs to the backbone, not to the critic's checkpoint
        self.register_buffer("alphas_cumprod", alphas_cumprod.detach().float().clone(), persistent=False)
        self.trunk = UNetFirstHalf(unet)
        if lora_rank is None:
            self.trunk.requires_grad_(True)
        else:
            add_lora(self.trunk, lora_rank, lora_alpha, lora_init, lora_layers)
        self.head = HEADS[head](feature_channels(unet)) if isinstance(head, str) else head
        self.prompt = None
        if prompt_tokens and self.trunk.needs_prompt:
            self.prompt = nn.Parameter(torch.randn(1, prompt_tokens, unet.config.cross_attention_dim) * 0.02)
        self.feature_gradient = feature_gradient

    def forward(self, latent: Tensor, prompt: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Logits of being real.

        Args:
            latent: (B, 4, h, w), scaled by the VAE's factor.
            prompt: embeddings (1 or B, tokens, dim), needed if the UNet has cross-attention and the critic no prompt of
                its own, which else takes their place. They condition and are not trained by either adversarial loss: no
                gradient reaches them.
            generator: source of timesteps and noise, on any device; None is torch's global one. Clone it to judge two
                latents at the same noise.

        Returns:
            (B, 1, h', w') with the light head, (B, 1, h' - 2, w' - 2) with the published one.

        Raises:
            ValueError: if a prompt is needed and absent.
        """
        prompt = self.prompt if self.prompt is not None or prompt is None else prompt.detach()
        if prompt is None and self.trunk.needs_prompt:
            raise ValueError("this critic's UNet has cross-attention; prompt must be given")
        noisy, timestep = self.renoise(latent, generator)
        if prompt is not None:
            prompt = prompt.to(noisy.dtype).expand(len(latent), -1, -1)
        with torch.set_grad_enabled(self.feature_gradient and torch.is_grad_enabled()):
            features = self.trunk(noisy, timestep, prompt)
        return self.head(features)

    def renoise(self, latent: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """The noisy latent sqrt(a) x + sqrt(1 - a) noise, as `latent` in shape and type, and its timesteps (B,)."""
        source = latent.device if generator is None else generator.device
        timestep = torch.randint(self.first, self.end, (len(latent),), generator=generator, device=source)
        noise = torch.randn(latent.shape, generator=generator, device=source)
        timestep, noise = timestep.to(latent.device), noise.to(latent)
        alpha = self.alphas_cumprod[timestep].view(-1, 1, 1, 1)
        return alpha.sqrt().to(latent) * latent + (1 - alpha).sqrt().to(latent) * noise, timestep


class UNetFirstHalf(nn.Module):
    """Deep copy of a UNet's timestep embedding, conv_in, down blocks and middle block, frozen."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.centre = bool(unet.config.center_input_sample)
        names = ("conv_in", "time_proj", "time_embedding", "time_embed_act", "down_blocks", "mid_block")
        for name in names:
            setattr(self, name, copy.deepcopy(getattr(unet, name)))
        self.requires_grad_(False)

    @property
    def needs_prompt(self) -> bool:
        return any(attends(block) for block in (*self.down_blocks, self.mid_block))

    def forward(self, sample: Tensor, timestep: Tensor, prompt: Tensor | None) -> Tensor:
        """Features (B, C, h', w') of noisy latents (B, 4, h, w) at timesteps (B,), as the UNet's own forward."""
        if self.centre:
            sample = 2 * sample - 1
        embedding = self.time_embedding(self.time_proj(timestep).to(sample.dtype))
        if self.time_embed_act is not None:
            embedding = self.time_embed_act(embedding)
        sample = self.conv_in(sample)
        for block in self.down_blocks:
            context = {"encoder_hidden_states": prompt} if attends(block) else {}
            sample, _ = block(hidden_states=sample, temb=embedding, **context)
        if self.mid_block is not None:
            context = {"encoder_hidden_states": prompt} if attends(self.mid_block) else {}
            sample = self.mid_block(sample, embedding, **context)
        return sample


class LogitHead(nn.Module):
    """Two convolutions from features to a map of logits (B, 1, h', w'), each judging a patch."""

    def __init__(self, channels: int, hidden: int = 256) -> None:
        super().__init__()
        hidden = min(hidden, channels)
        self.layers = nn.Sequential(
            nn.GroupNorm(math.gcd(channels, 32), channels),  # the features are a sum of residuals of any size
            nn.SiLU(),
            nn.Conv2d(channels, hidden, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(hidden, 1, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features)


class PublishedHead(nn.Module):
    """The published code's head: a logit for each 4x4 patch of a map of twice the features, (B, 1, h' - 2, w' - 2)."""

    MIN_SIDE = 3  # of the features

    def __init__(self, channels: int) -> None:
        super().__init__()
        wide = 2 * channels
        self.layers = nn.Sequential(
            nn.Conv2d(channels, wide, 4, padding=1),
            nn.GroupNorm(math.gcd(wide, 32), wide),
            nn.SiLU(),
            nn.Conv2d(wide, 1, 4, padding=1),
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features)


HEADS = {"light": LogitHead, "published": PublishedHead}


def feature_channels(unet: nn.Module) -> int:
    """Channels of the features that a head gets."""
    return unet.config.block_out_channels[-1]


def attends(block: nn.Module | None) -> bool:
    """Whether a UNet block takes the prompt."""
    return bool(getattr(block, "has_cross_attention", False))


def add_lora(trunk: nn.Module, rank: int, alpha: float | None, init: str, layers: str) -> None:
    """Put LoRA on the layers of the paper's denoiser, all convolutions and linear layers but those of the timestep.

    With layers "published" conv_in has none, and the blocks' projection of the timestep has.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if rank < 1:
        raise ValueError(f"lora_rank = {rank} is not allowed; it must be 1 or more, or None to train in full")
    targets = [
        name
        for name, module in trunk.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and "time_emb" not in name
    ]
    if layers == "published":
        targets.remove("conv_in")
        targets += [name for name, _ in trunk.named_modules() if name.endswith(".time_emb_proj")]
    init_weights = {"gaussian": "gaussian", "kaiming": True}[init]
    alpha = rank if alpha is None else alpha
    config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights=init_weights, target_modules=targets)
    inject_adapter_in_model(config, trunk, adapter_name="critic")


def check_conditioning(unet: nn.Module) -> None:
    """Refuse UNets whose first half would need more than a latent, a timestep and a prompt."""
    if any("lora_" in name for name, _ in unet.named_parameters()):
        raise ValueError("the critic copies a UNet without LoRA layers; build it before the denoiser's are added")
    unsupported = ("class_embed_type", "num_class_embeds", "addition_embed_type", "encoder_hid_dim_type")
    for field in (*unsupported, "encoder_hid_dim"):
        value = unet.config.get(field)
        if value is not None:
            raise ValueError(f"UNet {field} = {value!r} is not supported by the critic; it must be unset")
