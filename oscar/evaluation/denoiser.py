"""What the denoising step does: a codec's files decoded with its UNet, without it, and at one timestep throughout.

    OUTPUT/<variant>/                   an evaluation of each of `VARIANTS` (`oscar.evaluation.evaluate`)
    OUTPUT/tables/denoiser_<metric>     a row for each operating point: CSV, Markdown, LaTeX

The weights stay as they are: this asks what the UNet of a trained model is worth to its decoder, not how well a model
would do that was trained without one. What no quantisation would give is z0 with the RMS of each channel of z_hat at
the highest point, since a bottleneck may hand the latent on at another scale.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from oscar.baselines.base import Encoded, ImageCodec, RoundTrip
from oscar.bottlenecks.vq import channel_rms, rescale
from oscar.codec import OscarCodec
from oscar.data.tensors import to_pil, to_tensor
from oscar.evaluation.codecs import OscarImageCodec, load_oscar
from oscar.evaluation.curves import metric_title
from oscar.evaluation.evaluate import evaluate, prepare_ablation
from oscar.evaluation.results import EvaluationError
from oscar.metrics.image import METRICS
from oscar.utils.tables import Table

if TYPE_CHECKING:
    from oscar.config import AblateDenoiserConfig

CODEC, CONSTANT, BYPASSED, UNQUANTISED, VAE = VARIANTS = ("codec", "constant", "bypassed", "unquantised", "vae")
AT_ONE_POINT = (UNQUANTISED, VAE)


class PartialCodec(OscarImageCodec):
    """A codec of which a part is left out; files are those of the whole.

    Args:
        whole: the codec.
        variant: "constant" denoises at `timestep` whatever the operating point, "bypassed" decodes x0 = z_hat,
            "unquantised" denoises z0 as it does z_hat, "vae" decodes z0; these two write no file.
        timestep: of "constant".
    """

    def __init__(self, whole: OscarImageCodec, variant: str, timestep: float | None = None):
        super().__init__(whole.codec, whole.model, whole.protocol, whole.sha256, whole.source)
        self.variant, self.timestep = variant, timestep
        self.name, self.label = f"{whole.name}-{variant}", f"{whole.label}, {variant}"

    def describe(self) -> dict:
        return {**super().describe(), "variant": self.variant, "timestep": self.timestep}

    @torch.inference_mode()
    def round_trip(self, image: Image.Image, point: float) -> RoundTrip:
        if self.variant not in AT_ONE_POINT:
            return ImageCodec.round_trip(self, image, point)
        codec, found = self.codec, self.codec.find_point(point)
        start = time.perf_counter()
        encoded = codec.quantise(codec.encode_latent(to_tensor(image), found), found)
        latent = rescale(encoded.latent.float(), channel_rms(codec.bottleneck.dequantise(encoded.symbols, found)))
        middle = time.perf_counter()
        if self.variant == UNQUANTISED:
            own = encoded.timesteps
            latent = codec.denoiser(latent, codec.mapping(found) if own is None else own)
        decoded = self._decode(latent, image.height, image.width)
        return RoundTrip(image, decoded, None, None, None, middle - start, time.perf_counter() - middle)

    def encode(self, image: Image.Image, point: float) -> Encoded:
        if self.variant in AT_ONE_POINT:
            raise ValueError(f"{self.name}: writes no files; allowed: round_trip")
        return super().encode(image, point)

    @torch.inference_mode()
    def decode(self, data: bytes) -> Image.Image:
        container, point, symbols = self.codec.read(data)
        latent = self.codec.bottleneck.dequantise(symbols, point)
        if self.variant == CONSTANT:
            latent = self.codec.denoiser(latent, self.timestep)
        return self._decode(latent, container.height, container.width)

    def _decode(self, latent: Tensor, height: int, width: int) -> Image.Image:
        return to_pil(self.codec.decode_image(latent)[..., :height, :width])


def ablate_denoiser_config(config: AblateDenoiserConfig) -> dict[str, pd.DataFrame]:
    """Run the ablation of a configuration, with progress, write its tables and print them.

    Returns:
        By metric the table: point, timestep, actual_bpp, and means over images, a column for each variant.

    Raises:
        ValueError: for an unknown model, metric, point or timestep, or a folder without images.
    """
    metrics, paths = prepare_ablation(config)
    whole = load_oscar(config.model, config.device)
    points = sorted({whole.check_point(point) for point in (config.points or whole.points)})
    timestep = constant_timestep(whole.codec, points, config.timestep)
    output, rows = Path(config.output), {}
    for variant in VARIANTS:
        codec = whole if variant == CODEC else PartialCodec(whole, variant, timestep if variant == CONSTANT else None)
        there = points[-1:] if variant in AT_ONE_POINT else points
        frame = evaluate(codec, paths, metrics, output / variant, there, config=asdict(config))
        rows[variant] = frame[frame["point"].isin(there)]
    scored = [name for name in metrics.names if name in rows[CODEC]]
    tables = {name: make_table(rows, name, whole, timestep) for name in scored}
    for table in tables.values():
        table.write(output / "tables")
        print(table.to_markdown())
    print(f"tables: {output / 'tables'}")
    return {name: table.frame for name, table in tables.items()}


def constant_timestep(codec: OscarCodec, points: list[float], timestep: int | None) -> int:
    """The timestep of variant "constant": the one that is given, or the mean of the points' own.

    Raises:
        EvaluationError: if it is not in the schedule, or is not given where points have none.
    """
    last = len(codec.backbone.schedule) - 1
    if timestep is None and codec.mapping.per_image:
        raise EvaluationError(f"timestep is unset, and this model's are those of images; allowed: 0 to {last}")
    if timestep is None:
        return round(fmean(codec.mapping(codec.find_point(point)) for point in points))
    if not 0 <= timestep <= last:
        raise EvaluationError(f"timestep is {timestep}; allowed: 0 to {last}")
    return timestep


def make_table(rows: dict[str, pd.DataFrame], metric: str, codec: OscarImageCodec, timestep: int) -> Table:
    """Means over images of one metric.

    Args:
        rows: by variant, of `evaluate`.
        metric: column.
        codec: whose points they are.
        timestep: of variant "constant".
    """
    groups = {variant: frame.groupby("point")[metric].mean() for variant, frame in rows.items()}
    points = groups[CODEC].index
    mapping = codec.codec.mapping
    own = [None if mapping.per_image else mapping(codec.codec.find_point(point)) for point in points]
    frame = pd.DataFrame(
        {
            "point": points,
            "timestep": pd.Series(own, dtype=float),
            "actual_bpp": rows[CODEC].groupby("point")["actual_bpp"].mean().to_numpy(),
            **{name: groups[name].item() if name in AT_ONE_POINT else groups[name].to_numpy() for name in VARIANTS},
        }
    )
    titles = {
        "point": codec.point_name,
        "timestep": "t",
        "actual_bpp": "actual bpp",
        CODEC: "codec",
        CONSTANT: f"UNet at t = {timestep}",
        BYPASSED: "no UNet",
        UNQUANTISED: "not quantised",
        VAE: "neither",
    }
    shown = f"{{:.{2 if METRICS[metric].unit == 'dB' else 4}f}}".format
    formats = dict.fromkeys(VARIANTS, shown)
    formats |= dict.fromkeys(("point", "actual_bpp"), "{:.4f}".format) | {"timestep": "{:.0f}".format}
    caption = f"{metric_title(metric)} of {codec.model}, means over {rows[CODEC]['image'].nunique()} images."
    notes = [
        f"Same weights throughout, same files but for the last two columns. UNet at t = {timestep}: at every point.",
        "Not quantised: the latent itself at the highest point's scale and timestep. Neither: that, without the UNet.",
    ]
    return Table(f"denoiser_{metric.replace('+', '_plus')}", caption, frame, titles, formats, notes)
