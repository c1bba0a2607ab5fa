"""Validation during training: real files of a fixed set of images, metrics of what they decode to, and a grid of it.

    vae                  reconstructions by the autoencoder: metrics
    diffusion_pretrain   loss at fixed noise and timesteps
    bottleneck           files at every rate: metrics, actual bpp, cosine of quantised latent and latent, use of codes
    joint                likewise

With a hyperprior, qualities are in the place of rates, and there is no codebook.

Until the entropy tables are counted at the end of training, files are coded with tables from the quantisers' moving
averages.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from oscar.bottlenecks import Point
from oscar.bottlenecks.vq import perplexity
from oscar.codec import OscarCodec
from oscar.config import ConfigError, TrainConfig
from oscar.data.folders import find_images
from oscar.data.images import read_image
from oscar.data.tensors import to_pil, to_tensor
from oscar.metrics.image import METRICS, MetricSet
from oscar.models.padding import pad_to_multiple
from oscar.training.stages.base import Stage, validation_points
from oscar.utils.files import atomic_write
from oscar.utils.rng import StepRng

PRIOR_DRAWS = 4  # timesteps per image
_CELL, _CAPTION, _GAP = 256, 18, 4  # pixels of the grid
_OTHERS = {"bpp": False, "cosine": True, "loss": False}  # whether higher is better, of scalars that are no metrics


@dataclass
class Row:
    """What one image gives, at one rate where there are rates.

    Attributes:
        number: of the image within the set.
        rate: nominal bpp, quality, or other operating point; None in stages without rates and for originals.
        label: what it is called in the names of scalars.
        values: scalar by name, none for an original; None where a metric does not exist for this image.
        codes: uses of each code (K,), None without a codebook.
        cell: what the grid shows and its caption, None if the image is not in the grid.
    """

    number: int
    rate: float | None = None
    values: dict[str, float | None] = field(default_factory=dict)
    codes: np.ndarray | None = None
    cell: tuple[Image.Image, str] | None = None
    label: str = ""


class Validator:
    """Measures a stage on the set of `config.validation`, whose images are shared out over the processes.

    Args:
        config: the run; its validation is enabled.
        accelerator: of the run.

    Attributes:
        best: the scalar that picks the best checkpoint.
        higher_is_better: its direction.

    Raises:
        ConfigError: for a metric or a `best` that cannot be had.
        ImageError: if there is no image, or one cannot be read.
    """

    def __init__(self, config: TrainConfig, accelerator: Accelerator):
        options = config.validation
        self.config, self.accelerator = config, accelerator
        self.stage_name = config.stage.name
        names = [] if self.stage_name == "diffusion_pretrain" else options.metrics.names
        with accelerator.main_process_first():  # which downloads weights, if they may be
            self.metrics = MetricSet(
                names, accelerator.device, options.metrics.files, options.metrics.download, key="validation.metrics"
            )
        sets = [name for name in names if METRICS[name].kind == "set"]
        if sets:
            raise ConfigError(
                f"validation.metrics.names has {sets[0]}, which compares sets; allowed: metrics of single images"
            )
        self.best = self._find_best()
        self.higher_is_better = _OTHERS[self.best] if self.best in _OTHERS else METRICS[self.best].higher_is_better
        for name, reason in self.metrics.unavailable.items():
            get_logger(__name__).warning("validation without %s: %s", name, reason)
        paths = find_images(options.images)[: options.limit]
        self.count = len(paths)
        # every process takes as many turns, going through its last image again if need be: sharded networks want that
        turns = range(
            accelerator.process_index,
            -(-self.count // accelerator.num_processes) * accelerator.num_processes,
            accelerator.num_processes,
        )
        self.images = [(turn, centre(read_image(paths[min(turn, self.count - 1)]), options.crop)) for turn in turns]

    def _find_best(self) -> str:
        available = [name for name in self.metrics.names if name not in self.metrics.unavailable]
        allowed = {"vae": available, "diffusion_pretrain": ["loss"]}.get(self.stage_name, [*available, "bpp", "cosine"])
        if not allowed:
            reasons = "; ".join(self.metrics.unavailable.values())
            raise ConfigError(f"validation.metrics.names has no metric that can be had: {reasons}")
        best = self.config.validation.best
        if best is None:
            return "cosine" if self.stage_name == "bottleneck" or not available and "cosine" in allowed else allowed[0]
        if best not in allowed:
            reason = self.metrics.unavailable.get(best)
            raise ConfigError(
                f"validation.best is {best!r}{f', which is unavailable ({reason})' if reason else ''}; "
                f"allowed: {', '.join(allowed)}"
            )
        return best

    @torch.no_grad()
    def run(self, stage: Stage, step: int) -> dict[str, float]:
        """Validate the weights that the stage has now, and put it back into the mode that it was in.

        The grid is written to `output/validation/step-NNNNNNN.png` and given to the trackers.

        Args:
            stage: not wrapped, on the accelerator's device.
            step: of the run.

        Returns:
            Scalars by name, equal on every process: means over images and rates, then by rate, as psnr_0.0625;
            besides metrics these are bpp (of the files), cosine, perplexity (of the codes of the whole set) and
            used (share of the codes that occur). NaN where a metric exists for no image.
        """
        training = stage.training
        stage.eval()
        try:
            rows = [row for row in self._rows(stage) if row.number < self.count]
        finally:
            stage.train(training)
        rows = sorted(gather_object(rows), key=lambda row: (row.number, row.rate or 0))
        cells = [row for row in rows if row.cell is not None]
        if self.accelerator.is_main_process and cells:
            self._publish(draw_grid(cells), step)
        return summarise(rows)

    def _rows(self, stage: Stage) -> Iterator[Row]:
        if self.stage_name == "diffusion_pretrain":
            for number, image in self.images:
                images = self._padded(image, stage.backbone.factor).expand(PRIOR_DRAWS, -1, -1, -1)
                loss = stage(images, StepRng(number, self.config.seed))["loss"]
                yield Row(number, values={"loss": loss.item()})
            return
        for number, image in self.images:
            if number < self.config.validation.grid:
                yield Row(number, cell=(centre(image, _CELL), f"{image.width} x {image.height}"))
        if self.stage_name == "vae":
            for number, image in self.images:
                yield self._row(number, None, image, self._autoencode(stage, image), "decoded")
        else:
            codec = stage.current_codec()
            points = validation_points(self.config.validation, codec.bottleneck)
            with codec.bottleneck.ready_to_code():
                codec.forget_fingerprint()  # the weights have changed
                for number, image in self.images:
                    for point in points:
                        yield self._code(codec, point, number, image)
            codec.forget_fingerprint()

    def _code(self, codec: OscarCodec, point: Point, number: int, image: Image.Image) -> Row:
        """One image at an operating point through a file and back."""
        encoded = codec.quantise(codec.encode_latent(to_tensor(image), point), point)
        (data,) = codec.write(encoded, point, image.height, image.width)
        parsed = codec.read(data)
        decoded = to_pil(codec.decode_files([parsed])[0])
        row = self._row(number, point.value, image, decoded, f"{point.value:.4g}: {len(data):,} bytes")
        row.label = codec.bottleneck.label(point)
        cosine, row.codes = codec.bottleneck.judge(parsed.symbols, point, encoded.latent)
        row.values |= {"bpp": 8 * len(data) / (image.width * image.height), "cosine": cosine}
        return row

    def _autoencode(self, stage: Stage, image: Image.Image) -> Image.Image:
        decoded = stage.backbone.decode(stage.backbone.encode(self._padded(image, stage.backbone.factor)))
        return to_pil(decoded[0, :, : image.height, : image.width].clamp(-1, 1))

    def _padded(self, image: Image.Image, factor: int) -> Tensor:
        """The image as (1, 3, H, W) with whole latent positions."""
        return pad_to_multiple(to_tensor(image).to(self.accelerator.device), factor)

    def _row(self, number: int, rate: float | None, image: Image.Image, decoded: Image.Image, caption: str) -> Row:
        row = Row(number, rate, self.metrics.score(image, decoded))
        if number < self.config.validation.grid:
            row.cell = centre(decoded, _CELL), caption
        return row

    def _publish(self, grid: Image.Image, step: int) -> None:
        folder = Path(self.config.output) / "validation"
        folder.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        grid.save(buffer, "PNG")
        atomic_write(folder / f"step-{step:07d}.png", buffer.getvalue())
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({"validation": np.asarray(grid)[None]}, step=step, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({"validation": [grid]}, step=step)


def summarise(rows: list[Row]) -> dict[str, float]:
    """The scalars of all rows, see `Validator.run`."""
    rows = [row for row in rows if row.values]
    scalars = _means(rows)
    for rate in sorted({row.rate for row in rows if row.rate is not None}):
        group = [row for row in rows if row.rate == rate]
        use = {}
        if group[0].codes is not None:
            codes = sum(row.codes for row in group)
            use = {"perplexity": perplexity(torch.from_numpy(codes)).item(), "used": float(np.mean(codes > 0))}
        scalars |= {f"{name}_{group[0].label}": value for name, value in {**_means(group), **use}.items()}
    return scalars


def _means(rows: list[Row]) -> dict[str, float]:
    values = {name: [row.values[name] for row in rows if row.values[name] is not None] for name in rows[0].values}
    return {name: fmean(present) if present else math.nan for name, present in values.items()}


def centre(image: Image.Image, side: int | None) -> Image.Image:
    """The centre crop, no larger than the image; None takes the whole."""
    if side is None:
        return image
    width, height = min(side, image.width), min(side, image.height)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def draw_grid(rows: list[Row]) -> Image.Image:
    """A row per image: the original, then its reconstructions by rate, their centres in their own pixels."""
    numbers = list(dict.fromkeys(row.number for row in rows))
    columns = max(sum(row.number == number for row in rows) for number in numbers)
    step = _CELL + _GAP, _CELL + _CAPTION + _GAP
    grid = Image.new("RGB", (_GAP + columns * step[0], _GAP + len(numbers) * step[1]), (244, 244, 244))
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(12)
    for line, number in enumerate(numbers):
        cells = [row.cell for row in rows if row.number == number]
        for column, (image, caption) in enumerate(cells):
            left, top = _GAP + column * step[0], _GAP + line * step[1]
            draw.text((left, top), caption, (30, 30, 30), font)
            grid.paste(image, (left, top + _CAPTION))
    return grid
