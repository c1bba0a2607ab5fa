"""A table as people read it, written as CSV (all digits), Markdown and LaTeX (booktabs).

pandas writes the CSV. Its Markdown needs tabulate and leaves a bar in a cell as it is; its LaTeX needs Jinja and knows
neither notes nor tables that shrink to the line, and escapes no bar, minus or multiplication sign.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from oscar.utils.files import atomic_write

NONE = "–"


@dataclass(frozen=True)
class Table:
    """A table as people read it.

    Attributes:
        name: of its files, without suffix.
        caption: what it shows, in a sentence or two; a unit or a rule belongs here.
        frame: all columns, with all digits: the CSV.
        shown: title by column, for those that stand in Markdown and LaTeX.
        formats: of numbers by column, for those that the default (four significant digits) does not suit.
        notes: lines under the table.
    """

    name: str
    caption: str
    frame: pd.DataFrame
    shown: Mapping[str, str]
    formats: Mapping[str, Callable[[float], str]] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def write(self, folder: Path) -> None:
        """Write NAME.csv, NAME.md and NAME.tex into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        for suffix, text in (
            (".csv", self.frame.to_csv(index=False)),
            (".md", self.to_markdown()),
            (".tex", self.to_latex()),
        ):
            atomic_write(folder / f"{self.name}{suffix}", text.encode())

    def cells(self) -> list[list[str]]:
        """The shown columns as text, row by row."""
        columns = [[_shown(value, self.formats.get(name)) for value in self.frame[name]] for name in self.shown]
        return [list(row) for row in zip(*columns, strict=True)]

    def to_markdown(self) -> str:
        rows = [list(self.shown.values()), [":--" if left else "--:" for left in self.left()], *self.cells()]
        lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
        notes = [f"- {note}" for note in self.notes]
        return "\n".join([self.caption, "", *lines, *(["", *notes] if notes else [])]) + "\n"

    def to_latex(self) -> str:
        """A `table` environment; its packages are booktabs and, for wide tables, graphicx (the table is shrunk)."""
        body = [" & ".join(map(escape_latex, row)) + r" \\" for row in self.cells()]
        lines = [
            r"% needs \usepackage{booktabs,graphicx}",
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{escape_latex(self.caption)}}}",
            rf"\label{{tab:{self.name.replace('_', '-')}}}",
            r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
            rf"\begin{{tabular}}{{{''.join('l' if left else 'r' for left in self.left())}}}",
            r"\toprule",
            " & ".join(map(escape_latex, self.shown.values())) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}}",
            *(rf"\par\footnotesize {escape_latex(note)}" for note in self.notes),
            r"\end{table}",
        ]
        return "\n".join(lines) + "\n"

    def left(self) -> list[bool]:
        """Whether each shown column holds words, which are aligned left."""
        return [
            not pd.api.types.is_numeric_dtype(self.frame[name]) and not _is_figures(self.frame[name])
            for name in self.shown
        ]


def filled(frame: pd.DataFrame, titles: Mapping[str, str]) -> dict[str, str]:
    """Those of `titles`, by column, whose columns are there and hold a value."""
    return {name: title for name, title in titles.items() if name in frame and frame[name].notna().any()}


def escape_latex(text: str) -> str:
    """Text as LaTeX prints it, with pdfTeX too."""
    special = {
        "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
        ">": r"\textgreater{}", "|": r"\textbar{}", "–": "--", "−": "$-$", "×": r"$\times$", "…": r"\dots{}",
    }  # fmt: skip
    return re.sub(r"[\\~^<>|–−×…]|[&%$#_{}]", lambda match: special.get(match[0], f"\\{match[0]}"), text)


def _shown(value: Any, show: Callable[[float], str] | None) -> str:
    if pd.isna(value) or isinstance(value, str):
        return NONE if pd.isna(value) else value or NONE
    return show(value) if show else f"{value:,}" if isinstance(value, int) else plain_minus(f"{value:.4g}")


def _is_figures(column: pd.Series) -> bool:
    """Whether all cells are numbers with something around them, such as `21.93 (+0.52)`."""
    return all(pd.isna(value) or re.match(r"[-+−]?\d|smallest|–", str(value)) for value in column)


def plain_minus(number: str) -> str:
    """A number with a true minus sign."""
    return number.replace("-", "−").replace("e−", "e-")
