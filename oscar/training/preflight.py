"""Before a long run: are weights, data, memory and disk there, and what would the steps wait for? In about a minute.

    python scripts/train.py experiment=paper/stage2 data.train=[/data/DIV2K] preflight=true

The run is built as it would be, in a temporary folder; the loader is timed by itself, then steps on a batch in memory.
Nothing of it stays.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path

import torch

from oscar.config import ConfigError, LoggerConfig, TrainConfig
from oscar.inference.fitting import TensorMemory
from oscar.training.build import build_stage
from oscar.training.resolve import resolve
from oscar.training.stages.base import Stage
from oscar.training.trainer import Trainer, make_accelerator
from oscar.utils.free_memory import available_memory

GIB = 2**30
LOADER_SECONDS, STEP_SECONDS, MOST_STEPS = 10.0, 20.0, 20  # of measuring
RESERVE = 0.05  # of the memory, for what allocators cannot use


@dataclass(frozen=True)
class Finding:
    """What was looked at.

    Attributes:
        name: of it.
        facts: what was found.
        problem: what is wrong, with what is allowed; None if nothing is.
        is_fatal: whether the run cannot go on so.
    """

    name: str
    facts: str
    problem: str | None = None
    is_fatal: bool = False

    @property
    def line(self) -> str:
        state = "ok" if self.problem is None else "STOP" if self.is_fatal else "slow"
        return f"{self.name:<9}{state:<6}{self.facts}{'' if self.problem is None else f'; {self.problem}'}"


def run_preflight(
    config: TrainConfig,
    show: Callable[[str], object] = print,
    seconds: Sequence[float] = (LOADER_SECONDS, STEP_SECONDS),
) -> list[Finding]:
    """Look at all of a run, and say what would stop it or slow it down.

    Args:
        config: the run.
        show: takes each finding's line as soon as it is there; on the first process.
        seconds: at most, of timing the loader and the steps.

    Raises:
        ConfigError: at the end, in one line, if the run cannot go on so; at once for what building it refuses, as
            CheckpointError, BackboneError, WeightsUnavailable and ImageError.
    """
    config = resolve(config)
    findings: list[Finding] = []
    with tempfile.TemporaryDirectory() as folder:
        trial = replace(
            config,
            output=folder,
            trainer=replace(config.trainer, resume=False),
            logger=LoggerConfig(tensorboard=False),
        )
        accelerator = make_accelerator(trial)

        def found(finding: Finding) -> Finding:
            findings.append(finding)
            if accelerator.is_main_process:
                show(finding.line)
            return finding

        begin, free = time.perf_counter(), free_memory(accelerator.device)
        stage = build_stage(trial)
        found(_weights(stage, time.perf_counter() - begin))
        needed = persistent_bytes(stage, config)
        if not found(_room(needed, free)).is_fatal:
            try:
                _run(trial, stage, accelerator, found, free, seconds)
            except (RuntimeError, MemoryError) as error:
                if not _is_out_of_memory(error):
                    raise
                found(Finding("memory", f"{free / GIB:.1f} GiB were free", _less_memory(config), True))
        found(_disk(stage, config))
    stopping = [finding for finding in findings if finding.is_fatal]
    if stopping:
        raise ConfigError("preflight: " + "; ".join(f"{finding.name}: {finding.problem}" for finding in stopping))
    return findings


def _run(trial: TrainConfig, stage: Stage, accelerator, found: Callable, free: int, seconds: Sequence[float]) -> None:
    trainer = Trainer(stage, trial, accelerator)
    batches = trainer._batches(0)
    batch = next(batches)
    loaded = _rate(batches, seconds[0]) * trial.data.batch_size
    del batches  # and with them their workers
    peak, step = measure_steps(trainer, batch, seconds[1])
    images = trial.data.batch_size * trial.trainer.accumulation  # of a step, of one process
    found(_loader(loaded, images / step, len(trainer.paths), trial, accelerator.device))
    found(_memory(peak, free, trial))
    waiting = images / loaded  # for a step's images
    if trial.data.workers == 0:  # nothing is loaded while a step goes on
        step += waiting
    elif accelerator.device.type != "cpu":
        step = max(step, waiting)
    steps = trial.trainer.max_steps
    facts = f"{images / step:.2f} images/s a process, {step:.3f} s a step x {steps:,} steps"
    found(Finding("time", f"{facts} = {steps * step / 3600:.1f} hours"))


def _loader(loaded: float, used: float, count: int, config: TrainConfig, device: torch.device) -> Finding:
    """What the loader gives by itself against what steps take, in images/s of one process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = f"{count:,} images; {loaded:.1f} images/s by {config.data.workers} workers ({cores} cores)"
    problem = None
    if device.type != "cpu" and (loaded < used or config.data.workers == 0):
        problem = (
            f"steps take {used:.1f} and would wait; allowed: a larger data.workers, shards in place of files on a "
            "network drive, data.latents in stage bottleneck"
        )
    return Finding("loader", facts, problem)


def measure_steps(trainer: Trainer, batch: dict, seconds: float) -> tuple[int, float]:
    """Peak bytes of an optimiser step, all told, and the median seconds of those that follow.

    On a GPU the peak is what its allocator reserved. On a CPU it is that of the tensors alone, without Python,
    libraries and what kernels take for themselves. If the first step takes all the time, it is the only one.
    """
    device, batches = trainer.accelerator.device, repeat(batch)
    counter: contextlib.AbstractContextManager = contextlib.nullcontext()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        counter = TensorMemory()
    with counter as memory:
        first = _timed_step(trainer, batches)
    taken: list[float] = []
    while sum(taken) + first < seconds and len(taken) < MOST_STEPS:
        taken.append(_timed_step(trainer, batches))
    median = sorted(taken)[len(taken) // 2] if taken else first
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device), median
    return memory.peak + tensor_bytes(trainer.stage), median


def _timed_step(trainer: Trainer, batches: Iterator[dict]) -> float:
    begin = time.perf_counter()
    trainer._optimise(batches)  # which reads the loss, and so waits for the device
    trainer.step += 1
    return time.perf_counter() - begin


def _rate(batches: Iterator[dict], seconds: float) -> float:
    """Batches per second."""
    begin, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - begin < seconds:
        next(batches)
        count += 1
    return count / (time.perf_counter() - begin)


# What is known without a step.


def stage_modules(stage: Stage) -> list[torch.nn.Module]:
    """The stage, and its critic if it has one."""
    return [stage] if stage.critic is None else [stage, stage.critic]


def parameters_of(stage: Stage) -> list[torch.nn.Parameter]:
    """All weights, the critic's too."""
    return [value for module in stage_modules(stage) for value in module.parameters()]


def count_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Of tensors, each taken once."""
    return sum(value.numel() * value.element_size() for value in {id(value): value for value in tensors}.values())


def tensor_bytes(stage: Stage) -> int:
    """Of all weights and buffers, the critic's too."""
    buffers = [value for module in stage_modules(stage) for value in module.buffers()]
    return count_bytes([*parameters_of(stage), *buffers])


def trained_bytes(stage: Stage) -> int:
    return count_bytes(value for value in parameters_of(stage) if value.requires_grad)


def persistent_bytes(stage: Stage, config: TrainConfig) -> int:
    """What a process keeps from step to step as a replica: weights, gradients, AdamW's two moments, and averages."""
    copies = 3 + (config.trainer.ema_decay is not None)
    return tensor_bytes(stage) + copies * trained_bytes(stage)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on the device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()


def _weights(stage: Stage, seconds: float) -> Finding:
    parameters = parameters_of(stage)
    total = sum(value.numel() for value in parameters)
    trained = sum(value.numel() for value in parameters if value.requires_grad)
    return Finding("weights", f"{total / 1e6:.1f} M parameters, {trained / 1e6:.1f} M of them trained; {seconds:.0f} s")


def _room(needed: int, free: int) -> Finding:
    facts = f"{needed / GIB:.2f} GiB for weights, gradients and optimiser; {free / GIB:.1f} GiB free"
    problem = None if needed < free else "they do not fit; allowed: accelerate's fsdp, or a larger device"
    return Finding("room", facts, problem, problem is not None)


def _memory(peak: int, free: int, config: TrainConfig) -> Finding:
    facts = f"a step takes {peak / GIB:.2f} of {free / GIB:.1f} GiB"
    problem = _less_memory(config) if peak > (1 - RESERVE) * free else None
    return Finding("memory", facts, problem, problem is not None)


def _less_memory(config: TrainConfig) -> str:
    ways = [
        *(["trainer.gradient_checkpointing=true"] if not config.trainer.gradient_checkpointing else []),
        *(["trainer.mixed_precision=bf16"] if config.trainer.mixed_precision == "no" else []),
        *(["a smaller data.batch_size with more trainer.accumulation"] if config.data.batch_size > 1 else []),
        "accelerate's fsdp",
    ]
    return f"a step of batch {config.data.batch_size} does not fit; allowed: {', '.join(ways)}"


def _disk(stage: Stage, config: TrainConfig) -> Finding:
    trained = trained_bytes(stage)
    one = trained * (3 + (config.trainer.ema_decay is not None))
    files = config.trainer.keep_last + 1 + config.validation.enabled  # one more while it is written
    needed = files * one + tensor_bytes(stage)
    place = Path(config.output).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    facts = f"{needed / GIB:.1f} GiB for {files} checkpoints and the result at {place}; {free / GIB:.1f} GiB free"
    problem = None if needed < free else "they do not fit; allowed: a smaller trainer.keep_last, or another output"
    return Finding("disk", facts, problem, problem is not None)


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or "memory" in str(error).lower()
