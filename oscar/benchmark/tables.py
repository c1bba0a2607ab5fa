"""Tables of a benchmark, and the frames they are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from oscar.evaluation.curves import metric_title
from oscar.metrics.image import METRICS
from oscar.utils.tables import NONE, Table, filled, plain_minus

RATES = {"nominal_bpp": "nominal bpp", "estimated_bpp": "estimated bpp", "actual_bpp": "actual bpp"}
SECONDS = {"encode_seconds": "encode s", "decode_seconds": "decode s"}
PROTOCOL_NOTES = {
    "bitstream": "",
    "paper": " Protocol paper, as published: images resized to multiples of 128 pixels, original norms, nominal rate.",
}  # docs/protocols.md


# The tables.


def means_frame(rows: pd.DataFrame, set_scores: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    """Means over images by codec and point.

    Args:
        rows: of all codecs, as `evaluate` gives them, and label.
        set_scores: columns codec, point and set metrics.
        metrics: all that were asked for; those without a value are left out.

    Returns:
        Columns codec, label, protocol, point, images, nominal_bpp, estimated_bpp, actual_bpp, metrics, encode_seconds
        and decode_seconds; codecs in the order of `rows`, points in the order of rate.
    """
    single = [name for name in metrics if name in rows]
    values = [*RATES, *single, *SECONDS]
    groups = rows.groupby(["codec", "label", "protocol", "point"], sort=False)
    means = pd.concat([groups.size().rename("images"), groups[values].mean()], axis=1).reset_index()
    if len(set_scores):
        means = means.merge(set_scores, on=["codec", "point"], how="left")
    means["rate"] = means["actual_bpp"].fillna(means["nominal_bpp"])
    means = means.sort_values(["codec", "rate"], key=_as_they_come, ignore_index=True)
    found = filled(means, {name: name for name in metrics})
    return means[["codec", "label", "protocol", "point", "images", *RATES, *found, *SECONDS]]


def means_table(
    means: pd.DataFrame,
    metrics: Sequence[str],
    unavailable: Mapping[str, str],
    protocol: str = "bitstream",
    left_out: Sequence[str] = (),
) -> Table:
    """The table of means of one protocol; what is unavailable stands in it with the reason, and as notes `left_out`."""
    means = means[means["protocol"] == protocol]
    missing = {name: f"unavailable: {reason}" for name, reason in unavailable.items()}
    codecs = pd.DataFrame([{"codec": n, "label": n, "note": text} for n, text in missing.items() if n not in METRICS])
    frame = pd.concat([means, codecs], ignore_index=True) if len(codecs) else means
    shown = [name for name in metrics if name in frame]
    titles = {
        "label": "codec",
        "point": "setting",
        "images": "images",
        **RATES,
        **{name: metric_title(name) for name in shown},
        **SECONDS,
        "note": "note",
    }
    notes = [f"{METRICS[name].label}: {text}" for name, text in missing.items() if name in METRICS]
    return Table(
        named("means", protocol),
        "Means over images. "
        + (
            "Rate is measured on whole files; nominal bpp is the codec's own name for the rate."
            if protocol == "bitstream"
            else PROTOCOL_NOTES[protocol].strip()
        ),
        frame,
        filled(frame, titles),
        {
            "point": "{:g}".format,
            **dict.fromkeys(RATES, "{:.4f}".format),
            **dict.fromkeys(SECONDS, "{:.3f}".format),
            **dict.fromkeys(shown, _metric_format),
        },
        [*notes, *left_out],
    )


def named(name: str, protocol: str) -> str:
    """The name of a table or plot of one protocol: plain, or with `_paper`."""
    return name if protocol == "bitstream" else f"{name}_{protocol}"


def matched_frame(matched: pd.DataFrame, rows: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    """Means at matched bytes: each baseline beside the OSCAR files that it was matched to, on the same images.

    Args:
        matched: rows of `oscar.benchmark.matched.match_bytes`.
        rows: of the targets, as `evaluate` gives them, and label.
        metrics: those to average.

    Returns:
        One row per target, its point and baseline, with means over the images where the baseline has a file that is
        not larger (`fits`, of `images`): target_bytes and bytes, actual_bpp, and for each metric its value, that of
        the target (target_<metric>) and the difference (delta_<metric>, baseline minus target). smallest_ratio is the
        mean over the other images of the baseline's smallest file's size divided by the target's.
    """
    metrics = [name for name in metrics if name in matched and name in rows]
    ours = rows.rename(columns={"codec": "target", "label": "target_label", "point": "target_point"})
    ours = ours[["image", "target", "target_label", "target_point", *metrics]]
    both = matched.merge(ours, on=["image", "target", "target_point"], suffixes=("", "_of_target"))
    result = []
    keys = ["target", "target_label", "target_point", "codec", "label"]
    for key, group in both.groupby(keys, sort=False):
        fits, others = group[group["fits"]], group[~group["fits"]]
        row = dict(zip(keys, key, strict=True)) | {"fits": len(fits), "images": len(group)}
        row |= {"target_bytes": fits["target_bytes"].mean(), "bytes": fits["file_bytes"].mean()}
        row |= {"actual_bpp": fits["actual_bpp"].mean()}
        row["smallest_ratio"] = (others["file_bytes"] / others["target_bytes"]).mean()
        for name in metrics:
            value, target = fits[name].mean(), fits[f"{name}_of_target"].mean()
            row |= {name: value, f"target_{name}": target, f"delta_{name}": value - target}
        result.append(row)
    return pd.DataFrame(result).sort_values(["target", "target_point"], kind="stable", ignore_index=True)


def matched_tables(means: pd.DataFrame, rows: pd.DataFrame, metrics: Sequence[str]) -> list[Table]:
    """For each target and metric a table to read: rates down, baselines across; and one of all figures, `matched`.

    Args:
        means: a `matched_frame`.
        rows: of the targets, as for it.
        metrics: those to show.
    """
    whole = Table(
        "matched",
        "Means at matched bytes: each baseline's largest file that is not larger than OSCAR's, over the images where "
        "there is one.",
        means,
        {
            "target_label": "target",
            "target_point": "rate",
            "label": "baseline",
            "fits": "images",
            "target_bytes": "target bytes",
            "bytes": "bytes",
            "smallest_ratio": "smallest file, × target",
            **{
                f"{part}{name}": f"{title}{metric_title(name)}"
                for name in metrics
                if name in means
                for part, title in (("target_", "target "), ("", ""))
            },
        },
        {
            "target_point": "{:.4f}".format,
            "smallest_ratio": "{:.1f}".format,
            **dict.fromkeys(("target_bytes", "bytes"), "{:,.0f}".format),
            **{part + name: _metric_format for name in metrics for part in ("", "target_")},
        },
    )
    targets = list(dict.fromkeys(means["target"]))
    return [
        whole,
        *(
            _matched_table(
                means[means["target"] == target],
                rows[rows["codec"] == target],
                metric,
                f"matched_{metric}" if len(targets) == 1 else f"matched_{metric}_{target}",
            )
            for target in targets
            for metric in metrics
            if metric in means
        ),
    ]


def _matched_table(means: pd.DataFrame, rows: pd.DataFrame, metric: str, name: str) -> Table:
    label = means["target_label"].iloc[0]
    lines = []
    for point, group in means.groupby("target_point", sort=False):
        own = rows[rows["point"] == point]
        line = {"metric": metric_title(metric), "rate": f"{point:.4f}", "bytes": f"{own['file_bytes'].mean():,.0f}"}
        line[label] = _metric_format(own[metric].mean())
        lines.append(line | {row["label"]: _matched_cell(row, metric) for row in group.to_dict("records")})
    frame = pd.DataFrame(lines)
    best = "higher" if METRICS[metric].higher_is_better else "lower"
    return Table(
        name,
        f"{metric_title(metric)} ({best} is better) at matched bytes, mean over {means['images'].max()} images. "
        f"Each baseline at its largest file that is not larger than that of {label}, image by image. In brackets "
        f"the difference to {label} and, where not all images have such a file, the number that have: value and "
        "difference are means over these. Where none has, the size of the smallest file as a multiple of ours.",
        frame,
        {column: column for column in frame if column != "metric"},
    )


def _matched_cell(row: Mapping, metric: str) -> str:
    fits, images = row["fits"], row["images"]
    if not fits:
        return f"smallest {row['smallest_ratio']:.1f}×"
    some = "" if fits == images else f"; {fits}/{images}"
    value, delta = row[metric], row[f"delta_{metric}"]
    return f"{_metric_format(value)} ({_signed(delta, value)}{some})" if pd.notna(value) else NONE


def bd_frame_table(bd: pd.DataFrame, method: str, protocol: str = "bitstream") -> Table:
    """The table of BD-rates between codecs under one protocol."""
    bd = bd[bd["protocol"] == protocol] if len(bd) else bd
    titles = {"label": "codec", "anchor_label": "anchor", "metric_label": "metric", "bd_rate_percent": "BD-rate %",
              "bd_metric": "BD-metric", "overlap_low": "overlap from", "overlap_high": "to",
              "overlap_percent": "overlap %", "mean_of_images_percent": "mean of images %", "bd_images": "on",
              "note": "note"}  # fmt: skip
    frame = bd.assign(metric_label=[metric_title(name) for name in bd["metric"]]) if len(bd) else bd
    return Table(
        named("bd_rate", protocol),
        f"Bjontegaard deltas of the mean curves (bjontegaard package, {method}): difference in rate at equal quality, "
        "negative where the codec needs fewer bits than the anchor, and in quality at equal rate. BD-rate holds over "
        "the overlap, the range of quality that both curves reach, given also as a share of what they span together. "
        f"MS-SSIM is on the scale -10 log10(1 - x) dB.{PROTOCOL_NOTES[protocol]}",
        frame,
        {name: title for name, title in titles.items() if name in frame},
        {
            **dict.fromkeys(("bd_rate_percent", "mean_of_images_percent"), lambda value: plain_minus(f"{value:+.1f}")),
            "overlap_percent": "{:.0f}".format,
            "bd_metric": lambda value: plain_minus(f"{value:+.3g}"),
        },
    )


def timing_frame(
    latency: pd.DataFrame, stages: pd.DataFrame, throughput: pd.DataFrame, memory: pd.DataFrame, macs: pd.DataFrame
) -> pd.DataFrame:
    """What the tables of `oscar.benchmark.speed.timing` say of a call and its stages, in one: a row each."""
    call = ["codec", "point", "direction"]
    names, figures = [*call, "stage"], ["p50_ms", "p90_ms", "p99_ms"]
    calls = [
        latency[["codec", "label", "point"]].assign(
            direction=direction,
            stage="whole call",
            note=latency.get("note"),
            **{name: latency[f"{direction}_{name}"] for name in figures},
        )
        for direction in ("encode", "decode")
    ]
    parts = stages.loc[stages["stage"] != "whole call", [*names, *figures, "share_percent"]]
    parts = parts.assign(label=parts["codec"].map(dict(zip(latency["codec"], latency["label"], strict=True))))
    frame = pd.concat([*calls, *([parts] if len(parts) else [])], ignore_index=True)
    if len(memory):
        peaks = memory.reindex(columns=[*call, "call_peak_mib", "cuda_call_peak_mib", "note"])
        peaks = peaks.rename(columns={"note": "memory_note"}).assign(stage="whole call")
        frame = frame.merge(peaks, on=names, how="left")
        frame["note"] = frame["note"].fillna(frame.pop("memory_note"))
    if len(throughput):
        best = throughput.groupby(call, as_index=False)[["images_per_s", "megapixels_per_s"]].max()
        frame = frame.merge(best.assign(stage="whole call"), on=names, how="left")
    if len(macs):
        frame = frame.merge(macs[[*names, "gmacs"]], on=names, how="left")
    return frame.sort_values(call, ascending=[True, True, False], key=_as_they_come, ignore_index=True)


def timing_table(frame: pd.DataFrame, image: str, repeats: int) -> Table:
    """The table of a `timing_frame`."""
    titles = {"label": "codec", "point": "setting", "direction": "direction", "stage": "stage", "p50_ms": "p50 ms",
              "p90_ms": "p90 ms", "p99_ms": "p99 ms", "share_percent": "share %", "call_peak_mib": "peak MiB",
              "cuda_call_peak_mib": "peak MiB on the GPU", "images_per_s": "images/s",
              "megapixels_per_s": "megapixels/s", "gmacs": "GMACs", "note": "note"}  # fmt: skip
    return Table(
        "timing",
        f"Time of one call on {image}, percentiles of {repeats} measurements taken in turns; image in memory to "
        "bytes in memory, and back. Throughput is the best batch size's; peak memory that of a process of its own.",
        frame,
        filled(frame, titles),
        {
            "point": "{:g}".format,
            "share_percent": "{:.1f}".format,
            "call_peak_mib": "{:,.0f}".format,
            "cuda_call_peak_mib": "{:,.0f}".format,
            "gmacs": "{:.3f}".format,
        },
    )


def parameter_table(parameters: pd.DataFrame) -> Table:
    """The table of parameters by part (`oscar.benchmark.speed.timing`)."""
    return Table(
        "parameters",
        "Parameters by part; the bottleneck's by rate.",
        parameters,
        {name: name for name in ("codec", "part", "rate", "parameters", "note")},
        {"rate": "{:.4f}".format, "parameters": "{:,.0f}".format},
    )


# Rows and cells.


def _as_they_come(column: pd.Series) -> pd.Series | np.ndarray:
    """Key for sorting: codecs in the order in which they are met, all else by its values."""
    return pd.factorize(column)[0] if column.name == "codec" else column


def _metric_format(value: float) -> str:
    """Four digits for values below 10, two decimals from there on."""
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.4f}"


def _signed(delta: float, value: float) -> str:
    """A difference, to the decimals of the value beside it."""
    return plain_minus(f"{delta:+.2f}" if abs(value) >= 10 else f"{delta:+.4f}")
