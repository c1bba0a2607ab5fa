"""`oscar export`: what it refuses. What it writes is tested with the models in the package and in test_full_size.py."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from oscar.cli.main import main
from oscar.convert import graphs
from oscar.convert.graph_weights import stored_weights
from oscar.runtime import RuntimeModelError
from oscar.timesteps import PerImageMapping

GOLDEN = Path(__file__).parent / "golden/ours"


def test_graphs_that_differ_are_refused(tmp_path: Path, monkeypatch) -> None:
    """Nothing is left then."""
    monkeypatch.setattr(graphs, "_check", lambda codec, runtime: (_ for _ in ()).throw(RuntimeModelError("differ")))
    monkeypatch.setattr(graphs, "_parts", lambda codec: iter(()))
    monkeypatch.setattr(graphs, "Codec", lambda folder: None)
    with pytest.raises(RuntimeModelError, match="differ"):
        graphs.export(GOLDEN / "hyperprior", tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_weights_are_found_in_the_models_own_files(tmp_path: Path) -> None:
    """A copy that lies beside them is none of the model's, and is not sent to others."""
    numbers = np.arange(5, dtype=np.float16)
    for name in ("own", "zcopy"):
        save_file({"unused": np.zeros(3, dtype=np.float32), "weight": numbers}, tmp_path / f"{name}.safetensors")
    found = stored_weights(tmp_path, ["own.safetensors", "own.bin"])
    place = found[hashlib.sha256(numbers.astype(np.float32).tobytes()).digest()]
    assert (place.file, place.length, place.narrow) == ("own.safetensors", 10, True) and len(found) == 2
    stored = (tmp_path / place.file).read_bytes()[place.offset : place.offset + place.length]
    assert stored == numbers.tobytes()


def test_what_cannot_be_exported(make_codec, tmp_path: Path, capsys) -> None:
    codec = make_codec()
    codec.set_mapping(PerImageMapping())
    codec.save_pretrained(tmp_path / "model")
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "out")]) == 2
    assert "timesteps.kind is 'per_image'; allowed for export: a mapping of operating points" in capsys.readouterr().err
    assert main(["export", "nano", str(tmp_path / "out"), "--format", "coreml"]) == 2
    assert "--format 'coreml' does not exist; allowed: onnx" in capsys.readouterr().err
    assert main(["export", "nano", str(tmp_path / "model")]) == 2
    assert "exists already; allow it with --overwrite" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    own = tmp_path / "model/out"
    assert main(["export", str(tmp_path / "model"), str(own)]) == 2
    assert f"{own} lies within {tmp_path / 'model'}; allowed: a folder outside" in capsys.readouterr().err
    assert not own.exists()
