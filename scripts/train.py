"""Train one stage: `python scripts/train.py experiment=nano/vae`, or several processes with `torchrun`.

Every field of the configuration can be overridden on the command line; the same command run again resumes. With
`preflight=true` it trains nothing, and says what would stop the run or slow it down.
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from oscar.config import parse_job, register
from oscar.utils.errors import one_line, run_script

register()


@hydra.main(config_path="../configs", config_name="train", version_base="1.3")
@one_line("train")
def main(config: DictConfig) -> None:
    typed, overrides = parse_job(config)
    from oscar.training.build import build_stage
    from oscar.training.resolve import resolve
    from oscar.training.trainer import Trainer, make_accelerator

    if typed.preflight:
        from oscar.training.preflight import run_preflight

        run_preflight(typed)
        return
    typed = resolve(typed)
    accelerator = make_accelerator(typed)  # before the stage, whose quantisers ask whether there are other processes
    Trainer(build_stage(typed), typed, accelerator, overrides).run()


def run() -> None:
    run_script(main, "train")


if __name__ == "__main__":
    run()
