"""Perceptual metrics with random weights in the layouts of the real files, against pyiqa's own use of these files."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch

from oscar.metrics.image import MetricSet
from oscar.metrics.perceptual import import_clip

pyiqa = pytest.importorskip("pyiqa")
lpips = pytest.importorskip("lpips")


def clip_archive(state: dict[str, torch.Tensor], path: Path) -> None:
    """Save a state dict as a TorchScript archive, which is what OpenAI's RN50.pt is."""
    root = torch.nn.Module()
    for key, value in state.items():
        *parents, name = key.split(".")
        module = root
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, torch.nn.Module())
            module = getattr(module, parent)
        module.register_buffer(name, value)
    torch.jit.script(root).save(str(path))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """Random weights. CLIP's layers are narrow: their sizes are read from its file."""
    import_clip()
    from pyiqa.archs import clip_model, musiq_arch
    from scipy.io import savemat
    from torchvision import models

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    for name in ("alexnet", "vgg16"):
        with torch.device("meta"):  # no need to draw the classifier's 100 million weights
            shapes = getattr(models, name)(weights=None).state_dict()
        state = {key: 0.05 * torch.randn(value.shape) for key, value in shapes.items() if key.startswith("features")}
        rest = {key: torch.zeros(1).expand(value.shape) for key, value in shapes.items() if key not in state}
        torch.save({**state, **rest}, folder / f"{name}.pth")
    torch.save({name: torch.rand(1, 1475, 1, 1) for name in ("alpha", "beta")}, folder / "dists.pth")
    torch.save(musiq_arch.MUSIQ(pretrained=False).state_dict(), folder / "musiq.pth")
    random = np.random.default_rng(0)
    root = random.normal(size=(36, 36))
    savemat(folder / "niqe.mat", {"mu_prisparam": random.normal(size=(1, 36)), "cov_prisparam": root @ root.T})
    clip = clip_model.CLIP(32, 64, (1, 1, 1, 1), 8, None, 77, 49408, 64, 1, 1)
    for parameter in clip.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape)  # some start at zero
    clip_archive(clip.state_dict(), folder / "clip_rn50.pt")
    torch.save(torch.nn.Parameter(torch.randn(2, 16, 64)), folder / "clipiqa_prompts.pth")
    return {path.stem: str(path) for path in folder.iterdir()}


@pytest.fixture
def pyiqas_own(files, monkeypatch):
    """Builds pyiqa's metric as pyiqa does, with its downloads replaced by the files."""
    from pyiqa.archs import arch_util, clip_model, clipiqa_arch, niqe_arch
    from torchvision.models import _api

    names = {"DISTS": "dists", "musiq": "musiq", "CLIP-IQA+": "clipiqa_prompts", "niqe": "niqe"}

    def local(url, *args, **kwargs):
        file = unquote(url.rsplit("/", 1)[-1])
        if file.startswith("LPIPS"):  # pyiqa's copy of the layers that the lpips package brings along
            return str(Path(lpips.__file__).parent / f"weights/v0.1/{'vgg' if 'vgg' in file else 'alex'}.pth")
        return next(files[name] for start, name in names.items() if file.startswith(start))

    for module in (arch_util, clipiqa_arch, niqe_arch):
        monkeypatch.setattr(module, "load_file_from_url", local)
    monkeypatch.setattr(clip_model, "_download", lambda *_: files["clip_rn50"])
    trunk = {"vgg16-397923af.pth": "vgg16", "alexnet-owt-7be5be79.pth": "alexnet"}
    monkeypatch.setattr(
        _api, "load_state_dict_from_url", lambda url, *_, **__: torch.load(files[trunk[url.rsplit("/", 1)[-1]]])
    )
    return lambda name: pyiqa.create_metric(name, device=torch.device("cpu"))


def unit(image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255


@pytest.mark.parametrize(
    ("name", "pyiqas_name", "smallest", "too_small"),
    [
        ("lpips_alex", "lpips", (31, 31), (30, 31)),
        pytest.param("lpips_vgg", "lpips-vgg", (16, 16), (16, 15), marks=pytest.mark.slow),  # VGG is slow to be drawn
        pytest.param("dists", "dists", (1, 1), None, marks=pytest.mark.slow),
        ("musiq", "musiq", (1, 447), (1, 448)),
        ("clipiqa+", "clipiqa+", (32, 32), (32, 31)),
        ("niqe", "niqe", (96, 192), (95, 500)),
    ],
)
def test_equals_pyiqas_own(name, pyiqas_name, smallest, too_small, files, pyiqas_own, make_image):
    reference, decoded = make_image(300, 256, 0), make_image(300, 256, 1)
    metrics = MetricSet([name], files=files)
    assert metrics.unavailable == {}
    score = metrics.score(reference, decoded)[name]
    own = pyiqas_own(pyiqas_name)
    expected = own(unit(decoded), unit(reference)).item()
    assert math.isfinite(score) and score == pytest.approx(expected, rel=1e-4)
    if own.metric_mode == "FR":
        assert metrics.score(reference, reference)[name] == pytest.approx(0, abs=1e-5)
        assert score > 1e-3
    else:
        assert metrics.score(decoded, decoded)[name] == score, "it looks at the decoded image alone"
        assert metrics.score(decoded, reference)[name] != score
    assert math.isfinite(metrics.score(make_image(*smallest), make_image(*smallest, 1))[name])
    if too_small:
        assert metrics.score(make_image(*too_small), make_image(*too_small, 1)) == {name: None}


def test_networks_are_shared_with_their_patches(files, make_image):
    reference, decoded = make_image(400, 384, 0), make_image(400, 384, 1)
    names = ["lpips_alex", "lpips_alex_p256", "niqe_p256", "clipiqa+_p256"]
    scores = MetricSet(names, files=files).score(reference, decoded)
    boxes = [(0, 0, 256, 256), (128, 128, 384, 384)]
    for name in names[1:]:
        whole = MetricSet([name.removesuffix("_p256")], files=files)
        parts = [whole.score(reference.crop(box), decoded.crop(box))[name.removesuffix("_p256")] for box in boxes]
        assert scores[name] == pytest.approx(np.mean(parts), rel=1e-5)


def test_a_flat_image_has_no_niqe(files):
    flat = np.full((256, 256, 3), 77, np.uint8)
    assert MetricSet(["niqe", "niqe_p256"], files=files).score(flat, flat) == {"niqe": None, "niqe_p256": None}


@pytest.mark.parametrize(
    ("name", "file", "other", "message"),
    [
        ("lpips_alex", "alexnet", "vgg16", "alexnet weights lack slice2.3.weight"),
        ("lpips_alex", "alexnet", "clipiqa_prompts", "holds no state dict"),
        ("musiq", "musiq", "alexnet", "musiq weights do not fit: Missing key"),
        ("niqe", "niqe", "alexnet", "cannot be read"),
        ("clipiqa+", "clip_rn50", "niqe", "cannot be read"),
        ("clipiqa+", "clipiqa_prompts", "alexnet", "clipiqa_prompts weights do not fit"),
    ],
)
def test_other_files_make_a_metric_unavailable(name, file, other, message, files):
    metrics = MetricSet([name, "psnr"], files={**files, file: files[other]})
    assert list(metrics.unavailable) == [name]
    assert message in metrics.unavailable[name] and len(metrics.unavailable[name].splitlines()) == 1


def test_clip_leaves_nothing_behind_in_place_of_setuptools():
    import_clip()
    assert "clip" in sys.modules
    assert getattr(sys.modules.get("pkg_resources"), "__file__", "absent") is not None
