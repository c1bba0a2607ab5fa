"""Benchmark of several codecs on one data set: `python scripts/benchmark.py data.images=photos`.

Tables, BD-rate, plots, timing and a report page, in the folder `output`. Every field of the configuration can be
overridden on the command line; the same command run again resumes.
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from oscar.config import BenchmarkConfig, parse_job, register
from oscar.utils.errors import one_line, run_script

register()


@hydra.main(config_path="../configs", config_name="benchmark", version_base="1.3")
@one_line("benchmark")
def main(config: DictConfig) -> None:
    typed, _ = parse_job(config, BenchmarkConfig)
    from oscar.benchmark.runs import run_benchmark

    run_benchmark(typed)


def run() -> None:
    run_script(main, "benchmark")


if __name__ == "__main__":
    run()
