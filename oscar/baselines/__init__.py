"""Codecs to compare with, under one interface."""

from oscar.baselines.base import BaselineUnavailable, CodecError, Encoded, ImageCodec, RoundTrip, encode_to_size
from oscar.baselines.registry import BASELINES, make_baseline

__all__ = [
    "BASELINES",
    "BaselineUnavailable",
    "CodecError",
    "Encoded",
    "ImageCodec",
    "RoundTrip",
    "encode_to_size",
    "make_baseline",
]
