"""The paper's curves: ours beside the published ones, protocols beside each other, rivals and their speed.

Protocol `paper` is compared with the paper's own curves, files with what rivals publish of theirs; the two stand in no
common table, but for the one that says what honest files cost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from oscar.benchmark.plots import plot_rates
from oscar.benchmark.tables import means_frame
from oscar.evaluation.curves import (
    DATASETS,
    bd_delta,
    bd_name,
    dataset_of,
    mean_curve,
    metric_title,
    paper_curves,
    peer_curves,
    published_curves,
    published_latencies,
    rate_column,
    to_decibel,
)
from oscar.metrics.image import METRICS
from oscar.reproduce.jobs import Job
from oscar.reproduce.study import Study, Summary, read_rows
from oscar.utils.tables import Table, plain_minus

# Under protocol paper MS-SSIM is of the luma, so files are scored by it too.
BOTH = {"ms_ssim": "ms_ssim_y"}


class RateDistortion(Study):
    """Curves of a model on data sets under both protocols."""

    title = "Rate and quality"

    def check(self) -> None:
        super().check()
        self.rates_of(self.config.model)

    def metric_arguments(self) -> list[str]:
        names = self.config.metrics.names
        asked = [*names, *(other for name, other in BOTH.items() if name in names and other not in names)]
        return [f"metrics.names=[{','.join(asked)}]", *super().metric_arguments()[1:]]

    def jobs(self) -> list[Job]:
        points = len(self.rates_of(self.config.model))
        return [
            self.evaluate_job(
                f"{protocol}-on-{dataset}", self.config.model, dataset, points, (), [f"protocol={protocol}"]
            )
            for dataset in self.config.data.datasets
            for protocol in self.config.protocols
        ]

    def summarise(self, done: Sequence[str]) -> Summary:
        from oscar.evaluation.results import load_results

        summary, timed = Summary(), []
        for dataset in self.config.data.datasets:
            known = dataset_of(self.images_of(dataset))
            means, unavailable = {}, {}
            for protocol in self.config.protocols:
                if f"{protocol}-on-{dataset}" not in done:
                    continue
                folder = self.output / "runs" / f"{protocol}-on-{dataset}"
                rows = read_rows(folder, label=f"OSCAR ({self.config.model})")
                _, record = load_results(folder)
                unavailable |= record["unavailable"]
                sets = pd.DataFrame(record["set_metrics"])
                sets = sets.assign(codec=rows["codec"].iloc[0]).drop(columns="images") if len(sets) else sets
                metrics = [name for name in METRICS if name in rows or name in sets]
                means[protocol] = means_frame(rows, sets, metrics)
                timed.append(latency_of(rows, dataset, protocol, record["hardware"]))
                name = f"rd_{protocol}_{dataset}"
                title = f"{DATASETS.get(known, dataset)}, {rows['image'].nunique()} images"
                published = published_curves(known, protocol)
                for path in plot_rates(self.plots / name, means[protocol], published, title, unavailable, protocol):
                    caption = (
                        f"{path.stem.removeprefix('rd_').removesuffix('_paper')} on {dataset}, protocol {protocol}"
                    )
                    summary.figures[caption] = f"{name}/{path.stem}"
            for metric, reason in unavailable.items():
                line = f"{metric} is unavailable: {reason}"
                summary.lines += [] if line in summary.lines else [line]
            if "paper" in means and known is not None:
                summary.tables.append(published_table(means["paper"], known, self.config.tolerance))
            if len(means) == 2:
                summary.tables += protocol_tables(means["paper"], means["bitstream"], dataset)
            if "bitstream" in means and known is not None:
                summary.tables.append(rivals_table(means["bitstream"], known))
        if timed:
            summary.tables.append(latency_table(pd.concat(timed, ignore_index=True)))
        return summary


def published_table(means: pd.DataFrame, dataset: str, tolerance: Mapping[str, float]) -> Table:
    """Ours under protocol `paper` beside the paper's figure, rate by rate.

    Args:
        means: of `means_frame`.
        dataset: one of `oscar.evaluation.curves.DATASETS`.
        tolerance: largest difference that counts as reproduced, by metric.
    """
    curves = paper_curves(dataset)
    curves = curves[curves["codec"] == "oscar"]
    rows = []
    for row in curves.to_dict("records"):
        metric = row["metric"]
        ours = means[(means["nominal_bpp"] - row["bpp"]).abs() < 5e-5]
        value = float(ours[metric].iloc[0]) if len(ours) and metric in ours else float("nan")
        off, allowed = value - row["value"], tolerance.get(metric)
        verdict = (
            "not measured" if off != off else "" if allowed is None else "within" if abs(off) <= allowed else "beyond"
        )
        rows.append(
            {
                "metric": metric,
                "metric_title": metric_title(metric),
                "rate": f"{row['bpp']:.4f}",
                "ours": value,
                "published": row["value"],
                "difference": off,
                "tolerance": float("nan") if allowed is None else allowed,
                "verdict": verdict,
            }
        )
    plain = ("rate", "ours", "published", "difference", "tolerance", "verdict")
    shown = {"metric_title": "metric", **{name: name for name in plain}}
    return Table(
        f"published_{dataset}",
        f"{DATASETS[dataset]}, protocol paper: ours beside the curve of the paper, as read off its figure.",
        pd.DataFrame(rows),
        shown,
        {"difference": lambda value: plain_minus(f"{value:+.4g}"), "tolerance": "{:g}".format},
    )


def protocol_tables(paper: pd.DataFrame, files: pd.DataFrame, dataset: str) -> list[Table]:
    """What honest files cost: rate by rate, and as a Bjontegaard delta of files against protocol `paper`."""
    metrics = [name for name in METRICS if name in paper and name in files]
    both = paper.merge(files, on="point", suffixes=("_paper", "_file"))
    frame = both.assign(
        rate=both["point"].map("{:.4f}".format),
        rate_change=100 * (both["actual_bpp_file"] / both["nominal_bpp_paper"] - 1),
    )
    titles = {"rate": "rate", "nominal_bpp_paper": "nominal bpp", "actual_bpp_file": "bpp of files",
              "rate_change": "rate %"}  # fmt: skip
    formats = {"rate_change": lambda value: plain_minus(f"{value:+.1f}"),
               **dict.fromkeys(("nominal_bpp_paper", "actual_bpp_file"), "{:.4f}".format)}  # fmt: skip
    for metric in metrics:
        frame[f"{metric}_change"] = frame[f"{metric}_file"] - frame[f"{metric}_paper"]
        titles |= {f"{metric}_{kind}": f"{metric_title(metric)}, {kind}" for kind in ("paper", "file")}
        titles[f"{metric}_change"] = "change"
        formats[f"{metric}_change"] = lambda value: plain_minus(f"{value:+.4g}")
    deltas = []
    for metric in metrics:
        curves = [_curve(means, metric) for means in (paper, files)]
        delta = bd_delta(*curves, METRICS[metric].higher_is_better)
        deltas.append({"metric": metric_title(bd_name(metric)), **vars(delta)})
    return [
        Table(
            f"protocols_{dataset}",
            f"The same model on {dataset} under both protocols: nominal rate and the encoder's norms, and real files.",
            frame,
            titles,
            formats,
        ),
        _bd_table(f"honesty_{dataset}", f"What honest files cost on {dataset}: BD-rate of files against protocol "
                  "paper, negative where files need fewer bits than their nominal rate.", deltas),
    ]  # fmt: skip


def rivals_table(files: pd.DataFrame, dataset: str) -> Table:
    """Files of ours against what rivals publish of theirs, by BD-rate."""
    peers = peer_curves(dataset)
    deltas = []
    for (label, metric), group in peers.groupby(["label", "metric"], sort=False):
        if metric in files and files[metric].notna().any():
            own, other = _curve(files, metric), group[["bpp", "value"]]
            if bd_name(metric) != metric:
                other = other.assign(value=other["value"].map(to_decibel))
            delta = bd_delta(other, own, METRICS[metric].higher_is_better)
            deltas.append({"rival": label, "metric": metric_title(bd_name(metric)), **vars(delta)})
    return _bd_table(
        f"rivals_{dataset}",
        f"BD-rate of our files against those of rivals on {DATASETS[dataset]}, by their published points; negative "
        "where ours need fewer bits. Their protocols differ.",
        deltas,
    )


def _bd_table(name: str, caption: str, deltas: Sequence[Mapping]) -> Table:
    titles = {"rival": "rival", "metric": "metric", "bd_rate_percent": "BD-rate %", "bd_metric": "BD-metric",
              "overlap_percent": "overlap %", "note": "note"}  # fmt: skip
    frame = pd.DataFrame(deltas)
    return Table(
        name,
        caption,
        frame,
        {column: title for column, title in titles.items() if column in frame},
        {
            "bd_rate_percent": lambda value: plain_minus(f"{value:+.1f}"),
            "bd_metric": lambda value: plain_minus(f"{value:+.3g}"),
            "overlap_percent": "{:.0f}".format,
        },
    )


def _curve(means: pd.DataFrame, metric: str) -> pd.DataFrame:
    """A codec's curve on the scale on which BD-rate is computed."""
    curve = mean_curve(means, metric, rate_column(means))
    return curve.assign(value=curve["value"].map(to_decibel)) if bd_name(metric) != metric else curve


def latency_of(rows: pd.DataFrame, dataset: str, protocol: str, hardware: Mapping) -> pd.DataFrame:
    """Median milliseconds of our calls on images of a data set's commonest size."""
    sizes = rows.groupby(["scored_width", "scored_height"]).size()
    width, height = sizes.idxmax()
    same = rows[(rows["scored_width"] == width) & (rows["scored_height"] == height)]
    machine = hardware["gpu"] or f"{hardware['processor']}, {hardware['threads']} threads"
    return pd.DataFrame(
        {
            "label": same["label"].iloc[0],
            "protocol": protocol,
            "task": task,
            "resolution": f"{width:.0f}x{height:.0f}",
            "hardware": machine,
            "ms": 1000 * same[f"{task}_seconds"].median(),
            "source": f"measured here, {dataset}",
        }
        for task in ("encode", "decode")
        if same[f"{task}_seconds"].notna().any()
    )


def latency_table(ours: pd.DataFrame) -> Table:
    """Our latencies, and all that rivals publish of images, each of its own hardware."""
    rivals = published_latencies()
    rivals = rivals[rivals["task"].isin(("encode", "decode"))].assign(protocol="published")
    frame = pd.concat([ours, rivals.sort_values(["resolution", "task", "hardware", "ms"])], ignore_index=True)
    names = ("protocol", "task", "resolution", "hardware", "ms", "reading", "source")
    return Table(
        "latency",
        "Milliseconds of one image. Ours is the median over images of the commonest size, from image in memory to "
        "bytes in memory and back; rivals' as published. Only rows of one hardware and resolution compare.",
        frame,
        {"label": "codec", **{name: name for name in names}},
        {"ms": "{:,.1f}".format},
    )
