"""The precision that a device is fast in, and what is done where it only emulates one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


def emulates_dtype(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a device computes in a precision several times slower than in float32, for want of instructions."""
    return device.type == "cpu" and dtype in (torch.bfloat16, torch.float16) and dtype != auto_dtype(device)


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


def upcast_to_fp32(network: nn.Module) -> None:
    """Replace layers of a network, in place, by what is faster where a narrow precision is emulated."""
    wide = {nn.Conv2d: WideConv2d, nn.Linear: WideLinear}
    for module in network.modules():
        module.__class__ = wide.get(type(module), type(module))
