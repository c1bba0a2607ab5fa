"""Winograd's minimal filtering for 3x3 convolutions in float32 on a CPU: a quarter of the multiplications.

A tile of m x m outputs is a product in a transformed domain, ``A' [(G w G') * (B' x B)] A`` (Lavin and Gray 2016,
"Fast Algorithms for Convolutional Neural Networks"), with (m + 2)^2 multiplications in place of 9 m^2: 36 for 144 with
tiles of 4. Here each of the three transforms is one matrix product over a block of tiles, and so is each of the
(m + 2)^2 products over channels, so that all the work is in large matrix products.

A 3x3 convolution after doubling by repetition is four 2x2 convolutions, one for each place of an output in its pair of
rows and of columns; with tiles of 5 these take 36 multiplications for 225.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oscar.inference.cpu.reuse import POOL
from oscar.inference.cpu.threads import share
from oscar.inference.statistics import Moments, moments

# Finite interpolation points by inputs of a tile along a side; infinity is the last one. Of the pairs of sixteenths,
# 5/8 and 3/2 have the least error: half that of the usual 1 and 2.
POINTS = {4: (0, 1, -1), 6: (0, Fraction(5, 8), -Fraction(5, 8), Fraction(3, 2), -Fraction(3, 2))}
MIN_CHANNELS = 96  # with 64 the transforms cost what the products save
UPSAMPLING_TILE = 5
MIN_TILES = 16  # with 4 the products are too small to be fast
_BLOCK_TILES, _BLOCK_COLUMNS = 128, 16  # tiles that a block has, about: enough to read the weights for
_CHUNK = 4096  # tiles times channels that are transformed at a time; 36 numbers for each stay in the nearest cache


def winograd_matrices(tile: int, taps: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """The output, weight and input transforms in one dimension.

    Args:
        tile: side m of a tile of outputs; n = m + taps - 1 inputs.
        taps: side of the filter.

    Returns:
        A' (m, n), G (n, taps) and B' (n, n), float64: ``A' ((G w) * (B' x))`` is the correlation of x (n) with w.

    Raises:
        ValueError: if there are no points for the tile.
    """
    if tile + taps - 1 not in POINTS:
        allowed = ", ".join(str(size - taps + 1) for size in POINTS)
        raise ValueError(f"tile {tile!r} is not supported; allowed: {allowed}")
    points = [Fraction(point) for point in POINTS[tile + taps - 1]]
    output = [[point**power for point in points] + [Fraction(int(power == tile - 1))] for power in range(tile)]
    weight, inputs = [], []
    for point in points:
        others = [other for other in points if other != point]
        scale = Fraction(1)
        for other in others:
            scale *= point - other
        weight.append([point**power / scale for power in range(taps)])
        inputs.append(_polynomial(others) + [Fraction(0)])
    weight.append([Fraction(int(power == taps - 1)) for power in range(taps)])
    inputs.append(_polynomial(points))
    return tuple(
        torch.tensor([[float(x) for x in row] for row in rows], dtype=torch.float64)
        for rows in (output, weight, inputs)
    )


def _polynomial(roots: list[Fraction]) -> list[Fraction]:
    """Coefficients, lowest power first, of the monic polynomial with the given roots."""
    coefficients = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *coefficients]
        for power, value in enumerate(coefficients):
            shifted[power] -= root * value
        coefficients = shifted
    return coefficients


@lru_cache
def _planar(tile: int, size: int) -> tuple[Tensor, Tensor]:
    """The output (m*m, n*n) and input (n*n, n*n) transforms in two dimensions, float32."""
    output, _, inputs = winograd_matrices(tile, size - tile + 1)
    return torch.kron(output, output).float(), torch.kron(inputs, inputs).float()


def transform_weight(weight: Tensor, tile: int = 4) -> Tensor:
    """Weights (O, I, k, k) of a convolution -> (n*n, I, O), float32, for `winograd_conv2d`; n = tile + k - 1."""
    outputs, inputs, taps, _ = weight.shape
    matrix = winograd_matrices(tile, taps)[1]
    planar = torch.kron(matrix, matrix).float()  # (n*n, k*k)
    values = weight.detach().float().permute(2, 3, 1, 0).reshape(taps * taps, -1)
    return (planar @ values).view(len(planar), inputs, outputs)


def winograd_conv2d(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    padding: int = 0,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    found: list[list[Moments]] | None = None,
) -> Tensor:
    """A 3x3 convolution with stride 1, for inference; with what is before and after it, while that is in the cache.

    Images are worked on one at a time, so that a batch gives what its images give alone.

    Args:
        images: (B, I, H, W), float32 on a CPU; fastest in channels-last order.
        weight: (n*n, I, O) from `transform_weight` of a 3x3 one.
        bias: (O,), or (B, O) with one for each image.
        padding: zeros around the image: 0 (it is padded already) or 1.
        scale, shift: (B, I); if given, ``silu(scale * images + shift)`` is convolved.
        residual: (B, O, H - 2 + 2 * padding, W - 2 + 2 * padding), added to the result.
        found: gets the `moments` of the parts of the results, for a normalisation that follows.

    Returns:
        (B, O, H - 2 + 2 * padding, W - 2 + 2 * padding) in channels-last order.
    """
    batch, _, height, width = images.shape
    result = POOL.empty(batch, height - 2 + 2 * padding, width - 2 + 2 * padding, weight.shape[2])
    _convolve(images, weight, 3, bias, result, (padding, padding), scale, shift, residual, found)
    return result.permute(0, 3, 1, 2)


def winograd_upsample2d(images: Tensor, weights: Sequence[Tensor], bias: Tensor) -> Tensor:
    """A 3x3 convolution of images doubled by repetition, for inference.

    Args:
        images: (B, I, h, w), float32 on a CPU; fastest in channels-last order.
        weights: from `transform_upsampling`.
        bias: (O,).

    Returns:
        (B, O, 2h, 2w) in channels-last order.
    """
    batch, _, height, width = images.shape
    result = POOL.empty(batch, 2 * height, 2 * width, len(bias))
    for (row, column), weight in zip(product((0, 1), repeat=2), weights, strict=True):
        _convolve(images, weight, 2, bias, result[:, row::2, column::2], (1 - row, 1 - column))
    return result.permute(0, 3, 1, 2)


def transform_upsampling(weight: Tensor) -> list[Tensor]:
    """Weights (O, I, 3, 3) -> those of the four convolutions, for `winograd_upsample2d`."""

    def halves(a: Tensor, b: Tensor, c: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        return (a, b + c), (a + b, c)  # of an even output and of an odd one

    return [
        transform_weight(torch.stack([torch.stack(part, dim=-1) for part in parts], dim=-2), UPSAMPLING_TILE)
        for rows in halves(*weight.detach().unbind(dim=2))
        for parts in zip(*(halves(*row.unbind(dim=2)) for row in rows), strict=True)
    ]


def _convolve(
    images: Tensor,
    weight: Tensor,
    taps: int,
    bias: Tensor | None,
    result: Tensor,
    before: tuple[int, int],
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    found: list[list[Moments]] | None = None,
) -> None:
    """Fill result (B, h, w, O) by a convolution; `before` are the zeros above and to the left of the image."""
    size = math.isqrt(len(weight))
    tile = size - taps + 1
    inputs = images.shape[1]
    batch, height, width, outputs = result.shape
    bias = images.new_zeros(outputs) if bias is None else bias
    rows, columns = _block(-(-height // tile), -(-width // tile))
    chunk = max(1, _CHUNK // (columns * max(inputs, outputs)))
    channels_last = images.permute(0, 2, 3, 1)
    tops, lefts = range(0, height, tile * rows), range(0, width, tile * columns)
    parts: dict[tuple[int, int, int], Moments] = {}

    def work(blocks: Iterator[tuple[int, int, int]]) -> None:
        strip = POOL.empty(tile * rows + taps - 1, tile * columns + taps - 1, inputs)
        spare = POOL.empty(tile * rows, tile * columns, outputs)  # a block that reaches beyond the result
        transformed = POOL.empty(size * size, rows, columns, inputs)
        products = POOL.empty(size * size, rows, columns, outputs)
        scratch = POOL.empty(size * size * min(chunk, rows) * columns * max(inputs, outputs))
        for index, top, left in blocks:
            affine = None if scale is None else (scale[index], shift[index])
            offset = bias if bias.dim() == 1 else bias[index]
            _fill(strip, channels_last[index], top - before[0], left - before[1], affine)
            _transform_tiles(strip, transformed, tile, chunk, scratch)
            torch.bmm(transformed.flatten(1, 2), weight, out=products.flatten(1, 2))
            part = (slice(top, top + tile * rows), slice(left, left + tile * columns))
            space = result[index][part]
            if space.shape == spare.shape:
                _finish_tiles(products, space, tile, offset, chunk, scratch)
            else:
                _finish_tiles(products, spare, tile, offset, chunk, scratch)
                space.copy_(spare[: space.shape[0], : space.shape[1]])
            if residual is not None:
                space += residual[index].permute(1, 2, 0)[part]
            if found is not None:
                parts[index, top, left] = moments(space)

    share(work, list(product(range(batch), tops, lefts)))
    if found is not None:
        found += [[parts[index, top, left] for top, left in product(tops, lefts)] for index in range(batch)]


def _block(rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns of tiles that are worked on together, in blocks of about the same size."""
    columns = -(-columns // -(-columns // _BLOCK_COLUMNS))
    return -(-rows // -(-rows // max(1, _BLOCK_TILES // columns))), columns


def _fill(strip: Tensor, image: Tensor, top: int, left: int, affine: tuple[Tensor, Tensor] | None) -> None:
    """Copy a window of an image (H, W, C), or the SiLU of an affine map of it, into a strip; zero outside of it."""
    height, width = strip.shape[:2]
    above, before = max(0, -top), max(0, -left)
    source = image[top + above : top + height, left + before : left + width]
    below, after = above + source.shape[0], before + source.shape[1]
    strip[:above], strip[below:] = 0, 0
    strip[above:below, :before], strip[above:below, after:] = 0, 0
    inner = strip[above:below, before:after]
    if affine is None:
        inner.copy_(source)
    else:
        scale, shift = affine
        F.silu(torch.addcmul(shift, source, scale, out=inner), inplace=True)


def _transform_tiles(strip: Tensor, transformed: Tensor, tile: int, chunk: int, scratch: Tensor) -> None:
    """A strip (h, w, I) -> transformed (n*n, tile rows, tile columns, I), `chunk` tile rows at a time."""
    squared, rows, columns, inputs = transformed.shape
    size = math.isqrt(squared)
    line = strip.stride(0)
    # (row in the tile, column in it, tile row, tile column, channel)
    windows = strip.as_strided((size, size, rows, columns, inputs), (line, inputs, tile * line, tile * inputs, 1))
    matrix = _planar(tile, size)[1]
    for start in range(0, rows, chunk):
        window = windows[:, :, start : start + chunk]
        gathered = scratch[: window.numel()].view(window.shape).copy_(window)
        torch.mm(matrix, gathered.view(squared, -1), out=transformed[:, start : start + chunk].flatten(1))


def _finish_tiles(products: Tensor, space: Tensor, tile: int, bias: Tensor, chunk: int, scratch: Tensor) -> None:
    """Products (n*n, tile rows, tile columns, O) -> space (h, w, O), `chunk` tile rows at a time."""
    squared, rows, columns, _ = products.shape
    blocks = space.unflatten(1, (columns, tile)).unflatten(0, (rows, tile)).permute(1, 3, 0, 2, 4)
    matrix = _planar(tile, math.isqrt(squared))[0]
    for start in range(0, rows, chunk):
        block = blocks[:, :, start : start + chunk]
        finished = scratch[: block.numel()].view(tile * tile, -1)
        torch.mm(matrix, products[:, start : start + chunk].flatten(1), out=finished)
        torch.add(finished.view(block.shape), bias, out=block)


class WinogradConv2d(nn.Conv2d):
    """A 3x3 convolution that takes Winograd's way where that pays, for inference in float32 on a CPU.

    Parameters and their names are the plain convolution's. The transformed weights (4 times their size with tiles of 4,
    1.8 times with tiles of 2) are made on the first input that is large enough, and dropped if the weights are moved or
    read anew.
    """

    tile = 4
    _transformed: Tensor | None = None

    def forward(self, images: Tensor) -> Tensor:
        """(B, I, H, W) -> (B, O, H, W)."""
        if not self.pays(images):
            return super().forward(images)
        return winograd_conv2d(images, self.transformed(), self.bias, padding=1)

    def transformed(self) -> Tensor:
        """The weights for `winograd_conv2d`."""
        if self._transformed is None:
            self._transformed = transform_weight(self.weight, self.tile)
        return self._transformed

    def pays(self, images: Tensor) -> bool:
        """Whether Winograd's way is open for such an input, and faster."""
        learning = torch.is_grad_enabled() and any(x.requires_grad for x in (images, *self.parameters()))
        plain = images.dtype == self.weight.dtype == torch.float32 and images.device.type == "cpu"
        tiles = -(-images.shape[-2] // self.tile) * -(-images.shape[-1] // self.tile)
        return plain and not learning and tiles >= MIN_TILES

    def _apply(self, *args, **kwargs) -> nn.Module:
        self._transformed = None
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self._transformed = None
        super()._load_from_state_dict(*args, **kwargs)


def is_eligible(module: nn.Module) -> bool:
    """Whether a module is a plain convolution that has a Winograd form."""
    return (
        type(module) is nn.Conv2d
        and module.kernel_size == (3, 3)
        and module.stride == module.dilation == (1, 1)
        and module.padding in (1, (1, 1))
        and module.padding_mode == "zeros"
        and module.groups == 1
    )


def use_winograd(module: nn.Module, tile: int = 4, min_channels: int = MIN_CHANNELS) -> int:
    """Have the convolutions of a network take Winograd's way where that pays, in place.

    Args:
        module: a network for inference whose weights are final; they stay what they are.
        tile: side of a tile of outputs: 4 is fastest, 2 is more exact and takes less memory.
        min_channels: convolutions with fewer channels in or out stay as they are.

    Returns:
        the number of convolutions that can.

    Raises:
        ValueError: if the tile is not supported.
    """
    winograd_matrices(tile)
    found = [child for child in module.modules() if is_eligible(child) and min(child.weight.shape[:2]) >= min_channels]
    for conv in found:
        conv.__class__ = WinogradConv2d  # the same parameters under the same names
        conv.tile = tile
    return len(found)
