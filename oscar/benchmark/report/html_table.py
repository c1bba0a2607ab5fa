"""Numbers as people read them, and sortable HTML tables of them; `report.js` does the sorting."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from html import escape
from numbers import Real

import pandas as pd

NONE = "–"  # what is unavailable
Show = Callable[[float], str]  # how the numbers of one column are written


def number(value: object) -> float | None:
    """A float, or None for what is missing: None, NaN, pandas' NA and anything that is no number."""
    if isinstance(value, bool) or not isinstance(value, Real) or math.isnan(value):
        return None
    return float(value)


def text(value: object) -> str:
    """A value in words; a dash if it is missing."""
    return NONE if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)) else str(value)


def shower(values: Iterable[object]) -> Show:
    """How numbers of one column are written: four digits for its largest, as many decimals for all."""
    numbers = [found for value in values if (found := number(value)) is not None and math.isfinite(found)]
    largest = max(map(abs, numbers), default=0)
    whole = all(found.is_integer() for found in numbers)
    decimals = 0 if whole or not largest else min(max(4 - math.ceil(math.log10(largest)), 0), 6)
    return lambda found: f"{found:,.{decimals}f}"


def shown(value: object, show: Show) -> tuple[float | str | None, str]:
    """A value to compute with and the same as written.

    The first is a float, None where it is missing, or "Infinity" or "-Infinity", which JSON lacks as numbers and
    JavaScript's `Number()` reads.
    """
    found = number(value)
    if found is None:
        return None, NONE
    exact = found if math.isfinite(found) else f"{'-' if found < 0 else ''}Infinity"
    return exact, show(found).replace("-", "−").replace("inf", "∞")


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        title: its heading.
        values: numbers, or text if any of them is; None, NaN and NA are missing.
        show: how numbers are written; by the column's largest if None.
        long: whether its text may be wrapped.
    """

    title: str
    values: list[object]
    show: Show | None = None
    long: bool = False


def table(name: str, columns: list[Column], classes: Iterable[str]) -> str:
    """A sortable table that scrolls on its own.

    Args:
        name: what it shows, for screen readers.
        columns: of equal length; the first one stays in sight.
        classes: of each row.
    """
    cells = [_cells(column) for column in columns]
    head = "".join(
        f'<th scope="col"{kind}><button type="button">{escape(column.title)}</button></th>'
        for column, (kind, _) in zip(columns, cells, strict=True)
    )
    body = "\n".join(
        f'<tr class="{class_}">{"".join(row)}</tr>'
        for class_, row in zip(classes, zip(*(column for _, column in cells), strict=True), strict=True)
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(name)}"><table class="sortable">\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def _cells(column: Column) -> tuple[str, list[str]]:
    """The class attribute of a column's head, and its cells. `data-value` is what a cell is sorted by."""
    words = [text(value) for value in column.values]
    if not all(isinstance(value, Real) or word == NONE for value, word in zip(column.values, words, strict=True)):
        kind = ' class="text long"' if column.long else ' class="text"'
        cells = [f'<td{kind} data-value="{"" if word == NONE else escape(word)}">{escape(word)}</td>' for word in words]
        return ' class="text"', cells
    show = column.show or shower(column.values)
    return "", [
        f'<td class="none" data-value="">{NONE}</td>' if exact is None else f'<td data-value="{exact}">{word}</td>'
        for exact, word in (shown(value, show) for value in column.values)
    ]


def definitions(items: Mapping[str, object]) -> str:
    """Names and what is to be said of them."""
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in items.items()) + "</dl>"
