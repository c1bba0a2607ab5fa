"""Loss curves of training runs, a panel for each, from their CSV logs.

    python scripts/plot_training.py runs/nano/{vae,bottleneck,joint} --out docs/training-curves

Other columns of log.csv are drawn with --column.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from oscar.training.log_plot import LogError, plot_logs, read_log
from oscar.utils.errors import exit_code
from oscar.utils.figures import FORMATS


def name_runs(paths: list[Path]) -> list[str]:
    """A title for each run: its folder's name, with as many parents as tell it from the others."""
    folders = [(path if path.is_dir() else path.parent).absolute().parts for path in paths]
    for length in range(1, max(map(len, folders)) + 1):
        names = ["/".join(parts[-length:]) for parts in folders]
        if len(set(names)) == len(names):
            return names
    raise LogError("a run is named twice; allowed: each once")


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, or their log.csv")
    parser.add_argument("--out", type=Path, default=Path("training-curves"), help="files to write, without suffix")
    parser.add_argument(
        "--formats",
        nargs="+",
        choices=FORMATS,
        default=FORMATS,
        metavar="FORMAT",
        help=f"of {', '.join(FORMATS)} (default: all)",
    )
    parser.add_argument("--column", default="loss", help="column of the log (default: loss)")
    options = parser.parse_args(args)
    return exit_code("plot_training", lambda: plot(options))


def plot(options: argparse.Namespace) -> None:
    logs = {
        name: read_log(path, options.column) for name, path in zip(name_runs(options.runs), options.runs, strict=True)
    }
    plot_logs(options.out, logs, options.column, options.formats)
    print("\n".join(f"{options.out}.{suffix}" for suffix in options.formats))


if __name__ == "__main__":
    sys.exit(main())
