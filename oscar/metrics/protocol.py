"""The published evaluation's rules (protocol `paper`) where they are not ours; docs/protocols.md compares both."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from oscar.data.images import ImageError

if TYPE_CHECKING:
    import torch

Protocol = Literal["bitstream", "paper"]
PROTOCOLS = ("bitstream", "paper")
PAPER_MULTIPLE = 128  # pixels


def check_protocol(protocol: str) -> str:
    """The protocol (ValueError if it is none of `PROTOCOLS`)."""
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol {protocol!r} does not exist; allowed: {', '.join(PROTOCOLS)}")
    return protocol


def paper_size(width: int, height: int) -> tuple[int, int]:
    """The size to which protocol `paper` resizes: each side down to a multiple of 128.

    Raises:
        ImageError: for a side below 128 pixels, of which the published code would leave nothing.
    """
    if min(width, height) < PAPER_MULTIPLE:
        raise ImageError(
            f"image of {width}x{height} pixels is not allowed in protocol paper, which rounds sides down "
            f"to multiples of {PAPER_MULTIPLE}; allowed: from {PAPER_MULTIPLE} a side"
        )
    return width // PAPER_MULTIPLE * PAPER_MULTIPLE, height // PAPER_MULTIPLE * PAPER_MULTIPLE


def image_noise(images: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Standard normal noise for the latents of images (B, 3, H, W) in [-1, 1]: float32 of `shape` (B, C, h, w), CPU.

    The published code draws without a seed. Here the seed of each image is the CRC-32 of its 8-bit pixels, so that a
    run can be repeated, whatever the order, the batch, the process and the device.
    """
    import torch

    noise = []
    for image in images:
        pixels = ((image.detach().float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        generator = torch.Generator().manual_seed(zlib.crc32(pixels.cpu().contiguous().numpy().tobytes()))
        noise.append(torch.randn(shape[1:], generator=generator))
    return torch.stack(noise)


def sample_of(images: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """The `draw` of `Backbone.encode` by which latents of these images (B, 3, H, W) are samples."""
    return lambda mean: image_noise(images, mean.shape).to(mean)
