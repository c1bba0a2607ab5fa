"""The report page of a benchmark: one HTML file with plots, an image browser and sortable tables.

The page makes no request: styles, script and images are in the file, and its content security policy allows no other
source. Tables are written here, so that they can be read without JavaScript; `report.js` draws the plots, runs the
image browser and sorts the tables.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

import pandas as pd
from PIL import Image

from oscar.benchmark.report.data import MetricInfo, ReportData
from oscar.benchmark.report.html_table import NONE, Column, Show, definitions, number, shower, shown, table, text
from oscar.benchmark.tables import RATES, SECONDS
from oscar.data.images import read_image
from oscar.utils.files import atomic_write
from oscar.utils.strict_json import dumps

_FOLDER = Path(__file__).parent
_COLOURS = 8  # in report.css; the first is for our codecs alone
_SHAPES = 5  # of markers in report.js
_THUMB = (272, 128)  # pixels, at most: twice the size shown
_WEBP_LIMIT = 16383  # pixels a side


def write_report(path: Path, data: ReportData) -> None:
    """Write the page, whole or not at all.

    Each image of the browser is embedded once as lossless WebP; 768x512 pixels are 0.2 to 0.6 MB, so hundreds of them
    make a page that is slow to open.

    Raises:
        ImageError: naming the file, if an image of the browser cannot be read.
        OSError: naming `path`, if it cannot be written.
    """
    metrics = [metric for metric in data.metrics if _has_values(data.means, metric.name)]
    show = {metric.name: shower(data.means[metric.name]) for metric in metrics}
    styles = _styles(data)
    images = _Images()
    payload = {
        "metrics": [{"name": m.name, "label": m.label, "unit": m.unit, "higher": m.higher_is_better} for m in metrics],
        "series": _measured(data, show, styles) + _references(data, show, styles),
        "images": _browser(data, show, styles, images),
    }
    tables = _tables(data, metrics, styles)
    links = [("curves", "Rate and quality")] if metrics else []
    links += [("images", "Images")] if data.images else []
    links += [(section.id, section.title) for section in tables]
    script, style = (_read(f"stage.{kind}") + _read(f"report.{kind}") for kind in ("js", "css"))
    page = Template(_read("report.html")).substitute(
        title=escape(data.title),
        summary=_list("summary", data.summary),
        navigation="".join(f'<a href="#{id_}">{title}</a>' for id_, title in links),
        curves_hidden="" if metrics else "hidden",
        images_hidden="" if data.images else "hidden",
        tables="\n".join(section.html for section in tables),
        style=style,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=_json(payload),
    )
    head, tail = page.split("<!--images-->")  # nothing escaped contains this
    atomic_write(path, b"".join([head.encode(), *images.blocks, tail.encode()]))


# Text


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _has_values(frame: pd.DataFrame, column: str) -> bool:
    return column in frame and any(number(value) is not None for value in frame[column])


def _setting(point: float) -> str:
    """A codec's setting: rates in bits per pixel with four decimals, as they are named; qualities plainly."""
    return f"{point:.4f}" if 0 < point < 1 else f"{point:g}"


_SHOW: dict[str, Show] = {
    "point": _setting,
    **dict.fromkeys(("nominal_bpp", "estimated_bpp", "actual_bpp"), "{:.4f}".format),
    **dict.fromkeys(("encode_seconds", "decode_seconds"), "{:.4f}".format),
    "bd_rate_percent": "{:+.1f}".format,
    "overlap_percent": "{:.0f}".format,
}


def _json(value: object) -> str:
    """JSON that may stand in a script element: no "<", and nothing that JSON lacks."""
    return dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _list(class_: str, lines: Iterable[str]) -> str:
    return f'<ul class="{class_}">{"".join(f"<li>{escape(line)}</li>" for line in lines)}</ul>'


# Codecs: one colour and marker for each, everywhere on the page


@dataclass(frozen=True)
class _Style:
    colour: int
    shape: int
    ours: bool

    @property
    def classes(self) -> str:
        return f"c{self.colour}{' ours' if self.ours else ''}"


def _styles(data: ReportData) -> dict[tuple[str, str], _Style]:
    """By kind ("measured" or "reference") and codec. Ours, here and in the paper, share the first colour."""
    flagged = {entry.codec for image in data.images for entry in image.entries if entry.is_ours}
    measured = list(dict.fromkeys([*data.means.get("codec", []), *(e.codec for i in data.images for e in i.entries)]))
    codecs = [("measured", codec) for codec in measured]
    codecs += [("reference", codec) for codec in dict.fromkeys(data.reference_curves.get("codec", []))]
    styles: dict[tuple[str, str], _Style] = {}
    counts = {True: 0, False: 0}
    for kind, codec in codecs:
        ours = codec in flagged or codec == "oscar" or codec.startswith("oscar-")
        count = counts[ours]
        counts[ours] += 1
        colour = 0 if ours else 1 + count % (_COLOURS - 1)
        styles[kind, codec] = _Style(colour, count % _SHAPES, ours)
    return styles


def _label(frame: pd.DataFrame) -> dict[str, str]:
    return dict(zip(frame["codec"], frame["label"], strict=True)) if {"codec", "label"} <= set(frame) else {}


# Data of the script


def _measured(data: ReportData, show: dict[str, Show], styles: dict) -> list[dict]:
    """A curve per codec. Where no file was written (protocol `paper`) the rate is the nominal one, and is called so."""
    series = []
    for codec, group in data.means.groupby("codec", sort=False) if "codec" in data.means else ():
        nominal = not _has_values(group, "actual_bpp")
        points = [
            {
                "setting": _setting(row["point"]),
                "bpp": shown(row.get("nominal_bpp" if nominal else "actual_bpp"), _SHOW["actual_bpp"]),
                "values": {name: shown(row[name], show[name]) for name in show},
            }
            for row in group.to_dict("records")
        ]
        label = str(group["label"].iloc[0]) + (" (nominal bpp)" if nominal else "")
        series.append(_curve(label, styles["measured", codec], points, reference=False))
    return series


def _references(data: ReportData, show: dict[str, Show], styles: dict) -> list[dict]:
    """A dashed curve per data set and codec of the paper; those of our codec's namesake are shown from the start."""
    frame = data.reference_curves
    series = []
    for (dataset, codec), group in frame.groupby(["dataset", "codec"], sort=False) if len(frame) else ():
        points = [
            {
                "setting": None,
                "bpp": shown(row["bpp"], _SHOW["actual_bpp"]),
                "values": {row["metric"]: shown(row["value"], "{:.4g}".format)},
            }
            for row in group.to_dict("records")
            if row["metric"] in show
        ]
        if points:
            series.append(_curve(f"{codec}, {dataset}", styles["reference", codec], points, reference=True))
    return series


def _curve(label: str, style: _Style, points: list[dict], reference: bool) -> dict:
    return {
        "label": label,
        "classes": style.classes + (" reference" if reference else ""),
        "shape": style.shape,
        "ours": style.ours,
        "reference": reference,
        "points": points,
    }


class _Images:
    """Images of the page: a script element each, which a browser does not parse; the script looks them up by id."""

    def __init__(self) -> None:
        self.blocks: list[bytes] = []
        self._ids: dict[Path, str] = {}

    def add(self, path: Path) -> str:
        """The id of an image file, embedded on its first use."""
        if path not in self._ids:
            self._ids[path] = name = f"image-{len(self._ids)}"
            uri = _data_uri(read_image(path), lossless=True, quality=50, method=0)  # ten times as fast as 4
            self.blocks.append(f'<script type="text/plain" id="{name}">{uri}</script>\n'.encode())
        return self._ids[path]


def _data_uri(image: Image.Image, **webp: int) -> str:
    """Pixels as a data URI, in PNG where WebP has no such sizes."""
    kind, options = ("webp", webp) if max(image.size) <= _WEBP_LIMIT else ("png", {})
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _thumb(path: Path) -> str:
    image = read_image(path)
    image.thumbnail(_THUMB, Image.Resampling.LANCZOS)
    return _data_uri(image, quality=80)


def _browser(data: ReportData, show: dict[str, Show], styles: dict, images: _Images) -> list[dict]:
    return [
        {
            "name": image.name,
            "width": image.width,
            "height": image.height,
            "thumb": _thumb(image.original),
            "original": images.add(image.original),
            "entries": [
                {
                    "codec": entry.codec,
                    "label": entry.label,
                    "classes": styles["measured", entry.codec].classes,
                    "point": number(entry.point),
                    "setting": _setting(entry.point),
                    "ours": entry.is_ours,
                    "matched": number(entry.matched_to),
                    "bytes": number(entry.file_bytes),
                    "bpp": shown(entry.actual_bpp, _SHOW["actual_bpp"]),
                    "values": {name: shown(entry.metrics.get(name), show[name]) for name in show},
                    "image": images.add(entry.image),
                }
                for entry in image.entries
            ],
        }
        for image in data.images
    ]


# Tables


@dataclass(frozen=True)
class _Section:
    id: str
    title: str
    html: str


def _section(id_: str, title: str, body: str) -> _Section:
    return _Section(id_, title, f'<section id="{id_}">\n<h2>{title}</h2>\n{body}\n</section>')


def _codec_table(name: str, frame: pd.DataFrame, columns: list[Column], styles: dict) -> str:
    """A table whose rows have their codec's colour; `report.js` draws the key from the row's class."""
    plain = _Style(_COLOURS - 1, 0, False)
    codecs = frame["codec"] if "codec" in frame else [None] * len(frame)
    return table(name, columns, [styles.get(("measured", c), plain).classes if c else "" for c in codecs])


def _metric_title(metric: MetricInfo) -> str:
    return f"{metric.label}{f' {metric.unit}' if metric.unit else ''}"


def _columns(frame: pd.DataFrame, titles: dict[str, str]) -> list[Column]:
    """The named columns that the frame has and that are not empty."""
    return [
        Column(title, list(frame[name]), _SHOW.get(name), long=name == "note")
        for name, title in titles.items()
        if name in frame and any(text(value) not in (NONE, "") for value in frame[name])
    ]


def _any_columns(frame: pd.DataFrame) -> list[Column]:
    """All columns of a frame, under their own names; codecs by label where there is one."""
    names = [name for name in frame if not (name == "codec" and "label" in frame)]
    names.sort(key=lambda name: name not in ("codec", "label"))
    return _columns(frame, {name: "codec" if name == "label" else str(name).replace("_", " ") for name in names})


def _tables(data: ReportData, metrics: list[MetricInfo], styles: dict) -> list[_Section]:
    """The page's sections of tables, without those that have nothing to show."""
    qualities = {metric.name: _metric_title(metric) for metric in metrics}
    sections = []
    for protocol, means in _by_protocol(data.means):
        titles = {"label": "codec", "point": "setting", "images": "images", **RATES, **qualities, **SECONDS}
        body = '<p class="note">Click a heading to sort; what is unavailable (–) comes last.</p>\n'
        body += _codec_table("Means", means, _columns(means, titles), styles)
        sections.append(_section(f"means{protocol}", f"Means over the images{_WORDS[protocol]}", body))
    if data.matched is not None and len(data.matched):
        body = _codec_table("At matched bytes", data.matched, _any_columns(data.matched), styles)
        sections.append(_section("matched", "At matched bytes", body))
    for protocol, bd in _by_protocol(data.bd):
        sections.append(_section(f"bd{protocol}", f"BD-rate{_WORDS[protocol]}", _bd(data, bd, styles)))
    for protocol, rows in _by_protocol(data.rows):
        sections.append(_section(f"rows{protocol}", f"Every image{_WORDS[protocol]}", _rows(rows, qualities, styles)))
    if data.timing is not None and len(data.timing):
        body = _codec_table("Timing", data.timing, _any_columns(data.timing), styles)
        sections.append(_section("timing", "Timing", body))
    if data.unavailable:
        body = '<p class="note">What could not be measured here, and why. The rest of the run is not affected.</p>\n'
        sections.append(_section("unavailable", "Unavailable", body + definitions(data.unavailable)))
    if data.environment:
        sections.append(_section("environment", "Environment", definitions(data.environment)))
    return sections


_WORDS = {"": "", "-paper": ", protocol paper"}


def _by_protocol(frame: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """A frame's rows by protocol, which never stand in one table; bitstream's, the usual one, under no name."""
    if "protocol" not in frame:
        return [("", frame)] if len(frame) else []
    is_paper = frame["protocol"] == "paper"
    return [(name, part) for name, part in (("", frame[~is_paper]), ("-paper", frame[is_paper])) if len(part)]


def _bd(data: ReportData, bd: pd.DataFrame, styles: dict) -> str:
    labels = _label(bd) | _label(data.means)
    names = {metric.name: metric.label for metric in data.metrics}
    frame = bd.assign(
        anchor=[labels.get(codec, codec) for codec in bd["anchor"]],
        metric=[names.get(metric, metric) for metric in bd["metric"]],
    )
    titles = {"label": "codec", "anchor": "anchor", "metric": "metric", "bd_rate_percent": "BD-rate %",
              "bd_metric": "BD-metric", "overlap_low": "overlap from", "overlap_high": "to",
              "overlap_percent": "overlap %", "note": "note"}  # fmt: skip
    return (
        '<p class="note">Mean difference in rate at equal quality (Bjøntegaard); negative: fewer bits than the anchor. '
        "It holds over the range of quality that both curves reach, the overlap; without one there is no figure.</p>\n"
        + _codec_table("BD-rate", frame, _columns(frame, titles), styles)
    )


def _rows(frame: pd.DataFrame, qualities: dict[str, str], styles: dict) -> str:
    if {"width", "height"} <= set(frame):
        frame = frame.assign(size=[f"{w}×{h}" for w, h in zip(frame["width"], frame["height"], strict=True)])
    titles = {
        "image": "image",
        "label": "codec",
        "point": "setting",
        "protocol": "protocol",
        "size": "size",
        "file_bytes": "bytes",
        **RATES,
        **qualities,
        **SECONDS,
    }
    return (
        f"<details><summary>{len(frame):,} rows, one per image, codec and setting</summary>\n"
        '<input type="search" aria-label="Show rows that contain" placeholder="Show rows that contain …">\n'
        + _codec_table("Every image", frame, _columns(frame, titles), styles)
        + "</details>"
    )
