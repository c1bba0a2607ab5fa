"""The runtime against golden files of the shipped models, damage and bad input. No torch (`make test-runtime`)."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from oscar.bitstream import BitstreamError, WrongModelError
from oscar.data.images import ImageError
from oscar.model_folder import CheckpointError, locate, sha256
from oscar.rate_control import TargetError
from oscar.runtime import Codec, RuntimeModelError, codec
from oscar.runtime.files import providers

SHIPPED = Path(__file__).parents[1] / "golden/shipped"
MODELS = ("nano", "nano-vq")
FILES = sorted(SHIPPED.glob("*/*.oscar"))


@functools.cache
def load(model: str) -> Codec:
    return Codec(model, threads=1)


@functools.cache
def arrays(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "arrays.safetensors")


def name(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def photo(width: int, height: int) -> Image.Image:
    image = Image.open(SHIPPED / "nano-vq/0.1250_131x67.png")
    return image.resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The folder of nano, to be damaged."""
    return Path(shutil.copytree(locate("nano"), tmp_path / "model"))


@pytest.mark.parametrize("path", FILES, ids=name)
def test_golden_files(path: Path) -> None:
    """Symbols and bytes are equal, pixels at most one level from torch's."""
    own, data, stored = load(path.parent.name), path.read_bytes(), arrays(path.parent)
    container, point = own.open(data)
    symbols = own.bottleneck.read(container.coded, point, own.latent_shape(container))
    assert np.array_equal(symbols[0], stored[f"{path.stem}.symbols"])
    levels = np.asarray(own.decompress(data), dtype=int) - np.asarray(Image.open(path.with_suffix(".png")))
    assert np.abs(levels).max() <= 1
    effort = int(path.stem.partition("_effort")[2] or 0)
    found = own.quantise(stored[f"{path.stem}.latent"], point, effort)
    assert own.write(found, point, container.height, container.width) == [data]


def test_default_points() -> None:
    assert load("nano-vq").bottleneck.default_point.bpp == 0.043  # the middle of eight
    assert load("nano").bottleneck.default_point.value == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("model", MODELS)
def test_any_size_and_kind_of_image(model: str) -> None:
    own = load(model)
    for size in ((1, 1), (40, 3), (65, 130)):
        image = photo(*size)
        data = own.compress(image)
        assert data == own.compress(np.asarray(image)) and own.decompress(data).size == size
    assert own.decompress(own.compress(photo(30, 20).convert("L"))).mode == "RGB"
    files = own.compress_batch([photo(30, 20), photo(20, 30)])
    assert [image.size for image in own.decompress_batch(files)] == [(30, 20), (20, 30)]


@pytest.mark.parametrize(("model", "largest"), [("nano-vq", 120), ("nano", 500)])
def test_size_targets(model: str, largest: int) -> None:
    """None is exceeded, and what comes out is a file of the model's."""
    own, image = load(model), photo(131, 67)
    low = len(own.compress(image, own.points[0], own.bottleneck.max_effort))
    high = len(own.compress(image, own.points[-1]))
    targets = np.random.default_rng(0).integers(low, min(high, largest), 12)  # 200: scripts/evaluate_targets.py
    for target in targets:
        data = own.compress(image, max_bytes=int(target))
        assert len(data) <= target
        own.open(data)
    with pytest.raises(TargetError, match=rf"max_bytes is 12, .*; reachable: {low} to {high} bytes"):
        own.compress(image, max_bytes=12)
    with pytest.raises(ValueError, match="allowed: it alone"):
        own.compress(image, own.points[0], max_bytes=100)


@pytest.mark.parametrize("model", MODELS)
def test_previews(model: str) -> None:
    own, image = load(model), photo(131, 67)
    data = own.compress(image, own.points[-1])
    whole = own.partial(data)
    assert whole.share == 1 and np.array_equal(whole.image, own.decompress(data))
    assert 0 < own.partial(data[: len(data) // 2]).share < 1


@pytest.mark.parametrize("model", MODELS)
def test_damaged_files(model: str) -> None:
    """500 files with flipped, cut or added bytes: named errors only."""
    own, random = load(model), np.random.default_rng(0)
    files = [path.read_bytes() for path in FILES if path.parent.name == model]
    for turn in range(500):
        data = bytearray(files[turn % len(files)])
        if turn % 3 == 0:
            data = data[: random.integers(len(data))]
        elif turn % 3 == 1:
            data += random.bytes(int(random.integers(1, 9)))
        else:
            data[random.integers(len(data))] ^= 1 << int(random.integers(8))
        with pytest.raises(BitstreamError):
            own.decompress(bytes(data))


def test_files_of_another_model() -> None:
    file = next(path for path in FILES if path.parent.name == "nano-vq").read_bytes()
    with pytest.raises(WrongModelError, match="a vector quantiser; this one has a hyperprior"):
        load("nano").decompress(file)


def test_bad_arguments() -> None:
    own, rates = load("nano"), load("nano-vq")
    with pytest.raises(ValueError, match=r"quality is 1.5; allowed: 0 to 1"):
        own.compress(photo(8, 8), quality=1.5)
    with pytest.raises(ValueError, match="rate is 0.1, but this model has a hyperprior; allowed: quality or max_bytes"):
        own.compress(photo(8, 8), rate=0.1)
    with pytest.raises(ValueError, match="effort is 3, but this model has a hyperprior; allowed: 0"):
        own.compress(photo(8, 8), effort=3)
    with pytest.raises(ValueError, match=r"rate 0.2 does not exist; allowed: 0.0019, "):
        rates.compress(photo(8, 8), rate=0.2)
    with pytest.raises(ValueError, match="effort is 10; allowed: 0 to 9"):
        rates.compress(photo(8, 8), effort=10)
    with pytest.raises(ImageError, match="transparent"):
        own.compress(Image.new("RGBA", (8, 8)))
    with pytest.raises(ValueError, match=r"device is 'tpu'; allowed for the runtime here: cpu"):
        Codec("nano", device="tpu")


def test_an_image_too_large_for_the_memory(monkeypatch) -> None:
    data = load("nano").compress(photo(131, 67))
    monkeypatch.setattr(codec, "available_memory", lambda: 1_000_000)
    with pytest.raises(ImageError, match=r"pixels take 0\.0 GB to decode, of which 0\.0 are free; allowed: fewer"):
        load("nano").decompress(data)


def test_shipped_graphs_are_of_the_shipped_weights() -> None:
    """Whoever replaces a shipped model exports it anew (`oscar export NAME oscar/assets/NAME --overwrite`)."""
    shipped = [path.parent for path in locate("nano").parent.glob("*/oscar.json")]
    assert len(shipped) >= 2
    for folder in shipped:
        description = json.loads((folder / "runtime.json").read_text())
        assert description["fingerprint"] == json.loads((folder / "oscar.json").read_text())["fingerprint"]
        assert {path.name for path in folder.glob("*.onnx")} == set(description["sha256"]) - {"graphs.data"}


def test_damaged_models(copy: Path) -> None:
    """Each is refused in one line that names the file."""

    def error() -> str:
        with pytest.raises(CheckpointError) as caught:
            Codec(copy)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    original = (copy / "runtime.json").read_text()
    (copy / "runtime.json").write_text(json.dumps({**json.loads(original), "fingerprint": "0" * 64}))
    assert "runtime.json is of another model" in error()
    (copy / "runtime.json").write_text(original.replace('"format": 1', '"format": 2'))
    assert "runtime.json: format is 2; allowed: 1" in error()
    (copy / "runtime.json").write_text("{}")
    assert "cannot be read: KeyError" in error()
    (copy / "runtime.json").write_text(original)
    graph = (copy / "denoiser.onnx").read_bytes()
    (copy / "denoiser.onnx").write_bytes(graph[:-1])
    assert "denoiser.onnx is damaged (its SHA-256 is not that of runtime.json)" in error()
    (copy / "denoiser.onnx").write_bytes(graph)
    weights = copy / "vae/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    assert "is damaged (its SHA-256 is not that of oscar.json)" in error()
    (copy / "runtime.json").unlink()
    assert "has no runtime.json; allowed: a model folder that `oscar export` wrote" in error()


BROKEN = {  # what a JSON file says where it should say something else, and what is said of it; None: nothing
    "runtime.json": {
        "factor": {None: "KeyError: 'factor'", "8": "runtime.json: factor is '8'; allowed: whole numbers from 1"},
        "unet_multiple": {0: "unet_multiple is 0; allowed: whole numbers from 1"},
        "schedule_length": {100: "is outside the schedule; allowed: 0 to 99"},
        "bytes_per_pixel": {None: "KeyError: 'bytes_per_pixel'", 3: "cannot be read: TypeError"},
        "sha256": {None: "KeyError: 'sha256'", (): "is damaged (its SHA-256 is not that of runtime.json)"},
    },
    "oscar.json": {
        "bottleneck": {
            None: "KeyError: 'bottleneck'",
            (): "KeyError: 'rates'",
            ("kind", "mine"): "is 'mine'",
            ("stages", 4): "bottleneck.stages is 4, which is there no more",
        },
        "timesteps": {None: "KeyError: 'timesteps'"},
        "sha256": {(): "oscar.safetensors is damaged (its SHA-256 is not that of oscar.json)"},
    },
}


@pytest.mark.parametrize(("file", "key"), [(file, key) for file, keys in BROKEN.items() for key in keys])
def test_descriptions_that_lack_something(file: str, key: str, copy: Path) -> None:
    """They are refused in one line when the model is loaded, not when it is used."""
    whole = json.loads((copy / file).read_text())
    for value, words in BROKEN[file][key].items():
        own = {key: dict([value] if value else []) if isinstance(value, tuple) else value}
        (copy / file).write_text(json.dumps({name: of for name, of in (whole | own).items() if of is not None}))
        with pytest.raises(CheckpointError, match=re.escape(words)) as caught:
            Codec(copy)
        assert "\n" not in str(caught.value) and str(caught.value).startswith(f"model {str(copy)!r}")


def test_the_denoisers_weights_are_left_to_its_graph(copy: Path) -> None:
    """A UNet that was trained in full is in this file, and large."""
    tensors = load_file(copy / "oscar.safetensors") | {"denoiser.unet.weight": np.zeros(3, dtype=np.float32)}
    save_file(tensors, copy / "oscar.safetensors")
    description = json.loads((copy / "oscar.json").read_text())
    description["sha256"]["oscar.safetensors"] = sha256(copy / "oscar.safetensors")
    (copy / "oscar.json").write_text(json.dumps(description))
    assert set(Codec(copy).files.tensors) == set(load("nano").files.tensors)


def test_devices(monkeypatch) -> None:
    cpu, cuda = "CPUExecutionProvider", "CUDAExecutionProvider"
    assert providers("cpu") == [cpu]
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: [cuda, cpu])
    assert providers("cuda") == [cuda, cpu] and providers("cuda:1") == [(cuda, {"device_id": "1"}), cpu]
    for device in ("cpu:0", "cuda:x", "coreml", "CUDAExecutionProvider"):
        with pytest.raises(RuntimeModelError, match=f"device is '{device}'; allowed for the runtime here: cpu, cuda"):
            providers(device)


def test_no_torch_is_imported() -> None:
    """Nor anything else of the networks' packages, though they are installed here."""
    path = next(path for path in FILES if path.stem == "0.5000_131x67")
    code = f"""
import sys
for package in ("torch", "diffusers", "compressai", "scipy", "accelerate", "hydra", "omegaconf", "huggingface_hub"):
    sys.modules[package] = None  # an import of it fails
from oscar.runtime import Codec
codec = Codec("nano", threads=1)
codec.compress(codec.decompress(open({str(path)!r}, "rb").read()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
