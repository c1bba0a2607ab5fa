"""Shared fixtures: a tiny random codec, synthetic photographs, composed configurations and the golden files."""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything reads it: no test may wait for a network

import numpy as np
import pytest
from PIL import Image, ImageFilter

HAS_TORCH = importlib.util.find_spec("torch") is not None  # but for `make test-runtime`
if HAS_TORCH:
    import torch
    from omegaconf import OmegaConf

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests/golden"


def load_module(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def load_script() -> Callable[[str], ModuleType]:
    """A script's name, such as "train" -> the script as the module train_script."""
    return lambda name: load_module(ROOT / f"scripts/{name}.py", f"{name}_script")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the most slow tests come first, so that processes which take a file at a time end together."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


def pytest_collection_finish() -> None:
    """What imports have made stays: no garbage collection walks over its million objects again."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # libraries complain of what is left at the end


@pytest.fixture(autouse=True)
def one_thread():
    """Small networks are fastest so, and tests do not depend on the machine's cores."""
    if HAS_TORCH:
        torch.set_num_threads(1)
    yield
    if HAS_TORCH:
        torch.set_num_threads(1)


@pytest.fixture
def all_formats() -> None:
    """Figures are written in all their formats (see `one_format`)."""


@pytest.fixture(autouse=True)
def one_format(request: pytest.FixtureRequest, monkeypatch) -> None:
    """Figures are written in one format, since each takes half a second, but where a test asks for `all_formats`."""
    if "all_formats" not in request.fixturenames:
        monkeypatch.setattr("oscar.utils.figures.DEFAULT_FORMATS", ("svg",))


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps its state per process and refuses to change it: no test leaves any behind."""
    yield
    if "accelerate.state" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


@pytest.fixture(scope="session")
def photographs() -> dict[str, Image.Image]:
    """The five colour photographs that scikit-image has in its package, 451x300 to 741x500, by name."""
    from oscar.data.folders import find_images

    return {path.stem: Image.open(path).convert("RGB") for path in find_images()}


@pytest.fixture(scope="session")
def astronaut(photographs) -> Image.Image:
    """One of them, 512x512."""
    return photographs["astronaut"]


@pytest.fixture(scope="session")
def make_goldens() -> ModuleType:
    """The module by which our own golden data were made."""
    return load_module(GOLDEN / "make.py", "make_goldens")


@pytest.fixture(scope="session")
def golden() -> Path:
    """Outputs of the published implementation for tiny weights."""
    return GOLDEN / "published"


@pytest.fixture(scope="session")
def sd21() -> Path:
    """Configurations, without weights, of Stable Diffusion 2.1."""
    return GOLDEN / "sd21/stable-diffusion-2-1"


@pytest.fixture(scope="session")
def golden_cases(golden) -> dict[str, torch.Tensor]:
    """`image`, `latent` and, for each rate id R, `R.indices`, `R.z_hat`, `R.x0` and `R.image`."""
    from safetensors.torch import load_file

    return load_file(golden / "cases.safetensors")


@pytest.fixture(scope="session")
def golden_pkl(golden, tmp_path_factory) -> Path:
    """The tiny published checkpoint of the golden outputs."""
    rules = load_module(golden / "build_checkpoint.py", "build_checkpoint")
    path = tmp_path_factory.mktemp("golden") / "oscar.pkl"
    rules.main(path)
    return path


@pytest.fixture(scope="session")
def golden_codec(golden, golden_pkl):
    """The codec with the weights of the golden outputs. Not to be changed by tests."""
    from oscar.convert.published import from_published

    return from_published([golden_pkl], golden / "sd_tiny").codec.requires_grad_(False)


@pytest.fixture(scope="session")
def backbone_config() -> Callable[[str], dict]:
    """Reads one of the configurations of backbones by its name."""
    return lambda name: OmegaConf.to_container(OmegaConf.load(ROOT / f"configs/backbone/{name}.yaml"))


@pytest.fixture(scope="session")
def make_backbone(backbone_config) -> Callable:
    """Builds the tiny backbone with random weights; keyword arguments change its scheduler."""
    from oscar.models.backbone import Backbone

    def make(seed: int = 0, **scheduler):
        config = backbone_config("tiny")
        torch.manual_seed(seed)
        return Backbone.from_configs(config["vae"], config["unet"], {**config["scheduler"], **scheduler})

    return make


@pytest.fixture(scope="session")
def make_codec(make_backbone) -> Callable:
    """Builds the tiny codec, in evaluation mode, with adapters that do something.

    Its `rates` are ids; further keyword arguments go to the denoiser.
    """
    from oscar import OscarCodec, checkpoint
    from oscar.rates import PAPER_RATES, RATES
    from oscar.timesteps import TableMapping, interpolate

    def make(seed: int = 0, rates=range(8), bottleneck: dict | None = None, **denoiser):
        options = OmegaConf.to_container(OmegaConf.load(ROOT / "configs/bottleneck/tiny.yaml"))
        del options["kind"]
        backbone = make_backbone(seed)
        architecture = {
            "bottleneck": {**options, "rates": list(rates), **(bottleneck or {})},
            "denoiser": {"lora_rank": 2, "prompt_tokens": 4, **denoiser},
            "timesteps": interpolate(
                TableMapping.paper(), PAPER_RATES, [RATES[id_] for id_ in rates if id_ >= len(PAPER_RATES)]
            ).to_config(),
        }
        codec = OscarCodec(*checkpoint.build(architecture, backbone))
        with torch.no_grad():
            for name, parameter in codec.named_parameters():
                if "lora_B" in name:  # zero at the start, so that adapters would not matter
                    parameter.normal_(std=0.1)
        return codec.eval()

    return make


@pytest.fixture(scope="session")
def tiny_folder(make_codec, tmp_path_factory) -> Path:
    """A checkpoint of the tiny codec, with counted frequency tables. Not to be changed by tests."""
    codec = make_codec()
    images = torch.stack([image_tensor(128, 128, seed) for seed in range(4)])
    with torch.no_grad():
        codec.bottleneck.finish([codec.backbone.encode(images)])
    codec.forget_fingerprint()
    folder = tmp_path_factory.mktemp("tiny") / "model"
    codec.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_folder):
    """The tiny codec as a user loads it. Not to be changed by tests."""
    from oscar.inference.load import load

    return load(tiny_folder, dtype=torch.float32)


def synthetic_image(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth coloured blobs with a little noise."""
    random = np.random.default_rng(seed)
    blobs = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    smooth = blobs.resize((width, height), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(1))
    pixels = np.asarray(smooth, dtype=np.int16) + random.integers(-6, 7, (height, width, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def image_tensor(width: int, height: int, seed: int = 0) -> torch.Tensor:
    pixels = torch.from_numpy(np.array(synthetic_image(width, height, seed)))
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


@pytest.fixture(scope="session")
def make_image() -> Callable[..., Image.Image]:
    """Makes a synthetic image from width, height and seed."""
    return synthetic_image


@pytest.fixture(scope="session")
def make_images() -> Callable[..., torch.Tensor]:
    """Makes a batch of images from its size: smooth, with noise, and another brightness on each side."""

    def make(count: int = 1, height: int = 152, width: int = 136) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        coarse = torch.rand(count, 3, 6, 6, generator=generator) * 1.6 - 0.8
        smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
        return (smooth + 0.1 * torch.randn(smooth.shape, generator=generator)).clamp(-1, 1)

    return make


@pytest.fixture
def small_limits(monkeypatch) -> None:
    """Small images are cut into blocks and strips."""
    from oscar.inference import row_blocks, tiling

    monkeypatch.setattr(tiling, "WHOLE", 2**10)
    monkeypatch.setattr(tiling, "STRIP", 2**12)
    monkeypatch.setattr(row_blocks, "BLOCK", {"cpu": 2**10})
    monkeypatch.setattr(row_blocks, "QUERIES", 50)


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """A folder of five synthetic photographs of 96x80."""
    folder = tmp_path_factory.mktemp("photos")
    for seed in range(5):
        synthetic_image(96, 80, seed).save(folder / f"{seed}.png")
    return folder


@pytest.fixture(scope="session")
def compose() -> Callable:
    """Composes and checks the training configuration of some overrides, as scripts/train.py does."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    from oscar.config import parse, register

    register()

    def make(*overrides: str):
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            return parse(hydra_compose("train", overrides=list(overrides)))

    return make


@pytest.fixture
def quick_tables(monkeypatch):
    """Frequency tables from one batch, in place of many."""
    from oscar.bottlenecks.vq import VQBottleneck

    finish = VQBottleneck.finish
    monkeypatch.setattr(VQBottleneck, "finish", lambda self, latents, *rest: finish(self, [next(iter(latents))], *rest))


@pytest.fixture(scope="module")
def browser() -> Iterator:
    """Headless Chromium; tests that need it skip where there is none, and say so."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    executable = next(filter(None, map(shutil.which, names)), None)
    if executable is None:
        pytest.skip(f"no browser on the PATH: {', '.join(names)}")
    arguments = [
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    ]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=arguments)
        yield browser
        browser.close()
