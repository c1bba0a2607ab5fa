import json

import numpy as np
import pytest
import torch
from PIL import Image

from oscar.baselines import BaselineUnavailable, CodecError, make_baseline

zoo = pytest.importorskip("compressai.zoo.image")


def save_weights(folder, name, qualities, width=None, metric="mse"):
    """Random weights under the zoo's file names and in its old layout of keys."""
    for quality in qualities:
        torch.manual_seed(quality)
        network = zoo.model_architectures[name](*(width or (8, 12)))
        network.update()
        state = {f"module.{key}": value for key, value in network.state_dict().items()}
        torch.save(state, folder / zoo.model_urls[name][metric][quality].rsplit("/", 1)[1])


@pytest.fixture(scope="module")
def photo():
    random = np.random.default_rng(0)
    return Image.fromarray(random.integers(0, 256, (50, 40, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("name", "width"),
    [
        ("bmshj2018-factorized", (8, 12)),
        ("bmshj2018-hyperprior", (8, 12)),
        ("mbt2018-mean", (8, 12)),
        ("mbt2018", (12, 12)),
        ("cheng2020-anchor", (12,)),
        ("cheng2020-attn", (12,)),
    ],
)
def test_files_carry_the_image(tmp_path, photo, name, width):
    """What decodes from the bytes alone, in a fresh codec, is what the network itself gives."""
    save_weights(tmp_path, name, [2], width)
    codec = make_baseline(name, weights=tmp_path)
    assert codec.points == codec.grid == (2,)
    encoded = codec.encode(photo, 2)
    assert encoded.data[0] == 2 and encoded.parts["header"] == (5 if name == "bmshj2018-factorized" else 8)
    decoded = make_baseline(name, weights=tmp_path).decode(encoded.data)
    assert decoded.size == photo.size

    pixels = torch.from_numpy(np.asarray(photo).copy()).permute(2, 0, 1)[None] / 255
    padded = torch.nn.functional.pad(pixels, (0, 24, 0, 14), mode="replicate")
    network = codec.network(2)
    with torch.inference_mode():
        direct = network.decompress(**network.compress(padded))["x_hat"][0, :, :50, :40]
    expected = (direct.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(np.asarray(decoded), expected)


def test_qualities_are_those_with_weights(tmp_path, photo):
    save_weights(tmp_path, "mbt2018-mean", [1, 4])
    codec = make_baseline("mbt2018-mean", weights=tmp_path)
    assert codec.points == (1, 4)
    with pytest.raises(ValueError, match="^mbt2018-mean: quality 3 is not allowed; allowed: 1, 4$"):
        codec.encode(photo, 3)
    described = json.loads(json.dumps(codec.describe()))
    assert len(described["sha256"]["4"]) == 64 and described["library"].startswith("compressai ")
    result = codec.round_trip(photo, 4)
    assert result.decoded.size == photo.size and result.encoded.data[0] == 4


def test_the_metric_chooses_the_files(tmp_path):
    save_weights(tmp_path, "bmshj2018-factorized", [1], metric="ms-ssim")
    assert make_baseline("bmshj2018-factorized", weights=tmp_path, metric="ms-ssim").points == (1,)
    with pytest.raises(BaselineUnavailable, match="^bmshj2018-factorized: no weights in "):
        make_baseline("bmshj2018-factorized", weights=tmp_path)
    with pytest.raises(ValueError, match="metric 'lpips' is not allowed; allowed: mse, ms-ssim"):
        make_baseline("bmshj2018-factorized", weights=tmp_path, metric="lpips")


def test_without_weights_nothing_is_fetched(tmp_path, monkeypatch):
    def fetch(*args, **kwargs):
        raise AssertionError("no download was allowed")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    with pytest.raises(BaselineUnavailable, match=f"no weights in {tmp_path}/hub/checkpoints: put cheng2020-anchor-1-"):
        make_baseline("cheng2020-anchor")


def test_a_failed_download_is_one_line(tmp_path, monkeypatch):
    def fetch(url, path, hash_prefix, progress):
        assert hash_prefix == "446d5c7f"
        raise OSError("no network\nat all")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    with pytest.raises(BaselineUnavailable, match="^bmshj2018-factorized: cannot fetch https://.*: no network$"):
        make_baseline("bmshj2018-factorized", weights=tmp_path, download=True)


def test_broken_weights_and_files(tmp_path, photo):
    save_weights(tmp_path, "bmshj2018-hyperprior", [1])
    codec = make_baseline("bmshj2018-hyperprior", weights=tmp_path)
    data = codec.encode(photo, 1).data
    with pytest.raises(CodecError, match="the file has quality 7"):
        codec.decode(b"\7" + data[1:])
    with pytest.raises(CodecError, match="cut|too short"):
        codec.decode(data[:6])
    codec.files[1].write_bytes(b"not weights")
    with pytest.raises(CodecError, match="^bmshj2018-hyperprior: weights .* cannot be read: "):
        make_baseline("bmshj2018-hyperprior", weights=tmp_path).encode(photo, 1)
