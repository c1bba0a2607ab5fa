"""The one-step denoiser: a diffusion UNet with LoRA or full fine-tuning and a learned prompt (paper section 3.3)."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from oscar.diffusion import NoiseSchedule
from oscar.models.backbone import unet_multiple
from oscar.models.modules import check_tensors
from oscar.models.padding import pad_to_multiple
from oscar.models.precision import compute_finite
from oscar.utils.errors import hub_reason
from oscar.utils.extras import need

# Adapter names of the published checkpoint: down path and conv_in; up path and conv_out; the rest.
ADAPTERS = ("default_encoder", "default_decoder", "default_others")
_LORA_LAYERS = re.compile(
    r"(^conv_in|^conv_out|\.to_[qkv]|\.to_out\.0|\.proj_in|\.proj_out|\.ff\.net\.0\.proj|\.ff\.net\.2"
    r"|\.conv1|\.conv2|\.conv_shortcut|samplers\.\d+\.conv)$"
)


def lora_targets(unet: nn.Module) -> dict[str, list[str]]:
    """The layers that each adapter of the paper covers: all attention, projection, feed-forward and convolution layers.

    Returns:
        module names by adapter name, in the UNet's order.
    """
    targets: dict[str, list[str]] = {adapter: [] for adapter in ADAPTERS}
    for name, module in unet.named_modules():
        if not isinstance(module, (nn.Conv2d, nn.Linear)) or not _LORA_LAYERS.search(name):
            continue
        encoder, decoder, others = ADAPTERS
        if name.startswith(("down_blocks.", "conv_in")):
            targets[encoder].append(name)
        elif name.startswith(("up_blocks.", "conv_out")):
            targets[decoder].append(name)
        else:
            targets[others].append(name)
    return {adapter: names for adapter, names in targets.items() if names}


def adapter_names(denoiser: Denoiser) -> set[str]:
    """Names of the adapters' tensors that a checkpoint of this denoiser has."""
    if denoiser.tuning == "full":
        return set()
    return {
        f"denoiser.{layer}.lora_{side}.{adapter}.weight"
        for adapter, layers in lora_targets(denoiser.unet).items()
        for layer in layers
        for side in "AB"
    }


def uses_prompt(unet: UNet2DConditionModel) -> bool:
    """Whether any layer of the UNet looks at the prompt."""
    return any(name.endswith("attn2") for name, _ in unet.named_modules())


class Denoiser(nn.Module):
    """Restores a quantised latent in one step at its pseudo-timestep.

    Args:
        unet: the backbone's UNet, changed in place by the adapters.
        schedule: the backbone's noise schedule.
        tuning: "lora" trains adapters of `lora_rank` on a frozen UNet, "full" trains the whole UNet.
        lora_rank: rank of the three adapters (16 in the paper).
        lora_alpha: scale of the adapters times the rank (PEFT's default of 8 in the published code).
        prompt_tokens: tokens of the learned prompt (77 in the paper); none is kept if the UNet has no cross-attention.
        merged: whether the UNet's weights have the adapters in them already, so that none are added.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        schedule: NoiseSchedule,
        tuning: Literal["lora", "full"] = "lora",
        lora_rank: int = 16,
        lora_alpha: float = 8,
        prompt_tokens: int = 77,
        merged: bool = False,
    ):
        super().__init__()
        if tuning not in ("lora", "full"):
            raise ValueError(f"denoiser.tuning {tuning!r} does not exist; allowed: lora, full")
        self.unet = unet
        self.schedule = schedule
        self.tuning = tuning
        self.options = {
            "tuning": tuning,
            "lora_rank": lora_rank,
            "lora_alpha": lora_alpha,
            "prompt_tokens": prompt_tokens,
        }
        self.merged = merged or tuning == "full"
        if not self.merged:
            need("peft")
            from peft import LoraConfig

            self.unet.requires_grad_(False)
            for adapter, names in lora_targets(unet).items():
                config = LoraConfig(
                    r=lora_rank, lora_alpha=lora_alpha, init_lora_weights="gaussian", target_modules=names
                )
                with warnings.catch_warnings():  # peft warns of a second adapter, which here is meant
                    warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)
                    unet.add_adapter(config, adapter_name=adapter)
            unet.set_adapters(list(unet.peft_config))
        self.prompt = None
        if uses_prompt(unet):
            width = unet.config.cross_attention_dim
            self.prompt = nn.Parameter(torch.empty(1, prompt_tokens, width))
            self.init_prompt_from_noise()

    @torch.no_grad()
    def init_prompt_from_noise(self) -> None:
        """Start the prompt from noise, as in the paper; a UNet without one stays as it is."""
        if self.prompt is not None:
            self.prompt.copy_(torch.randn(self.prompt.shape) * 0.02)

    def init_prompt_from_text(self, source: str | Path) -> None:
        """Start the prompt from the backbone's own text encoder on an empty text.

        Args:
            source: folder or hub id with `text_encoder/` and `tokenizer/`.

        Raises:
            ValueError: if they cannot be read, or the encoder's output does not have the prompt's shape.
        """
        from transformers import AutoTokenizer, CLIPTextModel

        if self.prompt is None:
            raise ValueError("denoiser.prompt_init: this UNet has no cross-attention and so no prompt")
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, subfolder="tokenizer")
            encoder = CLIPTextModel.from_pretrained(source, subfolder="text_encoder")
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise ValueError(
                f"denoiser.prompt_init: tokenizer and text_encoder of {source} could not be read: "
                f"{hub_reason(error)}; allowed: a folder that has them too as backbone.source=FOLDER, or "
                "denoiser.prompt_init=noise"
            ) from error
        tokens = tokenizer("", padding="max_length", max_length=self.prompt.shape[1], return_tensors="pt")
        with torch.no_grad():
            embedding = encoder(tokens.input_ids).last_hidden_state
        if embedding.shape != self.prompt.shape:
            raise ValueError(
                f"denoiser.prompt_init: text encoder of {source} gives {tuple(embedding.shape)}; "
                f"allowed: {tuple(self.prompt.shape)}"
            )
        self.prompt.data.copy_(embedding)

    def forward(self, noisy: Tensor, timestep: float | Tensor) -> Tensor:
        """One denoising step.

        Args:
            noisy: rescaled quantised latent (B, 4, h, w), of any size; padded for the UNet and cropped here.
            timestep: pseudo-timestep, one number or (B,); may be a fraction.

        Returns:
            x0 (B, 4, h, w), at least in float32, whatever the UNet's precision.

        Raises:
            NotFiniteError: in evaluation, if the UNet gives numbers that are not finite.
        """
        timestep = torch.as_tensor(timestep, device=noisy.device).expand(len(noisy))
        output = compute_finite("the denoised latent", self.unet, self.run_unet, noisy, timestep)
        return self.schedule.predict_x0(noisy, output, timestep)

    def run_unet(self, unet: UNet2DConditionModel, noisy: Tensor, timestep: Tensor) -> Tensor:
        """The UNet's output (B, 4, h, w) for a latent of any size at timesteps (B,); `oscar.inference` has another."""
        return predict(unet, noisy, timestep, self.prompt)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of it, by name: prompt and adapters; a UNet tuned in full is the backbone's."""
        found = {} if self.prompt is None else {"denoiser.prompt": self.prompt.detach()}
        if self.tuning == "lora":
            state = self.unet.state_dict()
            found |= {f"denoiser.{name}": value for name, value in state.items() if "lora_" in name}
        return found

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `tensors` gave (ValueError for missing, unknown or misshapen ones)."""
        check_tensors(tensors, self.tensors())
        names = {
            name: name if name == "denoiser.prompt" else name.replace("denoiser.", "denoiser.unet.", 1)
            for name in tensors
        }
        self.load_state_dict(
            {names[name].removeprefix("denoiser."): value for name, value in tensors.items()}, strict=False
        )

    def merge(self) -> None:
        """Fold the adapters into the UNet's weights, for inference; cannot be undone."""
        if not self.merged:
            self.unet.fuse_lora()
            self.unet.unload_lora()
            self.merged = True

    def discard(self) -> None:
        """Take the adapters out of the UNet, which is then as it was before them."""
        if not self.merged:
            self.unet.unload_lora()
            self.merged = True
        self.unet.requires_grad_(True)


def predict(unet: UNet2DConditionModel, latent: Tensor, timestep: float | Tensor, prompt: Tensor | None) -> Tensor:
    """The UNet's output (B, 4, h, w) for a latent of any size: replicated to the UNet's multiple and cropped back."""
    batch, _, height, width = latent.shape
    padded = pad_to_multiple(latent, unet_multiple(unet))
    if prompt is None:  # no layer reads it, but diffusers' signature asks for one
        prompt = latent.new_zeros(1, 1, 1)
    timestep = torch.as_tensor(timestep, device=latent.device).expand(batch)
    states = prompt.to(latent.dtype).expand(batch, -1, -1)
    return unet(padded, timestep, encoder_hidden_states=states).sample[..., :height, :width]
