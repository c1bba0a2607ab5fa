"""The training loop: optimiser steps, average, logs, validation, checkpoints and resume, the same for every stage.

A run is a function of its configuration: every random draw follows from seed, pass and process (`StepRng`), the
rates of a pass from seed and pass alone, and the data from the numbers of the crops (`data.ResumableSampler`). So a
checkpoint holds no state of a random generator, processes need not tell each other which rate comes next, and a resumed
run repeats an uninterrupted one to the bit on the same machine and number of processes. On another number of processes
it goes on with the same crops in the same steps, if there are as many per step; draws that belong to a process (noise
for the critic and of stage diffusion_pretrain, new codes for dead ones) then differ.
"""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from diffusers.training_utils import EMAModel
from torch import Tensor
from tqdm.auto import tqdm

from oscar.config import ConfigError, TrainConfig
from oscar.data.crops import build_loader
from oscar.training.checkpoints import BEST, Checkpoints, CsvLog, reset
from oscar.training.interval import Interval
from oscar.training.processes import check_processes, critic_accelerator, make_accelerator, start_trackers
from oscar.training.record import FINAL, RunRecord
from oscar.training.resolve import resolve
from oscar.training.stages.base import Stage, critic_pass
from oscar.training.train_state import NonFiniteError, TrainState, full_tensors, shard
from oscar.utils.rng import StepRng

log = logging.getLogger(__name__)

OVERFLOW = "a gradient overflowed"  # what float16's scaler is there for, and no fault


class Trainer:
    """Runs one stage from its newest checkpoint to its last step, on every process alike.

    Args:
        stage: what is trained.
        config: the run.
        accelerator: made from the config if None, for a single process; several are joined before the stage is built.
        overrides: of the command, for the record of the run.

    Raises:
        ConfigError: for settings that do not go with the way the processes share their work, or if the folder holds
            another run.
        ValueError: for a checkpoint that cannot be read or is of another configuration.
    """

    def __init__(
        self, stage: Stage, config: TrainConfig, accelerator: Accelerator | None = None, overrides: Sequence[str] = ()
    ):
        config = resolve(config)
        trainer = config.trainer
        self.config = config
        self.output = Path(config.output)
        self.accelerator = accelerator or make_accelerator(config)
        check_processes(config, stage, self.accelerator)
        self.record = RunRecord(config, stage, self.accelerator, overrides)
        if self.accelerator.is_main_process:
            self.output.mkdir(parents=True, exist_ok=True)
            if not trainer.resume:
                reset(self.output)
        self.layout = torch.channels_last if trainer.channels_last else torch.contiguous_format
        self.stage = stage.to(self.accelerator.device, memory_format=self.layout)
        self.stage.train()
        self.train_state = TrainState(
            self.stage, config.optimiser, trainer.max_steps, self.accelerator, stage.clip_groups
        )
        self.critic = None
        if stage.critic is not None:
            stage.critic.to(self.accelerator.device, memory_format=self.layout).train()
            accelerator = critic_accelerator(self.accelerator)
            self.critic = TrainState(stage.critic, config.stage.critic.optimiser, trainer.max_steps, accelerator)
        self.train_states = [self.train_state] if self.critic is None else [self.train_state, self.critic]
        self.ema = None
        if trainer.ema_decay is not None:
            at_once = self.accelerator.distributed_type != DistributedType.FSDP  # else one by one: torch cannot yet
            self.ema = EMAModel(self.train_state.parameters, decay=trainer.ema_decay, foreach=at_once)
            self.ema.to(self.accelerator.device)
        self.validator = None
        if config.validation.enabled:
            from oscar.training.validation import Validator

            self.validator = Validator(config, self.accelerator)
        self.batch = config.data.batch_size * self.accelerator.num_processes * trainer.accumulation
        self.step = 0
        self.validated = 0  # the last step after which there was a validation
        self.best: float | None = None  # what it gave
        self.skipped = self.skipped_in_a_row = 0
        self.interval = Interval()
        self.seconds = 0.0  # of the run before this process
        self._faults: dict[TrainState, str] = {}  # by train state, why this step's update is left out
        self._indices: list[list[int]] = []  # of the images of this step's passes, on this process
        self.checkpoints = Checkpoints(self.output, self.accelerator, trainer.keep_last)
        newest = self.checkpoints.newest() if trainer.resume else None
        if newest is not None:
            self._restore(newest)
            if self.step > trainer.max_steps:
                raise ConfigError(
                    f"trainer.max_steps is {trainer.max_steps}, but the run in {self.output} is at step "
                    f"{self.step}; allowed: at least that"
                )
            if self.accelerator.is_main_process:
                log.info("resumed from %s", newest)
        start_trackers(config, self.accelerator, self.step)
        self._signalled = self._stopping = False  # a signal to this process; one to any, as all have agreed

    def run(self) -> bool:
        """Train to the last step and save the result in `output/final`.

        Returns:
            False if a signal stopped it early; then a checkpoint of the last step is there to resume from.

        Raises:
            NonFiniteError: see `trainer.non_finite`.
        """
        trainer, main = self.config.trainer, self.accelerator.is_main_process
        if self.step == trainer.max_steps and self.record.is_finished(self.step):
            if main:
                log.info("finished already: %s, %d steps; nothing to do", self.output / FINAL, self.step)
            self.accelerator.end_training()
            return True
        self.record.start(self.step)
        self._open_tables()
        batches = self._batches(self.step * trainer.accumulation)
        progress = tqdm(total=trainer.max_steps, initial=self.step, disable=not main, desc=self.config.stage.name)
        with self._catch_signals():
            self._validate_if_due()  # if that of the checkpoint's step was not finished
            while self.step < trainer.max_steps and not self._stopping:
                self._optimise(batches)
                self.step += 1
                progress.update()
                last = self.step == trainer.max_steps
                if self.step % trainer.log_every == 0 or last:
                    progress.set_postfix(loss=f"{self._log():.4f}")
                if self.step % trainer.checkpoint_every == 0 or last or self._stopping:
                    self._save(f"step-{self.step:07d}")
                if not self._stopping:
                    self._validate_if_due()
        progress.close()
        if self.step < trainer.max_steps:
            if main:
                log.info("stopped at step %d; run the same command again to go on", self.step)
            self.accelerator.end_training()
            return False
        self._finish()
        return True

    # One step.

    def _optimise(self, batches: Iterator[dict]) -> None:
        """One optimiser step over `accumulation` passes; what they measure is added to the interval."""
        started = time.perf_counter()
        accumulation = self.config.trainer.accumulation
        keep = self.config.trainer.non_finite == "skip" or self.train_state.scaler is not None
        buffers = [(buffer, buffer.clone()) for buffer in self.stage.buffers()] if keep else []
        self._faults.clear()
        self._indices.clear()
        found = []
        for micro in range(accumulation):
            batch = next(batches)
            rng = StepRng(self.step * accumulation + micro, self.config.seed, self.accelerator.process_index)
            with self.accelerator.accumulate(*(train_state.module for train_state in self.train_states)):
                if self.train_state not in self._faults:
                    self._indices.append(batch["index"].tolist())
                    found.append(self._learn(self._images(batch), rng))
        self._conclude(found, buffers)
        self.interval.add_time(self.batch, time.perf_counter() - started)

    def _learn(self, images: Tensor, rng: StepRng) -> dict[str, float]:
        """One pass, and the updates if it is a step's last; returns what it measures."""
        if self.critic is not None:
            self.stage.critic.requires_grad_(False)  # its weights get no gradient from the codec's loss
        metrics = self.train_state.module(images, rng)
        values = self._descend(self.train_state, metrics["loss"], metrics, "loss", "grad_norm")
        if self.critic is not None:
            for parameter in self.critic.parameters:
                parameter.requires_grad_(True)
            if not self._faults:
                loss = critic_pass(
                    self.critic.module, self.stage.critic_inputs(), rng, self.config.stage.critic.reduction
                )
                weighted = self.config.stage.critic.weight * loss
                values |= self._descend(self.critic, weighted, {"critic": loss}, "critic", "critic_grad_norm")
        return values

    def _images(self, batch: dict) -> Tensor:
        images = batch["latent" if self.stage.takes_latents else "image"]
        return images.to(self.accelerator.device, memory_format=self.layout, non_blocking=True)

    def _descend(
        self, train_state: TrainState, loss: Tensor, metrics: dict[str, Tensor], name: str, norm_name: str
    ) -> dict[str, float]:
        """Gradients of a loss, and the update on a step's last pass if they are finite on all processes.

        Args:
            train_state: what is trained.
            loss: scalar.
            metrics: scalars that are measured.
            name: which of them must be finite.
            norm_name: what the norm of the gradients is called among them.

        Returns:
            Means of the metrics over the processes; no others than finite ones if the update is left out.
        """
        train_state.backward(loss)
        if self.accelerator.sync_gradients:
            metrics = {**metrics, norm_name: train_state.clip()}
        values = self._share(metrics)
        if not math.isfinite(values[name]):
            self._faults[train_state] = self._describe(name, metrics[name])
            return {}
        if not math.isfinite(values.get(norm_name, 0)):
            overflow = train_state.has_overflowed()
            self._faults[train_state] = OVERFLOW if overflow else self._describe(norm_name, metrics[norm_name])
            del values[norm_name]
        elif self.accelerator.sync_gradients:
            train_state.update()
        return values

    def _share(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        """Means over the processes, the same on each; they also tell each other of signals.

        This is the one place where a pass waits for the device.
        """
        values = [value.detach().float().reshape(()) for value in metrics.values()]
        signalled = torch.tensor(float(self._signalled), device=self.accelerator.device)
        *means, stop = self.accelerator.reduce(torch.stack([*values, signalled]), "mean").tolist()
        self._stopping = self._stopping or stop > 0
        return dict(zip(metrics, means, strict=True))

    def _describe(self, name: str, value: Tensor) -> str:
        """What is not finite, and the images behind it: of this pass, or of all passes for a norm."""
        passes = self._indices if name.endswith("grad_norm") else self._indices[-1:]
        own = [] if torch.isfinite(value) else [(value.item(), [str(self.paths[i]) for i in chain(*passes)])]
        found = gather_object(own)
        names = ", ".join(path for _, paths in found for path in paths)
        title = {
            "grad_norm": "norm of the gradients",
            "critic": "loss of the critic",
            "critic_grad_norm": "norm of the critic's gradients",
        }.get(name, name)
        message = f"{title} is {found[0][0]} at step {self.step + 1}; images of the batch: {names}"
        if self.config.trainer.non_finite == "stop":
            raise NonFiniteError(message)
        return message

    def _conclude(self, found: list[dict[str, float]], buffers: list[tuple[Tensor, Tensor]]) -> None:
        """End a step on every process: if the stage's update was left out, all is as it was before.

        If only the critic's was, the stage's stands.
        """
        fault = self._faults.get(self.train_state)
        for train_state in self.train_states:
            if fault is not None or train_state in self._faults:
                train_state.skip()
        if fault is None or fault is OVERFLOW:
            for values in found:
                self.interval.add(values)
        if fault is None and self.ema is not None:
            self.ema.step(self.train_state.parameters)
        if fault is not None:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
        messages = [message for message in self._faults.values() if message is not OVERFLOW]
        if messages:
            self._count_skip(messages[0])
        elif not self._faults:
            self.skipped_in_a_row = 0

    def _count_skip(self, message: str) -> None:
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= self.config.trainer.max_skipped:
            raise NonFiniteError(f"{self.skipped_in_a_row} steps in a row were skipped; {message}")
        if self.accelerator.is_main_process:
            log.warning("step skipped: %s", message)

    def _batches(self, first: int) -> Iterator[dict]:
        data = self.config.data
        loader = build_loader(
            data.train,
            crop_size=data.crop,
            batch_size=data.batch_size,
            seed=self.config.seed,
            augment=data.augment,
            cache=data.cache,
            scale=tuple(data.scale) if list(data.scale) != [1.0, 1.0] else None,
            margin=data.crop_margin,
            latents=data.latents,
            workers=data.workers,
            start_step=first,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
        )
        self.paths = loader.dataset.paths
        return iter(loader)

    # Logs and validation.

    def _open_tables(self) -> None:
        self._tables: dict[str, CsvLog] = {}
        self._started = time.perf_counter()
        norms = ["grad_norm"] if self.critic is None else ["grad_norm", "critic_grad_norm"]
        columns = ["step", "seconds", *self._status(), *norms, *self.stage.metrics]
        if self.accelerator.is_main_process:
            self._tables["log"] = CsvLog(self.output / "log.csv", self.step, columns)
            if self.validator is not None:
                self._tables["validation"] = CsvLog(self.output / "validation.csv", self.validated)

    def _total_seconds(self) -> float:
        """Since the run began, without the time between its end and a resume."""
        return self.seconds + time.perf_counter() - self._started

    def _status(self) -> dict[str, float]:
        """What a row of the log holds beside the interval's means; collective."""
        values = {"images_per_second": round(self.interval.images_per_second, 3)}
        device = self.accelerator.device
        if device.type == "cuda":  # of the process that took the most
            peak = torch.tensor([torch.cuda.max_memory_allocated(device)], device=device)
            values["gpu_memory_gib"] = round(self.accelerator.gather(peak).max().item() / 2**30, 3)
        values["lr"] = self.train_state.schedule.get_last_lr()[0]
        if self.train_state.scaler is not None:
            values["loss_scale"] = self.train_state.scaler.get_scale()
        if self.config.trainer.non_finite == "skip":
            values["skipped"] = self.skipped
        return values

    def _log(self) -> float:
        """Write a row of means over the interval, and return the loss; NaN if all of its steps were skipped."""
        means = self.interval.means()
        values = {**self._status(), **means}
        self.accelerator.log(values, step=self.step)
        if "log" in self._tables:
            self._tables["log"].write({"step": self.step, "seconds": round(self._total_seconds(), 3), **values})
        if self.step % self.config.trainer.log_every == 0:  # else the last step's row, and a longer run goes on
            self.interval.clear()
        return means.get("loss", math.nan)

    def _validate_if_due(self) -> None:
        last = self.step == self.config.trainer.max_steps
        due = self.step > 0 and (self.step % self.config.validation.every == 0 or last)
        if self.validator is None or not due or self.validated == self.step:
            return
        with self._averaged_stage() as stage:
            scalars = self.validator.run(stage, self.step)
        self.validated = self.step
        self.accelerator.log({f"validation/{name}": value for name, value in scalars.items()}, step=self.step)
        if "validation" in self._tables:
            self._tables["validation"].write({"step": self.step, **scalars})
        value = scalars[self.validator.best]
        higher = self.validator.higher_is_better
        if not math.isnan(value) and (self.best is None or (value > self.best if higher else value < self.best)):
            self.best = value
            self._save(BEST)
        if last:
            self._save(f"step-{self.step:07d}")  # again, now that it is validated

    @contextmanager
    def _averaged_stage(self) -> Iterator[Stage]:
        """The stage with its averaged weights, if there are any, whole on every process; collective."""
        parameters = self.train_state.parameters
        kept = []
        if self.ema is not None:
            kept = [parameter.detach().clone() for parameter in parameters]
            self.ema.copy_to(parameters)
        try:
            yield self._whole_stage() if self.accelerator.distributed_type == DistributedType.FSDP else self.stage
        finally:
            for parameter, value in zip(parameters if kept else [], kept, strict=True):
                parameter.data.copy_(value)

    def _whole_stage(self) -> Stage:
        """A copy of a stage that FSDP has sharded over the processes."""
        from oscar.training.build import build_stage

        state = {name: full_tensors(value) for name, value in self.stage.state_dict().items()}
        stage = build_stage(self.config)
        stage.load_state_dict(state)
        return stage.to(self.accelerator.device, memory_format=self.layout)

    def _finish(self) -> None:
        last = self.step
        if self.config.trainer.final == BEST and self.best is not None:
            self._restore(self.checkpoints.best)
        with self._averaged_stage() as stage:
            if self.accelerator.is_main_process:
                stage.eval()
                stage.finish(self._images(batch) for batch in self._batches(0))
                stage.save(self.output / FINAL, self.record.of_result(self.step))
                self.record.finish(last)
                log.info("saved %s", self.output / FINAL)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()

    # Checkpoints.

    def _save(self, name: str) -> None:
        self.record.check_ours()
        state = {
            "step": self.step,
            "batch": self.batch,
            "validated": self.validated,
            "best": self.best,
            "skipped": [self.skipped, self.skipped_in_a_row],
            "interval": self.interval.state(),
            "clock": [self._total_seconds(), self.interval.seconds],
            "learner": self.train_state.state(),
            "critic": self.critic.state() if self.critic else None,
            "ema": full_tensors(self.ema.state_dict()) if self.ema else None,
        }
        self.checkpoints.save(state, name, self.train_states)

    def _restore(self, path: Path) -> None:
        state = self.checkpoints.load(path)
        if state["batch"] != self.batch:
            processes, trainer = self.accelerator.num_processes, self.config.trainer
            raise ValueError(
                f"checkpoint {path}: made with {state['batch']} crops per step, but this run has {self.batch} "
                f"(processes {processes} x data.batch_size {self.config.data.batch_size} x trainer.accumulation "
                f"{trainer.accumulation}); allowed: a product of {state['batch']}, which keeps the order of the data"
            )
        for name, target in (("critic", self.critic), ("ema", self.ema)):
            if (state[name] is None) != (target is None):
                raise ValueError(f"checkpoint {path}: {name} does not fit this configuration")
        self.train_state.restore(state["learner"])
        if self.critic is not None:
            self.critic.restore(state["critic"])
        self.checkpoints.load_engines(path, self.train_states)
        if self.ema is not None:
            averages = zip(state["ema"]["shadow_params"], self.train_state.parameters, strict=True)
            self.ema.load_state_dict({**state["ema"], "shadow_params": [shard(*pair) for pair in averages]})
            self.ema.to(self.accelerator.device)
        self.step, self.validated, self.best = state["step"], state["validated"], state["best"]
        self.skipped, self.skipped_in_a_row = state["skipped"]
        if "interval" in state:  # not in those of older versions
            self.seconds, in_interval = state["clock"]
            self.interval.restore(state["interval"], in_interval)

    @contextmanager
    def _catch_signals(self):
        """On SIGINT or SIGTERM to any process, all finish the step, write a checkpoint and leave."""

        def stop(number, frame):
            self._signalled = True

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
