"""The common look of our figures, and how they are written: matplotlib without pyplot, so that no display is needed."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oscar.utils.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's, which the common kinds of colour blindness tell apart, and two more.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#B58900", "#666666", "#8C510A")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
FORMATS = DEFAULT_FORMATS = ("pdf", "svg", "png")
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # text stays text
    "svg.hashsalt": "oscar",  # the same file from the same data
}


@contextmanager
def open_figure(path: Path, size: tuple[float, float], formats: Sequence[str] | None = None) -> Iterator[Figure]:
    """A figure to draw on, written when the block ends without an error.

    Args:
        path: without suffix; it gets one for each format.
        size: inches.
        formats: of FORMATS; None for DEFAULT_FORMATS.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    logging.getLogger("fontTools").setLevel(logging.WARNING)  # it tells every table of every font
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        figure.draw_without_rendering()  # lays it out, once for all formats
        figure.set_layout_engine("none")
        for suffix in DEFAULT_FORMATS if formats is None else formats:
            data = io.BytesIO()
            blank = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(suffix)
            figure.savefig(data, format=suffix, metadata=blank, dpi=160, bbox_inches="tight")
            atomic_write(path.with_name(f"{path.name}.{suffix}"), data.getvalue())


def log_rate_axis(axes: Axes) -> None:
    """Rates on a logarithmic x axis, labelled at 1, 2 and 5 times the powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
