"""How noisy quantised latents really are: the measurement behind the mappings `cosine` and `snr`.

    OUTPUT/calibration.json     per rate, with where it comes from, and the mappings that follow (`read_calibration`)
    OUTPUT/calibration.csv      per rate
    OUTPUT/images.csv         per image and rate, of which the others are means
    OUTPUT/calibration.pdf      measured cosine against sqrt(alpha_bar_t), and the timesteps; also as SVG and PNG

The paper takes the decoder's rescaled latent y for a noisy one, y = sqrt(alpha_bar_t) z0 + sqrt(1 - alpha_bar_t) noise
(section 3.1). Here y is split, in each channel of each image, into its part along z0 and a residual orthogonal to it.
If the residual is the noise of timestep t, the cosine of y and z0 is sqrt(alpha_bar_t), the residual's share of y's
power is 1 - alpha_bar_t, and the residual is Gaussian and does not depend on z0.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from oscar.bottlenecks.vq import need_rates, rescale
from oscar.codec import OscarCodec
from oscar.data.folders import find_images
from oscar.data.images import ImageError, read_image
from oscar.data.tensors import to_tensor
from oscar.diffusion import channel_cosine
from oscar.evaluation.results import EvaluationError
from oscar.rates import RatePoint
from oscar.timesteps import CalibratedMapping, TimestepMapping
from oscar.utils.environment import describe_environment
from oscar.utils.errors import first_line
from oscar.utils.files import atomic_write
from oscar.utils.strict_json import write_json

if TYPE_CHECKING:
    from oscar.config import CalibrateTimestepsConfig

_TINY = 1e-12


@dataclass(frozen=True)
class Calibration:
    """What was measured.

    Attributes:
        images: a row per image and rate: image, rate, and the columns of `measure`.
        rates: a row per rate, by bits per pixel: see `summarise`.
        mappings: `cosine` and `snr`, which follow.
        failed: images that could not be read, with the reason.
    """

    images: pd.DataFrame
    rates: pd.DataFrame
    mappings: dict[str, CalibratedMapping]
    failed: dict[str, str]


def calibrate_config(config: CalibrateTimestepsConfig) -> Calibration:
    """Run the calibration of a configuration, with progress, and write its results.

    Raises:
        ValueError: for an unknown model, a folder without images, or a folder to save to that is no checkpoint.
    """
    from oscar.evaluation.timestep_plots import plot_calibration

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    paths = find_images(config.data.images)[: config.data.limit]
    codec = OscarCodec.from_pretrained(config.model).eval().requires_grad_(False).to(config.device)
    calibration = calibrate(codec, paths)
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    for name, frame in (("images", calibration.images), ("calibration", calibration.rates)):
        atomic_write(output / f"{name}.csv", frame.to_csv(index=False).encode())
    record = {
        "mappings": {name: mapping.to_config() for name, mapping in calibration.mappings.items()},
        "rates": calibration.rates.astype(object).where(calibration.rates.notna(), None).to_dict("records"),
        "model": config.model,
        "fingerprint": codec.fingerprint,
        "timesteps": codec.mapping.to_config(),
        "schedule": codec.backbone.schedule.config,
        "images": sorted(set(calibration.images["image"])),
        "failed": calibration.failed,
        "config": asdict(config),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **describe_environment(),
    }
    write_json(output / "calibration.json", record)
    plot_calibration(output / "calibration", calibration.rates, codec.backbone.schedule, len(record["images"]))
    print(calibration.rates.to_string(index=False, float_format="{:.4f}".format))
    print(f"calibration: {output / 'calibration.json'}")
    if config.save_to is not None:
        codec.set_mapping(calibration.mappings[config.save_mapping])
        codec.save_pretrained(config.save_to)
        print(f"checkpoint with mapping {config.save_mapping}: {config.save_to}")
    return calibration


def calibrate(codec: OscarCodec, paths: Sequence[Path], progress: bool = True) -> Calibration:
    """Measure every rate of a codec on whole images; one that cannot be read costs a line on stderr.

    Raises:
        EvaluationError: if none can be read.
        ValueError: for a model without rates.
    """
    need_rates(codec.bottleneck, "the calibration")
    rows: list[dict] = []
    failed: dict[str, str] = {}
    root = os.path.commonpath([path.parent for path in paths])
    every = 0.1 if sys.stderr.isatty() else 10  # seconds between updates of the bar
    for path in tqdm(paths, desc="calibrate", mininterval=every, disable=not progress):
        name = path.relative_to(root).as_posix()
        try:
            batch = to_tensor(read_image(path))
        except ImageError as error:
            failed[name] = first_line(error)
            tqdm.write(f"left out: {failed[name]}", file=sys.stderr)
            continue
        rates = by_bpp(codec.bottleneck.rates)
        rows += [{"image": name, "rate": rate.bpp, **measure(codec, batch, rate)} for rate in rates]
    if not rows:
        raise EvaluationError(f"none of the {len(paths)} images can be read: {next(iter(failed.values()))}")
    images = pd.DataFrame(rows)
    rates, mappings = summarise(codec, images)
    return Calibration(images, rates, mappings, failed)


@torch.inference_mode()
def measure(codec: OscarCodec, batch: Tensor, rate: RatePoint) -> dict[str, float]:
    """Compare one image's quantised and original latents.

    Args:
        codec: the codec.
        batch: the image (1, 3, H, W) in [-1, 1].
        rate: one of the codec's rate points.

    Returns:
        Means over the latent's channels: `cosine` over space, `cosine_position` (over channels, mean over positions);
        `signal_power` and `residual_power`, mean squares of the two parts of the rescaled latent; of the residual,
        standardised, `skewness`, `excess_kurtosis` and `ks_distance` (Kolmogorov-Smirnov, to the standard normal);
        `correlation` of z0 with what is left of the rescaled latent at the codec's own timestep (0 if that fits, below
        if the timestep is too low), and `magnitude_correlation` of the residual's and z0's absolute values; also
        `timestep`, the image's own (mapping `per_image`).
    """
    encoded = codec.quantise(codec.encode_latent(batch, rate), rate)
    z_hat = codec.bottleneck.at(rate).decode(encoded.symbols.indices).contiguous()
    own = codec.backbone.schedule.measure(z_hat, encoded.latent)
    latent = encoded.latent[0].flatten(1).double()
    noisy = rescale(z_hat, encoded.symbols.rms)[0].flatten(1).double()
    signal = _dot(noisy, latent) / _dot(latent, latent).clamp_min(_TINY) * latent
    residual = noisy - signal
    timestep = own if codec.mapping.per_image else codec.mapping(rate)
    rest = noisy - codec.backbone.schedule.alpha_bar(timestep).sqrt().double() * latent
    shape = _standardise(residual)
    columns = {
        "cosine": channel_cosine(z_hat, encoded.latent)[0],
        "cosine_position": F.cosine_similarity(z_hat.float(), encoded.latent.float(), dim=1),
        "signal_power": signal.square(),
        "residual_power": residual.square(),
        "skewness": shape**3,
        "excess_kurtosis": shape**4 - 3,
        "ks_distance": normal_distance(shape),
        "correlation": F.cosine_similarity(rest, latent, dim=1),
        "magnitude_correlation": _standardise(residual.abs()) * _standardise(latent.abs()),
        "timestep": own,
    }
    return {name: values.double().mean().item() for name, values in columns.items()}


def normal_distance(values: Tensor) -> Tensor:
    """Kolmogorov-Smirnov distance of each row's distribution to the standard normal one: (C, N) -> (C,)."""
    count = values.shape[1]
    expected = torch.special.ndtr(values.sort(dim=1).values)
    above = torch.arange(1, count + 1, dtype=values.dtype, device=values.device) / count
    return torch.maximum((above - expected).amax(dim=1), (expected - above).amax(dim=1) + 1 / count)


def summarise(codec: OscarCodec, images: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, CalibratedMapping]]:
    """Means over images, and the timesteps that follow.

    Returns:
        The frame: rate, images, cosine and cosine_std over images, cosine_position, residual_variance (the share of
        residual in the power of all images), skewness, excess_kurtosis, ks_distance, correlation,
        magnitude_correlation; timesteps: of the paper's table, the codec's own mapping, `cosine`, `snr`, and mean and
        standard deviation of the images' own (per_image). And the mappings `cosine` and `snr`.
    """
    groups = images.groupby("rate")
    means = groups.mean(numeric_only=True)
    rates = by_bpp(codec.bottleneck.rates)
    share = means["residual_power"] / (means["residual_power"] + means["signal_power"])
    signals = {"cosine": means["cosine"], "snr": (1 - share) ** 0.5}
    values = {"cosine": means["cosine"], "snr": share}
    mappings = {}
    for kind, signal in signals.items():
        nearest = codec.backbone.schedule.timestep_of_signal(torch.tensor([signal[rate.bpp] for rate in rates]))
        mappings[kind] = CalibratedMapping(
            timesteps={rate.id: timestep for rate, timestep in zip(rates, nearest.tolist(), strict=True)},
            values={rate.id: float(values[kind][rate.bpp]) for rate in rates},
            kind=kind,
        )
    shape = ("skewness", "excess_kurtosis", "ks_distance", "correlation", "magnitude_correlation")
    bpp = [rate.bpp for rate in rates]
    frame = pd.DataFrame(
        {
            "rate": bpp,
            "images": groups.size()[bpp].to_list(),
            "cosine": means["cosine"][bpp].to_list(),
            "cosine_std": groups["cosine"].std(ddof=0)[bpp].to_list(),
            "cosine_position": means["cosine_position"][bpp].to_list(),
            "residual_variance": share[bpp].to_list(),
            **{name: means[name][bpp].to_list() for name in shape},
            "timestep_paper": pd.array([rate.timestep for rate in rates], dtype="Int64"),
            "timestep_own": [_of_rate(codec.mapping, rate) for rate in rates],
            **{f"timestep_{kind}": [mapping(rate) for rate in rates] for kind, mapping in mappings.items()},
            "timestep_per_image": means["timestep"][bpp].to_list(),
            "timestep_per_image_std": groups["timestep"].std(ddof=0)[bpp].to_list(),
        }
    )
    return frame, mappings


def _of_rate(mapping: TimestepMapping, rate: RatePoint) -> float | None:
    return None if mapping.per_image else mapping(rate)


def by_bpp(rates: Iterable[RatePoint]) -> list[RatePoint]:
    """Rate points, the lowest rate first."""
    return sorted(rates, key=lambda rate: rate.bpp)


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """Of each row: two of (C, N) -> (C, 1)."""
    return (one * other).sum(dim=1, keepdim=True)


def _standardise(values: Tensor) -> Tensor:
    """Each row of (C, N) with mean 0 and variance 1."""
    centred = values - values.mean(dim=1, keepdim=True)
    return centred / centred.square().mean(dim=1, keepdim=True).clamp_min(_TINY).sqrt()
