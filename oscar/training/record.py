"""What a run is and how it came about: provenance.json and config.yaml in its folder, and a part in its result.

    identity    all that the trained weights follow from: the resolved configuration but for what `MAY_CHANGE`
    config      the whole resolved configuration, as of the last session
    origin      where the weights came from that it began with, and their own provenance
    sessions    each start: date, step, processes, overrides of the command, and commit, versions, hardware if changed
    finished    what the result in final/ was made of

A folder belongs to one run. Another one is refused, whether the first is finished or not.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from omegaconf import OmegaConf

from oscar import checkpoint
from oscar.config import ConfigError, TrainConfig
from oscar.data.latents import read_index
from oscar.training.checkpoints import find_checkpoints
from oscar.training.stages.base import Stage
from oscar.utils import former
from oscar.utils.environment import describe_environment
from oscar.utils.errors import first_line
from oscar.utils.files import atomic_write
from oscar.utils.provenance import PROVENANCE, read_provenance
from oscar.utils.strict_json import as_read, write_json

FINAL = "final"
_DIGEST = "backbone.source (its "  # keys of an identity: of the parts of a backbone that the weights follow from
# Keys, or beginnings of keys, that may be others when a run goes on, since the weights do not follow from them but for
# rounding, or since something else stands for them.
MAY_CHANGE = (
    "output", "preflight", "plan", "trainer.resume", "logger.",
    "trainer.max_steps",  # how long, not how: of a cosine, `schedule_steps` is part of the identity
    # their product is checked with the checkpoint
    "data.batch_size", "data.total_batch_size", "trainer.accumulation",
    "data.workers", "data.cache", "trainer.threads", "trainer.compile", "trainer.channels_last",
    "trainer.gradient_checkpointing", "trainer.cudnn_deterministic", "trainer.tf32", "stage.download",
    "trainer.checkpoint_every", "trainer.keep_last", "trainer.log_every",
    "trainer.non_finite", "trainer.max_skipped",  # of steps that train nothing
    "trainer.final", "stage.table_batches",  # how the result is made of the weights: see `result_key`
    "validation.every", "validation.grid",
    "init_from", "backbone.source", "backbone.name", "data.latents",  # by what they hold, see `identify`
)  # fmt: skip


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted keys; empty ones vanish."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        key = f"{prefix}{name}"
        flat |= flatten(value, f"{key}.") if isinstance(value, Mapping) else {key: value}
    return flat


def may_change(key: str) -> bool:
    """Whether a key, such as trainer.max_steps, may be another when a run goes on."""
    return any(key == name or name.endswith(".") and key.startswith(name) for name in MAY_CHANGE)


def identify(config: TrainConfig, stage: Stage) -> dict[str, Any]:
    """What makes a run this one and no other, JSON-able, by dotted key.

    Args:
        config: resolved (`oscar.training.resolve`).
        stage: built from it.
    """
    flat = {key: value for key, value in flatten(asdict(config)).items() if not may_change(key)}
    for name, optimiser in (("optimiser", config.optimiser), ("stage.critic.optimiser", config.stage.critic.optimiser)):
        if optimiser.schedule == "cosine":
            flat[f"{name}.schedule_steps"] = optimiser.schedule_steps or config.trainer.max_steps
    if not config.validation.enabled:
        flat = {key: value for key, value in flat.items() if not key.startswith("validation.")}
    if config.init_from is not None:
        flat["init_from (its content)"] = checkpoint.content_hash(config.init_from)
    else:
        backbone = getattr(stage, "codec", stage).backbone
        unused = None if stage.computes_with_unet else "unet"  # which is there for validation at most
        flat |= {f"{_DIGEST}{part})": digest[:16] for part, digest in backbone.digests.items() if part != unused}
    if config.data.latents is not None:
        flat["data.latents (its content)"] = read_index(config.data.latents).digest[:16]
    return as_read(flat)


class RunRecord:
    """The record of the run that a folder belongs to, the same on every process; the first alone writes.

    Args:
        config: resolved.
        stage: built from it.
        accelerator: of the run.
        overrides: of the command.

    Raises:
        ConfigError: if the folder belongs to another run.
    """

    def __init__(self, config: TrainConfig, stage: Stage, accelerator: Accelerator, overrides: Sequence[str] = ()):
        self.config, self.accelerator, self.overrides = config, accelerator, list(overrides)
        self.folder = Path(config.output)
        self.identity = identify(config, stage)
        self.parent = getattr(getattr(stage, "codec", None), "provenance", None)
        self.session = uuid.uuid4().hex
        self.stored, problem = {}, None
        if accelerator.is_main_process and config.trainer.resume:
            try:
                self.stored = self._read()
            except ConfigError as error:
                problem = str(error)
        self.stored, problem = broadcast_object_list([self.stored, problem])
        if problem is not None:
            raise ConfigError(problem)

    def _read(self) -> dict:
        """The folder's record, {} of a folder in which nothing is lost by a new run."""
        if not find_checkpoints(self.folder) and not (self.folder / FINAL).exists():
            return {}
        path = self.folder / PROVENANCE
        anew = "trainer.resume=false to start anew, or another output"
        try:
            stored = json.loads(path.read_text())
            before = stored["identity"]
        except FileNotFoundError:
            raise ConfigError(
                f"output is {self.folder}, which holds a run without {PROVENANCE}, from before there was "
                f"one, so that it is not known which; allowed: {anew}"
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"output is {self.folder}, whose {PROVENANCE} cannot be read ({first_line(error)}); allowed: {anew}"
            ) from None
        changes = self._differences(before)
        if changes:
            more = f" and {len(changes) - 4} more" if len(changes) > 4 else ""
            raise ConfigError(
                f"output is {self.folder}, which holds another run: {'; '.join(changes[:4])}{more}; "
                f"allowed: the same, {anew}"
            )
        return stored

    def _differences(self, before: Mapping[str, Any]) -> list[str]:
        stage = before.get("stage.name")
        before = {**before, "stage.name": former.STAGES.get(stage, stage)}
        defaults = flatten(asdict(TrainConfig()))  # of keys that are newer than the record
        unused = {key for key in before if key.startswith(_DIGEST)} - self.identity.keys()  # in older records
        keys = (before.keys() | self.identity.keys()) - unused
        if not (any(key.startswith("validation.") for key in before) and self.config.validation.enabled):
            keys = {key for key in keys if not key.startswith("validation.")}  # it may be turned on and off
        changes = []
        for key in sorted(keys):
            old, new = (values.get(key, defaults.get(key)) for values in (before, self.identity))
            if old != new:
                hint = ""
                if key.endswith("schedule_steps") and self.config.trainer.max_steps != old:
                    hint = " (trainer.max_steps, unless it is set)"
                changes.append(f"{key}{hint} was {old!r}, is {new!r}")
        return changes

    def is_finished(self, step: int) -> bool:
        """Whether the result of a run at this step is there already."""
        return self.stored.get("finished") == self._result(step)

    def _result(self, step: int) -> dict:
        return {"step": step, "final": self.config.trainer.final, "table_batches": self.config.stage.table_batches}

    def start(self, step: int) -> None:
        """Write that a session begins at this step, and config.yaml."""
        if not self.accelerator.is_main_process:
            return
        environment = describe_environment()
        sessions = self.stored.get("sessions", [])
        known = next((session["environment"] for session in reversed(sessions) if "environment" in session), None)
        session = {
            "id": self.session,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "step": step,
            "processes": self.accelerator.num_processes,
            "device": self.accelerator.device.type,
            "overrides": self.overrides,
            **({} if environment == known else {"environment": environment}),
        }
        self.stored = {
            "identity": {**self.stored.get("identity", {}), **self.identity},
            "config": asdict(self.config),
            "origin": self._origin(),
            "sessions": [*sessions, session],
            "finished": None,
        }
        atomic_write(self.folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(self.config)).encode())
        self._write()

    def _origin(self) -> dict | None:
        config = self.config
        if config.init_from is not None:
            return {
                "init_from": config.init_from,
                "content": self.identity["init_from (its content)"],
                "provenance": self.parent,
            }
        if config.backbone.source is not None:
            return {"backbone": config.backbone.source, "provenance": read_provenance(config.backbone.source)}
        return None

    def check_ours(self) -> None:
        """Stop, on every process, where another run has taken the folder since.

        Raises:
            ConfigError: naming the folder.
        """
        problem = None
        if self.accelerator.is_main_process:
            try:
                owner = json.loads((self.folder / PROVENANCE).read_text())["sessions"][-1]["id"]
            except (OSError, ValueError, LookupError, TypeError):
                owner = None
            if owner != self.session:
                what = "in which another run has begun" if owner else "whose provenance.json is gone or damaged"
                problem = (
                    f"output is {self.folder}, {what} since; this one ends without writing to it; "
                    "allowed: one run at a time"
                )
        (problem,) = broadcast_object_list([problem])
        if problem is not None:
            raise ConfigError(problem)

    def of_result(self, step: int) -> dict:
        """What a result made at this step says of itself."""
        return as_read({"step": step, **{name: self.stored[name] for name in ("config", "origin", "sessions")}})

    def finish(self, step: int) -> None:
        """Write that the result is there."""
        self.stored["finished"] = self._result(step)
        self._write()

    def _write(self) -> None:
        write_json(self.folder / PROVENANCE, self.stored, indent=1)
