"""A trained network with its optimiser, wrapped for whatever the processes share: replicas, FSDP or DeepSpeed.

States are put together and sharded here and not by `torch.distributed.checkpoint.state_dict`: with full states it gives
moments of zero, and a first step behind them, to parameters that have had no gradient yet, such as those of a rate that
no pass has drawn. A resumed run would then differ from an uninterrupted one.
"""

from __future__ import annotations

import copy
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


class NonFiniteError(RuntimeError):
    """A loss, a gradient or a weight that is no number; says which, and the step or the checkpoint."""


class TrainState:
    """A module with its optimiser, learning-rate schedule and gradient clipping, wrapped by Accelerate.

    Attributes:
        plain: the module itself.
        module: what a training pass calls, which gathers gradients over the processes.
        parameters: those that are trained.
        clip_groups: parameters whose gradients are clipped by their norm together.
        scaler: of the loss, in float16 on a GPU, or None. Each train state has its own: Accelerate's, shared by several
            optimisers, would divide the gradients of all by the scale as soon as one of them is clipped, and change
            the scale between the passes that another one adds up.
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
        self.clip_norm = config.grad_clip
        optimiser = torch.optim.AdamW(
            [parameter for parameter in module.parameters() if parameter.requires_grad],
            lr=config.lr,
            betas=tuple(config.betas),
            weight_decay=config.weight_decay,
        )
        kind = "constant_with_warmup" if config.schedule == "constant" else "cosine"
        self.schedule = get_scheduler(
            kind,
            optimiser,
            num_warmup_steps=config.warmup_steps,
            num_training_steps=config.schedule_steps or max_steps,
        )
        self.plain = module
        self.has_engine = accelerator.distributed_type == DistributedType.DEEPSPEED
        if self.has_engine:
            accelerator.deepspeed_plugin.deepspeed_config["gradient_clipping"] = config.grad_clip or 0.0
        with warnings.catch_warnings():  # of a name that torch changes and Accelerate still uses
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            self.module, self.optimiser = accelerator.prepare(module, optimiser)
        self.scaler = copy.deepcopy(accelerator.scaler)
        if self.scaler is not None:
            self.optimiser.scaler = None  # Accelerate's would step and change the scale by itself
            self.scaler.scale(torch.zeros((), device=accelerator.device))  # makes its state, which else comes later
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]  # FSDP makes new
        self.clip_groups = clip_groups() or [self.parameters]

    def backward(self, loss: Tensor) -> None:
        """Add a pass's share to the gradients."""
        if self.scaler is None:
            self.accelerator.backward(loss)
        else:
            self.scaler.scale(loss / self.accelerator.gradient_accumulation_steps).backward()

    def clip(self) -> Tensor:
        """Clip the gradients of all passes, once for each step; returns the norm of all before, a scalar.

        It is alike on every process, and not finite if any gradient is not.
        """
        if self.has_engine:  # which has clipped and stepped within `backward`
            norm = self.accelerator.deepspeed_engine_wrapped.get_global_grad_norm()
            return torch.as_tensor(0.0 if norm is None else norm, device=self.accelerator.device)
        if self.scaler is not None:
            self.scaler.unscale_(self.optimiser.optimizer)
        largest = torch.inf if self.clip_norm is None else self.clip_norm
        norms = [torch.nn.utils.clip_grad_norm_(group, largest) for group in self.clip_groups]
        norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
        return torch.linalg.vector_norm(torch.stack([norm.to(self.accelerator.device) for norm in norms]))

    def has_overflowed(self) -> bool:
        """Whether gradients that are not finite come of the loss's scale, which is then halved.

        That is no fault: the scale is tried out this way. At a scale of 1 the gradients are not finite by themselves.
        """
        if self.scaler is None:
            return False
        scale = self.scaler.get_scale()
        self.scaler.update()
        return scale > 1 and self.scaler.get_scale() < scale

    def update(self) -> None:
        """One optimiser step from the gathered and clipped gradients (call under `accelerator.sync_gradients`)."""
        self.optimiser.step()
        if self.scaler is not None:
            self.scaler.update()
        self._go_on()

    def skip(self) -> None:
        """Pass over this step: forget the gradients, and take the next learning rate all the same."""
        for parameter in self.parameters:
            if parameter not in self.optimiser.state:  # its first gradient: a zero in its place would move it
                parameter.grad = None
        if self.scaler is not None:
            self.scaler.update(self.scaler.get_scale())  # unchanged, and ready for the next step's gradients
        with warnings.catch_warnings():  # that the rate changes without a step of the optimiser
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
            self._go_on()

    def _go_on(self) -> None:
        self.schedule.step()
        self.optimiser.zero_grad(set_to_none=self.set_to_none)

    def state(self) -> dict:
        """What resuming needs: trained parameters and buffers, optimiser and schedule. Call on every process.

        Tensors that FSDP has sharded over the processes are put together, so that the state is the same for any number
        of processes. DeepSpeed's optimiser is not in it, see `save_engine`.
        """
        optimiser = None if self.has_engine else full_tensors(self.optimiser.state_dict())
        return {
            "model": full_tensors(self._model()),
            "optimiser": optimiser,
            "schedule": self.schedule.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
        }

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
        shapes, fitting = (
            {name: tuple(value.shape) for name, value in model.items()} for model in (state["model"], own)
        )
        for name in sorted(shapes.keys() | fitting.keys()):
            if shapes.get(name) != fitting.get(name):
                raise ValueError(
                    f"checkpoint: {name} of shape {shapes.get(name)} does not fit this configuration, "
                    f"which has {fitting.get(name)}"
                )
        if (state["optimiser"] is None) != self.has_engine:
            made = "with" if state["optimiser"] is None else "without"
            raise ValueError(
                f"checkpoint: made {made} DeepSpeed, whose optimiser does not go with others; "
                f"allowed: to go on {made} it"
            )
        if (state.get("scaler") is None) != (self.scaler is None):
            raise ValueError("checkpoint: scaler does not fit this configuration")
        self.plain.load_state_dict(
            {name: shard(value, own[name]) for name, value in state["model"].items()}, strict=False
        )
        if not self.has_engine:
            self.optimiser.load_state_dict(self._shard_optimiser(state["optimiser"]))
            if not self.set_to_none:  # those that had a gradient before have zeros now, which move them
                for parameter in self.optimiser.state:
                    parameter.grad = torch.zeros_like(parameter)
        self.schedule.load_state_dict(state["schedule"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])

    def _shard_optimiser(self, state: dict) -> dict:
        moments = {
            index: {name: shard(value, self.parameters[index]) for name, value in values.items()}
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


def full_tensors(value: Any) -> Any:
    """A nested state with tensors that are sharded over processes put together on the CPU; a collective call."""
    if isinstance(value, DTensor):
        return value.full_tensor().cpu()
    if isinstance(value, dict):
        return {name: full_tensors(item) for name, item in value.items()}
    if isinstance(value, list):
        return [full_tensors(item) for item in value]
    return value


def shard(value: Any, like: Tensor) -> Any:
    """The tensor sharded over processes as `like` is; other values, and tensors of another shape, as they are."""
    if isinstance(like, DTensor) and isinstance(value, Tensor) and value.shape == like.shape:
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return value
