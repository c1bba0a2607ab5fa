"""Codecs under evaluation by name: OSCAR under the interface of the baselines, and the baselines themselves."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from PIL import Image

import oscar
from oscar import checkpoint, model_folder
from oscar.baselines.base import Encoded, ImageCodec, RoundTrip
from oscar.codec import OscarCodec, Parsed
from oscar.data.tensors import to_pil, to_tensor
from oscar.inference.load import load
from oscar.metrics.protocol import Protocol, check_protocol, paper_size, sample_of

# What results of protocol `paper` say of it; docs/protocols.md has the whole.
PAPER_RULES = {
    "resized": "Lanczos, sides down to multiples of 128",
    "latent": "sample, seeded by the image",
    "norms": "the original latent's",
    "pixels": "truncated",
}


class OscarImageCodec(ImageCodec):
    """OSCAR as a codec under evaluation; its points are those of the bottleneck: the nominal bpp of the model's rates,
    with a hyperprior qualities from 0 to 1.

    Protocol `bitstream` writes and reads real files of images of any size. Protocol `paper` is the published
    evaluation: the image is resized (`paper_size`, Lanczos), the latent is a sample, the decoder gets the original
    latent's norms, no file is written, pixels are truncated to 8 bits, and the result is scored against the resized
    image. Its rate is the nominal one.

    nominal_bpp is the rate's name, as the paper prints it; estimated_bpp is the ideal code length of the indices under
    the model's frequency tables, or context models, over the coded image's pixels; where there is a file, its header
    and norms, whose length is known, are included, and for a hyperprior the mean of rANS's final state. A model with a
    hyperprior has no nominal rate.

    Args:
        codec: the codec, in evaluation mode.
        model: its name in tables, "nano" or the name of the checkpoint's folder.
        protocol: "bitstream" or "paper".
        sha256: hashes of the checkpoint's weight files, by name.
        source: where the checkpoint can be loaded from again, by a process of its own; None if nowhere.

    Raises:
        ValueError: for an unknown protocol.
    """

    def __init__(
        self,
        codec: OscarCodec,
        model: str,
        protocol: Protocol = "bitstream",
        sha256: dict[str, str] | None = None,
        source: str | Path | None = None,
    ):
        check_protocol(protocol)
        self.codec, self.model, self.protocol, self.sha256 = codec, model, protocol, sha256 or {}
        self.source = source
        paper = protocol == "paper"
        self.name = f"oscar-{model}" + ("-paper" if paper else "")
        self.label = f"OSCAR {model}" + (" (paper protocol)" if paper else "")
        if paper and not codec.bottleneck.is_published:
            raise ValueError(f"protocol is 'paper', but {model} has {codec.bottleneck.point_words}; allowed: bitstream")
        self.point_name = codec.bottleneck.point_name
        self.points = self.grid = codec.points

    def describe(self) -> dict:
        return {
            **super().describe(),
            "protocol": self.protocol,
            **({"rules": PAPER_RULES} if self.protocol == "paper" else {}),
            "fingerprint": self.codec.fingerprint,
            "sha256": self.sha256,
            "backbone": self.codec.backbone.source,
            "timesteps": self.codec.mapping.to_config(),
            "device": self.codec.device.type,
            "dtype": str(self.codec.dtype).removeprefix("torch."),
            "version": oscar.__version__,
        }

    def check_point(self, point: float) -> float:
        return self.codec.find_point(point).value

    def encode(self, image: Image.Image, point: float) -> Encoded:
        """Compress an RGB image to an `.oscar` file.

        Raises:
            ValueError: for a rate that the model does not have, or in protocol `paper`, which writes no files.
        """
        if self.protocol != "bitstream":
            raise ValueError(f"{self.name}: protocol {self.protocol} writes no files; allowed: bitstream")
        (data,) = self.codec.compress_batch([image], point)
        return self._describe_file(data, self.codec.read(data))

    def decode(self, data: bytes) -> Image.Image:
        return self.codec.decompress(data)

    def round_trip(self, image: Image.Image, point: float) -> RoundTrip:
        """Encode an RGB image and decode it again, timed; what only measures the file is not counted."""
        if self.protocol == "paper":
            return self._paper_round_trip(image, point)
        start = time.perf_counter()
        (data,) = self.codec.compress_batch([image], point)
        middle = time.perf_counter()
        parsed = self.codec.read(data)
        decoded = to_pil(self.codec.decode_files([parsed])[0])
        end = time.perf_counter()
        return RoundTrip.of_file(image, decoded, self._describe_file(data, parsed), middle - start, end - middle)

    def _describe_file(self, data: bytes, parsed: Parsed) -> Encoded:
        container, (bits,) = parsed.container, self.codec.bottleneck.estimated_bits(parsed.symbols, parsed.point)
        header = 8 * (len(data) - len(container.payload))
        return Encoded(
            data=data,
            parts={name: len(part) for name, part in container.parts().items()},
            nominal_bpp=self.codec.bottleneck.nominal_bpp(parsed.point),
            estimated_bpp=(header + bits) / (container.width * container.height),
        )

    @torch.inference_mode()
    def _paper_round_trip(self, image: Image.Image, point: float) -> RoundTrip:
        codec, rate = self.codec, self.codec.find_point(point)
        reference = image.resize(paper_size(*image.size), Image.Resampling.LANCZOS)
        batch = to_tensor(reference)
        start = time.perf_counter()
        encoded = codec.quantise(codec.encode_latent(batch, rate, sample_of), rate)
        (bits,) = codec.bottleneck.estimated_bits(encoded.symbols, rate)  # on the CPU: the device has finished
        middle = time.perf_counter()
        decoded = to_pil(codec.decode(encoded.symbols, rate, encoded.timesteps).image, truncate=True)
        end = time.perf_counter()
        return RoundTrip(
            reference=reference,
            decoded=decoded,
            encoded=None,
            nominal_bpp=codec.bottleneck.nominal_bpp(rate),
            estimated_bpp=bits / (reference.width * reference.height),
            encode_seconds=middle - start,
            decode_seconds=end - middle,
        )


def make_codec(name: str, **options) -> ImageCodec:
    """The codec of a name.

    Args:
        name: "oscar", or a baseline's (`oscar.baselines.registry.BASELINES`).
        **options: of oscar `model` ("nano", a checkpoint folder or a hub id), `device`, `dtype` ("float32", "float16",
            "bfloat16") and `protocol` ("bitstream", "paper"); of a baseline its constructor's arguments.

    Raises:
        ValueError: for an unknown name, naming all that exist, or options that do not fit.
        BaselineUnavailable: if the codec cannot run here.
    """
    if name == "oscar":
        return load_oscar(**options)
    from oscar.baselines.registry import BASELINES, make_baseline

    if name not in BASELINES:  # its own message would not name oscar
        raise ValueError(f"codec {name!r} does not exist; allowed: {', '.join(['oscar', *BASELINES])}")
    return make_baseline(name, **options)


def load_oscar(
    model: str | Path = "nano",
    device: str | torch.device = "cpu",
    dtype: str = "float32",
    protocol: Protocol = "bitstream",
) -> OscarImageCodec:
    """Load an OSCAR checkpoint for evaluation; see `make_codec`.

    Raises:
        CheckpointError: if it cannot be found or read.
    """
    folder = model_folder.locate(model)
    codec = load(model, device, getattr(torch, dtype))
    sha256 = json.loads((folder / checkpoint.CONFIG).read_text())["sha256"]
    return OscarImageCodec(codec, Path(model).absolute().name, protocol, sha256, model)
