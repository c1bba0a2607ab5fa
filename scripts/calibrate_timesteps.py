"""Measure how noisy a checkpoint's quantised latents are: `python scripts/calibrate_timesteps.py data.images=photos`.

Writes per rate cosine similarity, residual variance and its Gaussianity, a figure, and calibration.json, from
which training takes a mapping: `python scripts/train.py init_from=... timesteps=cosine timesteps.calibration=FILE`.
"""

from __future__ import annotations

from oscar.cli.scripts import SCRIPTS

run = SCRIPTS["calibrate_timesteps"].run

if __name__ == "__main__":
    run()
