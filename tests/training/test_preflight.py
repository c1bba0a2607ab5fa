"""preflight=true: what it finds, what it refuses, and that nothing of it stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from oscar.config import ConfigError, TrainConfig
from oscar.training import preflight
from oscar.training.preflight import Finding, persistent_bytes, run_preflight

BRIEF = (0.01, 0.01)  # seconds of measuring


@pytest.fixture
def configure(compose, photos: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    def make(*overrides: str) -> TrainConfig:
        common = (f"data.train=[{photos}]", f"output={tmp_path / 'run'}", "preflight=true", "trainer.threads=1")
        return compose("experiment=tiny/joint", *common, *overrides)

    return make


def check(config: TrainConfig) -> tuple[dict[str, Finding], list[str]]:
    lines: list[str] = []
    return {finding.name: finding for finding in run_preflight(config, lines.append, BRIEF)}, lines


def test_a_run_that_can_begin(configure, tmp_path: Path) -> None:
    findings, lines = check(configure("trainer.max_steps=1000"))
    assert list(findings) == ["weights", "room", "loader", "memory", "time", "disk"]
    assert all(finding.problem is None for finding in findings.values()) and len(lines) == 6
    assert "x 1,000 steps" in findings["time"].facts and "0 workers" in findings["loader"].facts
    assert not (tmp_path / "run").exists()


def test_memory_is_that_of_weights_gradients_and_moments(configure) -> None:
    config = configure("trainer.ema_decay=0.9")
    stage = preflight.build_stage(config)
    every = [*stage.parameters(), *stage.buffers(), *stage.critic.parameters(), *stage.critic.buffers()]
    trained = [value for value in (*stage.parameters(), *stage.critic.parameters()) if value.requires_grad]
    expected = 4 * (sum(value.numel() for value in every) + 4 * sum(value.numel() for value in trained))
    assert persistent_bytes(stage, config) == pytest.approx(expected, rel=0.01)  # some buffers are not of 4 bytes


@pytest.mark.parametrize(
    ("what", "value", "message"),
    [
        ("free_memory", 10**6, "room: they do not fit"),
        ("measure_steps", (2**60, 1.0), "memory: a step of batch 2 does not fit; allowed: .*mixed_precision=bf16"),
        ("tensor_bytes", 2**60, "room: they do not fit; .*; disk: they do not fit"),
    ],
)
def test_what_stops_a_run(configure, monkeypatch, what: str, value: object, message: str) -> None:
    monkeypatch.setattr(preflight, what, lambda *args: value)
    lines: list[str] = []
    with pytest.raises(ConfigError, match=f"^preflight: {message}") as error:
        run_preflight(configure(), lines.append, BRIEF)
    assert len(str(error.value).splitlines()) == 1 and lines[-1].startswith("disk"), "all is looked at"
    assert any(" STOP " in line for line in lines)


def test_a_step_that_runs_out_of_memory_is_said(configure, monkeypatch) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(preflight, "measure_steps", fail)
    with pytest.raises(ConfigError, match="memory: a step of batch 2 does not fit; allowed: trainer"):
        run_preflight(configure(), lambda line: None, BRIEF)


def test_what_starves_a_gpu(configure) -> None:
    gpu, config = torch.device("cuda"), configure("data.workers=3")
    slow, fast = (preflight._loader(loaded, 80.0, 7, config, gpu) for loaded in (40.0, 120.0))
    assert "steps take 80.0 and would wait; allowed: a larger data.workers" in slow.problem and not slow.is_fatal
    assert "40.0 images/s by 3 workers" in slow.facts and " slow " in slow.line
    assert fast.problem is None and " ok " in fast.line
    assert preflight._loader(120.0, 80.0, 7, configure("data.workers=0"), gpu).problem, "nothing is loaded meanwhile"


def test_what_is_missing_is_said_at_once(configure, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="could not be read"):
        check(configure(f"backbone.source={tmp_path / 'none'}"))
