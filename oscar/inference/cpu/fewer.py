"""Convolutions with fewer multiplications for the same sums, in float32.

Winograd's (`oscar.inference.cpu.winograd`), those of `SharedUpsample2D`, and small maps as one matrix product.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import product

import torch
import torch.nn.functional as F
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from oscar.inference.cpu.group_norm import ExactGroupNorm
from oscar.inference.cpu.threads import each
from oscar.inference.cpu.winograd import WinogradConv2d, transform_upsampling, use_winograd, winograd_upsample2d

# Weights of a convolution above which Winograd's transformed ones, four times as large, are not worth their memory:
# those from and to 1280 channels, which see few positions.
HEAVY = 12_000_000
PATCH_POSITIONS = 640  # outputs up to which a convolution is fastest as one matrix product over patches
MANY_POSITIONS = 4096  # of a map from which an upsampling takes Winograd's way
_STRIP = 4096  # positions that an upsampling works on together


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
            and block.use_conv
            and block.interpolate
            and block.norm is None
            and block.name == "conv"
            and block.conv.kernel_size == (3, 3)
            and block.conv.padding == (1, 1)
        )


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
    channels_last = images.permute(0, 2, 3, 1)

    def strip(place: tuple[int, int]) -> None:
        index, top = place
        end = min(top + rows, height)
        # The rows and one more on each side, with zeros around the image.
        window = F.pad(channels_last[index, max(0, top - 1) : end + 1], (0, 0, 1, 1, int(top == 0), int(end == height)))
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
        rows, columns = (
            (side + 2 * pad - 3) // step + 1 for side, pad in zip((height, width), self.padding, strict=True)
        )
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


def use_fewer_multiplications(network: nn.Module) -> None:
    """Replace layers of a network, in place, by what is faster in float32 on a CPU, and as exact; see the module."""
    for module in network.modules():
        if type(module) is nn.GroupNorm:
            module.__class__ = ExactGroupNorm
        for fast in (SharedUpsample2D, PatchConv2d):
            if fast.replaces(module):
                module.__class__ = fast
    use_winograd(network)


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
