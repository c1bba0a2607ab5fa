"""The page of a study: one file with tables, figures, commands and where they come from; it needs no network."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from oscar.utils.files import atomic_write
from oscar.utils.tables import Table

if TYPE_CHECKING:
    from oscar.reproduce.study import Summary

_STYLE = """
body { max-width: 72rem; margin: 2rem auto; padding: 0 1rem; font: 15px/1.5 system-ui, sans-serif; color: #1b1b1a; }
table { border-collapse: collapse; margin: .5rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .6rem; border-bottom: 1px solid #deded9; text-align: right; }
th.text, td.text { text-align: left; }
.scroll { overflow-x: auto; } figure { margin: 1.5rem 0; } img { max-width: 100%; }
.note, figcaption { color: #62625e; font-size: .9em; } pre { overflow-x: auto; background: #f1f1ee; padding: .6rem; }
"""


def write_page(path: Path, title: str, summary: Summary, record: Mapping, plots: Path) -> None:
    """Write the page, whole or not at all.

    Args:
        path: of the page.
        title: its heading.
        summary: what the study has found.
        record: as in study.json: date, command, jobs, failed, commit, versions, hardware.
        plots: folder of the figures, of which the SVG is taken.
    """
    dirty = " with changes" if record["dirty"] else ""
    hardware = record["hardware"]
    lines = [
        *summary.lines,
        f"Made on {record['date']} at commit {record['commit'] or 'unknown'}{dirty}, on {hardware['processor']}"
        f"{' and ' + hardware['gpu'] if hardware['gpu'] else ''}.",
        *(f"No result of {name}: {reason}" for name, reason in record["failed"].items()),
    ]
    parts = [
        f"<h1>{escape(title)}</h1>",
        *(f"<p>{escape(line)}</p>" for line in lines),
        f"<pre>{escape(record['command'])}</pre>",
        *map(_table, summary.tables),
        *(_figure(plots / f"{name}.svg", caption) for caption, name in summary.figures.items()),
        "<h2>Commands</h2>",
        f"<pre>{escape(chr(10).join(record['jobs'].values()))}</pre>",
    ]
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    atomic_write(path, "\n".join([head, *parts, "</html>\n"]).encode())


def _table(table: Table) -> str:
    classes = [' class="text"' if left else "" for left in table.left()]
    head = "".join(f"<th{kind}>{escape(name)}</th>" for kind, name in zip(classes, table.shown.values(), strict=True))
    body = "\n".join(
        f"<tr>{''.join(f'<td{kind}>{escape(cell)}</td>' for kind, cell in zip(classes, row, strict=True))}</tr>"
        for row in table.cells()
    )
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in table.notes)
    return (
        f'<section id="{escape(table.name)}"><h2>{escape(table.caption)}</h2>\n<div class="scroll"><table><thead><tr>'
        f"{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>{notes}</section>"
    )


def _figure(path: Path, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure><img alt="{escape(caption)}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )
