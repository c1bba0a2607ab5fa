"""Metrics: known values, every kind of input, agreement with other implementations, refusals, and sets of metrics."""

from __future__ import annotations

import io
import math
import socket
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from oscar.data.images import ImageError
from oscar.metrics.image import (
    METRICS,
    MS_SSIM_MIN_SIDE,
    MetricSet,
    metrics_of,
    ms_ssim,
    ms_ssim_y,
    patches,
    psnr,
    ssimulacra2,
)


@pytest.fixture(scope="module")
def pair() -> tuple[np.ndarray, np.ndarray]:
    """A smooth colour image of 203x181 and a noisy form of it."""
    generator = np.random.default_rng(0)
    y, x = np.mgrid[0:181, 0:203]
    smooth = np.stack([127 + 90 * np.sin(x / 9 + c) * np.cos(y / (11 + c)) for c in range(3)], axis=-1)
    noisy = smooth + generator.normal(0, 12, smooth.shape)
    return smooth.round().astype(np.uint8), noisy.round().clip(0, 255).astype(np.uint8)


def forms(pixels: np.ndarray) -> list:
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    return [pixels, Image.fromarray(pixels), tensor, tensor[None].float() / 127.5 - 1]


def unit(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255


def test_psnr_of_known_errors():
    black = np.zeros((4, 5, 3), np.uint8)
    one_off = black.copy()
    one_off[0, 0, 0] = 30
    assert psnr(black, black) == 80  # the cap, as in pyiqa
    assert psnr(black, black + 255) == pytest.approx(0, abs=1e-6)
    assert psnr(black, one_off) == pytest.approx(10 * math.log10(255**2 / (900 / 60)), abs=1e-3)


def test_every_kind_of_input_gives_the_same(pair):
    a, b = pair
    for metric in (psnr, ms_ssim):
        values = [metric(x, y) for x, y in zip(forms(a), reversed(forms(b)), strict=True)]
        assert len(set(values)) == 1


def test_ms_ssim_of_equal_and_worse(pair):
    a, b = pair
    assert ms_ssim(a, a) == pytest.approx(1, abs=1e-6)
    assert 0.5 < ms_ssim(a, b) < 0.99
    assert ms_ssim(a, 255 - a) == 0, "contrast that is negative everywhere counts as none"


def test_small_images_have_no_ms_ssim():
    small = np.zeros((MS_SSIM_MIN_SIDE - 1, 300, 3), np.uint8)
    assert ms_ssim(small, small) is None
    assert psnr(small, small) == 80
    assert ms_ssim(np.zeros((161, 161, 3), np.uint8), np.zeros((161, 161, 3), np.uint8)) == pytest.approx(1)


def test_agreement_with_pyiqa_on_rgb(pair):
    psnr_arch = pytest.importorskip("pyiqa.archs.psnr_arch")
    ssim_arch = pytest.importorskip("pyiqa.archs.ssim_arch")
    a, b = pair
    nearly = a.copy()
    nearly[::40, ::40] ^= 1  # 80 dB, where pyiqa's epsilon is as large as the error
    for other in (b, nearly):
        tensors = unit(a), unit(other)
        expected = psnr_arch.PSNR()(*(tensor.double() for tensor in tensors)).item()
        assert psnr(a, other) == pytest.approx(expected, abs=1e-4)
        assert ms_ssim(a, other) == pytest.approx(ssim_arch.MS_SSIM(test_y_channel=False)(*tensors).item(), abs=1e-6)


@pytest.mark.parametrize("error", ["noise", "one level", "none"])
def test_the_paper_s_metrics_are_pyiqas_own_calls(pair, error):
    """As the published evaluation makes them: `create_metric(name)` with its defaults, on uint8 / 255 in float32."""
    pyiqa = pytest.importorskip("pyiqa")
    a, b = pair
    nearly = a.copy()
    nearly[::7, ::5] ^= 1
    other = {"noise": b, "one level": nearly, "none": a}[error]
    for name, ours in (("psnr", psnr), ("ms_ssim", ms_ssim_y)):
        own = pyiqa.create_metric(name, device=torch.device("cpu"))
        assert ours(a, other) == pytest.approx(own(unit(other), unit(a)).item(), abs=1e-4 if name == "psnr" else 1e-6)


def test_luma_is_rounded_and_leaves_colour_out(pair):
    a, b = pair
    grey = np.repeat(a[..., :1], 3, axis=2)
    assert ms_ssim_y(grey, np.repeat(b[..., :1], 3, axis=2)) == pytest.approx(
        ms_ssim(grey, np.repeat(b[..., :1], 3, axis=2)), abs=1e-5
    )
    assert ms_ssim_y(a, b) > ms_ssim(a, b) + 0.001
    assert ms_ssim_y(a, a) == pytest.approx(1, abs=1e-12) and ms_ssim_y(a[:160], a[:160]) is None


def test_metrics_of_the_protocols(pair):
    names = ["psnr", "ms_ssim", "ms_ssim_p256", "fid"]
    assert metrics_of("bitstream", names) == names
    assert metrics_of("paper", names) == ["psnr", "ms_ssim_y", "ms_ssim_y_p256", "fid"]
    both = MetricSet(["psnr", "ms_ssim", "ms_ssim_y"])
    assert list(both.only(metrics_of("paper", ["psnr", "ms_ssim"])).score(*pair)) == ["psnr", "ms_ssim_y"]
    assert both.names == ("psnr", "ms_ssim", "ms_ssim_y")


def filter_by_rows_and_columns(image: torch.Tensor, window: torch.Tensor, shape: str) -> torch.Tensor:
    """pyiqa's filter2, for a window that is a product of two: a hundredth of its time in float64."""
    line = window[0, 0].to(image).sum(dim=1)
    rows, columns = (
        torch.stack([torch.nn.functional.pad(line, (i, side - 11 - i)) for i in range(side - 10)])
        for side in image.shape[-2:]
    )
    return rows @ image @ columns.T


@pytest.mark.slow
def test_agreement_with_pyiqa_on_photographs(photographs, monkeypatch):
    psnr_arch = pytest.importorskip("pyiqa.archs.psnr_arch")
    ssim_arch = pytest.importorskip("pyiqa.archs.ssim_arch")
    monkeypatch.setattr(ssim_arch, "filter2", filter_by_rows_and_columns)
    for image in photographs.values():
        for quality in (5, 50, 90):
            file = io.BytesIO()
            image.save(file, "JPEG", quality=quality)
            a, b = np.array(image), np.array(Image.open(file))
            expected = psnr_arch.PSNR()(unit(a).double(), unit(b).double()).item()
            assert psnr(a, b) == pytest.approx(expected, abs=1e-4)
            expected = ssim_arch.MS_SSIM(test_y_channel=False)(unit(a), unit(b)).item()
            assert ms_ssim(a, b) == pytest.approx(expected, abs=5e-5)


def test_refusals(pair):
    a, b = pair
    for metric in (psnr, ms_ssim, MetricSet(["psnr"]).score):
        with pytest.raises(ValueError, match="203x181 and 203x180 pixels"):
            metric(a, b[:-1])
        with pytest.raises(ImageError):
            metric(a.astype(np.float32), b)


def test_ssimulacra2_follows_the_quality_of_jpeg(make_image):
    pytest.importorskip("ssimulacra2")
    image, scores = make_image(256, 240), []
    for quality in (10, 50, 90):
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        scores.append(ssimulacra2(image, Image.open(file)))
    assert scores == sorted(scores) and scores[-1] < ssimulacra2(image, image) == 100
    assert MetricSet(["ssimulacra2"]).score(image.crop((0, 0, 7, 9)), image.crop((0, 0, 7, 9))) == {"ssimulacra2": None}


def test_ssimulacra2_of_a_stored_pair(pair):
    pytest.importorskip("ssimulacra2")
    assert ssimulacra2(*pair) == pytest.approx(19.71345449, abs=1e-5)  # of ssimulacra2 0.3.0


def test_a_metric_whose_package_is_absent_is_unavailable(pair, monkeypatch):
    monkeypatch.setitem(sys.modules, "ssimulacra2", None)
    metrics = MetricSet(["psnr", "ssimulacra2"])
    assert metrics.unavailable["ssimulacra2"].startswith("package ssimulacra2 cannot be imported: ")
    assert metrics.unavailable["ssimulacra2"].endswith("; allowed: pip install 'oscar-codec[eval]'")
    assert list(metrics.score(*pair)) == ["psnr"]


@pytest.mark.parametrize(
    ("width", "height", "origins"),
    [
        (768, 512, [(0, 0), (256, 0), (512, 0), (0, 256), (256, 256), (512, 256), (128, 128), (384, 128)]),
        (400, 383, [(0, 0)]),
        (400, 384, [(0, 0), (128, 128)]),
        (255, 900, []),
    ],
)
def test_patches_are_those_of_two_grids(width, height, origins):
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    places = np.stack([x, y], axis=-1)
    found = patches(places)
    assert [tuple(patch[0, 0]) for patch in found] == origins
    assert all(patch.shape == (256, 256, 2) for patch in found)


def test_metrics_on_patches_are_means_over_them(make_image):
    a, b = (np.array(make_image(400, 384, seed)) for seed in (0, 1))
    scores = MetricSet(["psnr_p256", "ms_ssim_p256", "ms_ssim"]).score(a, b)
    corners = [(a[:256, :256], b[:256, :256]), (a[128:, 128:384], b[128:, 128:384])]
    for metric in (psnr, ms_ssim):
        assert scores[f"{metric.__name__}_p256"] == pytest.approx(np.mean([metric(*corner) for corner in corners]))
    assert scores["ms_ssim"] == ms_ssim(a, b)


def test_metrics_that_do_not_exist_for_a_small_image(make_image):
    small = make_image(200, 120)
    metrics = MetricSet(["psnr_p256", "ms_ssim", "psnr", "psnr"])
    assert metrics.names == ("psnr_p256", "ms_ssim", "psnr")
    assert metrics.score(small, small) == {"psnr_p256": None, "ms_ssim": None, "psnr": 80}
    assert not metrics.has_set_metrics and metrics.features(small) == {} and metrics.set_scores([], []) == {}


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"metric 'vmaf' does not exist; allowed: psnr, .*kid, each also with _p256"):
        MetricSet(["psnr", "vmaf"])
    with pytest.raises(ValueError, match=r"metrics.files: weight file 'vgg' does not exist; allowed: vgg16"):
        MetricSet(["psnr"], files={"vgg": "x"})


def test_without_weights_and_network_the_rest_goes_on(pair, monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    metrics = MetricSet(METRICS)
    assert metrics.names == tuple(METRICS) and not metrics.has_set_metrics
    needed = {
        "lpips_alex": ["alexnet"], "lpips_vgg": ["vgg16"], "dists": ["dists", "vgg16"], "musiq": ["musiq"],
        "clipiqa+": ["clip_rn50", "clipiqa_prompts"], "niqe": ["niqe"], "fid": ["inception"], "kid": ["inception"],
    }  # fmt: skip
    assert set(metrics.unavailable) == {name + suffix for name in needed for suffix in ("", "_p256")}
    for name, files in needed.items():
        reason = metrics.unavailable[name]
        assert reason == metrics.unavailable[f"{name}_p256"] and len(reason.splitlines()) == 1
        assert reason.startswith(f"{' and '.join(files)} weights are not in torch's cache ({tmp_path}")
        ways = " ".join(f"+metrics.files.{file}=FILE" for file in files)
        assert reason.endswith(f"; allowed: {ways}, or metrics.download=true to download")
    assert list(metrics.score(*pair)) == [
        "psnr",
        "ms_ssim",
        "ms_ssim_y",
        "ssimulacra2",
        "psnr_p256",
        "ms_ssim_p256",
        "ms_ssim_y_p256",
        "ssimulacra2_p256",
    ]
    absent = MetricSet(["niqe"], files={"niqe": str(tmp_path / "niqe.mat")})
    assert absent.unavailable == {"niqe": f"niqe weights: no file {tmp_path / 'niqe.mat'}"}
