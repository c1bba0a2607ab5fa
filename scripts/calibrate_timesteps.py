"""Measure how noisy a checkpoint's quantised latents are: `python scripts/calibrate_timesteps.py data.images=photos`.

Writes per rate cosine similarity, residual variance and its Gaussianity, a figure, and calibration.json, from
which training takes a mapping: `python scripts/train.py init_from=... timesteps=cosine timesteps.calibration=FILE`.
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from oscar.config import CalibrateTimestepsConfig, parse_job, register
from oscar.utils.errors import one_line, run_script

register()


@hydra.main(config_path="../configs", config_name="calibrate_timesteps", version_base="1.3")
@one_line("calibrate_timesteps")
def main(config: DictConfig) -> None:
    typed, _ = parse_job(config, CalibrateTimestepsConfig)
    from oscar.evaluation.calibration import calibrate_config

    calibrate_config(typed)


def run() -> None:
    run_script(main, "calibrate_timesteps")


if __name__ == "__main__":
    run()
