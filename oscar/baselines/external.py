"""Codecs that are programs of their own: BPG, VTM and VVenC, run on files in a temporary folder.

Seconds of these codecs include the start of the program and the conversion to and from its files.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from abc import abstractmethod
from numbers import Real
from pathlib import Path

import numpy as np
from PIL import Image

from oscar.baselines.base import BaselineUnavailable, CodecError, Encoded, ImageCodec, check_choice, check_whole
from oscar.baselines.framing import pack_size, split_size
from oscar.baselines.yuv import CHROMAS, from_yuv, to_yuv


class ExternalCodec(ImageCodec):
    """A pair of programs, one to encode and one to decode.

    Args:
        encoder, decoder: the programs; None looks for their usual names on the PATH.
        timeout: seconds after which a run of a program is ended.

    Attributes:
        encoders, decoders: usual names of the programs, most preferred first.
        source: where to get them.

    Raises:
        BaselineUnavailable: if a program is missing.
    """

    point_name = "QP"
    encoders: tuple[str, ...]
    decoders: tuple[str, ...]
    source: str

    def __init__(self, encoder: str | None = None, decoder: str | None = None, timeout: float = 3600):
        if not (isinstance(timeout, Real) and timeout > 0):
            raise ValueError(f"{self.name}: timeout {timeout!r} is not allowed; allowed: above 0 seconds")
        self.encoder = self._find(encoder, self.encoders)
        self.decoder = self._find(decoder, self.decoders)
        self.timeout = timeout

    def _find(self, given: str | None, usual: tuple[str, ...]) -> str:
        names = usual if given is None else (str(given),)
        for name in names:
            if path := shutil.which(name):
                return path
        raise BaselineUnavailable(
            f"{self.name}: {self.label} needs the program {' or '.join(names)} on the PATH; get it from {self.source}"
        )

    @abstractmethod
    def encode_file(self, image: Image.Image, point: int, folder: Path) -> bytes:
        """The bytes of an image's file; `folder` is empty and for any files on the way."""

    @abstractmethod
    def decode_file(self, data: bytes, folder: Path) -> Image.Image:
        """The image of a file; `folder` is empty and for any files on the way."""

    def encode(self, image: Image.Image, point: float) -> Encoded:
        point = int(self.check_point(point))
        with tempfile.TemporaryDirectory(prefix="oscar-") as folder:
            return Encoded(self.encode_file(image, point, Path(folder)))

    def decode(self, data: bytes) -> Image.Image:
        with tempfile.TemporaryDirectory(prefix="oscar-") as folder:
            return self.decode_file(data, Path(folder))

    def run(self, command: list[str | Path], result: Path) -> bytes:
        """Run a program in `result`'s folder and read the file that it is to write.

        Raises:
            CodecError: naming the program, if it fails, takes too long or writes nothing.
        """
        program = Path(command[0]).name
        log = result.with_name("program.log")  # no pipe: one held open by a child of the program would outlast it
        try:
            with log.open("wb") as stream:
                status = subprocess.run(
                    [str(part) for part in command],
                    cwd=result.parent,
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    timeout=self.timeout,
                ).returncode
        except subprocess.TimeoutExpired:
            raise CodecError(f"{self.name}: {program} took longer than {self.timeout:g} seconds") from None
        except OSError as error:
            raise CodecError(f"{self.name}: {program} cannot be run: {error.strerror or error}") from error
        if status != 0:
            raise CodecError(f"{self.name}: {program} ended with exit code {status}: {_last_line(log)}")
        data = result.read_bytes() if result.is_file() else b""
        if not data:
            raise CodecError(f"{self.name}: {program} wrote no file: {_last_line(log)}")
        return data

    def version(self) -> str | None:
        """The first line in which the encoder, asked for help, tells its version."""
        try:
            run = subprocess.run([self.encoder, "--help"], capture_output=True, stdin=subprocess.DEVNULL, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        lines = (run.stdout + run.stderr).decode(errors="replace").splitlines()
        return next((" ".join(line.split()) for line in lines if "version" in line.lower()), None)

    def describe(self) -> dict:
        return {**super().describe(), "library": Path(self.encoder).name, "version": self.version()}


class BPG(ExternalCodec):
    """BPG (HEVC intra), 8 bits.

    Args:
        subsampling: of chroma; 4:4:4 is what the literature on learned compression compares with.
        level: effort of the encoder, 1 to 9.
        encoder, decoder, timeout: see `ExternalCodec`.
    """

    name, label = "bpg", "BPG"
    encoders, decoders = ("bpgenc",), ("bpgdec",)
    source = "https://bellard.org/bpg"
    points = (51, 47, 43, 39, 35, 31, 28)
    grid = tuple(range(51, -1, -1))

    def __init__(
        self,
        subsampling: str = "4:4:4",
        level: int = 9,
        encoder: str | None = None,
        decoder: str | None = None,
        timeout: float = 600,
    ):
        check_choice(self.name, "subsampling", subsampling, ("4:2:0", "4:2:2", "4:4:4"))
        self.settings = {"subsampling": subsampling, "level": check_whole(self.name, "level", level, 1, 9)}
        super().__init__(encoder, decoder, timeout)

    def encode_file(self, image: Image.Image, point: int, folder: Path) -> bytes:
        image.save(folder / "in.png", compress_level=1)
        chroma = self.settings["subsampling"].replace(":", "")
        command = [self.encoder, "-q", point, "-f", chroma, "-b", 8, "-m", self.settings["level"], "-o", "out.bpg"]
        return self.run([*command, "in.png"], folder / "out.bpg")

    def decode_file(self, data: bytes, folder: Path) -> Image.Image:
        (folder / "in.bpg").write_bytes(data)
        self.run([self.decoder, "-o", "out.png", "in.bpg"], folder / "out.png")
        with Image.open(folder / "out.png") as image:
            return image.convert("RGB")

    def describe(self) -> dict:
        return {**super().describe(), "settings": self.settings}


class VVCCodec(ExternalCodec):
    """VVC as one intra image, fed with raw Y'CbCr of 10 bits (BT.709).

    The image is padded to multiples of 8 by replicating its edge. Raw files do not tell their size, so that ours are
    the stream with 4 bytes of width and height before it.
    """

    chroma: str
    grid = tuple(range(63, -1, -1))

    @abstractmethod
    def encode_command(self, width: int, height: int, point: int) -> list[str | Path]:
        """The command that makes out.vvc of in.yuv, raw frames of width x height."""

    @abstractmethod
    def decode_command(self) -> list[str | Path]:
        """The command that makes out.yuv of in.vvc."""

    def encode_file(self, image: Image.Image, point: int, folder: Path) -> bytes:
        pixels = np.pad(np.asarray(image), ((0, -image.height % 8), (0, -image.width % 8), (0, 0)), mode="edge")
        padded = Image.fromarray(pixels)
        (folder / "in.yuv").write_bytes(to_yuv(padded, self.chroma))
        return self.run(self.encode_command(padded.width, padded.height, point), folder / "out.vvc")

    def encode(self, image: Image.Image, point: float) -> Encoded:
        header = pack_size(self.name, image)
        stream = super().encode(image, point).data
        return Encoded(header + stream, {"size": len(header), "stream": len(stream)})

    def decode_file(self, data: bytes, folder: Path) -> Image.Image:
        (width, height), stream = split_size(self.name, data)
        (folder / "in.vvc").write_bytes(stream)
        samples = self.run(self.decode_command(), folder / "out.yuv")
        try:
            padded = from_yuv(samples, width + -width % 8, height + -height % 8, self.chroma)
        except ValueError as error:
            raise CodecError(f"{self.name}: {Path(self.decoder).name} wrote {error}") from None
        return padded.crop((0, 0, width, height))


class VTM(VVCCodec):
    """VTM, the reference software of VVC, all intra.

    Args:
        config: encoder_intra_vtm.cfg; None looks where it is in VTM's source tree, beside the program's folder.
        subsampling: of chroma.
        encoder, decoder, timeout: see `ExternalCodec`.
    """

    name, label = "vtm", "VTM"
    encoders = ("EncoderAppStatic", "EncoderApp")
    decoders = ("DecoderAppStatic", "DecoderApp")
    source = "https://vcgit.hhi.fraunhofer.de/jvet/VVCSoftware_VTM"
    points = (52, 47, 42, 37, 32, 27)

    def __init__(
        self,
        config: str | None = None,
        subsampling: str = "4:4:4",
        encoder: str | None = None,
        decoder: str | None = None,
        timeout: float = 3600,
    ):
        check_choice(self.name, "subsampling", subsampling, CHROMAS)
        super().__init__(encoder, decoder, timeout)
        self.chroma = subsampling
        beside = Path(self.encoder).resolve().parents[1] / "cfg" / "encoder_intra_vtm.cfg"
        self.config = (beside if config is None else Path(config)).absolute()
        if not self.config.is_file():
            raise BaselineUnavailable(
                f"{self.name}: no file {self.config}; give VTM's encoder_intra_vtm.cfg as config; "
                f"it comes with the source at {self.source}"
            )

    def encode_command(self, width: int, height: int, point: int) -> list[str | Path]:
        return [
            *(self.encoder, "-c", self.config, "-i", "in.yuv", "-b", "out.vvc", "-o", os.devnull),
            *("-wdt", width, "-hgt", height, "-fr", 1, "-f", 1, "-q", point),
            f"--InputChromaFormat={self.chroma.replace(':', '')}",
            "--InputBitDepth=10",
        ]

    def decode_command(self) -> list[str | Path]:
        return [self.decoder, "-b", "in.vvc", "-o", "out.yuv", "-d", 10]

    def describe(self) -> dict:
        return {**super().describe(), "settings": {"subsampling": self.chroma, "config": self.config.name}}


class VVenC(VVCCodec):
    """Fraunhofer's VVenC and VVdeC, which code 4:2:0.

    Args:
        preset: effort: faster, fast, medium, slow or slower.
        perceptual: adapt the quantiser to what is seen, the program's own default; off, it minimises squared error.
        encoder, decoder, timeout: see `ExternalCodec`.
    """

    name, label = "vvenc", "VVenC"
    encoders, decoders = ("vvencapp",), ("vvdecapp",)
    source = "https://github.com/fraunhoferhhi/vvenc and https://github.com/fraunhoferhhi/vvdec"
    points = (52, 47, 42, 37, 32, 27)
    chroma = "4:2:0"

    def __init__(
        self,
        preset: str = "slow",
        perceptual: bool = False,
        encoder: str | None = None,
        decoder: str | None = None,
        timeout: float = 3600,
    ):
        check_choice(self.name, "preset", preset, ("faster", "fast", "medium", "slow", "slower"))
        check_choice(self.name, "perceptual", perceptual, (False, True))
        self.settings = {"preset": preset, "perceptual": perceptual}
        super().__init__(encoder, decoder, timeout)

    def encode_command(self, width: int, height: int, point: int) -> list[str | Path]:
        return [
            *(self.encoder, "-i", "in.yuv", "-s", f"{width}x{height}", "-c", "yuv420_10", "-r", 1, "-f", 1),
            *("--preset", self.settings["preset"], "-q", point, "--qpa", int(self.settings["perceptual"])),
            *("-o", "out.vvc"),
        ]

    def decode_command(self) -> list[str | Path]:
        return [self.decoder, "-b", "in.vvc", "-o", "out.yuv"]

    def describe(self) -> dict:
        return {**super().describe(), "settings": self.settings}


def _last_line(log: Path) -> str:
    """The last line that a program printed."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it printed nothing"
