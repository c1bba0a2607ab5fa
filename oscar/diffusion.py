"""The noise schedule and the one-step estimate of x0 that restores every rate (paper section 3.1, equations 1 to 3)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor, nn

from oscar.timesteps import timestep_code, timestep_of_code

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


class NoiseSchedule(nn.Module):
    """A diffusion schedule with its prediction type.

    Only the betas and `prediction_type` of a diffusers scheduler configuration matter for one step; sampling options
    such as clipping or time-step spacing are ignored, as one step at a chosen t uses none of them.

    Args:
        config: contents of a diffusers `scheduler_config.json` (of any scheduler class with DDPM betas).
    """

    def __init__(self, config: dict):
        super().__init__()
        self.prediction_type = config.get("prediction_type", "epsilon")
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"scheduler prediction_type {self.prediction_type!r} is not supported; "
                f"allowed: {', '.join(PREDICTION_TYPES)}"
            )
        names = (
            "num_train_timesteps",
            "beta_start",
            "beta_end",
            "beta_schedule",
            "trained_betas",
            "rescale_betas_zero_snr",
        )
        self.config = {name: config[name] for name in names if name in config}
        self.config["prediction_type"] = self.prediction_type
        scheduler: Any = DDPMScheduler(**self.config)
        self.register_buffer("alphas_cumprod", scheduler.alphas_cumprod.float(), persistent=False)

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def _apply(self, fn, recurse=True):
        # The schedule stays in float32 whatever the networks' dtype: half precision cannot hold 1 - alpha near t = 0.
        device = fn(torch.empty(0, device=self.alphas_cumprod.device)).device
        self.alphas_cumprod = self.alphas_cumprod.to(device)
        return self

    def alpha_bar(self, timestep: Tensor | float) -> Tensor:
        """alpha_bar_t, in the timestep's shape.

        Between whole timesteps sqrt(alpha_bar) is a straight line, so that a learned t gets a gradient.
        """
        timestep = torch.as_tensor(timestep, device=self.alphas_cumprod.device)
        if not timestep.is_floating_point():
            return self.alphas_cumprod[timestep]
        timestep = timestep.to(self.alphas_cumprod.dtype)
        below = timestep.detach().long().clamp(0, len(self) - 2)
        signal = self.alphas_cumprod.sqrt()
        return torch.lerp(signal[below], signal[below + 1], timestep - below).square()

    def timestep_of_signal(self, signal: Tensor) -> Tensor:
        """The whole timesteps whose sqrt(alpha_bar) are nearest to `signal` (any shape), int64."""
        return (self.alphas_cumprod.sqrt() - signal.to(self.alphas_cumprod)[..., None]).abs().argmin(dim=-1)

    def measure(self, z_hat: Tensor, latent: Tensor) -> Tensor:
        """The timesteps, int64 (B,), whose sqrt(alpha_bar) are nearest to the mean cosine similarity of z_hat and the
        latent (B, C, h, w), among those that a file can say (mapping `per_image`; paper section 3.1)."""
        timesteps = self.timestep_of_signal(channel_cosine(z_hat, latent).mean(dim=1))
        return timestep_of_code(timestep_code(timesteps, len(self)), len(self))

    def signal_and_noise(self, timestep: Tensor | float, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), shaped to broadcast over `like` (B, ...), in its dtype."""
        alpha = self.alpha_bar(timestep).reshape(-1, *[1] * (like.dim() - 1)).to(like.device)
        return alpha.sqrt().to(like.dtype), (1 - alpha).sqrt().to(like.dtype)

    def add_noise(self, x0: Tensor, noise: Tensor, timestep: Tensor | float) -> Tensor:
        """x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) noise (equation 1)."""
        signal, sigma = self.signal_and_noise(timestep, x0)
        return signal * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, timestep: Tensor | float) -> Tensor:
        """What a network of this prediction type should output for `add_noise(x0, noise, timestep)`."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return x0
        signal, sigma = self.signal_and_noise(timestep, x0)
        return signal * noise - sigma * x0

    def predict_x0(self, x_t: Tensor, output: Tensor, timestep: Tensor | float) -> Tensor:
        """The estimate of x0 from one network output at `timestep` (the one step of the method)."""
        if self.prediction_type == "sample":
            return output
        signal, sigma = self.signal_and_noise(timestep, x_t)
        if self.prediction_type == "epsilon":
            return (x_t - sigma * output) / signal
        return signal * x_t - sigma * output


def channel_cosine(z_hat: Tensor, latent: Tensor) -> Tensor:
    """Cosine similarity over space of each channel: two of (B, C, h, w) -> (B, C), float32 (paper section 3.1)."""
    return F.cosine_similarity(z_hat.float().flatten(2), latent.float().flatten(2), dim=2)
