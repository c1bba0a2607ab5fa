"""Stable Diffusion's autoencoder layer by layer, over blocks of rows of the maps between its layers.

A convolution gets the rows that its block needs, those of the neighbouring blocks too; a normalisation has its
statistics gathered over all blocks before the first one is normalised; the attention answers some of the queries at a
time. A map between two layers is kept in memory, or computed anew, block by block, each time that it is read. The
memory allowed decides that and nothing else: the blocks are cut by the map's width alone, so that either way each one
is computed from the same numbers in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from oscar.inference.precision import WideConv2d, emulates_dtype
from oscar.inference.statistics import affine_map, group_statistics, moments

BLOCK = {"cpu": 2**16}  # positions of a block of rows, by kind of device
BLOCK_ELSEWHERE = 2**17
QUERIES = 2**14  # that the attention answers at a time


def spans(height: int, step: int) -> Iterator[tuple[int, int]]:
    """Top and bottom of the blocks of a map: of `step` rows, and the last one of what is left."""
    for top in range(0, height, step):
        yield top, min(top + step, height)


class _Kept:
    """A map (1, C, H, W) in memory; `counted` against the budget or not."""

    def __init__(self, tensor: Tensor, counted: bool = True):
        self.tensor = tensor
        self.shape = tuple(tensor.shape[1:])
        self.bytes = tensor.nbytes if counted else 0

    @property
    def needs(self) -> frozenset[_Kept]:
        """The maps in memory that are read when this one is."""
        return frozenset((self,))

    def rows(self, top: int, bottom: int) -> Tensor:
        return self.tensor[:, :, top:bottom]


class _Computed:
    """A map that is computed in blocks of rows when it is read; the last blocks are remembered for their neighbours.

    A block gets the dtype and the order in memory that it would have in a kept map, so that who reads it sees no
    difference.

    Args:
        compute: (top, bottom) -> rows (1, C, bottom - top, W).
        shape: (C, H, W).
        step: rows of a block.
        dtype: of the map.
        sources: the maps that `compute` reads.
    """

    REMEMBERED = 3  # a 3x3 convolution reads one block, the row before it and the row after

    def __init__(
        self,
        compute: Callable[[int, int], Tensor],
        shape: tuple[int, int, int],
        step: int,
        dtype: torch.dtype,
        *sources: _Kept | _Computed,
    ):
        self.compute = compute
        self.shape = shape
        self.step = step
        self.dtype = dtype
        self.bytes = math.prod(shape) * dtype.itemsize
        self.needs = frozenset().union(*(source.needs for source in sources))
        self._blocks: dict[int, Tensor] = {}

    def rows(self, top: int, bottom: int) -> Tensor:
        parts = []
        for start in range(top - top % self.step, bottom, self.step):
            block = self._blocks.pop(start, None)
            if block is None:
                block = self.compute(start, min(start + self.step, self.shape[1]))
                block = block.to(self.dtype, memory_format=torch.channels_last)
            self._blocks[start] = block
            if len(self._blocks) > self.REMEMBERED:
                del self._blocks[next(iter(self._blocks))]  # the one read longest ago
            parts.append(block[:, :, max(top - start, 0) : bottom - start])
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def forget(self) -> None:
        self._blocks.clear()


_Map = _Kept | _Computed
_Change = Callable[[Tensor], Tensor]


class Stream:
    """One pass of one image through one half of the autoencoder.

    Whoever calls a method for the next map must not hold on to the one before, or its memory is not free.

    Args:
        limit: bytes for the maps and what is made on the way; infinity is none.
        dtype: of the maps.
        device: where it runs.
    """

    def __init__(self, limit: float, dtype: torch.dtype, device: torch.device):
        self.limit = limit
        self.dtype = dtype
        self.block = BLOCK.get(device.type, BLOCK_ELSEWHERE)
        self.peak = 0
        self.recomputed = 0

    def encode(self, vae: AutoencoderKL, images: Tensor) -> Tensor:
        """(1, 3, H, W) -> moments (1, 2C, H/8, W/8)."""
        encoder = vae.encoder
        value = self.convolution(encoder.conv_in, _Kept(images, counted=False))
        for block in encoder.down_blocks:
            for resnet in block.resnets:
                value = self.perhaps_keep(value, resnet.out_channels)
                value = self.resnet(resnet, value)
            for sampler in block.downsamplers or ():
                value = self.keep(self.convolution(sampler.conv, value))
        moments = self.last(encoder, self.middle(encoder.mid_block, value))
        return moments if vae.quant_conv is None else vae.quant_conv(moments)

    def decode(self, vae: AutoencoderKL, latent: Tensor) -> Tensor:
        """(1, C, h, w) -> (1, 3, 8h, 8w)."""
        decoder = vae.decoder
        latent = latent if vae.post_quant_conv is None else vae.post_quant_conv(latent)
        value = self.keep(self.convolution(decoder.conv_in, _Kept(latent, counted=False)))
        value = self.middle(decoder.mid_block, value)
        for block in decoder.up_blocks:
            for resnet in block.resnets:
                value = self.perhaps_keep(value, resnet.out_channels)
                value = self.resnet(resnet, value)
            for sampler in block.upsamplers or ():
                value = self.doubled(sampler, value)
        return self.last(decoder, value)

    def middle(self, block: nn.Module, value: _Kept) -> _Kept:
        value = self.resnet(block.resnets[0], value)
        for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
            value = value if attention is None else self.attention(attention, value)
            value = self.resnet(resnet, value)
        return value

    def last(self, half: nn.Module, value: _Kept) -> Tensor:
        normalise = self.normalisation(half.conv_norm_out, half.conv_act, value)
        return self.keep(self.convolution(half.conv_out, value, normalise), counted=False).tensor

    # Layers.

    def resnet(self, resnet: ResnetBlock2D, value: _Map) -> _Kept:
        """value + conv2(act(norm2(conv1(act(norm1(value)))))), in the place of `value` if that is kept and fits."""
        normalise = self.normalisation(resnet.norm1, resnet.nonlinearity, value)
        hidden = self.convolution(resnet.conv1, value, normalise)
        place = value if isinstance(value, _Kept) and value.shape == hidden.shape else None
        if place is not None and not self.fits(value.needs, hidden.bytes, hidden.shape[0]):
            self.recomputed += 1
        else:
            hidden = self.keep(hidden)
            place = place or hidden
        normalise = self.normalisation(resnet.norm2, resnet.nonlinearity, hidden)
        second = self.convolution(resnet.conv2, hidden, normalise)

        def add(top: int, bottom: int) -> Tensor:
            change, rows = second.compute(top, bottom), value.rows(top, bottom)
            rows = rows if resnet.conv_shortcut is None else _convolve(resnet.conv_shortcut, rows)
            return (rows + change) / resnet.output_scale_factor

        return self.keep(_Computed(add, hidden.shape, second.step, self.dtype, hidden, value), place)

    def attention(self, attention: Attention, value: _Kept) -> _Kept:
        """Attention between all positions, `QUERIES` answered at a time, in the place of `value`."""
        channels, height, width = value.shape
        normalise = self.normalisation(attention.group_norm, nn.Identity(), value)
        step = max(1, QUERIES // width)

        def project(layer: nn.Linear, top: int, bottom: int) -> Tensor:
            tokens = normalise(value.rows(top, bottom)).flatten(2).transpose(1, 2)
            return _linear(layer, tokens).to(self.dtype).unflatten(2, (attention.heads, -1)).transpose(1, 2)

        keys, values = (
            torch.cat([project(layer, *span) for span in spans(height, step)], dim=2)
            for layer in (attention.to_k, attention.to_v)
        )
        self.note(value.needs, keys.nbytes + values.nbytes, channels)

        def answer(top: int, bottom: int) -> Tensor:
            queries = project(attention.to_q, top, bottom)
            found = F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2)
            found = _linear(attention.to_out[0], found).transpose(1, 2).unflatten(2, (bottom - top, width))
            return (found + value.rows(top, bottom)) / attention.rescale_output_factor

        return self.keep(_Computed(answer, value.shape, step, self.dtype, value), value)

    def convolution(self, conv: nn.Module, source: _Map, before: _Change | None = None, stretch: int = 1) -> _Computed:
        """A 3x3 convolution of a map.

        Args:
            conv: with stride 1 and padding 1; or with stride 2, and a row and a column of zeros at the end.
            source: what it reads.
            before: what is done to the rows that it reads.
            stretch: 2 doubles the map's sides first, by repetition.
        """
        stride = conv.stride[0]
        height, width = (side * stretch for side in source.shape[1:])

        def compute(top: int, bottom: int) -> Tensor:
            wanted = (2 * top, 2 * bottom + 1) if stride == 2 else (top - 1, bottom + 1)
            first, last = max(wanted[0], 0), min(wanted[1], height)
            rows = source.rows(first // stretch, -(-last // stretch))
            if stretch == 2:
                rows = F.interpolate(rows, scale_factor=2.0, mode="nearest")
                rows = rows[:, :, first % 2 : first % 2 + last - first]
            rows = rows if before is None else before(rows)
            if type(conv) in (nn.Conv2d, WideConv2d):
                return _convolve(conv, rows, first - wanted[0], wanted[1] - last)
            # Another kind pads each side by itself; its rows at a cut, for which it saw zeros, are not used.
            return conv(rows)[:, :, top - first : bottom - first]

        shape = (conv.out_channels, height // stride, width // stride)
        return _Computed(compute, shape, self.step(shape), self.dtype, source)

    def doubled(self, sampler: nn.Module, source: _Map) -> _Computed:
        """Upsampling by repetition and a convolution."""
        if type(sampler) is Upsample2D:
            return self.convolution(sampler.conv, source, stretch=2)

        def compute(top: int, bottom: int) -> Tensor:  # another kind; as above, the rows at a cut are not used
            first, last = max(top - 1, 0) // 2, min(-(-(bottom + 1) // 2), source.shape[1])
            return sampler(source.rows(first, last))[:, :, top - 2 * first : bottom - 2 * first]

        shape = (sampler.out_channels, 2 * source.shape[1], 2 * source.shape[2])
        return _Computed(compute, shape, self.step(shape), self.dtype, source)

    def normalisation(self, norm: nn.GroupNorm, activation: nn.Module, source: _Map) -> _Change:
        """Group normalisation by the statistics of the whole map and what follows it, for rows of the map."""
        scale, shift = affine_map(norm, *self.statistics(source, norm.num_groups))
        dtype = torch.promote_types(self.dtype, torch.float32)
        scale, shift = (value.to(dtype).to(norm.weight.device)[:, None, None] for value in (scale, shift))
        return lambda rows: activation(torch.addcmul(shift, rows, scale))

    def statistics(self, source: _Map, groups: int) -> tuple[Tensor, Tensor]:
        """Mean and variance of each group of channels over the whole map, float64 (groups,), on the CPU."""
        channels, height, _ = source.shape
        dtype = torch.promote_types(self.dtype, torch.float32)
        found = group_statistics(
            (
                moments(source.rows(*span).permute(0, 2, 3, 1).reshape(-1, channels).to(dtype))
                for span in spans(height, self.step(source.shape))
            ),
            groups,
        )
        if isinstance(source, _Computed):
            source.forget()
        return found

    # Memory.

    def step(self, shape: tuple[int, int, int]) -> int:
        """Rows of a block of a map, which depend on its width alone."""
        # With a row more on each side a multiple of four, which is what a Winograd convolution works on.
        return self.block // shape[2] // 4 * 4 + 2

    def keep(self, source: _Computed, place: _Kept | None = None, counted: bool = True) -> _Kept:
        """Compute a map whole, in the place of one that nothing but the map itself reads any more, if given."""
        if place is None:
            place = _Kept(self._empty(source), counted)
        self.note(source.needs | {place}, 0, source.shape[0])
        self.fill(place, source)
        return place

    def fill(self, place: _Kept, source: _Computed) -> None:
        late = None  # a block goes to its place after the next one was computed, which may read the row before it
        for top, bottom in spans(source.shape[1], source.step):
            rows = source.rows(top, bottom)
            if late is not None:
                late[0].copy_(late[1])
            late = place.rows(top, bottom), rows
        late[0].copy_(late[1])
        source.forget()

    def perhaps_keep(self, value: _Map, channels: int) -> _Map:
        """Keep what a residual block with so many channels reads, if there is room for both."""
        if isinstance(value, _Kept):
            return value
        after = value.bytes // value.shape[0] * channels
        now = self.fits(value.needs, value.bytes, value.shape[0])
        then = self.fits(frozenset(), value.bytes + after, max(channels, value.shape[0]))  # without its sources
        if now and then:
            return self.keep(value)
        self.recomputed += 1
        return value

    def fits(self, maps: frozenset[_Kept], more: int, channels: int) -> bool:
        return self.needed(maps, more, channels) <= self.limit

    def note(self, maps: frozenset[_Kept], more: int, channels: int) -> None:
        """Remember the peak."""
        self.peak = max(self.peak, self.needed(maps, more, channels))

    def needed(self, maps: frozenset[_Kept], more: int, channels: int) -> int:
        """Bytes of maps, of something more, and of the blocks in flight: some remembered, and some in float32."""
        widest = max([channels, *(kept.shape[0] for kept in maps)])
        return sum(kept.bytes for kept in maps) + more + self.block * widest * (6 * self.dtype.itemsize + 12)

    def _empty(self, source: _Computed) -> Tensor:
        device = next(iter(source.needs)).tensor.device
        shape = (1, *source.shape)
        return torch.empty(shape, dtype=self.dtype, device=device, memory_format=torch.channels_last)


class Outline(Stream):
    """The same without the computation, on the meta device: what is kept and what it takes."""

    def normalisation(self, norm: nn.GroupNorm, activation: nn.Module, source: _Map) -> _Change:
        return activation

    def fill(self, place: _Kept, source: _Computed) -> None:
        pass


def _convolve(conv: nn.Conv2d, rows: Tensor, above: int = 0, below: int = 0) -> Tensor:
    """A convolution of rows of a map, with so many rows of zeros above and below them."""
    dtype = _arithmetic(conv.weight)
    beside = conv.padding[1]
    if above or below or conv.stride[0] == 2:
        rows = F.pad(rows, (0, conv.stride[0] - 1, above, below))
    bias = None if conv.bias is None else conv.bias.to(dtype)
    return F.conv2d(rows.to(dtype), conv.weight.to(dtype), bias, conv.stride, (0, beside))


def _linear(layer: nn.Linear, rows: Tensor) -> Tensor:
    dtype = _arithmetic(layer.weight)
    return F.linear(rows.to(dtype), layer.weight.to(dtype), None if layer.bias is None else layer.bias.to(dtype))


def _arithmetic(weight: Tensor) -> torch.dtype:
    """The dtype to compute in: on a CPU that only emulates a narrow type, float32, which is faster there."""
    return torch.float32 if emulates_dtype(weight.device, weight.dtype) else weight.dtype
