"""Rate points: stable ids, grid, codebook size and nominal bits per pixel (shared by files, configs and checkpoints).

A rate point quantises the latent on a grid that is `downsample` times coarser than the latent and spends
log2(codebook_size) bits on each index. The paper states its nominal bits per pixel for a 512x512 image, whose
latent is 64x64 (paper section 4.1 and table of rates). This module knows no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

LATENT_SIDE = 64  # of the 512x512 image by which the paper names its grids
PIXELS_PER_LATENT = 8  # an f8 VAE, as in every backbone of the paper


@dataclass(frozen=True)
class RatePoint:
    """One bit-rate of the codec.

    Attributes:
        id: number stored in files; never reused for another rate.
        bpp: nominal bits per pixel as the paper prints it; also the rate's name in the API and on the command line.
        grid: side of the index grid for a 512x512 image: 64, 32, 16 or 8.
        codebook_size: number of codes K.
        timestep: the paper's pseudo-timestep, None for rates that its UNet was not trained on.
    """

    id: int
    bpp: float
    grid: int
    codebook_size: int
    timestep: int | None = None

    @property
    def value(self) -> float:
        """What users say: the nominal bpp."""
        return self.bpp

    @property
    def code(self) -> int:
        """What files hold: the id."""
        return self.id

    @property
    def downsample(self) -> int:
        """Latent positions per index along each side: 1, 2, 4 or 8."""
        return LATENT_SIDE // self.grid

    @property
    def pixels_per_index(self) -> int:
        """Pixels per index along each side: 8, 16, 32 or 64."""
        return PIXELS_PER_LATENT * self.downsample

    @property
    def bits_per_index(self) -> float:
        return math.log2(self.codebook_size)

    def grid_shape(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the index grid of an image of `height` x `width` pixels (padded up)."""
        return -(-height // self.pixels_per_index), -(-width // self.pixels_per_index)

    def nominal_bits(self, height: int, width: int) -> float:
        """Bits of the indices at fixed length, log2 K each, without any header."""
        rows, columns = self.grid_shape(height, width)
        return rows * columns * self.bits_per_index


# Ids 0..7 are the paper's trained rates in the order of its table, 8..11 those configured but not trained on.
RATES: tuple[RatePoint, ...] = (
    RatePoint(0, 0.0019, 8, 256, 500),
    RatePoint(1, 0.0098, 16, 1024, 400),
    RatePoint(2, 0.0313, 32, 256, 310),
    RatePoint(3, 0.0430, 32, 2048, 280),
    RatePoint(4, 0.0625, 64, 16, 210),
    RatePoint(5, 0.0781, 64, 32, 190),
    RatePoint(6, 0.0937, 64, 64, 170),
    RatePoint(7, 0.1250, 64, 256, 150),
    RatePoint(8, 0.0024, 8, 1024),
    RatePoint(9, 0.0234, 32, 64),
    RatePoint(10, 0.0507, 32, 8192),
    RatePoint(11, 0.1093, 64, 128),
)
PAPER_RATES: tuple[RatePoint, ...] = RATES[:8]


def rate_by_id(rate_id: int) -> RatePoint:
    """The rate point of a stable id.

    Raises:
        ValueError: if no rate has this id.
    """
    if 0 <= rate_id < len(RATES):
        return RATES[rate_id]
    raise ValueError(f"rate id {rate_id} does not exist; allowed: 0 to {len(RATES) - 1}")


def find_rate(bpp: float, available: Iterable[RatePoint] = RATES) -> RatePoint:
    """The rate point of this nominal bpp (to the four printed decimals) among `available`.

    Raises:
        ValueError: if there is none; the message lists the allowed values.
    """
    available = tuple(available)
    for rate in available:
        if abs(rate.bpp - bpp) < 5e-5:
            return rate
    allowed = ", ".join(f"{rate.bpp:.4f}" for rate in sorted(available, key=lambda rate: rate.bpp))
    raise ValueError(f"rate {bpp:g} does not exist; allowed: {allowed}")
