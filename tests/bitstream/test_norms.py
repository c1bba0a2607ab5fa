"""Quantised norms of the latent channels."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from oscar.bitstream.norms import LARGEST_RMS, MAX_RELATIVE_ERROR, SMALLEST_RMS, dequantise_rms, quantise_rms

ALL_CODES = np.arange(256, dtype=np.uint8)


def test_every_code_survives_a_round_trip():
    values = dequantise_rms(ALL_CODES)
    assert values.dtype == np.float32
    assert values[[0, 1, 255]].tolist() == [0.0, SMALLEST_RMS, LARGEST_RMS]
    assert (np.diff(values) > 0).all()
    assert (quantise_rms(values) == ALL_CODES).all()


def test_relative_error_is_as_stated():
    rms = np.geomspace(SMALLEST_RMS, LARGEST_RMS, 100_001)
    error = np.abs(dequantise_rms(quantise_rms(rms)) / rms - 1).max()
    assert 0.99 * MAX_RELATIVE_ERROR < error <= MAX_RELATIVE_ERROR


def test_zero_and_values_out_of_range_go_to_the_nearest():
    assert quantise_rms([0.0, 1e-30, 0.031, 0.032, 4.1, 1e30]).tolist() == [0, 0, 0, 1, 255, 255]


def test_shapes_and_bytes():
    assert quantise_rms(np.ones((2, 3), dtype=np.float32)).shape == (2, 3)
    assert dequantise_rms(bytes([0, 1, 255])).tolist() == [0.0, 0.0625, 4.0]


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_what_is_no_rms_is_refused(value):
    with pytest.raises(ValueError, match="is not allowed"):
        quantise_rms([1.0, value])


def test_codes_of_another_type_are_refused():
    with pytest.raises(ValueError, match="int64"):
        dequantise_rms(np.array([-1]))


def test_table_has_these_bits():
    """A changed table would alter the images of existing files."""
    digest = hashlib.sha256(dequantise_rms(ALL_CODES).astype("<f4").tobytes()).hexdigest()
    assert digest == "b0e7f2a241d2e5d9d62a14d798f941c852ece6e5c518b4de58c2f50f05d1b607"
