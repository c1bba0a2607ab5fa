"""Several processes train as one does, and no way of ending them costs more than the steps since a checkpoint."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from oscar import OscarCodec
from oscar.config import TrainConfig
from oscar.training.checkpoints import find_checkpoints
from tests.processes import CONTEXT

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
KILLS = 2


@dataclass(frozen=True)
class Job:
    """What a process does beside training.

    Attributes:
        gradients: folder for the gradients of the first step and the buffers after it.
        broken: (process, pass) whose loss is no number.
        poisoned: (process, step) whose loss is one, but has a gradient that is not.
        pause: seconds that each step takes longer.
        report: folder for the message of an error.
        fsdp: shard the networks over the processes; Accelerate itself does so on GPUs only.
    """

    gradients: Path | None = None
    broken: tuple[int, int] | None = None
    poisoned: tuple[int, int] | None = None
    pause: float = 0.0
    report: Path | None = None
    fsdp: bool = False


def train(config: TrainConfig, rank: int, world: int, port: int, job: Job) -> None:
    """One process of a run."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    from oscar.models.discriminator import LatentDiscriminator
    from oscar.training.build import build_stage
    from oscar.training.processes import make_accelerator
    from oscar.training.train_state import NonFiniteError, TrainState
    from oscar.training.trainer import Trainer

    torch.set_num_threads(1)
    if job.fsdp:
        join_for_fsdp()
    accelerator = make_accelerator(config)
    assert accelerator.num_processes == world and accelerator.device.type == "cpu"
    trainer = Trainer(build_stage(config), config, accelerator)
    if job.gradients is not None:
        update, steps = TrainState.update, []

        def keep(train_state: TrainState) -> None:
            found = {name: p.grad.clone() for name, p in train_state.plain.named_parameters() if p.grad is not None}
            torch.save(found, job.gradients / f"{type(train_state.plain).__name__}-{rank}.pt")
            steps.append(update(train_state))

        def renoise(critic: LatentDiscriminator, latent, generator=None):  # alike for each sample, in either split
            noise = torch.randn(latent.shape[1:], generator=torch.Generator().manual_seed(0))
            return (latent + noise) / 2**0.5, torch.full((len(latent),), 500)

        TrainState.update, LatentDiscriminator.renoise = keep, renoise
    if job.poisoned is not None:
        trainer.train_state.parameters[0].register_hook(
            lambda gradient: gradient * float("nan" if (rank, trainer.step) == job.poisoned else 1)
        )
    if job.broken is not None or job.pause:
        forward = type(trainer.stage).forward

        def wrapped(stage, images, rng):
            time.sleep(job.pause)
            metrics = forward(stage, images, rng)
            factor = float("nan") if (rng.rank, rng.number) == job.broken else 1
            return {name: value * factor for name, value in metrics.items()}

        type(trainer.stage).forward = wrapped
    try:
        trainer.run()
    except NonFiniteError as error:
        (job.report / f"{rank}.txt").write_text(str(error))
        sys.exit(2)
    if job.gradients is not None:
        torch.save(dict(trainer.stage.named_buffers()), job.gradients / f"buffers-{rank}.pt")


def join_for_fsdp() -> None:
    """Have Accelerate take these processes for some with GPUs; read configs/accelerate/fsdp.yaml as its launcher."""
    import accelerate
    from accelerate.utils import DistributedType
    from omegaconf import OmegaConf

    from oscar.training import processes

    options = OmegaConf.load(ROOT / "configs/accelerate/fsdp.yaml").fsdp_config
    os.environ.update(
        ACCELERATE_USE_FSDP="true",
        ACCELERATE_TORCH_DEVICE="cpu",
        FSDP_VERSION=str(options.fsdp_version),
        FSDP_AUTO_WRAP_POLICY=options.fsdp_auto_wrap_policy,
        FSDP_STATE_DICT_TYPE=options.fsdp_state_dict_type,
        FSDP_TRANSFORMER_CLS_TO_WRAP=options.fsdp_transformer_layer_cls_to_wrap,
        FSDP_RESHARD_AFTER_FORWARD=str(options.fsdp_reshard_after_forward).lower(),
        FSDP_CPU_RAM_EFFICIENT_LOADING=str(options.fsdp_cpu_ram_efficient_loading).lower(),
    )
    accelerate.PartialState._prepare_backend = lambda *args, **options: ("gloo", DistributedType.MULTI_GPU)
    processes.Accelerator = lambda cpu, **options: accelerate.Accelerator(**options)


def start(configs: list[TrainConfig], job: Job | None = None) -> list[BaseProcess]:
    """A process for each configuration; they differ in nothing but perhaps the output."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = len(configs)
    processes = [
        CONTEXT.Process(target=train, args=(config, rank, world, port, job or Job()))
        for rank, config in enumerate(configs)
    ]
    for process in processes:
        process.start()
    return processes


def finish(processes: list[BaseProcess], *codes: int) -> None:
    """Wait for the processes, which end with these codes."""
    for process in processes:
        process.join(120)
    for process in processes:
        process.kill()  # what hangs
    assert [process.exitcode for process in processes] == list(codes)


@pytest.fixture
def configure(compose, photos: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    def make(stage: str, output: str, *overrides: str) -> TrainConfig:
        tables = ("stage.table_batches=1",) if stage in ("bottleneck", "joint") else ()
        return compose(
            f"experiment=tiny/{stage}",
            f"data.train=[{photos}]",
            f"output={tmp_path / output}",
            "bottleneck.rates=[0.0313,0.0625]",
            "logger.tensorboard=false",
            "trainer.threads=1",
            "trainer.checkpoint_every=100",
            *tables,
            *overrides,
        )

    return make


@pytest.mark.parametrize("stage", ["vae", "bottleneck", "joint"])
def test_two_processes_make_the_step_of_one_with_the_doubled_batch(configure, tmp_path: Path, stage: str) -> None:
    """Gradients of codec and critic, and the codebooks' averages; draws that are a process's own are left out."""
    options = ["trainer.max_steps=1", *(["stage.kl=0"] if stage == "vae" else [])]
    found: dict[int, dict[str, dict]] = {}
    for world, batch in ((1, 4), (2, 2)):
        folder = tmp_path / f"gradients-{world}"
        folder.mkdir()
        config = configure(stage, f"run-{world}", f"data.batch_size={batch}", *options)
        finish(start([config] * world, Job(gradients=folder)), *[0] * world)
        found[world] = {path.stem: torch.load(path) for path in folder.iterdir()}
    trained = {"vae": 1, "bottleneck": 1, "joint": 2}[stage]
    assert len(found[1]) == trained + 1 and len(found[2]) == 2 * len(found[1])
    for name, one in found[1].items():
        kind = name.removesuffix("-0")
        largest = max((value.abs().max().item() for value in one.values() if value.is_floating_point()), default=1)
        assert largest > 0
        for rank in range(2):
            other = found[2][f"{kind}-{rank}"]
            assert other.keys() == one.keys(), kind
            for key, value in one.items():
                torch.testing.assert_close(other[key], value, rtol=1e-3, atol=1e-5 * largest, msg=f"{kind}: {key}")
        if kind == "buffers":  # to the bit: else the codebooks of two processes would drift apart
            assert all(torch.equal(value, found[2]["buffers-1"][key]) for key, value in found[2]["buffers-0"].items())
            assert stage == "vae" or any("_codebook.embed" in key for key in one)


def test_only_the_first_process_writes(configure, tmp_path: Path, photos: Path) -> None:
    config = configure(
        "bottleneck",
        "run",
        "trainer.max_steps=3",
        "trainer.ema_decay=0.9",
        "logger.tensorboard=true",
        f"validation.images={photos}",
        "validation.every=2",
        "validation.limit=3",
        "validation.metrics.names=[psnr]",
        "trainer.resume=false",
    )
    other = replace(config, output=str(tmp_path / "other"))
    finish(start([config, other]), 0, 0)
    assert not Path(other.output).exists()
    output = Path(config.output)
    assert {path.name for path in output.iterdir()} == {
        "checkpoints",
        "config.yaml",
        "final",
        "log.csv",
        "oscar",
        "provenance.json",
        "validation",
        "validation.csv",
    }
    assert (output / "log.csv").read_text().count("\n") == 4
    assert (output / "validation.csv").read_text().count("\n") == 3
    assert [path.name for path in (output / "checkpoints").glob("*.pt")].count("best.pt") == 1
    assert OscarCodec.from_pretrained(output / "final").bottleneck.rates


def test_another_number_of_processes_goes_on_with_the_same_data(configure, runs) -> None:
    split, whole = ("data.batch_size=1", "data.batch_size=2")
    for steps, world, batch in ((3, 2, split), (6, 1, whole), (9, 2, split)):
        finish(start([configure("bottleneck", "changed", f"trainer.max_steps={steps}", batch)] * world), *[0] * world)
    changed, alone = (configure("bottleneck", name, "trainer.max_steps=9", whole) for name in ("changed", "alone"))
    finish(start([alone]), 0)
    one, other = runs.rows(changed), runs.rows(alone)
    assert [row["step"] for row in one] == [row["step"] for row in other] == [str(step) for step in range(1, 10)]
    for a, b in zip(one, other, strict=True):  # the loss is the mean over the processes
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), abs=2e-3)


@pytest.mark.parametrize(
    ("fault", "what", "images"),
    [("broken", "loss", 2), ("poisoned", "norm of the gradients", 4)],  # a gradient's process is not known
)
def test_what_is_no_number_on_one_process(configure, runs, tmp_path: Path, fault: str, what: str, images: int) -> None:
    """Stopping names its images everywhere; skipping leaves the step out everywhere."""
    job = Job(**{fault: (1, 2)}, report=tmp_path)
    finish(start([configure("joint", "stop", "trainer.max_steps=5")] * 2, job), 2, 2)
    messages = [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)]
    assert messages[0] == messages[1] and messages[0].startswith(f"{what} is nan at step 3; images of the batch: ")
    assert messages[0].count(".png") == images
    skip = configure("joint", "skip", "trainer.max_steps=5", "trainer.non_finite=skip")
    finish(start([skip] * 2, job), 0, 0)
    state = runs.newest(skip)
    assert state["step"] == 5 and state["skipped"] == [1, 0]
    assert all(torch.isfinite(value).all() for value in state["learner"]["model"].values())


def test_fsdp_trains_alike_and_shares_checkpoints(configure, runs, photos: Path) -> None:
    """Replicas and sharded networks go on from each other's checkpoints, with the same losses, averages and files."""
    options = (
        "trainer.ema_decay=0.9",
        f"validation.images={photos}",
        "validation.every=2",
        "validation.limit=1",
        "validation.rates=[0.0313]",
        "validation.metrics.names=[psnr]",
        "optimiser.lr=1e-3",
        "optimiser.warmup_steps=0",
    )
    for steps, fsdp in ((2, True), (4, False), (6, True)):
        finish(start([configure("joint", "mixed", f"trainer.max_steps={steps}", *options)] * 2, Job(fsdp=fsdp)), 0, 0)
    mixed, plain = (configure("joint", name, "trainer.max_steps=6", *options) for name in ("mixed", "plain"))
    finish(start([plain] * 2), 0, 0)
    for a, b in zip(runs.rows(mixed), runs.rows(plain), strict=True):
        assert drawn(a) == drawn(b) and len(drawn(a)) == 1
        for name in ("loss", "gan", "critic"):
            assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-3), (name, a["step"])
    one, other = (runs.newest(config) for config in (mixed, plain))
    assert one["ema"]["optimization_step"] == other["ema"]["optimization_step"] == 6
    for part in ("learner", "critic"):
        for name, value in other[part]["model"].items():
            torch.testing.assert_close(one[part]["model"][name], value, rtol=1e-2, atol=1e-3, msg=name)
    tables = [Path(config.output, "validation.csv").read_text().splitlines() for config in (mixed, plain)]
    assert len(tables[0]) == len(tables[1]) == 4
    assert OscarCodec.from_pretrained(Path(mixed.output) / "final").bottleneck.rates


@pytest.mark.parametrize("stage", ["bottleneck", "joint"])
def test_killed_and_resumed_equals_uninterrupted(configure, runs, stage: str) -> None:
    """SIGKILL to both processes and SIGTERM to either, in turn, at random moments of training."""
    options = (
        "trainer.max_steps=16",
        "trainer.checkpoint_every=2",
        "trainer.keep_last=1",
        "trainer.ema_decay=0.9",
        "data.batch_size=1",
        "bottleneck.kmeans_init=true",
        "bottleneck.dead_code_threshold=0.5",
    )
    whole, killed = (configure(stage, name, *options) for name in ("whole", "killed"))
    finish(start([whole] * 2), 0, 0)
    random.seed(4)
    for number in range(KILLS):
        before = last_step(killed)
        processes = start([killed] * 2, Job(pause=0.03))
        deadline = time.monotonic() + 100
        while last_step(killed) == before:  # so that some way is made each time
            assert time.monotonic() < deadline and all(process.is_alive() for process in processes)
            time.sleep(0.005)
        time.sleep(random.uniform(0, 0.1))
        if number % 2:
            os.kill(random.choice(processes).pid, signal.SIGTERM)
            finish(processes, 0, 0)
        else:
            for process in processes:
                process.kill()
            finish(processes, -signal.SIGKILL, -signal.SIGKILL)
    assert 2 * KILLS <= last_step(killed) < 16, "the run ended before the last kill"
    finish(start([killed] * 2), 0, 0)
    runs.assert_same(whole, killed)


def drawn(row: dict[str, str]) -> set[str]:
    """The rates that a row of the log has values of."""
    return {name for name, value in row.items() if name.startswith("loss_") and value}


def last_step(config: TrainConfig) -> int:
    return int(next((path.stem[5:] for path in reversed(find_checkpoints(Path(config.output)))), "0"))


def test_accelerate_launches_two_processes_on_the_cpu(tmp_path: Path, photos: Path, runs, configure) -> None:
    """The command of the README, with Accelerate's own launcher."""
    config = configure("bottleneck", "run", "trainer.max_steps=2")
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            "configs/accelerate/cpu.yaml",
            "--num_processes",
            "2",
            "--main_process_port",
            "0",
            "scripts/train.py",
            "experiment=tiny/bottleneck",
            f"data.train=[{photos}]",
            f"output={config.output}",
            "trainer.max_steps=2",
            "logger.tensorboard=false",
            "bottleneck.rates=[0.0313,0.0625]",
            "stage.table_batches=1",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert runs.newest(config)["batch"] == 2 * config.data.batch_size
