"""plan=true: the computed pass against one that runs, and what the table is made of."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from oscar.config import ConfigError, TrainConfig
from oscar.inference.fitting import TensorMemory
from oscar.training.build import build_stage
from oscar.training.fake_pass import Pass, build_on_meta, measure_pass, norms_of_gpus, run_pass
from oscar.training.plan import GIB, measure_states, run_plan, seconds, without_weights
from oscar.training.preflight import stage_modules, tensor_bytes, trained_bytes

PASSES = [("hyperprior_joint", False, "no"), ("vae", True, "bf16")]
MORE = [
    ("joint", True, "bf16"),
    ("diffusion_pretrain", True, "no"),
]


def computed(config: TrainConfig, batch: int) -> Pass:
    config = without_weights(config)
    return measure_pass(build_on_meta(config), config, batch)


def run(config: TrainConfig, batch: int, *watchers) -> None:
    """The pass itself, on real tensors."""
    stage = build_stage(config)
    for module in stage_modules(stage):
        module.train()
    for buffer in stage.buffers():
        if buffer.dtype == torch.bool:
            buffer.fill_(True)
    if not config.optimiser.set_to_none:
        for module in stage_modules(stage):
            for parameter in module.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    images = torch.rand(batch, 3, config.data.crop, config.data.crop) * 2 - 1
    with contextlib.ExitStack() as stack:
        for watcher in watchers:
            stack.enter_context(watcher)
        run_pass(stage, config, images)


@pytest.fixture
def plan_of(compose) -> Callable[..., TrainConfig]:
    return lambda experiment, *overrides: compose(f"experiment={experiment}", "plan=true", *overrides)


@pytest.mark.parametrize(
    ("stage", "checkpointing", "precision"), [*PASSES, *(pytest.param(*more, marks=pytest.mark.slow) for more in MORE)]
)
def test_computed_and_counted_on_real_tensors_are_one(plan_of, stage: str, checkpointing: bool, precision: str) -> None:
    modes = (f"trainer.gradient_checkpointing={checkpointing}", f"trainer.mixed_precision={precision}")
    config = plan_of(f"tiny/{stage}", *modes, "optimiser.set_to_none=false")
    memory, operations = TensorMemory(), FlopCounterMode(display=False)
    run(config, 2, memory)
    run(config, 2, operations)  # by itself: it holds tensors
    plan = computed(config, 2)
    assert plan.peak == pytest.approx(memory.peak, rel=0.01)
    assert sum(plan.operations.values()) == operations.get_total_flops() > 0


@pytest.mark.slow
def test_computed_is_what_the_allocator_gives(plan_of) -> None:
    """Of torch's own profiler, which also sees what kernels take for themselves."""
    config = plan_of("tiny/vae", "data.crop=128")
    with profile(profile_memory=True) as profiler:
        run(config, 4)
    sizes = [event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    stage = build_on_meta(without_weights(config))
    measured = max(accumulate(sizes)) - tensor_bytes(stage)
    assert computed(config, 4).peak == pytest.approx(measured, rel=0.15)


def test_half_precision_keeps_what_a_gpu_keeps() -> None:
    """What layers keep under autocast on a CPU with `norms_of_gpus`, and by torch's own rules for GPUs."""

    def kept(device: str, *modes) -> int:
        memory = TensorMemory()
        with FakeTensorMode(), torch.device(device):
            block = nn.Sequential(ResnetBlock2D(in_channels=32, temb_channels=None, groups=8), nn.LayerNorm(16))
            block.requires_grad_(False)
            images = torch.empty(2, 32, 16, 16, requires_grad=True)
            with contextlib.ExitStack() as stack:
                for mode in (memory, *modes):
                    stack.enter_context(mode)
                result = Chain(block)(images)
        assert result.shape == images.shape
        return memory.now

    class Chain(nn.Module):
        def __init__(self, block: nn.Sequential):
            super().__init__()
            self.block = block

        def forward(self, images: Tensor) -> Tensor:
            return self.block[1](self.block[0](images, None))

    @contextlib.contextmanager
    def gpu():  # torch.autocast("cuda") turns itself off where there is none
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        torch.set_autocast_enabled("cuda", True)
        try:
            yield
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.clear_autocast_cache()

    full = kept("cpu")
    plain, like_gpu = (kept("cpu", torch.autocast("cpu", torch.bfloat16), *more) for more in ((), (norms_of_gpus(),)))
    assert plain < like_gpu < full
    if torch.backends.cuda.is_built():
        assert like_gpu == kept("cuda", gpu())


def test_table(plan_of, tmp_path) -> None:
    output, total = f"output={tmp_path / 'run'}", ("data.total_batch_size=8", "data.batch_size=8")
    config = plan_of("tiny/hyperprior_bottleneck", output, *total, "trainer.max_steps=1000")
    lines = run_plan(config, lambda line: None)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")][2:]
    assert "1,000 steps" in lines[0] and "not measured" in lines[0]
    shares = (("1", "8"), ("4", "2"), ("8", "1"))
    assert [row[:4] for row in rows] == [[mode, "no", *share] for mode in ("no", "bf16") for share in shares]
    assert all((row[6] == "") == (row[2] == "1") for row in rows), "one GPU has nothing to share"
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_batches_follow_a_line(plan_of) -> None:
    """Which the table draws from the first batch to the largest."""
    one, two, eight = (computed(plan_of("tiny/vae"), batch) for batch in (1, 2, 8))
    assert one.peak + (eight.peak - one.peak) / 7 == pytest.approx(two.peak, rel=0.02)
    assert sum(eight.operations.values()) == 8 * sum(one.operations.values())


def test_what_processes_keep(plan_of) -> None:
    config = without_weights(plan_of("tiny/joint", "optimiser.set_to_none=true"))
    stage = build_on_meta(config)
    states, trained = measure_states(stage, config), trained_bytes(stage)
    assert states.alone == tensor_bytes(stage) + 2 * trained, "weights and two moments"
    assert states.per_process(1) == states.alone and states.per_process(8) == states.alone + trained
    assert states.gathered < tensor_bytes(stage) and states.per_process(8, fsdp=True) < states.per_process(8)
    kept = without_weights(plan_of("tiny/joint", "optimiser.set_to_none=false", "trainer.ema_decay=0.9"))
    assert measure_states(stage, kept).alone == states.alone + 2 * trained, "and gradients and averages"


def test_hours_are_operations_by_the_peak() -> None:
    trillion = 10**12
    counts = {("convolution", 32): 156, ("product", 32): 195, ("product", 16): 312}
    step = Pass(0, Counter({kind: count * trillion for kind, count in counts.items()}))
    assert seconds(step, "A100", tf32=False) == pytest.approx((1 + 10 + 1) / 0.3)
    assert seconds(step, "A100", tf32=True) == pytest.approx((1 + 195 / 156 + 1) / 0.3)


def test_what_is_refused(plan_of, tmp_path) -> None:
    with pytest.raises(ConfigError, match="plan and preflight are both true; allowed: one"):
        plan_of("tiny/joint", "preflight=true")
    with pytest.raises(ConfigError, match="could not be read|cannot be read") as error:
        run_plan(plan_of("tiny/joint", f"backbone.source={tmp_path / 'none'}"), lambda line: None)
    assert "backbone=sd21_random" in str(error.value)


def test_codes_are_taken_to_be_alive(plan_of) -> None:
    """Whether codes have died depends on values; the pass is that of a step in which none has."""
    threshold = "bottleneck.dead_code_threshold"
    plain, asked = (computed(plan_of("tiny/joint", f"{threshold}={value}"), 2) for value in (0, 2))
    assert asked.operations == plain.operations and asked.peak == pytest.approx(plain.peak, rel=0.01)


def test_nothing_is_shown_of_a_pass_that_cannot_be_measured(plan_of, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments) -> Pass:
        raise ConfigError("it depends on values")

    monkeypatch.setattr("oscar.training.plan.measure_pass", refuse)
    shown: list[str] = []
    with pytest.raises(ConfigError, match="it depends on values"):
        run_plan(plan_of("tiny/vae"), shown.append)
    assert shown == []


@pytest.mark.slow
def test_full_size_is_the_known_figure(plan_of) -> None:
    """docs/training.md: 9,729 MiB resident on a CPU, of which libraries are about 1 GiB."""
    config = without_weights(plan_of("paper/stage2", "backbone=sd21_random", "trainer.gradient_checkpointing=true"))
    stage = build_on_meta(config)
    total = (measure_states(stage, config).alone + measure_pass(stage, config, 1).peak) / GIB
    assert total == pytest.approx(9729 / 1024 - 1, abs=0.7)
