"""The UNet on a large latent: its feed-forward layers in parts, and its self-attention in windows on the largest maps.

The UNet's maps are small, an eighth of the picture a side, and take less than the autoencoder's, so that it runs whole.
Only where a map has more than `ATTENTION_WHOLE` positions, self-attention between all of them would take too long:
there it looks at overlapping windows, and their results are blended. All limits depend on the picture's size alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from torch import Tensor

FEED_FORWARD = 2**14  # positions that the feed-forward layers work on at a time
ATTENTION_WHOLE = 2**17  # positions up to which self-attention is between all; 3840x2160 pixels have fewer
WINDOW, OVERLAP = 192, 64  # its windows beyond: their side, and how far they overlap


def is_large(height: int, width: int) -> bool:
    """Whether the UNet needs `large_latent` for a latent of that size."""
    return height * width > FEED_FORWARD


@contextlib.contextmanager
def large_latent(unet: UNet2DConditionModel, height: int, width: int) -> Iterator[None]:
    """Prepare a UNet for large latents of one size, as long as the context lasts."""
    blocks = list(_transformer_blocks(unet))
    processors = [block.attn1.processor for block, _ in blocks]
    try:
        for block, level in blocks:
            rows, columns = height >> level, width >> level
            part = max(count for count in range(1, max(2, FEED_FORWARD // columns + 1)) if rows % count == 0)
            block.set_chunk_feed_forward(part * columns, dim=1)
            if rows * columns > ATTENTION_WHOLE:
                block.attn1.set_processor(WindowedProcessor(block.attn1.processor, rows, columns))
        yield
    finally:
        for (block, _), processor in zip(blocks, processors, strict=True):
            block.set_chunk_feed_forward(None)
            block.attn1.set_processor(processor)


def _transformer_blocks(unet: UNet2DConditionModel) -> Iterator[tuple[BasicTransformerBlock, int]]:
    """The transformer blocks, with how often the latent's sides are halved where they are."""
    deepest = len(unet.down_blocks) - 1
    parts = [*enumerate(unet.down_blocks), (deepest, unet.mid_block)]
    parts += [(deepest - position, block) for position, block in enumerate(unet.up_blocks)]
    for level, part in parts:
        for module in part.modules() if part is not None else ():
            if isinstance(module, BasicTransformerBlock):
                yield module, level


class WindowedProcessor:
    """Self-attention within overlapping windows of a map, by another processor, blended.

    Args:
        processor: of diffusers' kind.
        height, width: of the map.
    """

    def __init__(self, processor: Callable[..., Tensor], height: int, width: int):
        self.processor = processor
        self.size = (height, width)

    def __call__(self, attn: Attention, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        def attend(window: Tensor) -> Tensor:
            found = self.processor(attn, window.flatten(2).transpose(1, 2), *args, **kwargs)
            return found.transpose(1, 2).unflatten(2, window.shape[-2:])

        return blend(attend, hidden_states.transpose(1, 2).unflatten(2, self.size)).flatten(2).transpose(1, 2)


def blend(function: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
    """Apply a function that keeps the shape to overlapping windows of a map (B, C, H, W), and blend what it gives.

    Where windows overlap, the weight passes from one to the other in a straight line, so that there is no seam.
    """
    height, width = value.shape[-2:]
    result = torch.zeros_like(value, dtype=torch.promote_types(value.dtype, torch.float32))
    weights = result.new_zeros(height, width)
    for top, bottom in _windows(height):
        for left, right in _windows(width):
            weight = _ramp(top, bottom, height)[:, None] * _ramp(left, right, width)
            weight = weight.to(result)
            result[..., top:bottom, left:right] += weight * function(value[..., top:bottom, left:right])
            weights[top:bottom, left:right] += weight
    return result.div_(weights).to(value.dtype)


def _windows(size: int) -> list[tuple[int, int]]:
    """Begin and end of the windows along a side: all of one length, evenly spread."""
    length = min(size, WINDOW)
    count = 1 + -(-(size - length) // (length - OVERLAP)) if size > length else 1
    begins = [index * (size - length) // max(count - 1, 1) for index in range(count)]
    return [(begin, begin + length) for begin in begins]


def _ramp(begin: int, end: int, size: int) -> Tensor:
    """Weights of a window along a side: rising over the overlap where it has a neighbour."""
    position = torch.arange(end - begin, dtype=torch.float32) + 0.5
    weight = torch.ones_like(position)
    if begin > 0:
        weight = torch.minimum(weight, position / OVERLAP)
    if end < size:
        weight = torch.minimum(weight, (end - begin - position) / OVERLAP)
    return weight
