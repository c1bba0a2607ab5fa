"""Train one stage: `python scripts/train.py experiment=nano/vae`, or several processes with `accelerate launch`.

Every field of the configuration can be overridden on the command line; the same command run again resumes.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from oscar.config import parse, register
from oscar.errors import first_line

os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # let errors reach `run`, which prints one line
register()


@hydra.main(config_path="../configs", config_name="train", version_base="1.3")
def main(config: DictConfig) -> None:
    typed = parse(config)
    from oscar.training.build import build_stage
    from oscar.training.loop import Trainer

    trainer = Trainer(build_stage(typed), typed)
    if trainer.accelerator.is_main_process:
        (Path(typed.output) / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(typed)))
    trainer.run()


def run() -> None:
    """`main`, with expected errors as one line and exit code 2."""
    try:
        main()
    except (ValueError, RuntimeError, OSError, HydraException, OmegaConfBaseException) as error:
        if os.environ.get("OSCAR_TRACEBACK"):
            raise
        message = first_line(error)
        if isinstance(error, HydraException) and error.__cause__ is not None:
            message += f": {first_line(error.__cause__)}"  # what is wrong with an override
        print(f"train: {message}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    run()
