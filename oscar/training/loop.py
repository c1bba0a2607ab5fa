"""The training loop: Accelerate, optimisers, EMA, logs, checkpoints and resume, the same for every stage."""

from __future__ import annotations

import csv
import logging
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm.auto import tqdm

from oscar.config import OptimiserConfig, TrainConfig
from oscar.errors import first_line
from oscar.training.data import build_loader
from oscar.training.losses import critic_loss
from oscar.training.stage import Pass, Stage

log = logging.getLogger(__name__)
_CHECKPOINT = re.compile(r"step-(\d+)\.pt")


class NonFiniteLossError(RuntimeError):
    """A loss that is not a number; says the step and the pictures of the batch."""


class Learner:
    """A module with its optimiser, learning-rate schedule and gradient clipping, wrapped by Accelerate."""

    def __init__(self, module: nn.Module, config: OptimiserConfig, max_steps: int, accelerator: Accelerator):
        self.accelerator = accelerator
        self.clip = config.grad_clip
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        optimiser = torch.optim.AdamW(
            self.parameters, lr=config.lr, betas=tuple(config.betas), weight_decay=config.weight_decay
        )
        kind = "constant_with_warmup" if config.schedule == "constant" else "cosine"
        self.schedule = get_scheduler(
            kind, optimiser, num_warmup_steps=config.warmup_steps, num_training_steps=max_steps
        )
        self.plain = module
        self.module, self.optimiser = accelerator.prepare(module, optimiser)

    def update(self) -> None:
        """One optimiser step from the gathered gradients (call under `accelerator.sync_gradients`)."""
        if self.clip is not None:
            self.accelerator.clip_grad_norm_(self.parameters, self.clip)
        self.optimiser.step()
        self.schedule.step()
        self.optimiser.zero_grad()

    def state(self) -> dict:
        """What resuming needs: trained parameters and buffers, optimiser and schedule."""
        optimiser, schedule = self.optimiser.state_dict(), self.schedule.state_dict()
        return {"model": self._model(), "optimiser": optimiser, "schedule": schedule}

    def _model(self) -> dict[str, Tensor]:
        trained = {name for name, parameter in self.plain.named_parameters() if parameter.requires_grad}
        trained |= {name for name, _ in self.plain.named_buffers()}
        return {name: value for name, value in self.plain.state_dict().items() if name in trained}

    def restore(self, state: dict) -> None:
        shapes, own = ({name: tuple(value.shape) for name, value in model.items()}
                       for model in (state["model"], self._model()))  # fmt: skip
        for name in sorted(shapes.keys() | own.keys()):
            if shapes.get(name) != own.get(name):
                raise ValueError(
                    f"checkpoint: {name} of shape {shapes.get(name)} does not fit this configuration, "
                    f"which has {own.get(name)}"
                )
        self.plain.load_state_dict(state["model"], strict=False)
        self.optimiser.load_state_dict(state["optimiser"])
        self.schedule.load_state_dict(state["schedule"])


class CsvLog:
    """One row per logged step in `log.csv`; on resume, rows after the checkpoint are dropped."""

    def __init__(self, path: Path, columns: list[str], step: int):
        self.path, self.columns = path, columns
        rows = []
        if path.exists() and step > 0:
            with path.open(newline="") as file:
                rows = [row for row in csv.DictReader(file) if int(row["step"]) <= step]
        temporary = path.with_suffix(".tmp")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, path)

    def write(self, row: dict) -> None:
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(row)


class Trainer:
    """Runs one stage from its newest checkpoint to its last step.

    Every random draw follows from seed, step and rank, and the data order from the step, so that a resumed run repeats
    an uninterrupted one exactly on the same machine and number of processes.

    Args:
        stage: what is trained.
        config: the run.
        accelerator: for tests; made from the config if None.
    """

    def __init__(self, stage: Stage, config: TrainConfig, accelerator: Accelerator | None = None):
        trainer = config.trainer
        self.config = config
        self.output = Path(config.output)
        self.accelerator = accelerator or make_accelerator(config)
        self.layout = torch.channels_last if trainer.channels_last else torch.contiguous_format
        self.stage = stage.to(self.accelerator.device, memory_format=self.layout)
        self.stage.train()
        self.learner = Learner(self.stage, config.optimiser, trainer.max_steps, self.accelerator)
        self.critic = None
        if stage.critic is not None:
            stage.critic.to(self.accelerator.device, memory_format=self.layout).train()
            self.critic = Learner(stage.critic, config.stage.critic.optimiser, trainer.max_steps, self.accelerator)
        self.ema = None
        if trainer.ema_decay is not None:
            self.ema = EMAModel(self.learner.parameters, decay=trainer.ema_decay)
            self.ema.to(self.accelerator.device)
        if not trainer.resume and self.accelerator.is_main_process:
            reset(self.output)
        self.step = self._resume() if trainer.resume else 0
        self._stop = False

    def run(self) -> bool:
        """Train to the last step and save the result in `output/final`.

        Returns:
            False if a signal stopped it early; then a checkpoint of the last step is there to resume from.
        """
        trainer, main = self.config.trainer, self.accelerator.is_main_process
        csv_log = None
        if main:
            columns = ["step", "seconds", "lr", *self.stage.metrics]
            csv_log = CsvLog(self.output / "log.csv", columns, self.step)
        batches = self._batches(self.step * trainer.accumulation)
        start = time.perf_counter()
        progress = tqdm(total=trainer.max_steps, initial=self.step, disable=not main, desc=self.config.stage.name)
        with self._catch_signals():
            while self.step < trainer.max_steps and not self._stop:
                metrics = self._optimise(batches)
                self.step += 1
                progress.update()
                if self.step % trainer.log_every == 0 or self.step == trainer.max_steps:
                    values = {name: value.item() for name, value in metrics.items()}
                    lr = self.learner.schedule.get_last_lr()[0]
                    progress.set_postfix(loss=f"{values['loss']:.4f}")
                    self.accelerator.log({**values, "lr": lr}, step=self.step)
                    if csv_log is not None:
                        seconds = round(time.perf_counter() - start, 3)
                        csv_log.write({"step": self.step, "seconds": seconds, "lr": lr, **values})
                if self.step % trainer.checkpoint_every == 0 or self.step == trainer.max_steps or self._stop:
                    self._save()
        progress.close()
        if self.step < trainer.max_steps:
            log.info("stopped at step %d; run the same command again to go on", self.step)
            return False
        self._finish()
        return True

    def _optimise(self, batches: Iterator[dict]) -> dict[str, Tensor]:
        """One optimiser step over `accumulation` passes; returns the last pass's metrics."""
        accelerator, learners = self.accelerator, [self.learner] + ([self.critic] if self.critic else [])
        for micro in range(self.config.trainer.accumulation):
            batch = next(batches)
            number = self.step * self.config.trainer.accumulation + micro
            turn = Pass(number, self.config.seed, accelerator.process_index)
            with accelerator.accumulate(*(learner.module for learner in learners)):
                if self.critic is not None:
                    self.stage.critic.requires_grad_(False)  # its weights get no gradient from the codec's loss
                metrics = self.learner.module(self._images(batch), turn)
                self._check_finite(metrics["loss"], batch)
                accelerator.backward(metrics["loss"])
                if accelerator.sync_gradients:
                    self.learner.update()
                if self.critic is not None:
                    for parameter in self.critic.parameters:
                        parameter.requires_grad_(True)
                    metrics["critic"] = self._train_critic(turn, batch)
            if accelerator.sync_gradients and self.ema is not None:
                self.ema.step(self.learner.parameters)
        return {name: value.detach() for name, value in metrics.items()}

    def _images(self, batch: dict) -> Tensor:
        return batch["image"].to(self.accelerator.device, memory_format=self.layout, non_blocking=True)

    def _train_critic(self, turn: Pass, batch: dict) -> Tensor:
        real, fake, prompt = self.stage.critic_inputs()
        latents = torch.cat([real, fake])
        logits = self.critic.module(latents, prompt, turn.noise(latents.device, stream=4))
        loss = critic_loss(*logits.chunk(2))
        self._check_finite(loss, batch)
        self.accelerator.backward(self.config.stage.critic.weight * loss)
        if self.accelerator.sync_gradients:
            self.critic.update()
        return loss

    def _check_finite(self, loss: Tensor, batch: dict) -> None:
        if not torch.isfinite(loss):
            names = ", ".join(str(self.paths[index]) for index in batch["index"].tolist())
            raise NonFiniteLossError(f"loss is {loss.item()} at step {self.step + 1}; pictures of the batch: {names}")

    def _batches(self, first: int) -> Iterator[dict]:
        data = self.config.data
        loader = build_loader(
            data.train, crop_size=data.crop, batch_size=data.batch_size, seed=self.config.seed, augment=data.augment,
            cache=data.cache, scale=tuple(data.scale) if list(data.scale) != [1.0, 1.0] else None,
            workers=data.workers, start_step=first, rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
        )  # fmt: skip
        self.paths = loader.dataset.paths
        return iter(loader)

    def _finish(self) -> None:
        if self.accelerator.is_main_process:
            if self.ema is not None:
                self.ema.store(self.learner.parameters)
                self.ema.copy_to(self.learner.parameters)
            self.stage.eval()
            self.stage.finish(self._images(batch) for batch in self._batches(0))
            self.stage.save(self.output / "final")
            if self.ema is not None:
                self.ema.restore(self.learner.parameters)
            log.info("saved %s", self.output / "final")
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()

    # Checkpoints.

    def _save(self) -> None:
        if not self.accelerator.is_main_process:
            return
        folder = self.output / "checkpoints"
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            "step": self.step,
            "learner": self.learner.state(),
            "critic": self.critic.state() if self.critic else None,
            "ema": self.ema.state_dict() if self.ema else None,
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
        }
        path = folder / f"step-{self.step:07d}.pt"
        temporary = path.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, path)
        for old in find_checkpoints(self.output)[: -self.config.trainer.keep_last]:
            old.unlink()

    def _resume(self) -> int:
        paths = find_checkpoints(self.output)
        if not paths:
            return 0
        try:
            state = torch.load(paths[-1], map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds for damaged files
            raise ValueError(f"checkpoint {paths[-1]} cannot be read: {first_line(error)}") from None
        self.learner.restore(state["learner"])
        for name, target in (("critic", self.critic), ("ema", self.ema), ("scaler", self.accelerator.scaler)):
            if (state[name] is None) != (target is None):
                raise ValueError(f"checkpoint {paths[-1]}: {name} does not fit this configuration")
        if self.critic is not None:
            self.critic.restore(state["critic"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
            self.ema.to(self.accelerator.device)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        log.info("resumed from %s", paths[-1])
        return state["step"]

    @contextmanager
    def _catch_signals(self):
        """On SIGINT or SIGTERM, finish the step, write a checkpoint and leave."""

        def stop(number, frame):
            self._stop = True

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def find_checkpoints(output: Path) -> list[Path]:
    """The run's training checkpoints, oldest first."""
    paths = [path for path in (output / "checkpoints").glob("*.pt") if _CHECKPOINT.fullmatch(path.name)]
    return sorted(paths, key=lambda path: int(_CHECKPOINT.fullmatch(path.name)[1]))


def make_accelerator(config: TrainConfig) -> Accelerator:
    """The accelerator of a run, with the loggers that the config names."""
    trackers = [name for name in ("tensorboard", "wandb") if getattr(config.logger, name)]
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(
        gradient_accumulation_steps=config.trainer.accumulation,
        mixed_precision=config.trainer.mixed_precision,
        log_with=trackers or None,
        project_dir=str(output),
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    if trackers:
        accelerator.init_trackers(config.logger.project)
    return accelerator


def reset(output: Path) -> None:
    """Remove the checkpoints and the log of an earlier run in this folder."""
    shutil.rmtree(output / "checkpoints", ignore_errors=True)
    (output / "log.csv").unlink(missing_ok=True)
