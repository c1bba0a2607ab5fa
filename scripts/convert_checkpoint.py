"""Convert a published checkpoint: `python scripts/convert_checkpoint.py oscar.pkl OUT --backbone FOLDER_OR_ID`.

The same as `oscar convert`, for a clone that is not installed.
"""

from __future__ import annotations

import sys

from oscar.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
