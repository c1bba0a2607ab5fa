"""A pass of a stage, forward and backward, on fake tensors: shapes without values, so that nothing is computed.

The stage is built on torch's meta device. What layers keep is added up, and operations are counted, as the code makes
them.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from oscar.config import ConfigError, TrainConfig
from oscar.inference.fitting import TensorMemory
from oscar.registry import STAGES
from oscar.training.build import build_stage
from oscar.training.preflight import stage_modules
from oscar.training.stages.base import Stage, critic_pass
from oscar.utils.rng import StepRng

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
_SCALAR = torch.ops.aten._local_scalar_dense.default
_CONVOLUTIONS = (torch.ops.aten.convolution, torch.ops.aten.convolution_backward)


@dataclass(frozen=True)
class Pass:
    """What one pass of a stage takes, forward and backward, its critic's too.

    Attributes:
        peak: bytes at most beyond what is kept from step to step.
        operations: by kind, ("convolution" or "product", bits of a number), two for a multiplication with its addition.
    """

    peak: int
    operations: Counter[tuple[str, int]]


def build_on_meta(config: TrainConfig) -> Stage:
    """The stage of a configuration from `without_weights`, with its networks' shapes alone."""
    with torch.device("meta"):
        stage = build_stage(config)
    if not (STAGES[config.stage.name].computes_with_unet or config.validation.enabled):
        stage.codec.denoiser = stage.codec.backbone.unet = None  # which a run on weights does not load
    for module in stage_modules(stage):
        module.train()
    return stage


def measure_pass(stage: Stage, config: TrainConfig, batch: int) -> Pass:
    """One pass of a stage from `build_on_meta`, as the trainer makes it.

    Raises:
        ConfigError: if it depends on the values of tensors.
    """
    mode, known = FakeTensorMode(allow_non_fake_inputs=True), {}
    for module in stage_modules(stage):
        _to_fake(module, mode, known)
    with mode:
        images = torch.empty(batch, 3, config.data.crop, config.data.crop)
        if stage.takes_latents:
            backbone = stage.codec.backbone
            side = config.data.crop // backbone.factor
            images = torch.empty(batch, backbone.latent_channels, side, side)
        if not config.optimiser.set_to_none:
            for parameter in known.values():
                parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        costs = _Costs()
        try:
            with costs:
                run_pass(stage, config, images)
        except DataDependentOutputException:
            raise ConfigError(
                f"plan is true, but a pass of stage {config.stage.name} depends on more than shapes; allowed: "
                "preflight=true, which runs it"
            ) from None
        finally:
            for parameter in known.values():
                parameter.grad = None
    return Pass(costs.peak, costs.operations)


@contextlib.contextmanager
def norms_of_gpus() -> Iterator[None]:
    """Under autocast, normalisations on a CPU in float32, as they are on a GPU, and not in half precision."""

    def in_float32(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(value: Tensor, *args, **kwargs) -> Tensor:
            return norm(value.float() if torch.is_autocast_enabled("cpu") else value, *args, **kwargs)

        return run

    with contextlib.ExitStack() as stack:
        for name in ("group_norm", "layer_norm"):
            stack.enter_context(mock.patch.object(F, name, in_float32(getattr(F, name))))
        yield


@norms_of_gpus()
def run_pass(stage: Stage, config: TrainConfig, images: Tensor) -> None:
    """Forward and backward pass of a stage and of its critic, as in `Trainer`, without the updates."""
    rng, critic, dtype = StepRng(0, config.seed), stage.critic, HALF.get(config.trainer.mixed_precision)
    trained = [] if critic is None else [value for value in critic.parameters() if value.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        loss = stage(images, rng)["loss"]
    loss.backward()
    for parameter in trained:
        parameter.requires_grad_(True)
    if critic is not None:
        if config.optimiser.set_to_none:
            for parameter in stage.parameters():
                parameter.grad = None
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            loss = critic_pass(critic, stage.critic_inputs(), rng, config.stage.critic.reduction)
        loss.backward()


def _to_fake(module: nn.Module, mode: FakeTensorMode, known: dict[int, Tensor]) -> None:
    """Put a fake tensor of the CPU in the place of each of a module's; flags become true ones, of what has begun."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, value in tensors.items():
                if value is None or isinstance(value, FakeTensor):
                    continue
                if value.dtype == torch.bool:
                    tensors[name] = torch.ones(value.shape, dtype=torch.bool)
                    continue
                if id(value) not in known:
                    with mode:
                        fake = torch.empty_like(value, device="cpu")
                        parameter = isinstance(value, nn.Parameter)
                        known[id(value)] = nn.Parameter(fake, value.requires_grad) if parameter else fake
                tensors[name] = known[id(value)]


class _Costs(TensorMemory):
    """Memory of what operations on fake tensors give, and the operations of convolutions and products.

    What is made of whole numbers alone, such as the order of axes, is computed. A number that is asked for is 0.5: a
    quality in its range. Whether something is so, such as that codes have died, is answered no: that is the usual step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        is_fake = any(isinstance(value, FakeTensor) for value in tensors)
        if is_fake and func is _SCALAR:
            if args[0].is_floating_point():
                return 0.5
            if args[0].dtype == torch.bool:
                return False
        made = kwargs.get("dtype")
        is_whole = not made.is_floating_point if made is not None else bool(tensors)
        if not is_fake and is_whole and not any(value.is_floating_point() for value in tensors):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        packet = func._overloadpacket
        if packet in flop_registry:
            kind = "convolution" if packet in _CONVOLUTIONS else "product"
            count = flop_registry[packet](*args, **kwargs, out_val=result)
            self.operations[kind, 8 * tensors[0].element_size()] += count
        return result
