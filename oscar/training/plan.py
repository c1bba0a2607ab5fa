"""Memory and hours of a run, computed from its shapes: without weights, images or a GPU.

    python scripts/train.py experiment=paper/stage2 backbone=sd21_random plan=true

Passes are made on tensors that have shapes and no values (`oscar.training.fake_pass`). docs/gpu.md says what this
leaves out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from oscar.config import ConfigError, TrainConfig
from oscar.models.backbone import PARTS, BackboneError, read_configs
from oscar.registry import STAGES
from oscar.training.fake_pass import Pass, build_on_meta, measure_pass
from oscar.training.preflight import GIB, count_bytes, persistent_bytes, stage_modules, tensor_bytes, trained_bytes
from oscar.training.resolve import resolve
from oscar.training.stages.base import Stage

GPUS = (1, 4, 8)
UTILISATION = 0.3  # of the peak, assumed
# 1e12 operations a second by the vendor's data sheets, dense, SXM: in float32, TensorFloat-32, and float16 or bfloat16.
PEAKS = {"A100": (19.5, 156.0, 312.0), "H100": (67.0, 494.5, 989.5)}
FSDP_UNITS = ("ResnetBlock2D", "BasicTransformerBlock")  # of configs/accelerate/fsdp.yaml


@dataclass(frozen=True)
class States:
    """Bytes that a process keeps from step to step: as the only one, as one of several replicas, or with FSDP."""

    alone: int
    buckets: int
    gathered: int

    def per_process(self, processes: int, fsdp: bool = False) -> float:
        if fsdp:
            return self.alone / processes + self.gathered
        return self.alone + (self.buckets if processes > 1 else 0)


def seconds(step: Pass, gpu: str, tf32: bool) -> float:
    """Of a pass on a GPU at `UTILISATION`. Convolutions of float32 are in TensorFloat-32, torch's default."""
    full, short, half = PEAKS[gpu]
    peaks = {
        kind: half if kind[1] < 32 else short if tf32 or kind[0] == "convolution" else full for kind in step.operations
    }
    return sum(count / (peaks[kind] * 1e12 * UTILISATION) for kind, count in step.operations.items())


def run_plan(config: TrainConfig, show: Callable[[str], object] = print) -> list[str]:
    """Show a Markdown table of memory and hours by precision, gradient checkpointing and number of GPUs.

    Args:
        config: the run. Its `init_from` need not be there yet.
        show: takes each line as soon as it is there.

    Raises:
        ConfigError: if the shapes of the backbone are not to be had, or the stage's pass depends on values.
    """
    config = without_weights(config)
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        show(line)

    fixed, own = config.data.total_batch_size, config.data.batch_size
    batches = {gpus: own if fixed is None else fixed // (gpus * config.trainer.accumulation) for gpus in GPUS}
    trainer, passes = config.trainer, config.trainer.accumulation * config.trainer.max_steps
    can_checkpoint = not STAGES[config.stage.name].works_on_latents
    for precision in ("no", "fp16" if trainer.mixed_precision == "fp16" else "bf16"):
        for checkpointing in (False, True) if can_checkpoint else (False,):
            modes = replace(trainer, mixed_precision=precision, gradient_checkpointing=checkpointing)
            trial = replace(config, trainer=modes)
            stage = build_on_meta(trial)
            states, largest = measure_states(stage, trial), max(1, *batches.values())
            first, last = (measure_pass(stage, trial, batch) for batch in (1, largest))
            if not lines:  # not before: a pass may be one that cannot be measured
                _head(say, stage, trial)
            slope = (last.peak - first.peak) / max(largest - 1, 1)
            for gpus, batch in batches.items():
                if batch < 1:
                    continue
                step = first.peak + slope * (batch - 1)
                alone = (states.per_process(gpus) + step) / GIB
                shared = f"{(states.per_process(gpus, fsdp=True) + step) / GIB:.1f}" if gpus > 1 else ""
                hours = (batch * passes * seconds(first, gpu, trainer.tf32) / 3600 for gpu in PEAKS)
                cells = [precision, "yes" if checkpointing else "no", gpus, batch, f"{step / GIB:.1f}", f"{alone:.1f}"]
                say(_row(*cells, shared, *(f"{value:,.1f}" if value >= 10 else f"{value:.2f}" for value in hours)))
    return lines


def _head(say: Callable[[str], object], stage: Stage, config: TrainConfig) -> None:
    total, trained = tensor_bytes(stage), trained_bytes(stage)
    say(
        f"stage {config.stage.name}, crop {config.data.crop}, {config.trainer.max_steps:,} steps: weights "
        f"{total / GIB:.2f} GiB, {trained / GIB:.2f} GiB of them trained; kept from step to step "
        f"{measure_states(stage, config).alone / GIB:.2f} GiB; computed from shapes, not measured"
    )
    say("")
    memory = ("pass, GiB", "each GPU, GiB", "with FSDP")
    say(_row("precision", "checkpointing", "GPUs", "batch", *memory, *(f"{gpu} hours" for gpu in PEAKS)))
    say(_row(":--", ":--", *["--:"] * (5 + len(PEAKS))))


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def without_weights(config: TrainConfig) -> TrainConfig:
    """The run with all of its shapes and no files of weights.

    Raises:
        ConfigError: if the backbone's configurations cannot be read.
    """
    config = copy.deepcopy(config)
    if config.init_from is not None and not Path(config.init_from).exists():
        config.init_from = None  # of a stage that has not run yet
        config.check()
    try:
        config = resolve(config)
        config.init_from = None
        if config.backbone.source is not None:
            found = read_configs(config.backbone.source)
            config.backbone.vae, config.backbone.unet, config.backbone.scheduler = (found[part] for part in PARTS)
            config.backbone.source = None
    except BackboneError as error:
        raise ConfigError(f"{error}; or the shapes alone, as backbone=sd21_random") from None
    config.denoiser.prompt_init = "noise"
    config.trainer.compile = False
    return config


def measure_states(stage: Stage, config: TrainConfig) -> States:
    """What processes keep, gradients among it if they are kept as zeros (`optimiser.set_to_none=false`)."""
    trained = trained_bytes(stage)
    alone = persistent_bytes(stage, config) - (trained if config.optimiser.set_to_none else 0)
    units = [
        [unit for unit in module.modules() if type(unit).__name__ in FSDP_UNITS] for module in stage_modules(stage)
    ]
    sizes = [sum(count_bytes(unit.parameters()) for unit in found) for found in units]
    rest = tensor_bytes(stage) - sum(sizes)  # in no unit: gathered for the whole pass
    largest = max((count_bytes(unit.parameters()) for found in units for unit in found), default=0)
    return States(alone, trained, rest + 2 * largest)  # one unit computes, the next is on its way
