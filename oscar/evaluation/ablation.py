"""Which timestep serves a rate best: any set of mappings, and a sweep, over one checkpoint.

    OUTPUT/rates/<rate>/    the evaluation of each rate, whose points are timesteps (`oscar.evaluation.evaluate`)
    OUTPUT/sweep.csv        all rows: image, rate, timestep (-1: the image's own), rates in bpp, metrics
    OUTPUT/tables/          side_by_side_<metric>, mappings_<metric>, timesteps: CSV, Markdown, LaTeX
    OUTPUT/plots/           quality against timestep, a panel for each rate: PDF, SVG, PNG

The weights stay as they are: this asks where the checkpoint's UNet should be told to stand, not how well another
mapping would do after training with it (`oscar train init_from=... timesteps=...`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch

from oscar.bottlenecks.vq import need_rates
from oscar.checkpoint import content_hash
from oscar.codec import OscarCodec
from oscar.evaluation.calibration import by_bpp, calibrate
from oscar.evaluation.curves import metric_title
from oscar.evaluation.evaluate import evaluate, prepare_ablation
from oscar.evaluation.results import load_results
from oscar.evaluation.timestep_codec import TimestepCodec
from oscar.evaluation.timestep_plots import BEST, OWN, plot_ablation
from oscar.inference.load import load
from oscar.metrics.image import METRICS, MetricSet
from oscar.rates import RatePoint
from oscar.timesteps import TimestepMapping, mapping_from_config, read_calibration
from oscar.utils.files import atomic_write
from oscar.utils.tables import Table

if TYPE_CHECKING:
    from oscar.config import AblateTimestepsConfig


def ablate_config(config: AblateTimestepsConfig) -> pd.DataFrame:
    """Run the ablation of a configuration, with progress, and write tables and plots; returns the choices.

    Raises:
        ValueError: for an unknown model, mapping, metric or rate, or a folder without images.
    """
    metrics, paths = prepare_ablation(config)
    codec = load(config.model, config.device, torch.float32)
    need_rates(codec.bottleneck, "the ablation")
    parse = codec.bottleneck.parse
    rates = by_bpp(codec.bottleneck.rates if config.rates is None else {parse(bpp) for bpp in config.rates})
    mappings, own = make_mappings(codec, config.mappings, paths)
    for mapping in mappings.values():
        mapping.check(rates, len(codec.backbone.schedule))
    output = Path(config.output)
    rows = sweep(
        codec,
        rates,
        mappings,
        config.sweep,
        paths,
        metrics,
        output,
        Path(config.model).absolute().name,
        asdict(config),
        content_hash(config.model),
    )
    atomic_write(output / "sweep.csv", rows.to_csv(index=False).encode())
    names = [name for name in metrics.names if name in rows]
    choices = choose(rows, rates, mappings, names, own)
    for table in make_tables(choices, mappings, names):
        table.write(output / "tables")
        if table.name.startswith("side_by_side"):
            print(table.to_markdown())
    images = rows["image"].nunique()
    for name in names:
        plot_ablation(output / "plots" / f"sweep_{name.replace('+', '_plus')}", rows, choices, name, images)
    for what in ("sweep.csv", "tables", "plots"):
        print(f"{what}: {output / what}")
    return choices


def make_mappings(
    codec: OscarCodec, configs: Mapping[str, Mapping], paths: Sequence[Path]
) -> tuple[dict[str, TimestepMapping], pd.DataFrame | None]:
    """The mappings of some configs by name. `cosine` and `snr` without a calibration file are measured on `paths`.

    Returns:
        The mappings, and the calibration's `images` if there was one: per_image needs one too.
    """
    images = None
    measured: dict[str, TimestepMapping] = {}
    resolved = {name: read_calibration(config) for name, config in configs.items()}
    missing = [
        name
        for name, config in resolved.items()
        if config.get("kind") in ("cosine", "snr") and config.get("values") is None
    ]
    others = {
        name: mapping_from_config(config, codec.bottleneck.rates)
        for name, config in resolved.items()
        if name not in missing
    }
    if missing or any(mapping.per_image for mapping in others.values()):
        calibration = calibrate(codec, paths)
        images, measured = calibration.images, calibration.mappings
    return {name: others[name] if name in others else measured[resolved[name]["kind"]] for name in configs}, images


def sweep(
    codec: OscarCodec,
    rates: Sequence[RatePoint],
    mappings: Mapping[str, TimestepMapping],
    timesteps: Sequence[int],
    paths: Sequence[Path],
    metrics: MetricSet,
    output: Path,
    model: str,
    config: dict | None = None,
    content: str | None = None,
) -> pd.DataFrame:
    """Score every image and rate at each timestep of the sweep and of a mapping; goes on where it stopped.

    Returns:
        The rows: image, rate, timestep (`OWN` for the image's own), nominal_bpp, actual_bpp, and the metrics.
    """
    frames = []
    for rate in rates:
        points = {float(timestep) for timestep in timesteps}
        points |= {_point(mapping, rate) for mapping in mappings.values()}
        folder = output / "rates" / f"{rate.bpp:.4f}"
        evaluate(TimestepCodec(codec, rate, model, content), paths, metrics, folder, sorted(points), config=config)
        frame, _ = load_results(folder)
        frames.append(frame[frame["point"].isin(points)].assign(rate=rate.bpp))
    rows = pd.concat(frames, ignore_index=True).rename(columns={"point": "timestep"})
    scored = [name for name in metrics.names if name in rows]
    return rows[["image", "rate", "timestep", "nominal_bpp", "actual_bpp", *scored]]


def _point(mapping: TimestepMapping, rate: RatePoint) -> float:
    return OWN if mapping.per_image else float(mapping(rate))


def choose(
    rows: pd.DataFrame,
    rates: Sequence[RatePoint],
    mappings: Mapping[str, TimestepMapping],
    metrics: Sequence[str],
    own: pd.DataFrame | None,
) -> pd.DataFrame:
    """What each mapping chooses and what comes of it, and the best timestep of all that were tried.

    Args:
        rows: of `sweep`.
        rates, mappings: those of the sweep.
        metrics: names of the columns.
        own: of `make_mappings`, for the mean of the images' own timesteps.

    Returns:
        Columns rate, mapping, timestep (the mean under per_image), actual_bpp and metrics (means over images); with a
        row for each rate and mapping, and one for each rate and metric whose mapping is `best` and whose other metrics
        are missing. The best is the best mean over images among one timestep for all of them.
    """
    means = rows.groupby(["rate", "timestep"])[["actual_bpp", *metrics]].mean()
    result = []
    for rate in rates:
        for name, mapping in mappings.items():
            point = _point(mapping, rate)
            timestep = own.loc[own["rate"] == rate.bpp, "timestep"].mean() if point == OWN else point
            result.append({"rate": rate.bpp, "mapping": name, "timestep": timestep, **means.loc[rate.bpp, point]})
        tried = means.loc[rate.bpp].drop(index=OWN, errors="ignore")
        for metric in metrics:
            values = tried[metric].dropna()
            if len(values):
                timestep = values.idxmax() if METRICS[metric].higher_is_better else values.idxmin()
                result.append(
                    {
                        "rate": rate.bpp,
                        "mapping": BEST,
                        "timestep": timestep,
                        "actual_bpp": tried.loc[timestep, "actual_bpp"],
                        metric: values[timestep],
                    }
                )
    return pd.DataFrame(result)


def make_tables(choices: pd.DataFrame, mappings: Mapping[str, TimestepMapping], metrics: Sequence[str]) -> list[Table]:
    """Side by side the measured and tabled mappings and the best timestep; all mappings; and their timesteps."""
    names = list(mappings)
    compared = [name for name, mapping in mappings.items() if mapping.kind in ("table", "cosine", "snr")]
    chosen = choices[choices["mapping"] != BEST]
    timesteps = chosen.pivot(index="rate", columns="mapping", values="timestep")[names]
    tables = [
        Table(
            "timesteps",
            "Timestep of each mapping by rate; of per_image the mean over images.",
            _with_rate(timesteps),
            _titles(names),
            dict.fromkeys(names, "{:.0f}".format),
        )
    ]
    for metric in metrics:
        title, digits = metric_title(metric), 2 if METRICS[metric].unit == "dB" else 4
        best = choices[(choices["mapping"] == BEST) & choices[metric].notna()].set_index("rate")
        values = chosen.pivot(index="rate", columns="mapping", values=metric)[names].assign(**{BEST: best[metric]})
        with_mean = pd.concat([values, values.mean().to_frame("mean").T])
        shown = dict.fromkeys([*names, BEST], f"{{:.{digits}f}}".format)
        note = (
            "best: of all timesteps tried the one with the best mean, chosen on these images; cosine and snr are "
            "measured on them too, unless a calibration file is named."
        )
        tables.append(
            Table(
                f"mappings_{metric}",
                f"{title} by rate under each mapping, same weights throughout.",
                _with_rate(with_mean),
                _titles([*names, BEST]),
                shown,
                [note],
            )
        )
        columns = {}
        for name in (*compared, BEST):
            columns[f"{name} t"] = best["timestep"] if name == BEST else timesteps[name]
            columns[f"{name} {title}"] = values[name]
        pairs = pd.DataFrame(columns)
        pairs = pd.concat([pairs, pairs.mean().to_frame("mean").T])
        pairs.loc["mean", [name for name in pairs if name.endswith(" t")]] = None
        formats = {name: "{:.0f}".format if name.endswith(" t") else f"{{:.{digits}f}}".format for name in pairs}
        tables.append(
            Table(
                f"side_by_side_{metric}",
                f"Timestep and {title} by rate, same weights throughout.",
                _with_rate(pairs),
                _titles(list(pairs)),
                formats,
                [note],
            )
        )
    return tables


def _with_rate(frame: pd.DataFrame) -> pd.DataFrame:
    """With the index as a first column of words."""
    rates = [index if isinstance(index, str) else f"{index:.4f}" for index in frame.index]
    plain = frame.reset_index(drop=True)
    plain.insert(0, "rate", rates)
    return plain


def _titles(names: Sequence[str]) -> dict[str, str]:
    return {name: name for name in ("rate", *names)}
