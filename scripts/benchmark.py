"""Benchmark of several codecs on one data set: `python scripts/benchmark.py data.images=photos`.

Tables, BD-rate, plots, timing and a report page, in the folder `output`. Every field of the configuration can be
overridden on the command line; the same command run again resumes.
"""

from __future__ import annotations

from oscar.cli.scripts import SCRIPTS

run = SCRIPTS["benchmark"].run

if __name__ == "__main__":
    run()
