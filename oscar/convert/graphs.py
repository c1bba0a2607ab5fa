"""`oscar export`: networks as ONNX graphs beside their checkpoint, from which `oscar.runtime` codes without torch.

The graphs compute in float32. Weights that a file of the checkpoint holds already stay there: a graph names file and
offset (ONNX's external data) and widens float16 to float32. What is in none, such as a UNet with merged adapters, goes
into `graphs.data`.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from oscar import checkpoint
from oscar.bottlenecks.hyperprior import HyperpriorBottleneck
from oscar.bottlenecks.vq import VQBottleneck
from oscar.codec import OscarCodec
from oscar.convert.graph_weights import as_proto, point_to, stored_weights
from oscar.inference.fitting import SLACK, peak_bytes
from oscar.inference.load import read
from oscar.model_folder import DATA, RUNTIME, identity, new_folder
from oscar.models.backbone import unet_multiple
from oscar.runtime import Codec
from oscar.runtime.files import FORMAT, RuntimeModelError
from oscar.utils.extras import need
from oscar.utils.strict_json import dumps

if TYPE_CHECKING:
    import onnx_ir

OPSET = 20
_SIDE = 1024  # pixels of the square image by which memory is told
_POSITIONS = (16, 24)  # of the latent that graphs are traced with
CHECKED_SIZES = ((17, 9), (64, 64), (301, 203), (256, 384), (520, 333))  # width and height
MOST_LEVELS = 1
# Share of the symbols: where rounding or the nearest code hangs on the last bits of float32, either is right.
MOST_SYMBOLS = 0.001


class _Part(NamedTuple):
    """One graph: what it computes, from which inputs, under which names; `grids` are inputs with free rows, columns."""

    name: str
    network: nn.Module
    inputs: dict[str, Tensor]
    output: str
    grids: dict[str, tuple[int, int]]


class _Call(nn.Module):
    """A function of a module's, as a module."""

    def __init__(self, network: nn.Module, function: Callable[..., Tensor]):
        super().__init__()
        self.network, self.function = network, function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self.network, *inputs)


class Checked(NamedTuple):
    """What torch and the runtime make of one image: bytes of its file, symbols that differ, levels of pixels that do
    at most."""

    width: int
    height: int
    point: float
    bytes: int
    symbols: int
    levels: int


class Exported(NamedTuple):
    """What was added to a model's folder, bytes by file, and how it was checked."""

    files: dict[str, int]
    checks: list[Checked]


def export(source: str | Path, target: str | Path, dtype: torch.dtype = torch.float32) -> Exported:
    """Write a model folder with graphs: a copy of the checkpoint, with what `oscar.runtime` needs beside it.

    Before it takes its name, five images of other sizes go through torch and the runtime: the runtime must decode
    torch's files to the same symbols, and to pixels at most `MOST_LEVELS` away.

    Args:
        source: name of a shipped model, a checkpoint folder or a hub id.
        target: the folder, which appears whole or not at all, and replaces an earlier checkpoint of that name.
        dtype: float32 or float16, of weights that no file of the checkpoint holds.

    Raises:
        CheckpointError: if the checkpoint cannot be read, or `target` exists and is no checkpoint.
        RuntimeModelError: for a model that the runtime cannot run, or whose graphs do not give what torch gives.
        ModuleNotFoundError: without the packages of the extra, naming it.
    """
    for package in ("onnx", "onnxscript"):
        need(package)
    target, (folder, config) = Path(target), checkpoint.read_description(source)
    if folder.resolve() in target.resolve().parents:
        raise checkpoint.CheckpointError(f"{target} lies within {folder}; allowed: a folder outside of the model's own")
    codec = read(source, "both", torch.float32)
    codec.eval().requires_grad_(False)
    parts = list(_parts(codec))
    narrow = dtype == torch.float16
    with new_folder(target) as temporary:
        shutil.copytree(folder, temporary, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.onnx", DATA, RUNTIME))
        stored = stored_weights(temporary, config["sha256"])
        with (temporary / DATA).open("wb") as data:
            for part in tqdm(parts, "graphs", disable=not sys.stderr.isatty()):
                graph = _trace(part)
                point_to(graph, stored, data, narrow)
                (temporary / f"{part.name}.onnx").write_bytes(as_proto(graph).SerializeToString())
        if not (temporary / DATA).stat().st_size:
            (temporary / DATA).unlink()
        added = sorted(path for path in temporary.iterdir() if path.suffix == ".onnx" or path.name == DATA)
        description = {
            "format": FORMAT,
            "fingerprint": identity(config),
            "factor": codec.backbone.factor,
            "latent_channels": codec.backbone.latent_channels,
            "unet_multiple": unet_multiple(codec.backbone.unet),
            "schedule_length": len(codec.backbone.schedule),
            "bytes_per_pixel": _bytes_per_pixel(codec),
            "sha256": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in added},
        }
        (temporary / RUNTIME).write_text(dumps(description, indent=2, sort_keys=True) + "\n")
        if narrow:  # as the graphs have them, so that nothing but the arithmetic differs
            for value in (*codec.backbone.parameters(), *codec.denoiser.parameters()):
                value.data = value.data.half().float()
        checks = _check(codec, Codec(temporary))
        return Exported({path.name: path.stat().st_size for path in added}, checks)


def _check(codec: OscarCodec, runtime: Codec) -> list[Checked]:
    """Compare the two on images of five sizes at points from all over the range (RuntimeModelError if they differ)."""
    checks = []
    points = codec.bottleneck.points
    for number, (width, height) in enumerate(tqdm(CHECKED_SIZES, "checks", disable=not sys.stderr.isatty())):
        point = points[number * (len(points) - 1) // (len(CHECKED_SIZES) - 1)]
        image = _example(width, height, seed=number)
        data = codec.compress(image, point)
        symbols = [codec.read(file).symbols[0].flatten() for file in (data, runtime.compress(image, point))]
        own, theirs = (np.asarray(each.decompress(data), dtype=int) for each in (codec, runtime))
        differing = int((symbols[0] != symbols[1]).sum())
        checks.append(Checked(width, height, point.value, len(data), differing, int(np.abs(own - theirs).max())))
        if checks[-1].levels > MOST_LEVELS or differing > MOST_SYMBOLS * symbols[0].numel():
            raise RuntimeModelError(
                f"the graphs do not give what torch gives: of {width}x{height} pixels {differing} symbols of "
                f"{symbols[0].numel()} differ, and pixels by up to {checks[-1].levels} levels; allowed: "
                f"{MOST_SYMBOLS:.1%} of the symbols, and {MOST_LEVELS} level"
            )
    return checks


def _example(width: int, height: int, seed: int) -> Image.Image:
    """Smooth colours with edges and some noise."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=int)
    pixels = np.where((np.indices((height, width)).sum(axis=0) // 16 % 5 == 0)[..., None], 255 - pixels, pixels)
    return Image.fromarray(np.clip(pixels + random.normal(0, 4, pixels.shape), 0, 255).astype(np.uint8))


def _parts(codec: OscarCodec) -> Iterator[_Part]:
    backbone, bottleneck, denoiser = codec.backbone, codec.bottleneck, codec.denoiser
    if codec.mapping.per_image:
        raise RuntimeModelError("timesteps.kind is 'per_image'; allowed for export: a mapping of operating points")
    factor, channels = backbone.factor, backbone.latent_channels
    latent = torch.zeros(1, channels, *_POSITIONS)
    image = torch.zeros(1, 3, *(factor * side for side in _POSITIONS))
    encode = _Call(backbone, lambda own, image: own.encode(image))
    yield _Part("vae_encoder", encode, {"image": image}, "latent", {"image": (2, 3)})
    prompt = denoiser.prompt if denoiser.prompt is not None else torch.zeros(1, 1, 1)  # which no layer reads then

    def denoise(own: nn.Module, z_hat: Tensor, timestep: Tensor) -> Tensor:
        return own.schedule.predict_x0(z_hat, own.unet(z_hat, timestep, prompt).sample, timestep)

    inputs = {"z_hat": latent, "timestep": torch.tensor([100.5])}
    yield _Part("denoiser", _Call(denoiser, denoise), inputs, "x0", {"z_hat": (2, 3)})
    decode = _Call(backbone, lambda own, x0: own.decode(x0))
    yield _Part("vae_decoder", decode, {"x0": latent}, "image", {"x0": (2, 3)})
    if isinstance(bottleneck, HyperpriorBottleneck):
        encode = _Call(bottleneck, lambda own, latent: own.hyper_encoder(latent))
        yield _Part("hyper_encoder", encode, {"latent": latent}, "side", {"latent": (2, 3)})
    elif isinstance(bottleneck, VQBottleneck):
        yield from _rate_parts(bottleneck, latent)
    else:
        raise RuntimeModelError(f"bottleneck.kind is {bottleneck.kind!r}; allowed for export: hyperprior, vq")


def _rate_parts(bottleneck: VQBottleneck, latent: Tensor) -> Iterator[_Part]:
    for rate in bottleneck.rates:
        encoder = bottleneck.at(rate)
        encode = _Call(encoder, lambda own, latent: F.normalize(own.project(latent), dim=-1))
        yield _Part(f"hyper_encoder_{rate.id}", encode, {"latent": latent}, "features", {"latent": (2, 3)})
        codes = torch.zeros(1, *_POSITIONS, encoder.quantizer.codebook.shape[-1])
        decode = _Call(encoder, lambda own, codes: own.proj(own.quantizer.project_out(codes).permute(0, 3, 1, 2)))
        yield _Part(f"hyper_decoder_{rate.id}", decode, {"codes": codes}, "z_hat", {"codes": (1, 2)})


def _trace(part: _Part) -> onnx_ir.Model:
    """The graph of a part, its weights within it."""
    free = torch.export.Dim.DYNAMIC
    shapes = tuple({place: free for place in part.grids.get(name, ())} for name in part.inputs)
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                part.network.eval(),
                tuple(part.inputs.values()),
                input_names=list(part.inputs),
                output_names=[part.output],
                dynamic_shapes=(shapes,),
                opset_version=OPSET,
                dynamo=True,
                optimize=True,
                verbose=False,
            )
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    return program.model


def _bytes_per_pixel(codec: OscarCodec) -> dict[str, float]:
    """What either direction takes at most beyond the weights, for each pixel of a large image."""
    backbone, shape = codec.backbone, (1, codec.backbone.latent_channels, *[_SIDE // codec.backbone.factor] * 2)
    timestep = torch.zeros(1, device="meta")

    def encode(vae: nn.Module, image: Tensor) -> Any:
        return backbone.run_encoder(vae, image)

    def decode(vae: nn.Module, latent: Tensor) -> Any:
        return backbone.run_decoder(vae, latent)

    def denoise(unet: nn.Module, latent: Tensor) -> Any:
        prompt = codec.denoiser.prompt
        return unet(latent, timestep, torch.zeros(1, 1, 1, device="meta") if prompt is None else prompt.to("meta"))

    dtype = torch.float32
    peaks = {
        "encode": peak_bytes(backbone.vae, encode, 1, 3, _SIDE, _SIDE, dtype=dtype),
        "decode": max(
            peak_bytes(backbone.vae, decode, *shape, dtype=dtype),
            peak_bytes(backbone.unet, denoise, *shape, dtype=dtype),
        ),
    }
    return {name: round(SLACK * peak / _SIDE**2, 1) for name, peak in peaks.items()}
