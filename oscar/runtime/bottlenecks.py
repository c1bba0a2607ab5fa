"""Both kinds of bottleneck without torch: what a file of a point holds from a latent, and z_hat from that."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from oscar.bitstream import Coding, Payload
from oscar.bitstream.context import ContextModel, decode_grid, decode_prefix, encode_grid
from oscar.bitstream.entropy import check_frequencies
from oscar.bitstream.hyperprior import Coded, HyperpriorCoder
from oscar.bitstream.hyperprior_weights import ACTIVATION_STEPS, KNOTS
from oscar.bitstream.norms import dequantise_rms, quantise_rms
from oscar.bitstream.rdo import check_effort, optimise_indices
from oscar.operating_points import OperatingPoints, Qualities, Quality, Rates, no_preview
from oscar.rates import RatePoint, rate_by_id
from oscar.runtime.files import ModelFiles, RuntimeModelError


def pad(value: np.ndarray, multiple: int) -> np.ndarray:
    """(1, C, H, W) with its last row and column repeated until both sides are multiples."""
    height, width = value.shape[-2:]
    return np.pad(value, ((0, 0), (0, 0), (0, -height % multiple), (0, -width % multiple)), mode="edge")


class HyperpriorSymbols(NamedTuple):
    """Decoded values in the coder's integers, int32 (C, h, w), and symbols and their tables in the order of coding."""

    values: np.ndarray
    coded: Coded


class HyperpriorBottleneck(Qualities):
    """See `oscar.bottlenecks.hyperprior`."""

    def __init__(self, files: ModelFiles):
        self.files = files
        self.coder = HyperpriorCoder.from_arrays(files.group("coder"))

    def quantise(self, latent: np.ndarray, point: Quality, effort: int = 0) -> HyperpriorSymbols:
        """Latent (1, C, h, w) -> symbols."""
        if effort:
            raise ValueError(f"effort is {effort}, but this model has a hyperprior; allowed: 0")
        side = self.files.run("hyper_encoder", latent=latent) * self._gain("log_side_gain", point)
        values = latent * self._gain("log_gain", point)
        coded, decoded = self.coder.choose(values[0], np.rint(side[0]).astype(np.int64), point.code)
        return HyperpriorSymbols(decoded, coded)

    def dequantise(self, symbols: HyperpriorSymbols, point: Quality) -> np.ndarray:
        """Symbols -> z_hat (1, C, h, w)."""
        values = symbols.values[None].astype(np.float32) / np.float32(ACTIVATION_STEPS)
        return values * self._gain("log_inverse", point)

    def write(self, symbols: HyperpriorSymbols, point: Quality) -> Payload:
        return Payload(Coding.HYPERPRIOR, b"", self.coder.write(symbols.coded, symbols.values.shape[-2:]))

    def read(self, payload: Payload, point: Quality, shape: tuple[int, int]) -> HyperpriorSymbols:
        coded, values = self.coder.read(payload.data, shape, point.code)
        return HyperpriorSymbols(values, coded)

    def read_prefix(self, payload: Payload, point: Quality, shape: tuple[int, int]) -> tuple[HyperpriorSymbols, float]:
        values, share = self.coder.decode_prefix(payload.data, shape, point.code)
        return HyperpriorSymbols(values, []), share

    def _gain(self, name: str, point: Quality) -> np.ndarray:
        """Factors (C, 1, 1) at a quality, between those at the knots."""
        places = np.float32(point.value) * np.float32(KNOTS - 1)
        knots = np.maximum(1 - np.abs(places - np.arange(KNOTS, dtype=np.float32)), 0)
        return np.exp(knots @ self.files.array(name))[:, None, None]


class VQSymbols(NamedTuple):
    """Indices (rows, columns), and codes of the norms (C,) uint8."""

    indices: np.ndarray
    norms: np.ndarray


class VQBottleneck(Rates):
    """See `oscar.bottlenecks.vq`."""

    def __init__(self, files: ModelFiles):
        self.files = files
        self.rates = tuple(rate_by_id(rate_id) for rate_id in files.checkpoint["bottleneck"]["rates"])
        self.frequencies = {rate.id: check_frequencies(files.tensors[f"frequencies.{rate.id}"]) for rate in self.rates}
        self.codebooks = {
            rate.id: files.array(f"hyper_encoders.{rate.id}.quantizer._codebook.embed")[0] for rate in self.rates
        }
        arrays = {rate.id: files.group(f"context.{rate.id}") for rate in self.rates}
        self.contexts = {rate_id: ContextModel(**own) for rate_id, own in arrays.items() if own}

    def quantise(self, latent: np.ndarray, point: RatePoint, effort: int = 0) -> VQSymbols:
        """Latent (1, 4, h, w), h and w multiples of the rate's downsample -> symbols."""
        check_effort(effort)
        codebook = self.codebooks[point.id]
        features = self.files.run(f"hyper_encoder_{point.id}", latent=latent)[0]
        indices = (features @ codebook.T).argmax(axis=-1)
        if effort:
            table, model = self.frequencies[point.id], self.contexts.get(point.id)
            indices = optimise_indices(features, codebook, indices, effort, table, model)
        rms = np.sqrt(np.square(latent[0]).mean(axis=(1, 2)))
        return VQSymbols(indices, quantise_rms(rms))

    def dequantise(self, symbols: VQSymbols, point: RatePoint) -> np.ndarray:
        """Symbols -> z_hat (1, 4, h, w), rescaled."""
        codes = self.codebooks[point.id][symbols.indices][None]
        z_hat = self.files.run(f"hyper_decoder_{point.id}", codes=codes)
        own = np.sqrt(np.square(z_hat).mean(axis=(2, 3), keepdims=True))
        return z_hat * (dequantise_rms(symbols.norms)[None, :, None, None] / np.maximum(own, np.float32(1e-8)))

    def write(self, symbols: VQSymbols, point: RatePoint) -> Payload:
        table, model = self.frequencies[point.id], self.contexts.get(point.id)
        coding, data = encode_grid(symbols.indices, table, model)
        return Payload(coding, symbols.norms.tobytes(), data)

    def read(self, payload: Payload, point: RatePoint, shape: tuple[int, int]) -> VQSymbols:
        table, model = self.frequencies[point.id], self.contexts.get(point.id)
        grid = decode_grid(payload.data, payload.coding, self.grid_shape(point, shape), table, model)
        return VQSymbols(grid, np.frombuffer(payload.side, dtype=np.uint8))

    def read_prefix(self, payload: Payload, point: RatePoint, shape: tuple[int, int]) -> tuple[VQSymbols, float]:
        if payload.coding != Coding.CONTEXT:
            raise no_preview(payload)
        grid, share = decode_prefix(payload.data, self.grid_shape(point, shape), self.contexts[point.id])
        return VQSymbols(grid, np.frombuffer(payload.side, dtype=np.uint8)), share


def make(files: ModelFiles) -> OperatingPoints:
    """The bottleneck that a model folder describes."""
    kinds: dict[str, Any] = {"vq": VQBottleneck, "hyperprior": HyperpriorBottleneck}
    kind = files.checkpoint["bottleneck"].get("kind", "vq")
    if kind not in kinds:
        raise RuntimeModelError(f"bottleneck.kind is {kind!r}; allowed for the runtime: {', '.join(kinds)}")
    return kinds[kind](files)
