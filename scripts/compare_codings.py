"""Lengths of files by coding (fixed length, table, context), and bytes and quality by effort.

    python scripts/compare_codings.py ../shared/data/kodak --out runs/codings
    python scripts/compare_codings.py ../shared/data/kodak --out runs/efforts --efforts 0 1 3 5 9 --metrics

Every length is a file's, which is read again. Writes rows.csv and tables as CSV, Markdown and LaTeX.
"""

from __future__ import annotations

import sys

from oscar.utils.errors import exit_code


def main(args: list[str] | None = None) -> int:
    from oscar.evaluation.codings import compare_folder, parse_arguments

    options = parse_arguments(__doc__.splitlines()[0], args)
    return exit_code("compare_codings", lambda: print(compare_folder(options)))


if __name__ == "__main__":
    sys.exit(main())
