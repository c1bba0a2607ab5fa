"""Compare timestep mappings, and a sweep, over one checkpoint: `python scripts/ablate_timesteps.py data.images=photos`.

Writes a table with the measured mappings, the paper's and the best timestep side by side, and plots of quality against
timestep. Every field of the configuration can be overridden on the command line; the same command run again resumes,
and adds what mappings and timesteps are new.
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from oscar.config import AblateTimestepsConfig, parse_job, register
from oscar.utils.errors import one_line, run_script

register()


@hydra.main(config_path="../configs", config_name="ablate_timesteps", version_base="1.3")
@one_line("ablate_timesteps")
def main(config: DictConfig) -> None:
    typed, _ = parse_job(config, AblateTimestepsConfig)
    from oscar.evaluation.ablation import ablate_config

    ablate_config(typed)


def run() -> None:
    run_script(main, "ablate_timesteps")


if __name__ == "__main__":
    run()
