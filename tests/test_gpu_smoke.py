"""scripts/gpu_smoke.py without a GPU: what it says then, and its table on a CPU."""

from __future__ import annotations

import pytest
import torch


def test_without_a_gpu_it_says_so(load_script, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert load_script("gpu_smoke").main([]) == 2
    error = capsys.readouterr().err
    assert "no GPU that torch finds" in error and len(error.splitlines()) == 1


@pytest.mark.slow
def test_the_table(load_script, monkeypatch, capsys) -> None:
    """Stages one after the other, a file and back; what fails is a row, and the rest is done."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    script = load_script("gpu_smoke")
    monkeypatch.setattr(script, "SMALL", [*script.SMALL, "data.workers=0", "data.crop=64"])
    monkeypatch.setitem(script.STAGES, "vae", ("tiny/none", None))
    arguments = ["--device", "cpu", "--stages", "vae", "joint", "context", "--precisions", "bf16", "--compile", "off"]
    assert script.main(arguments) == 1
    rows = [line.split() for line in capsys.readouterr().out.strip().rpartition("\n\n")[2].splitlines()]
    assert rows[0][:3] == ["what", "precision", "compile"]
    assert [row[0] for row in rows[1:]] == ["vae", "joint", "context", "file"]
    assert rows[1][5] == "FAILED:" and rows[2][5] == rows[3][5] == "loss" and rows[4][-1] == "bytes"
