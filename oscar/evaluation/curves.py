"""Rate-distortion curves: means over images, Bjontegaard deltas between them, and published ones to compare with.

BD-rate is the mean difference in rate at equal quality, in percent: log10(rate) is interpolated over quality and the
difference integrated over the range of quality that both curves reach, all by the `bjontegaard` package. Interpolation
is piecewise cubic (PCHIP) by default, as in the JCT-VC and JVET common test conditions: it is monotone between points.
Quality is PSNR in dB; MS-SSIM goes in as -10 log10(1 - x), in dB too, since near 1 equal steps of x are not equal steps
of quality; a metric for which lower is better goes in with its sign changed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from oscar.metrics.image import METRICS, Metric

METHODS = ("pchip", "akima", "cubic")
DATA = Path(__file__).parent / "data"
DATASETS = {"kodak": "Kodak", "div2k_val": "DIV2K validation", "clic2020": "CLIC 2020 test"}
DECIBEL = "_db"  # ends the names of MS-SSIM as BD-rate uses it
PAPER, PEERS = "read off the paper's figure", "published by their authors"
_PAPER_METRICS = {"lpips": "lpips_vgg", "dists": "dists", "musiq": "musiq", "clipiqa": "clipiqa+"}
_PEER_DATASETS = {"div2k": "div2k_val"}  # others there, such as crops and other sizes, compare with nothing here
_LABELS = {
    "oscar": "OSCAR", "bpg": "BPG", "vvc": "VVC", "hific": "HiFiC", "ms_illm": "MS-ILLM", "perco": "PerCo",
    "dpict": "DPICT", "ctc": "CTC", "stablecodec": "StableCodec", "aeic_me": "AEIC-ME", "aeic_se": "AEIC-SE",
    "onedc": "OneDC", "perco_sd": "PerCo (SD)", "diffeic_50": "DiffEIC-50", "rdeic_2": "RDEIC-2", "rdeic_5": "RDEIC-5",
    "crdr_beta3.84": "CRDR (β 3.84)", "text_sketch": "Text+Sketch", "vqir": "VQIR", "control_gic": "Control-GIC",
    "cod_latent": "CoD (latent)", "cod_latent_64bit": "CoD (latent, 64 bit)", "cod_pixel": "CoD (pixel)",
    "cod_lite": "CoD-Lite", "dcvc_rt": "DCVC-RT", "dcvc_rt_intra": "DCVC-RT intra", "dcvc_uf_htl": "DCVC-UF HTL",
    "dcvc_uf_hts": "DCVC-UF HTS", "dcvc_uf_intra": "DCVC-UF intra", "dcvc_uf_ld": "DCVC-UF LD", "dlf": "DLF",
    "elic": "ELIC", "evc_small": "EVC-S", "qarv_base": "QARV", "qres34m": "QRes34M",
}  # fmt: skip


@dataclass(frozen=True)
class BDDelta:
    """What lies between two curves.

    Attributes:
        bd_rate_percent: mean difference in rate at equal quality, negative where the test curve needs fewer bits; None
            where the curves reach no common quality.
        bd_metric: mean difference in quality at equal rate, in the metric's unit, with the metric's own sign; None
            where they reach no common rate.
        overlap_low, overlap_high: the range of quality over which bd_rate_percent holds.
        overlap_percent: that range as a share of the range that the curves span together.
        note: why a figure is missing, and how many points did not count; empty if there is nothing to say.
    """

    bd_rate_percent: float | None = None
    bd_metric: float | None = None
    overlap_low: float | None = None
    overlap_high: float | None = None
    overlap_percent: float | None = None
    note: str = ""


def mean_curve(rows: pd.DataFrame, metric: str, rate: str = "actual_bpp") -> pd.DataFrame:
    """The curve of a data set: rate and metric averaged over images at each point.

    Args:
        rows: of one codec, as `oscar.evaluation.evaluate` gives them.
        metric: column.
        rate: column; `nominal_bpp` where no files were written.

    Returns:
        Columns point, bpp, value and images, in the order of rate; points without a value are left out.
    """
    table = rows[["point", rate, metric]].dropna()
    curve = table.groupby("point").agg(bpp=(rate, "mean"), value=(metric, "mean"), images=(metric, "size"))
    return curve.reset_index().sort_values("bpp", ignore_index=True)


def bd_delta(anchor: pd.DataFrame, test: pd.DataFrame, higher_is_better: bool = True, method: str = "pchip") -> BDDelta:
    """BD-rate and BD-metric of `test` against `anchor`, where they exist.

    A point that another of the same curve dominates (no more bits, no less quality) does not count, since a curve must
    rise to be integrated, and nobody would choose it.

    Args:
        anchor: columns bpp and value.
        test: likewise.
        higher_is_better: the direction of the metric.
        method: interpolation, one of `METHODS`.

    Raises:
        ValueError: for another method.
    """
    if method not in METHODS:
        raise ValueError(f"BD-rate by {method!r} does not exist; allowed: {', '.join(METHODS)}")
    sign = 1 if higher_is_better else -1
    curves = {"anchor": _rising(anchor, sign), "test": _rising(test, sign)}
    counts = {"anchor": len(anchor), "test": len(test)}
    notes = [
        f"{counts[name] - len(rates)} of the {counts[name]} points of the {name} left out as dominated"
        for name, (rates, _) in curves.items()
        if len(rates) < counts[name]
    ]
    least = 4 if method == "cubic" else 2
    for name, (rates, _) in curves.items():
        if len(rates) < least:
            reason = f"no BD-rate: the {name} has {len(rates)} points, {least} are needed"
            return BDDelta(note="; ".join([reason, *notes]))
    import bjontegaard  # here: it brings matplotlib along

    (rate_a, value_a), (rate_t, value_t) = curves.values()
    bd_rate = bd_metric = None
    low, high, share = _overlap(value_a, value_t)
    options = {"method": method, "require_matching_points": False, "min_overlap": 0}
    if share > 0:
        bd_rate = float(bjontegaard.bd_rate(rate_a, value_a, rate_t, value_t, **options))
    else:
        reaches = f"anchor {_range(value_a, sign)}, test {_range(value_t, sign)}"
        notes.insert(0, f"no BD-rate: no overlap in quality, {reaches}")
    if _overlap(rate_a, rate_t)[2] > 0:
        bd_metric = sign * float(bjontegaard.bd_psnr(rate_a, value_a, rate_t, value_t, **options))
    else:
        notes.append(f"no overlap in rate, anchor {_range(rate_a)}, test {_range(rate_t)} bpp")
    ends = sorted((sign * low, sign * high)) if share > 0 else (None, None)
    return BDDelta(bd_rate, bd_metric, *ends, 100 * share, "; ".join(notes))


def bd_table(
    rows: pd.DataFrame,
    metrics: dict[str, bool],
    tests: Sequence[str],
    anchors: Sequence[str],
    method: str = "pchip",
) -> pd.DataFrame:
    """BD-rate and BD-metric of some codecs against others.

    Args:
        rows: of all codecs, as `evaluate` gives them, and label.
        metrics: columns of `rows` with `higher_is_better`; `ms_ssim` becomes `ms_ssim_db`, `ms_ssim_y` likewise.
        tests: codecs to judge.
        anchors: codecs to judge them by; a codec is not compared with itself, nor with one of another protocol.
        method: see `bd_delta`.

    Returns:
        One row per test, anchor and metric: codec, label, protocol, anchor, anchor_label, metric, the fields of
        `BDDelta` for the mean curves, and mean_of_images_percent, the mean of the BD-rates of single images, over
        those `bd_images` of all `images` that have one. Codecs without files enter with their nominal rate.
    """
    result = []
    labels, protocols = (dict(zip(rows["codec"], rows[name], strict=True)) for name in ("label", "protocol"))
    for metric, higher in metrics.items():
        for test in tests:
            for anchor in anchors:
                if anchor == test or protocols[anchor] != protocols[test]:
                    continue
                pair = [rows[rows["codec"] == codec] for codec in (anchor, test)]
                if any(table[metric].isna().all() for table in pair):
                    continue  # another protocol's metric
                entry = {
                    "codec": test,
                    "label": labels[test],
                    "protocol": protocols[test],
                    "anchor": anchor,
                    "anchor_label": labels[anchor],
                    "metric": bd_name(metric),
                }
                whole = bd_delta(*(_prepared(table, metric) for table in pair), higher, method)
                entry |= vars(whole)
                single = image_deltas(*pair, metric, higher, method)
                found = [delta.bd_rate_percent for delta in single.values() if delta.bd_rate_percent is not None]
                entry["mean_of_images_percent"] = float(np.mean(found)) if found else None
                entry |= {"bd_images": len(found), "images": len(single)}
                result.append(entry)
    frame = pd.DataFrame(result)
    if len(frame):
        frame["note"] = frame.pop("note")  # last
    return frame


def image_deltas(
    anchor: pd.DataFrame, test: pd.DataFrame, metric: str, higher_is_better: bool, method: str = "pchip"
) -> dict[str, BDDelta]:
    """`bd_delta` on each image that both codecs were evaluated on, by image.

    Args:
        anchor: rows of a codec, as `evaluate` gives them.
        test: likewise.
        metric: column; MS-SSIM goes in in dB.
        higher_is_better: the direction of the metric.
        method: see `bd_delta`.
    """
    curves = [{image: _prepared(part, metric) for image, part in rows.groupby("image")} for rows in (anchor, test)]
    common = sorted(curves[0].keys() & curves[1].keys())
    return {image: bd_delta(*(own[image] for own in curves), higher_is_better, method) for image in common}


def metric_of(name: str) -> Metric:
    """A metric by column, MS-SSIM on BD-rate's scale among them."""
    return replace(METRICS[name.removesuffix(DECIBEL)], unit="dB") if name.endswith(DECIBEL) else METRICS[name]


def metric_title(name: str) -> str:
    """Label and unit."""
    metric = metric_of(name)
    return f"{metric.label} {metric.unit}".rstrip()


def bd_name(metric: str) -> str:
    """What a metric is called on the scale on which BD-rate is computed."""
    return metric + DECIBEL if metric.startswith("ms_ssim") else metric


def rate_column(rows: pd.DataFrame) -> str:
    """The rate of a codec's rows: that of the files, or the nominal one where a protocol writes none."""
    return "actual_bpp" if rows["actual_bpp"].notna().any() else "nominal_bpp"


def to_decibel(ms_ssim: float) -> float:
    """MS-SSIM on the scale -10 log10(1 - x), in dB."""
    return -10 * math.log10(1 - ms_ssim) if ms_ssim < 1 else math.inf


# Published curves.


def paper_curves(dataset: str | None = None) -> pd.DataFrame:
    """The curves of the paper's figure, as they were read off it: dataset, codec, label, metric, bpp, value, reading.

    Args:
        dataset: one of `DATASETS`; None for all.
    """
    frame = pd.read_csv(DATA / "paper_curves.csv")
    frame["metric"] = frame["metric"].map(_PAPER_METRICS)
    return _published(frame, dataset, PAPER)


def peer_curves(dataset: str | None = None) -> pd.DataFrame:
    """What rival codecs publish, in the columns of `paper_curves`; the sources stand in data/peers.csv."""
    frame = pd.read_csv(DATA / "peers.csv")
    frame = frame[frame["metric"] != "lpips"]  # of which network is not said
    return _published(frame.assign(dataset=frame["dataset"].replace(_PEER_DATASETS)), dataset, PEERS)


def published_latencies() -> pd.DataFrame:
    """What rival codecs publish of their speed: codec, label, task, resolution, hardware, ms, reading and source.

    `task` is encode or decode, of images or, with `_video_frame`, of frames of videos.
    """
    frame = pd.read_csv(DATA / "speed.csv")
    return frame.assign(label=frame["codec"].map(_LABELS))


def published_curves(dataset: str | None, protocol: str = "bitstream") -> pd.DataFrame:
    """What to draw beside curves measured on a data set under a protocol.

    Args:
        dataset: one of `DATASETS`; None gives no curve, since figures of other images do not compare.
        protocol: beside `paper` stand the paper's own curves, which were measured so; beside `bitstream` those of its
            rivals, whose rates are of files.
    """
    if dataset is None:
        return paper_curves().iloc[:0]
    return paper_curves(dataset) if protocol == "paper" else peer_curves(dataset)


def dataset_of(folder: str | Path | None) -> str | None:
    """The data set of `DATASETS` that a folder's path names, from its last part upwards; None if there is none."""
    parts = Path(folder).absolute().parts if folder is not None else ()
    for part in reversed(parts):
        name = re.sub(r"[^a-z0-9]", "", part.lower())
        for dataset in DATASETS:
            if name.startswith(dataset.replace("_", "")):
                return dataset
    return None


def _published(frame: pd.DataFrame, dataset: str | None, reading: str) -> pd.DataFrame:
    if dataset is not None and dataset not in DATASETS:
        raise ValueError(f"data set {dataset!r} has no published curves; allowed: {', '.join(DATASETS)}")
    frame = frame.assign(label=frame["codec"].map(_LABELS), reading=reading)
    frame = frame if dataset is None else frame[frame["dataset"] == dataset]
    return frame[["dataset", "codec", "label", "metric", "bpp", "value", "reading"]].reset_index(drop=True)


# Between curves.


def _prepared(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """A mean curve on the scale on which BD-rate is computed."""
    curve = mean_curve(rows, metric, rate_column(rows))
    return curve.assign(value=curve["value"].map(to_decibel)) if bd_name(metric) != metric else curve


def _rising(curve: pd.DataFrame, sign: int) -> tuple[np.ndarray, np.ndarray]:
    """Rates and qualities (higher is better) of the points that no other point dominates, both strictly rising."""
    points = np.column_stack([curve["bpp"], sign * curve["value"]]).astype(float)
    points = points[np.isfinite(points).all(axis=1) & (points[:, 0] > 0)]
    kept: list[np.ndarray] = []
    for point in points[np.lexsort((-points[:, 1], points[:, 0]))]:
        if not kept or point[1] > kept[-1][1]:
            kept.append(point)
    rates, values = np.array(kept).reshape(-1, 2).T
    return rates, values


def _overlap(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """Ends of the common range of two rising sequences, and its share of the range that they span."""
    low, high = max(a[0], b[0]), min(a[-1], b[-1])
    return low, high, max(high - low, 0) / (max(a[-1], b[-1]) - min(a[0], b[0]))


def _range(values: np.ndarray, sign: int = 1) -> str:
    low, high = sorted((sign * values[0], sign * values[-1]))
    return f"{low:.4g} to {high:.4g}"
