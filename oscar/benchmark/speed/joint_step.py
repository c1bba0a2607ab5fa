"""What a step of stage joint costs at batch 1 with gradient checkpointing.

`python -m oscar.benchmark.speed.joint_step`; it runs in a process of its own, so that its peak memory is that of
training and nothing else.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from oscar.benchmark.speed.clocks import synchroniser
from oscar.benchmark.speed.memory import memory_of, run_child
from oscar.config import DataConfig, LoggerConfig, StageConfig, TrainConfig, TrainerConfig, TrainingSpeedConfig
from oscar.utils.strict_json import dumps

if TYPE_CHECKING:
    import pandas as pd

    from oscar.training.stages.base import Stage
    from oscar.training.trainer import Trainer

# Trained tensors of the published checkpoint of full size: all but codebooks, which are moving averages, and the base
# weights of conv_in, which are saved and never trained.
PUBLISHED_PARAMETERS = {"hyper_encoders": 81_820_960, "adapters": 16_222_848, "prompt": 78_848}
TIMEOUT = 3600.0  # seconds for building the networks and all steps
_LATENT_LOSSES = ("cosine", "commitment", "latent", "gan")


def measure_joint(config: TrainingSpeedConfig, image: Path, output: Path, device: torch.device) -> list[pd.DataFrame]:
    """Measure steps of stage joint.

    Args:
        config: backbone, bottleneck, losses, crop and number of steps.
        image: to train on.
        output: folder of the run.
        device: cpu or cuda.

    Returns:
        One row of seconds and memory, with the losses that were left out because their weights are not here; and the
        trained parameters by part, beside the published checkpoint's.

    Raises:
        TimingError: if the process fails.
    """
    import pandas as pd  # here: the process that is measured shall not hold it

    losses, missing = available_losses(config.joint)
    for name, reason in missing.items():
        print(f"loss {name} is left out: {reason}", file=sys.stderr)
    train = TrainConfig(
        output=str(output),
        backbone=config.backbone,
        bottleneck=config.bottleneck,
        data=DataConfig(train=[str(image)], crop=config.crop, batch_size=1, workers=0),
        stage=replace(config.joint, image_losses=losses),
        trainer=TrainerConfig(resume=False, gradient_checkpointing=True, threads=torch.get_num_threads()),
        logger=LoggerConfig(tensorboard=False),
    )
    print("training: a step of stage joint, in a process of its own", flush=True)
    request = {"config": asdict(train), "steps": config.joint_steps, "cpu": device.type == "cpu"}
    figures = run_child(__name__, request, "a step of stage joint", TIMEOUT)
    counts = figures.pop("parameters")
    first, *others = figures.pop("step_seconds")
    row = {"first_step_seconds": first, "step_seconds": float(np.median(others)) if others else None, **figures}
    row["losses"] = ", ".join([*losses, *(name for name in _LATENT_LOSSES if getattr(config.joint, name))])
    row["left_out"] = ", ".join(missing) or None
    parameters = pd.DataFrame({"part": counts.keys(), "trained": counts.values()})
    parameters["published"] = parameters["part"].map(PUBLISHED_PARAMETERS).astype("Int64")
    return [pd.DataFrame([row]), parameters]


def available_losses(stage: StageConfig) -> tuple[dict[str, float], dict[str, str]]:
    """The weights of the image losses that can be had here, and why the others cannot."""
    from oscar.metrics.weights import WeightsUnavailable
    from oscar.training.losses import ImageLoss

    weights, missing = {}, {}
    for name, weight in stage.image_losses.items():
        try:
            ImageLoss.of(replace(stage, image_losses={name: weight}))
            weights[name] = weight
        except WeightsUnavailable as error:
            missing[name] = str(error)
    return weights, missing


def trained_parameters(stage: Stage) -> dict[str, int]:
    """How many parameters a stage joint trains, by part."""
    codec = stage.codec
    parts = {
        "hyper_encoders": codec.bottleneck.parameters(),
        "adapters": codec.denoiser.unet.parameters(),
        "prompt": [] if codec.denoiser.prompt is None else [codec.denoiser.prompt],
        "critic": [] if stage.critic is None else stage.critic.parameters(),
    }
    return {part: sum(value.numel() for value in values if value.requires_grad) for part, values in parts.items()}


def advance(trainer: Trainer, batches: Iterator[dict], steps: int = 1) -> None:
    """Make optimiser steps as `Trainer.run` does, without its logs and checkpoints.

    The codec may be shared with other trainers: its bottleneck takes this one's options first.
    """
    codec, config = trainer.stage.codec, trainer.config
    codec.bottleneck.configure(config.bottleneck, config.stage, codec.backbone.factor)
    for _ in range(steps):
        trainer._optimise(batches)
        trainer.step += 1


def _child(request: dict) -> dict:
    """What the process does: build the stage, forget the peak of building, make steps, report."""
    from accelerate import Accelerator
    from omegaconf import OmegaConf

    from oscar.config import parse
    from oscar.training.build import build_stage
    from oscar.training.trainer import Trainer

    config = parse(OmegaConf.create(request["config"]))
    accelerator = Accelerator(cpu=request["cpu"])
    stage = build_stage(config)
    counts = trained_parameters(stage)  # now: training turns the critic's gradients off and on
    trainer, device = Trainer(stage, config, accelerator), accelerator.device
    wait, batches, seconds = synchroniser([device]), trainer._batches(0), []

    def call() -> None:
        for _ in range(request["steps"]):
            begin = time.perf_counter()
            advance(trainer, batches)
            wait()
            seconds.append(time.perf_counter() - begin)

    memory = memory_of(call, device)
    return {
        "parameters": counts,
        "step_seconds": seconds,
        "built_mib": memory["loaded_mib"],
        "steps_peak_mib": memory["call_peak_mib"],
        "process_peak_mib": memory["process_peak_mib"],
        "cuda_peak_mib": memory.get("cuda_call_peak_mib"),
    }


if __name__ == "__main__":
    print(dumps(_child(json.loads(sys.argv[1]))))
