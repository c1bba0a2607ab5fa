from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from oscar.rates import PAPER_RATES, RATES, find_rate, rate_by_id

ROOT = Path(__file__).parents[1]

# id: (bpp, grid, codebook size). Files and checkpoints depend on it: rows may be added, never changed.
TABLE = {
    0: (0.0019, 8, 256),
    1: (0.0098, 16, 1024),
    2: (0.0313, 32, 256),
    3: (0.0430, 32, 2048),
    4: (0.0625, 64, 16),
    5: (0.0781, 64, 32),
    6: (0.0937, 64, 64),
    7: (0.1250, 64, 256),
    8: (0.0024, 8, 1024),
    9: (0.0234, 32, 64),
    10: (0.0507, 32, 8192),
    11: (0.1093, 64, 128),
}


def test_ids_are_stable() -> None:
    assert {rate.id: (rate.bpp, rate.grid, rate.codebook_size) for rate in RATES} == TABLE
    assert [rate.id for rate in RATES] == list(range(len(RATES)))  # ids are positions in the table
    assert RATES[:8] == PAPER_RATES


@pytest.mark.parametrize("rate", RATES, ids=str)
def test_nominal_bits_are_those_of_the_name(rate) -> None:
    assert rate.grid_shape(512, 512) == (rate.grid, rate.grid)
    assert rate.nominal_bits(512, 512) == rate.grid**2 * math.log2(rate.codebook_size)
    assert rate.nominal_bits(512, 512) / 512**2 == pytest.approx(rate.bpp, abs=1e-4)  # the paper rounds and truncates
    assert rate.pixels_per_index == 8 * rate.downsample == 512 // rate.grid


def test_grid_is_padded_up() -> None:
    assert RATES[0].grid_shape(1, 1) == (1, 1)
    assert RATES[0].grid_shape(64, 65) == (1, 2)
    assert RATES[7].grid_shape(333, 517) == (42, 65)


def test_find_rate_takes_the_printed_decimals() -> None:
    assert find_rate(0.0625).id == 4
    assert find_rate(0.06251).id == 4
    assert find_rate(0.0024).id == 8  # beyond the paper's eight
    assert find_rate(0.0019, RATES[:1]).id == 0


@pytest.mark.parametrize("bpp", [0.0626, 0.0, -1.0, float("nan"), 0.0025])
def test_find_rate_lists_what_is_allowed(bpp: float) -> None:
    with pytest.raises(ValueError, match=r"^rate \S+ does not exist; allowed: 0\.0019, .*, 0\.1250$"):
        find_rate(bpp)


@pytest.mark.parametrize("rate_id", [-1, 12, 255])
def test_unknown_id(rate_id: int) -> None:
    with pytest.raises(ValueError, match=f"rate id {rate_id} does not exist; allowed: 0 to 11"):
        rate_by_id(rate_id)


def test_light_modules_import_no_torch() -> None:
    code = "import sys, oscar, oscar.rates, oscar.timesteps, oscar.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
