"""What makes the networks faster once nothing in them is trained: nothing here changes results beyond rounding.

Always: no copies that only training needs, channels-last order, the constant prompt's keys and values computed once.
In float32 on a CPU, where convolutions are most of the time, fewer multiplications for the same sums as well:
Winograd's (`oscar.inference.cpu.winograd`) and those of `SharedUpsample2D`; and small maps as one matrix product. In a
narrow precision on a CPU that only imitates it, sums of products in float32.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from oscar.inference.cpu.group_norm import ExactGroupNorm, Moments
from oscar.inference.cpu.threads import each
from oscar.inference.cpu.winograd import (
    WinogradConv2d,
    normalised_conv2d,
    transform_upsampling,
    use_winograd,
    winograd_upsample2d,
)
from oscar.inference.loading import Change, from_diffusers
from oscar.models.modules import WeightsError, drop
from oscar.rates import PIXELS_PER_LATENT
from oscar.utils.errors import first_line

# Weights of a convolution above which Winograd's transformed ones, four times as large, are not worth their memory:
# those from and to 1280 channels, which see few positions.
HEAVY = 12_000_000
PATCH_POSITIONS = 640  # outputs up to which a convolution is fastest as one matrix product over patches
MANY_POSITIONS = 4096  # of a map from which an upsampling takes Winograd's way
_STRIP = 4096  # positions that an upsampling works on together


def auto_dtype(device: str | torch.device) -> torch.dtype:
    """The fastest precision that a device computes in natively and that decodes well: bfloat16, float16 or float32."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "mps":
        return torch.float16
    if device.type == "cpu":
        found = torch.cpu.get_capabilities()
        return torch.bfloat16 if found.get("avx512_bf16") or found.get("amx_bf16") else torch.float32
    return torch.float32


def imitates(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a device computes in a precision several times slower than in float32, for want of instructions."""
    return device.type == "cpu" and dtype in (torch.bfloat16, torch.float16) and dtype != auto_dtype(device)


def merge_lora(adapters: Mapping[str, Tensor], scale: float) -> Change:
    """The change that folds adapters into a network's weights, W + scale * B A, as PEFT does.

    Args:
        adapters: tensors by name, `<layer>.lora_A.<adapter>.weight` (rank, in, ...) and lora_B (out, rank, 1, ...).
        scale: alpha / rank.
    """
    pairs: dict[str, dict[str, dict[str, Tensor]]] = {}
    for name, value in adapters.items():
        layer, _, rest = name.removesuffix(".weight").partition(".lora_")
        side, _, adapter = rest.partition(".")
        pairs.setdefault(f"{layer}.weight", {}).setdefault(adapter, {})[side] = value.float()

    def merge(name: str, weight: Tensor) -> Tensor:
        for pair in pairs.get(name, {}).values():
            down, up = pair["A"], pair["B"]
            if (len(up), down.shape[1:], up.shape[1]) != (len(weight), weight.shape[1:], len(down)):
                raise WeightsError(f"the adapter of {name} has shapes {tuple(down.shape)} and {tuple(up.shape)}, "
                                   f"which do not fit {tuple(weight.shape)}")  # fmt: skip
            weight = weight + scale * (up.flatten(1) @ down.flatten(1)).view(weight.shape)
        return weight

    return merge


class LeanResnetBlock2D(ResnetBlock2D):
    """diffusers' block without its copies: activations and sums in place or within the convolutions."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None, *args, **kwargs) -> Tensor:
        shift = None if self.time_emb_proj is None else self.time_emb_proj(F.silu(temb))
        found: list[list[Moments]] = []
        hidden = normalised_conv2d(input_tensor, self.norm1, self.conv1, shift=shift, found=found)
        residual = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        hidden = normalised_conv2d(hidden, self.norm2, self.conv2, residual=residual, known=found)
        return hidden if self.output_scale_factor == 1 else hidden.div_(self.output_scale_factor)

    @staticmethod
    def replaces(block: nn.Module) -> bool:
        return (
            type(block) is ResnetBlock2D
            and block.upsample is block.downsample is None
            and (block.time_embedding_norm == "default" or block.time_emb_proj is None)
            and block.time_embedding_norm != "scale_shift"
            and not block.skip_time_act
            and isinstance(block.nonlinearity, nn.SiLU)
        )


class LeanTransformer2DModel(Transformer2DModel):
    """diffusers' transformer, keeping the channels-last order that its tokens have anyway."""

    def _get_output_for_continuous_inputs(self, hidden_states, residual, batch_size, height, width, inner_dim):
        hidden = self.proj_out(hidden_states).view(batch_size, height, width, -1).permute(0, 3, 1, 2)
        return hidden.add_(residual)

    @staticmethod
    def replaces(block: nn.Module) -> bool:
        return type(block) is Transformer2DModel and block.is_input_continuous and block.use_linear_projection


class PromptAttnProcessor:
    """Attention to a prompt that never changes; its projections are the attention's `prompt_key` and `prompt_value`."""

    def __call__(self, attn: Attention, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        batch, length, _ = hidden_states.shape
        query = attn.to_q(hidden_states).view(batch, length, attn.heads, -1).transpose(1, 2)
        key, value = (part.expand(batch, -1, -1, -1) for part in (attn.prompt_key, attn.prompt_value))
        hidden = F.scaled_dot_product_attention(query, key, value)
        return attn.to_out[0](hidden.transpose(1, 2).reshape(batch, length, -1))


class SharedUpsample2D(Upsample2D):
    """Doubling by repetition and a 3x3 convolution, with 9 multiplications where there are 36: float32 on a CPU.

    With one row, d[i] = x[i] - x[i-1] and the filter (a, b, c), the two outputs that stem from x[i] are
    (a + b + c) x[i] - a d[i]  and  (a + b + c) x[i] + c d[i+1];
    so that 3 products stand for 6, and 9 for 36 with both directions. Neighbours are subtracted before they are
    weighted: the sums are as exact as the convolution's own.

    On maps from `MANY_POSITIONS` on, Winograd's way takes fewer still, for weights that are 16 times as large.
    """

    _terms: list[Tensor] | None = None
    _transformed: list[Tensor] | None = None

    def forward(self, hidden_states: Tensor, output_size: object = None, *args, **kwargs) -> Tensor:
        size = hidden_states.shape[-2:]
        doubles = output_size is None or tuple(output_size) == (2 * size[0], 2 * size[1])
        if not doubles or hidden_states.dtype != torch.float32 or hidden_states.device.type != "cpu":
            return super().forward(hidden_states, output_size, *args, **kwargs)
        if size.numel() >= MANY_POSITIONS:
            if self._transformed is None:
                self._transformed = transform_upsampling(self.conv.weight)
            return winograd_upsample2d(hidden_states, self._transformed, self.conv.bias)
        if self._terms is None:
            self._terms = upsampling_terms(self.conv.weight)
        return upsample_conv2d(hidden_states, self._terms, self.conv.bias)

    @staticmethod
    def replaces(block: nn.Module) -> bool:
        return (
            type(block) is Upsample2D
            and block.use_conv and block.interpolate and block.norm is None and block.name == "conv"
            and block.conv.kernel_size == (3, 3) and block.conv.padding == (1, 1)
        )  # fmt: skip


def upsampling_terms(weight: Tensor) -> list[Tensor]:
    """Filters (O, I, 3, 3) -> matrices (O, I), (2 O, I), (2 O, I), (4 O, I): of x, and of its differences along a row,
    along a column, and along both."""
    taps = weight.detach().permute(2, 3, 0, 1)  # (row, column, O, I)

    def along(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return a + b + c, -a, c

    both = [along(*row) for row in along(*taps)]
    groups = ([both[0][0]], both[0][1:], [both[1][0], both[2][0]], [*both[1][1:], *both[2][1:]])
    return [torch.cat(list(group)) for group in groups]


def upsample_conv2d(images: Tensor, terms: list[Tensor], bias: Tensor) -> Tensor:
    """(B, I, h, w) -> (B, O, 2h, 2w), channels-last; see `SharedUpsample2D`."""
    batch, _, height, width = images.shape
    outputs = len(bias)
    result = images.new_empty(batch, height, 2, width, 2, outputs)
    rows = max(1, _STRIP // width)
    pictures = images.permute(0, 2, 3, 1)

    def strip(place: tuple[int, int]) -> None:
        index, top = place
        end = min(top + rows, height)
        # The rows and one more on each side, with zeros around the picture.
        window = F.pad(pictures[index, max(0, top - 1) : end + 1], (0, 0, 1, 1, int(top == 0), int(end == height)))
        across = window[:, 1:] - window[:, :-1]  # (rows + 2, width + 1, I)
        down = (window[1:] - window[:-1])[:, 1:-1]
        both = across[1:] - across[:-1]
        same, across, down, both = (
            F.linear(part, term).unflatten(-1, (-1, outputs))
            for part, term in zip((window[1:-1, 1:-1], across[1:-1], down, both), terms, strict=True)
        )
        same = same.squeeze(2).add_(bias)
        count = end - top
        for row in (0, 1):
            for column in (0, 1):
                out = result[index, top:end, row, :, column]
                torch.add(same, across[:, column : column + width, column], out=out)
                out += down[row : row + count, :, row]
                out += both[row : row + count, column : column + width, 2 * row + column]

    each(strip, list(product(range(batch), range(0, height, rows))))
    return result.view(batch, 2 * height, 2 * width, outputs).permute(0, 3, 1, 2)


class PatchConv2d(nn.Conv2d):
    """A 3x3 convolution, on small maps as one matrix product over patches, which reads large weights but once."""

    def forward(self, images: Tensor) -> Tensor:
        batch, _, height, width = images.shape
        step = self.stride[0]
        rows, columns = ((side + 2 * pad - 3) // step + 1 for side, pad in
                         zip((height, width), self.padding, strict=True))  # fmt: skip
        if rows * columns > PATCH_POSITIONS or images.dtype != torch.float32 or images.device.type != "cpu":
            return super().forward(images)
        pad_h, pad_w = self.padding
        padded = F.pad(images.permute(0, 2, 3, 1), (0, 0, pad_w, pad_w, pad_h, pad_h))
        patches = padded.unfold(1, 3, step).unfold(2, 3, step).permute(0, 1, 2, 4, 5, 3)
        weight = self.weight.permute(0, 2, 3, 1).reshape(self.out_channels, -1)  # no copy in channels-last order
        result = F.linear(patches.reshape(batch * rows * columns, -1), weight, self.bias)
        return result.view(batch, rows, columns, -1).permute(0, 3, 1, 2)

    @staticmethod
    def replaces(conv: nn.Module) -> bool:
        return (
            type(conv) is nn.Conv2d
            and conv.kernel_size == (3, 3)
            and conv.groups == 1
            and conv.dilation == (1, 1)
            and conv.padding_mode == "zeros"
            and isinstance(conv.padding, tuple)
            and conv.weight.numel() > HEAVY
        )


def cache_prompt(unet: nn.Module, prompt: Tensor) -> int:
    """Have every cross-attention of a UNet attend to one prompt (1, tokens, width) from now on.

    Returns:
        the number of attentions.
    """
    found = 0
    for name, attn in unet.named_modules():
        if not (name.endswith("attn2") and isinstance(attn, Attention) and type(attn.processor) is AttnProcessor2_0):
            continue
        for part, project in (("prompt_key", attn.to_k), ("prompt_value", attn.to_v)):
            value = project(prompt)[0].unflatten(-1, (attn.heads, -1)).transpose(0, 1)  # (heads, tokens, channels)
            attn.register_buffer(part, value.contiguous(), persistent=False)
        attn.set_processor(PromptAttnProcessor())
        found += 1
    return found


def make_lean(network: nn.Module) -> None:
    """Take the copies out of a network's blocks and put its convolutions in channels-last order, in place."""
    for module in network.modules():
        for lean in (LeanResnetBlock2D, LeanTransformer2DModel):
            if lean.replaces(module):
                module.__class__ = lean  # the same parameters under the same names
        if isinstance(getattr(module, "conv_act", None), nn.SiLU):
            module.conv_act.inplace = True  # after a normalisation that nothing else reads
    network.to(memory_format=torch.channels_last)


def use_fewer_multiplications(network: nn.Module) -> None:
    """Replace layers of a network, in place, by what is faster in float32 on a CPU, and as exact; see the module."""
    for module in network.modules():
        if type(module) is nn.GroupNorm:
            module.__class__ = ExactGroupNorm
        for fast in (SharedUpsample2D, PatchConv2d):
            if fast.replaces(module):
                module.__class__ = fast
    use_winograd(network)


class WideConv2d(nn.Conv2d):
    """A convolution of maps and weights in a narrow precision, computed in float32."""

    def forward(self, images: Tensor) -> Tensor:
        return self._conv_forward(images.float(), self.weight.float(), _wide(self.bias)).to(images.dtype)


class WideLinear(nn.Linear):
    """A matrix product of vectors and weights in a narrow precision, computed in float32."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input.float(), self.weight.float(), _wide(self.bias)).to(input.dtype)


def _wide(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float()


def compute_wide(network: nn.Module) -> None:
    """Replace layers of a network, in place, by what is faster where a narrow precision is imitated."""
    wide = {nn.Conv2d: WideConv2d, nn.Linear: WideLinear}
    for module in network.modules():
        module.__class__ = wide.get(type(module), type(module))


@contextlib.contextmanager
def every_multiplication(network: nn.Module) -> Iterator[None]:
    """Undo `use_fewer_multiplications` as long as the context lasts, to count what the layers stand for."""
    kinds = (SharedUpsample2D, PatchConv2d, WinogradConv2d)
    changed = [(module, type(module)) for module in network.modules() if type(module) in kinds]
    for module, kind in changed:
        module.__class__ = kind.__base__
    try:
        yield
    finally:
        for module, kind in changed:
            module.__class__ = kind


def compile_networks(networks: Iterable[nn.Module], device: torch.device, graphs: bool) -> None:
    """Have torch.compile compile networks on their first call, and with `graphs` replay them as CUDA graphs.

    Raises:
        ValueError: without a CUDA device for the graphs, or a C++ compiler for the CPU.
    """
    if graphs and device.type != "cuda":
        raise ValueError(f"compile is 'graphs' on device {device}; allowed: a CUDA device, or True or False")
    if device.type == "cpu" and not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++")):
        raise ValueError("compile is True, but there is no C++ compiler; allowed: with g++ or clang++, or False")
    for network in networks:
        network.compile(mode="reduce-overhead" if graphs else None)


def load_tiny_vae(source: str | Path, latent_channels: int, dtype: torch.dtype) -> AutoencoderTiny:
    """The decoder of a small autoencoder, for previews.

    Args:
        source: diffusers folder or hub id of an AutoencoderTiny.
        latent_channels: that it must have.
        dtype: of its weights.

    Raises:
        ValueError: if it cannot be read or does not fit.
    """
    try:
        with from_diffusers():
            vae, report = AutoencoderTiny.from_pretrained(str(source), torch_dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = first_line(error)
        raise ValueError(f"tiny_vae {str(source)!r} cannot be read as an AutoencoderTiny: {reason}") from error
    if report["missing_keys"]:
        raise ValueError(f"tiny_vae {str(source)!r} lacks {min(report['missing_keys'])}")
    factor = vae.config.upsampling_scaling_factor ** (len(vae.config.num_decoder_blocks) - 1)
    if (vae.config.latent_channels, factor) != (latent_channels, PIXELS_PER_LATENT):
        raise ValueError(
            f"tiny_vae {str(source)!r} has {vae.config.latent_channels} latent channels and enlarges by {factor}; "
            f"allowed: {latent_channels} and {PIXELS_PER_LATENT}, as the model's"
        )
    drop(vae, ("encoder",))
    return vae
