"""Golden files: symbols, images and bytes stay what they were when the files were made (see README.md)."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from oscar import checkpoint
from oscar.bitstream import Coding, Container
from oscar.codec import OscarCodec

HERE = Path(__file__).parent
FILES = sorted([*HERE.glob("ours/files/*/*.oscar"), *HERE.glob("shipped/*/*.oscar")])


def name(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


@pytest.fixture(scope="module")
def load_codec(make_goldens):
    return functools.cache(lambda model: make_goldens.load_codec(model, HERE))


@functools.cache
def arrays(folder: Path) -> dict[str, np.ndarray]:
    """Symbols and latents of a model's files."""
    return load_file(folder / "arrays.safetensors")


@pytest.mark.parametrize("path", FILES, ids=name)
def test_decoding(path: Path, make_goldens, load_codec) -> None:
    codec, data = load_codec(path.parent.name), path.read_bytes()
    symbols = make_goldens.read_symbols(codec, data)
    expected = arrays(path.parent)[f"{path.stem}.symbols"]
    assert symbols.shape == expected.shape and (symbols == expected).all()
    decoded, image = codec.decompress(data), Image.open(path.with_suffix(".png"))
    assert decoded.size == image.size
    levels = np.abs(np.asarray(decoded, dtype=int) - np.asarray(image, dtype=int))
    assert levels.max() <= make_goldens.LEVELS


@pytest.mark.parametrize("path", FILES, ids=name)
def test_encoding(path: Path, make_goldens, load_codec) -> None:
    """To the byte, from the latent as it was stored and from the image."""
    case, codec, data = make_goldens.Case.of(path), load_codec(path.parent.name), path.read_bytes()
    assert make_goldens.write_latent(codec, arrays(path.parent)[f"{path.stem}.latent"], case) == data
    image = make_goldens.source_image(case, HERE)
    assert make_goldens.compress(codec, image, case) == data


def test_the_files_are_those_that_are_made(make_goldens) -> None:
    cases = [make_goldens.Case.of(path) for path in FILES]
    assert set(cases) == {*make_goldens.FILES, *make_goldens.SHIPPED} and len(cases) == len(set(cases))


def test_every_kind_of_file_is_there() -> None:
    found = {model: [] for model in ("vq", "vq_per_image", "hyperprior", "nano-vq", "nano")}
    for path in FILES:
        found[path.parent.name].append(Container.unpack(path.read_bytes()))
    assert {container.point_code for container in found["vq"]} == set(range(8))
    assert {container.point_code for container in found["nano-vq"]} == {0, 1, 2, 3, 6, 7, 9, 11}
    codings = {model: {file.coding for file in files if file.width > 1} for model, files in found.items()}
    assert codings["vq"] == {Coding.PACKED, Coding.TABLE, Coding.CONTEXT}
    assert codings["hyperprior"] == codings["nano"] == {Coding.HYPERPRIOR}
    assert all(file.timestep is not None for file in found["vq_per_image"])
    for model in ("vq", "hyperprior"):
        assert {(file.width, file.height) for file in found[model]} == {(1, 1), (7, 5), (131, 67)}


@pytest.mark.parametrize("kind", ["vq", "hyperprior"])
def test_fingerprints(kind: str) -> None:
    """They follow from the weights as they did."""
    codec = OscarCodec.from_pretrained(HERE / "ours" / kind)
    stored = json.loads((HERE / "ours" / kind / "oscar.json").read_text())["fingerprint"]
    assert checkpoint.fingerprint(codec, torch.float16) == stored  # the precision in which they are stored


@pytest.mark.parametrize("model", ["nano", "nano-vq"])
def test_the_shipped_model_is_that_of_the_files(model: str, load_codec) -> None:
    """A model that was trained anew needs its files anew: python tests/golden/make.py shipped --force."""
    tags = {Container.unpack(path.read_bytes()).model_tag for path in FILES if path.parent.name == model}
    codec = load_codec(model)
    assert codec.model_tag in tags
