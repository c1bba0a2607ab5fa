"""Tables and figures of the paper, and ablations: `python scripts/reproduce.py study=rd model=nano data.root=data`.

Studies: rd, unseen_rates, timesteps, losses, lora_rank, stages, entropy, complexity. The same command again goes on
where it stopped. Started several times, or by `torchrun --nproc-per-node 8`, its processes share the jobs, a GPU each.
`dry_run=true` prints the jobs, their number and estimated hours.
"""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from oscar.config import ReproduceConfig, parse_job, register
from oscar.utils.errors import one_line, run_script

register()


@hydra.main(config_path="../configs", config_name="reproduce", version_base="1.3")
@one_line("reproduce")
def main(config: DictConfig) -> None:
    typed, overrides = parse_job(config, ReproduceConfig)
    from oscar.reproduce.actions import leave_launcher

    leave_launcher()  # before CUDA is looked at
    from oscar.reproduce.study import run_study

    code = run_study(typed, Path(__file__).parents[1] / "configs", overrides)
    if code:
        sys.exit(code)


def run() -> None:
    run_script(main, "reproduce")


if __name__ == "__main__":
    run()
