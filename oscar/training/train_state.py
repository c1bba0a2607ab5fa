"""A trained network with its optimiser, wrapped for whatever the processes share: replicas, FSDP or DeepSpeed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from oscar.config import OptimiserConfig


class Learner:
    """A module with its optimiser, learning-rate schedule and gradient clipping, wrapped by Accelerate.

    Attributes:
        plain: the module itself.
        module: what a training pass calls, which gathers gradients over the processes.
        parameters: those that are trained.
        clip_groups: parameters whose gradients are clipped by their norm together.
    """

    def __init__(
        self,
        module: nn.Module,
        config: OptimiserConfig,
        max_steps: int,
        accelerator: Accelerator,
        clip_groups: Callable[[], list[list[nn.Parameter]] | None] = lambda: None,
    ):
        self.accelerator = accelerator
        self.set_to_none = config.set_to_none
        self.clip = config.grad_clip
        optimiser = torch.optim.AdamW(
            [parameter for parameter in module.parameters() if parameter.requires_grad],
            lr=config.lr, betas=tuple(config.betas), weight_decay=config.weight_decay,
        )  # fmt: skip
        kind = "constant_with_warmup" if config.schedule == "constant" else "cosine"
        self.schedule = get_scheduler(
            kind, optimiser, num_warmup_steps=config.warmup_steps,
            num_training_steps=config.schedule_steps or max_steps,
        )
        self.plain = module
        self.has_engine = accelerator.distributed_type == DistributedType.DEEPSPEED
        if self.has_engine:
            accelerator.deepspeed_plugin.deepspeed_config["gradient_clipping"] = config.grad_clip or 0.0
        with warnings.catch_warnings():  # of a name that torch changes and Accelerate still uses
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            self.module, self.optimiser = accelerator.prepare(module, optimiser)
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]  # FSDP makes new
        self.clip_groups = clip_groups() or [self.parameters]

    def update(self) -> None:
        """One optimiser step from the gathered gradients (call under `accelerator.sync_gradients`)."""
        if self.clip is not None:
            for group in self.clip_groups:
                self.accelerator.clip_grad_norm_(group, self.clip)
        self.optimiser.step()
        self.skip()

    def skip(self) -> None:
        """Pass over this step: forget the gradients, and take the next learning rate all the same."""
        self.schedule.step()
        self.optimiser.zero_grad(set_to_none=self.set_to_none)

    def state(self) -> dict:
        """What resuming needs: trained parameters and buffers, optimiser and schedule. Call on every process.

        Tensors that FSDP has spread over the processes are gathered, so that the state is the same for any number of
        processes. DeepSpeed's optimiser is not in it, see `save_engine`.
        """
        optimiser = None if self.has_engine else gathered(self.optimiser.state_dict())
        return {"model": gathered(self._model()), "optimiser": optimiser, "schedule": self.schedule.state_dict()}

    def _model(self) -> dict[str, Tensor]:
        trained = {name for name, parameter in self.plain.named_parameters() if parameter.requires_grad}
        trained |= {name for name, _ in self.plain.named_buffers()}
        return {name: value for name, value in self.plain.state_dict().items() if name in trained}

    def restore(self, state: dict) -> None:
        """Take over a state.

        Raises:
            ValueError: if it is of another configuration.
        """
        own = self._model()
        shapes, fitting = ({name: tuple(value.shape) for name, value in model.items()}
                           for model in (state["model"], own))  # fmt: skip
        for name in sorted(shapes.keys() | fitting.keys()):
            if shapes.get(name) != fitting.get(name):
                raise ValueError(
                    f"checkpoint: {name} of shape {shapes.get(name)} does not fit this configuration, "
                    f"which has {fitting.get(name)}"
                )
        if (state["optimiser"] is None) != self.has_engine:
            made = "with" if state["optimiser"] is None else "without"
            raise ValueError(f"checkpoint: made {made} DeepSpeed, whose optimiser does not go with others; "
                             f"allowed: to go on {made} it")  # fmt: skip
        self.plain.load_state_dict({name: spread(value, own[name]) for name, value in state["model"].items()},
                                   strict=False)  # fmt: skip
        if not self.has_engine:
            self.optimiser.load_state_dict(self._spread_optimiser(state["optimiser"]))
            if not self.set_to_none:  # those that had a gradient before have zeros now, which move them
                for parameter in self.optimiser.state:
                    parameter.grad = torch.zeros_like(parameter)
        self.schedule.load_state_dict(state["schedule"])

    def _spread_optimiser(self, state: dict) -> dict:
        moments = {
            index: {name: spread(value, self.parameters[index]) for name, value in values.items()}
            for index, values in state["state"].items()
        }
        return {**state, "state": moments}

    def save_engine(self, folder: Path) -> None:
        """Write DeepSpeed's share of the state; every process writes its own part."""
        self.module.save_checkpoint(str(folder), tag="engine", exclude_frozen_parameters=True)

    def restore_engine(self, folder: Path) -> None:
        """Read what `save_engine` wrote, on as many processes.

        Raises:
            ValueError: if it is not there or does not fit.
        """
        found, _ = self.module.load_checkpoint(str(folder), tag="engine", load_module_strict=False)
        if found is None:
            raise ValueError(f"checkpoint {folder} has no state of DeepSpeed for this number of processes")


def gathered(value: Any) -> Any:
    """A nested state with tensors that are spread over processes put together on the CPU; a collective call."""
    if isinstance(value, DTensor):
        return value.full_tensor().cpu()
    if isinstance(value, dict):
        return {name: gathered(item) for name, item in value.items()}
    if isinstance(value, list):
        return [gathered(item) for item in value]
    return value


def spread(value: Any, like: Tensor) -> Any:
    """The tensor spread over processes as `like` is; other values, and tensors of another shape, as they are."""
    if isinstance(like, DTensor) and isinstance(value, Tensor) and value.shape == like.shape:
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return value
