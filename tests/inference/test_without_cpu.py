"""The hand-written kernels can be deleted: a copy of the package without them codes images by the standard modules."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import oscar
from oscar.inference.load import load

CODE = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
import json
import numpy as np
import oscar
from PIL import Image
folder, *models = sys.argv[1:]
assert oscar.__file__.startswith(folder), oscar.__file__
image, kinds = Image.open(folder + "/image.png"), {}
for model in models:
    codec = oscar.load(model)
    data = codec.compress(image)
    np.save(f"{folder}/{model}.npy", np.asarray(codec.decompress(data)))
    open(f"{folder}/{model}.oscar", "wb").write(data)
    kinds[model] = sorted({type(part).__name__ for part in codec.modules() if "inference" in type(part).__module__})
import oscar.benchmark.speed.inference, oscar.benchmark.speed.timing, oscar.cli.main
print(json.dumps({"kinds": kinds, "cpu": any(name.startswith("oscar.inference.cpu") for name in sys.modules)}))
"""


MODELS = ("nano", "nano-vq")


@pytest.mark.slow
def test_the_folder_can_be_deleted(tmp_path: Path, make_image) -> None:
    package, image = Path(oscar.__file__).parent, make_image(72, 56)
    ignored = shutil.ignore_patterns("__pycache__", "cpu")
    shutil.copytree(package, tmp_path / "oscar", ignore=ignored)
    assert not (tmp_path / "oscar/inference/cpu").exists() and (package / "inference/cpu").is_dir()
    image.save(tmp_path / "image.png")
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path), *MODELS],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    kinds = dict.fromkeys(MODELS, ["TiledBackbone", "WindowedDenoiser"])
    assert json.loads(done.stdout.splitlines()[-1]) == {"kinds": kinds, "cpu": False}
    for model in MODELS:
        ours, data = load(model), (tmp_path / f"{model}.oscar").read_bytes()
        assert data == ours.compress(image)
        difference = np.load(tmp_path / f"{model}.npy").astype(int) - np.asarray(ours.decompress(data), dtype=int)
        assert np.abs(difference).max() <= 1
