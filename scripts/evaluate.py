"""Evaluate a codec on a folder of images: `python scripts/evaluate.py data.images=photos codec=jpeg`.

Every field of the configuration can be overridden on the command line; the same command run again resumes. Several
processes share the images: `accelerate launch --num_processes 4` with GPUs, `torchrun --nproc-per-node 2` without.
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from oscar.config import EvaluateConfig, parse_job, register
from oscar.utils.errors import one_line, run_script

register()


@hydra.main(config_path="../configs", config_name="evaluate", version_base="1.3")
@one_line("evaluate")
def main(config: DictConfig) -> None:
    typed, _ = parse_job(config, EvaluateConfig)
    from oscar.evaluation.evaluate import evaluate_config

    evaluate_config(typed)


def run() -> None:
    run_script(main, "evaluate")


if __name__ == "__main__":
    run()
