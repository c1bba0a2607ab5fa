"""`oscar export`: what it writes, what the runtime makes of it, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from oscar.cli.main import main
from oscar.convert import graphs
from oscar.runtime import Codec, RuntimeModelError
from oscar.timesteps import PerImageMapping

GOLDEN = Path(__file__).parent / "golden/ours"


@pytest.mark.slow
def test_a_tiny_model(tmp_path: Path, capsys) -> None:
    """By command; its files are those of torch, and weights of which no file is there are written too."""
    assert main(["export", str(GOLDEN / "hyperprior"), str(tmp_path / "model")]) == 0
    assert "symbols that differ" in capsys.readouterr().out
    own = Codec(tmp_path / "model", threads=1)
    for path in sorted((GOLDEN / "files/hyperprior").glob("*.oscar")):
        decoded, expected = own.decompress(path.read_bytes()), Image.open(path.with_suffix(".png"))
        assert np.abs(np.asarray(decoded, dtype=int) - np.asarray(expected)).max() <= 1
    description = json.loads((tmp_path / "model/runtime.json").read_text())
    assert set(description["sha256"]) == {path.name for path in (tmp_path / "model").glob("*.onnx")} | {"graphs.data"}
    assert main(["export", str(GOLDEN / "hyperprior"), str(tmp_path / "model")]) == 2
    assert "exists already; allow it with --overwrite" in capsys.readouterr().err


def test_graphs_that_differ_are_refused(tmp_path: Path, monkeypatch) -> None:
    """Nothing is left then."""
    monkeypatch.setattr(graphs, "_check", lambda codec, runtime: (_ for _ in ()).throw(RuntimeModelError("differ")))
    monkeypatch.setattr(graphs, "_parts", lambda codec: iter(()))
    monkeypatch.setattr(graphs, "Codec", lambda folder: None)
    with pytest.raises(RuntimeModelError, match="differ"):
        graphs.export(GOLDEN / "hyperprior", tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported(make_codec, tmp_path: Path, capsys) -> None:
    codec = make_codec()
    codec.set_mapping(PerImageMapping())
    codec.save_pretrained(tmp_path / "model")
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "out")]) == 2
    assert "timesteps.kind is 'per_image'; allowed for export: a mapping of operating points" in capsys.readouterr().err
    assert main(["export", "nano", str(tmp_path / "out"), "--format", "coreml"]) == 2
    assert "--format 'coreml' does not exist; allowed: onnx" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
