"""The inference part of the benchmark, on a tiny random model: what it measures, and that it is not measured twice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir

from oscar.benchmark.speed import inference as inference_speed
from oscar.benchmark.speed.inference import run_inference_speed
from oscar.benchmark.speed.memory import TimingError
from oscar.config import BenchmarkConfig, ConfigError, InferenceSpeedConfig, parse, register

CONFIGS = Path(__file__).parents[2] / "configs"
ROUNDS = 2


@pytest.fixture(scope="module")
def config() -> InferenceSpeedConfig:
    register()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        overrides = [
            "parts=[inference]",
            "backbone@inference.backbone=tiny",
            "bottleneck@inference.bottleneck=tiny",
            "inference.sizes=[64x48]",
            f"inference.repeats={ROUNDS}",
            "inference.large_size=96x64",
            "inference.large_dtype=float32",
        ]
        return parse(compose("benchmark", overrides=overrides), BenchmarkConfig).inference


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("inference")


@pytest.fixture
def in_process(monkeypatch) -> list[dict]:
    """Processes that are measured run in this one; lists their requests."""
    requests = []

    def run(module: str, request: dict, what: str, timeout: float) -> dict:
        requests.append(json.loads(json.dumps(request)))
        return inference_speed._child(requests[-1])

    monkeypatch.setattr(inference_speed, "run_child", run)
    return requests


def test_latency_beside_the_plain_way(config, output, monkeypatch) -> None:
    monkeypatch.setattr("oscar.inference.load.auto_dtype", lambda device: torch.float32)  # whatever this processor has
    latency = replace(config, measure=["latency"])
    (table,) = run_inference_speed(latency, output, "cpu")
    frame = table.frame
    assert list(frame["way"]) == ["plain", "float32 (default)"]  # auto and float32 are the same here, measured once
    plain, ours = frame.iloc[0], frame.iloc[1]
    assert plain["both_speedup"] == 1 and plain["max_difference"] == 0 and pd.isna(plain["psnr_db"])
    assert max(ours["max_difference"], *frame["exact_difference"]) < 1e-4
    assert ours["psnr_db"] > 80 and ours["other_indices_percent"] == 0
    assert (frame[["encode_s", "decode_s", "both_s", "encode_speedup", "decode_speedup"]] > 0).all(axis=None)
    text = table.to_markdown()
    assert "64x48" in text and "random weights" in text and "float32 (default)" in text


def test_memory_of_the_halves(config, output, in_process) -> None:
    tables = run_inference_speed(replace(config, measure=["memory", "large"]), output, "cpu")
    by_name = {table.name: table.frame for table in tables}
    memory, large = by_name["inference_memory"], by_name["inference_large"]
    assert [tuple(row) for row in memory[["way", "half"]].values] == [
        ("plain", "both"),
        ("ours", "both"),
        ("ours", "encoder"),
        ("ours", "decoder"),
    ]
    weights = dict(zip(memory["half"][1:], memory["weights_mib"][1:], strict=True))
    assert weights["encoder"] + weights["decoder"] >= weights["both"] > max(weights["encoder"], weights["decoder"])
    assert memory["encode_s"].isna().tolist() == [False, False, False, True]
    assert memory["decode_s"].isna().tolist() == [False, False, True, False]
    slack = 1  # MiB: the kernel counts pages in batches per CPU
    assert (memory["peak_mib"] > memory["loaded_mib"] - slack).all() and (memory["load_s"] > 0).all()
    assert list(large["half"]) == ["encoder", "decoder"] and (large["beyond_mib"] > -slack).all()
    assert [request["size"] for request in in_process] == ["64x48"] * 4 + ["96x64"] * 2


def test_nothing_is_measured_twice(config, tmp_path, monkeypatch) -> None:
    measured = []

    def stand_in(config: InferenceSpeedConfig, *_) -> pd.DataFrame:
        measured.append(config.rate)
        return pd.DataFrame({"size": ["64x48"], "way": ["plain"], "default": [False]})

    monkeypatch.setattr(inference_speed, "measure_latency", stand_in)
    for rate in (config.rate, config.rate, 0.125, 0.125):  # other settings are measured anew
        run_inference_speed(replace(config, model="nano", measure=["latency"], rate=rate), tmp_path, "cpu")
    assert measured == [config.rate, 0.125]


@pytest.mark.slow
def test_a_process_of_its_own(config, output, monkeypatch) -> None:
    model = inference_speed.model_folder(config, output / "inference")
    request = inference_speed._request(config, model, torch.device("cpu"), "64x48", "auto")
    row = inference_speed._measure({**request, "way": "ours", "half": "encoder"})
    assert row["loaded_mib"] > row["libraries_mib"] and "decode_s" not in row
    monkeypatch.setattr("sys.executable", "false")  # which fails, as an interpreter that was killed does
    with pytest.raises(TimingError, match="ours, half encoder, 64x48"):
        inference_speed._measure({**request, "way": "ours", "half": "encoder"})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"measure": ["speed"]}, "inference.measure is 'speed'; allowed: latency, memory, large"),
        ({"sizes": ["512"]}, "inference: size '512' is not allowed; allowed: WIDTHxHEIGHT"),
        ({"dtypes": []}, "inference.dtypes is empty; allowed: one or more"),
        ({"dtypes": ["int8"]}, "inference.dtypes is 'int8'; allowed: auto, float32"),
        ({"compile": ["max"]}, "inference.compile is 'max'; allowed: off, on, graphs"),
        ({"rate": 0.3}, "inference.rate: "),
        ({"repeats": 0}, "inference.repeats is 0; allowed: at least 1"),
    ],
)
def test_settings_that_are_not_allowed(config, change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(config, **change).check()
