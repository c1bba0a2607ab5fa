"""The UNet on a large latent: its feed-forward layers in parts, and its self-attention in windows on the largest maps.

The UNet's maps are small, an eighth of the image a side, and take less than the autoencoder's, so that it runs whole
wherever that fits. On a CPU, where a map has more than `ATTENTION_WHOLE` positions, self-attention between all of them
would take too long: there it looks at overlapping windows, and their results are blended. That depends on the image's
size alone.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from torch import Tensor

from oscar.inference.fitting import SLACK, device_type, images_at_once, peak_bytes
from oscar.inference.kernels import nothing_kept
from oscar.inference.memory import MemoryBudget
from oscar.models.backbone import unet_multiple
from oscar.models.denoiser import Denoiser, predict

FEED_FORWARD = 2**14  # positions that the feed-forward layers work on at a time
ATTENTION_WHOLE = 2**17  # positions up to which self-attention is between all; 3840x2160 pixels have fewer
WINDOW, OVERLAP = 192, 64  # its windows beyond: their side, and how far they overlap
_REFERENCE = 64  # side of the latent from which the UNet's memory by position is taken


class WindowedDenoiser(Denoiser):
    """A denoiser whose UNet works on large latents in parts, where the whole does not fit: for inference.

    Attributes:
        memory: what it may take beyond weights, latent and result; None is no bound.
    """

    memory: MemoryBudget | None

    def run_unet(self, unet: UNet2DConditionModel, noisy: Tensor, timestep: Tensor) -> Tensor:
        multiple, device = unet_multiple(unet), device_type(noisy)
        height, width = (-(-side // multiple) * multiple for side in noisy.shape[-2:])
        if len(noisy) * height * width <= FEED_FORWARD:
            return super().run_unet(unet, noisy, timestep)
        limit = math.inf if self.memory is None else self.memory.bytes(noisy.device)
        needed = (
            SLACK
            * height
            * width
            / _REFERENCE**2
            * peak_bytes(unet, self._example, 1, noisy.shape[1], _REFERENCE, _REFERENCE, dtype=noisy.dtype)
        )
        count = images_at_once(device, len(noisy), height * width, FEED_FORWARD, needed, limit)
        windows = device == "cpu" and height * width > ATTENTION_WHOLE
        with contextlib.ExitStack() as stack:
            if count == 0 or windows:
                stack.enter_context(nothing_kept())
                stack.enter_context(large_latent(unet, height, width, windows))
            parts = zip(noisy.split(max(count, 1)), timestep.split(max(count, 1)), strict=True)
            return torch.cat([predict(unet, *part, self.prompt) for part in parts])

    def _example(self, unet: UNet2DConditionModel, noisy: Tensor) -> Tensor:
        prompt = None if self.prompt is None else torch.empty_like(self.prompt, device=noisy.device)
        return predict(unet, noisy, 0, prompt)


@contextlib.contextmanager
def large_latent(unet: UNet2DConditionModel, height: int, width: int, windows: bool) -> Iterator[None]:
    """Prepare a UNet for large latents of one size, as long as the context lasts; `windows` cuts attention too."""
    blocks = list(_transformer_blocks(unet))
    processors = [block.attn1.processor for block, _ in blocks]
    try:
        for block, level in blocks:
            rows, columns = height >> level, width >> level
            part = max(count for count in range(1, max(2, FEED_FORWARD // columns + 1)) if rows % count == 0)
            block.set_chunk_feed_forward(part * columns, dim=1)
            if windows and rows * columns > ATTENTION_WHOLE:
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
