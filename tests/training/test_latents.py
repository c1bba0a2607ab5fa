"""Cached latents are those of the run that they stand for, are made once, and are refused where they do not fit."""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from safetensors.torch import load_file, save_file

from oscar.config import CacheLatentsConfig, ConfigError, parse, register
from oscar.data.crops import build_loader
from oscar.data.latents import LatentDataset, check_latents, read_index, vae_hash
from oscar.training import latent_cache
from oscar.training.build import build_backbone, build_stage
from oscar.utils.rng import StepRng

ROOT = Path(__file__).parents[2]
CROPS, IMAGES = 3, 6
SMALL = (
    "backbone=tiny",
    "data.crop=64",
    "data.workers=0",
    "data.batch_size=2",
    f"crops={CROPS}",
    "device=cpu",
    "shard_size=6",
    "dtype=float32",
)


@pytest.fixture(scope="module")
def image_folder(photos: Path, tmp_path_factory) -> Path:
    """Six files, of which the third is no image."""
    folder = tmp_path_factory.mktemp("images")
    for number, path in zip((0, 1, 3, 4, 5), sorted(photos.iterdir()), strict=True):
        (folder / f"{number}.png").write_bytes(path.read_bytes())
    (folder / "2.png").write_bytes(b"no image")
    return folder


def configure(image_folder: Path, output: Path, *overrides: str) -> CacheLatentsConfig:
    register()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        data = (f"data.train=[{image_folder}]", f"output={output}")
        return parse(compose("cache_latents", overrides=[*SMALL, *data, *overrides]), CacheLatentsConfig)


@pytest.fixture(scope="module")
def cache(image_folder: Path, tmp_path_factory) -> Path:
    """Three shards of two images with three crops each. Not to be changed by tests."""
    folder = tmp_path_factory.mktemp("cache") / "latents"
    latent_cache.cache_latents(configure(image_folder, folder), progress=False)
    return folder


@pytest.fixture
def train(compose, image_folder: Path, cache: Path):
    """The configuration of a training run on the images or, by default, on their latents."""

    def make(*overrides: str, latents: bool = True):
        more = [f"data.latents={cache}"] if latents else []
        return compose("experiment=tiny/bottleneck", f"data.train=[{image_folder}]", *more, *overrides)

    return make


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def batches(count: int, **arguments) -> list[dict[str, torch.Tensor]]:
    return list(itertools.islice(build_loader(crop_size=64, batch_size=2, **arguments), count))


def test_a_run_on_latents_sees_what_a_run_on_images_sees(image_folder: Path, cache: Path, train) -> None:
    torch.manual_seed(0)
    backbone = build_backbone(train()).eval()
    one_cycle = CROPS * IMAGES // 2
    from_images = batches(one_cycle, roots=image_folder)
    from_latents = batches(2 * one_cycle, roots=(), latents=cache)
    for images, latents in zip(from_images, from_latents[:one_cycle], strict=True):
        assert torch.equal(images["index"], latents["index"])
        with torch.no_grad():
            torch.testing.assert_close(latents["latent"], backbone.encode(images["image"]), rtol=0, atol=1e-5)
    crops = [
        {latent.numpy().tobytes() for batch in part for latent in batch["latent"]}
        for part in (from_latents[:one_cycle], from_latents[one_cycle:])
    ]
    assert len(crops[0]) == CROPS * IMAGES and crops[0] == crops[1], "then the same crops, in another order"


def test_the_hyper_stage_has_the_same_loss(train) -> None:
    from_latents, from_images = (
        build_stage(train("bottleneck.rates=[0.0625]", latents=latents)) for latents in (True, False)
    )
    data = train().data
    check_latents(data, from_latents.codec.backbone)
    (latents,) = batches(1, roots=(), latents=data.latents)
    (images,) = batches(1, roots=data.train)
    rng = StepRng(0, seed=0)
    loss = from_latents(latents["latent"], rng)["loss"]
    torch.testing.assert_close(loss, from_images(images["image"], rng)["loss"], rtol=1e-4, atol=1e-5)


def test_the_index_says_how_the_latents_were_made(cache: Path, image_folder: Path, train) -> None:
    torch.manual_seed(0)
    expected = {
        "vae": vae_hash(build_backbone(train())),
        "crop": 64,
        "augment": True,
        "scale": [1.0, 1.0],
        "seed": 0,
        "crops": CROPS,
        "images": IMAGES,
        "count": CROPS * IMAGES,
        "shape": [4, 8, 8],
        "dtype": "float32",
        "shard_images": 2,
        "posterior": "mode",
        "format": 1,
    }
    assert json.loads((cache / "index.json").read_text()) == expected
    names = [str(image_folder / f"{number}.png") for number in range(IMAGES)]
    assert json.loads((cache / "images.json").read_text()) == LatentDataset(cache).paths == names


@pytest.mark.parametrize(("dtype", "error"), [("float16", 1e-3), ("bfloat16", 1e-2)])
def test_shorter_types_lose_little(image_folder: Path, cache: Path, tmp_path: Path, dtype: str, error: float) -> None:
    latent_cache.cache_latents(configure(image_folder, tmp_path, f"dtype={dtype}", "crops=2"), progress=False)
    short, full = LatentDataset(tmp_path)[1, 1]["latent"], LatentDataset(cache)[1, 1]["latent"]
    assert short.dtype == torch.float32
    assert 0 < (short - full).abs().max() < error * full.abs().max()


def test_an_interrupted_run_goes_on(image_folder: Path, cache: Path, tmp_path: Path, monkeypatch) -> None:
    write, written = latent_cache.atomic_write, []

    def interrupted(path: Path, data: bytes) -> None:
        written.append(path.name)
        if len(written) == 4:  # names, index and one shard are there
            raise KeyboardInterrupt
        write(path, data)

    config = configure(image_folder, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(latent_cache, "atomic_write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            latent_cache.cache_latents(config, progress=False)
    with pytest.raises(ValueError, match="2 of 3 shards are not in .* yet"):
        LatentDataset(tmp_path)
    done = (tmp_path / "latents-00000.safetensors").stat().st_mtime_ns
    latent_cache.cache_latents(config, progress=False)
    assert (tmp_path / "latents-00000.safetensors").stat().st_mtime_ns == done
    assert files(tmp_path) == files(cache)


def process(rank: int, port: int, config: CacheLatentsConfig) -> None:
    PartialState._reset_state()
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    latent_cache.cache_latents(config, progress=False)
    assert PartialState().num_processes == 2
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_share_the_work(image_folder: Path, cache: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    context = multiprocessing.get_context("fork")
    children = [
        context.Process(target=process, args=(rank, port, configure(image_folder, tmp_path))) for rank in (0, 1)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    assert [child.exitcode for child in children] == [0, 0]
    assert files(tmp_path) == files(cache)


def test_workers_and_processes_change_no_batch(cache: Path) -> None:
    expected = batches(6, roots=(), latents=cache)
    halves = [
        list(
            itertools.islice(
                build_loader((), crop_size=64, batch_size=1, latents=cache, workers=workers, rank=rank, world=2), 6
            )
        )
        for rank, workers in ((0, 1), (1, 0))
    ]
    for batch, one, other in zip(expected, *halves, strict=True):
        for name in ("latent", "index"):
            assert torch.equal(torch.cat([one[name], other[name]]), batch[name])
    resumed = list(itertools.islice(build_loader((), crop_size=64, batch_size=2, latents=cache, start_step=4), 2))
    assert all(torch.equal(one["latent"], other["latent"]) for one, other in zip(resumed, expected[4:], strict=True))


def test_latents_that_do_not_fit_are_refused(train, cache: Path) -> None:
    config = train()
    torch.manual_seed(0)
    right, wrong = build_backbone(config), build_backbone(config)
    check_latents(config.data, right)
    for change, backbone, message in (
        ({"crop": 128}, right, "data.crop is 128, but the latents in .* were made with 64"),
        ({"augment": False}, right, "data.augment is False"),
        ({"scale": [0.5, 1.0]}, right, r"data.scale is \[0.5, 1.0\]"),
        ({}, wrong, f"data.latents is {cache}, whose latents come from another VAE"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            check_latents(replace(config.data, **change), backbone)
        assert "\n" not in str(caught.value)


def test_the_hash_is_that_of_the_encoder_half(make_backbone) -> None:
    backbone, again = make_backbone(), make_backbone()
    with torch.no_grad():
        again.vae.decoder.conv_in.weight.add_(1)
        again.vae.post_quant_conv.weight.add_(1)
        again.unet.conv_in.weight.add_(1)
        assert vae_hash(again) == vae_hash(backbone)
        again.vae.quant_conv.bias.view(-1)[0] += 1e-6
    assert vae_hash(again) != vae_hash(backbone)


def test_caches_from_before_keys_were_renamed(cache: Path, tmp_path: Path) -> None:
    for name, content in files(cache).items():
        (tmp_path / name).write_bytes(content)
    index = json.loads((tmp_path / "index.json").read_text())
    old = {"images": "pictures", "shard_images": "shard_pictures"}
    former = {old.get(key, key): value for key, value in index.items()}
    (tmp_path / "index.json").write_text(json.dumps(former))
    (tmp_path / "images.json").rename(tmp_path / "pictures.json")
    for shard in tmp_path.glob("*.safetensors"):
        tensors = load_file(shard)
        save_file({"latent": tensors["latent"], "picture": tensors["image"]}, shard)
    mine, theirs = LatentDataset(tmp_path), LatentDataset(cache)
    assert mine.index == theirs.index and mine.paths == theirs.paths
    assert mine[5]["index"] == theirs[5]["index"] == 5 and torch.equal(mine[5]["latent"], theirs[5]["latent"])
    # what runs of earlier versions have in their records
    digest = hashlib.sha256(json.dumps(former, sort_keys=True).encode()).hexdigest()
    assert mine.index.digest == theirs.index.digest == digest


def test_damaged_caches_are_refused(cache: Path, tmp_path: Path) -> None:
    def damaged(name: str, data: bytes | None) -> Path:
        folder = tmp_path / f"{name}-{data and len(data)}"
        folder.mkdir()
        for other, content in files(cache).items():
            (folder / other).write_bytes(content if other != name else data or b"")
        if data is None:
            (folder / name).unlink()
        return folder

    for name, data, reason in (
        ("index.json", None, "no index.json in"),
        ("index.json", b"{}", "not an index of format 1"),
        ("index.json", b"{", "index.json cannot be read"),
        ("images.json", None, "images.json cannot be read"),
        ("latents-00001.safetensors", None, "1 of 3 shards"),
    ):
        with pytest.raises(ValueError, match=reason) as caught:
            LatentDataset(damaged(name, data))
        assert "\n" not in str(caught.value)
    name = "latents-00001.safetensors"
    torn = LatentDataset(damaged(name, (cache / name).read_bytes()[:-100]))
    assert torn[0]["latent"].shape == (4, 8, 8)
    with pytest.raises(ValueError, match=f"{name} cannot be read"):
        torn[2]
    with pytest.raises(IndexError, match="image 6 does not exist"):
        torn[IMAGES]


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("seed=1", "seed is 0, not 1"),
        ("dtype=float16", "dtype is float32, not float16"),
        ("backbone.vae.scaling_factor=2", "vae is"),
        ("crops=2", "crops is 3, not 2"),
        (None, "its images are others"),
    ],
)
def test_an_output_with_other_latents_is_left_alone(
    image_folder: Path, photos: Path, cache: Path, override: str | None, difference: str
) -> None:
    before = files(cache)
    config = configure(image_folder, cache, *([override] if override else []))
    if override is None:
        config.data.train = [str(photos / "0.png")] * IMAGES
    with pytest.raises(ConfigError, match=f"holds other latents: .*{difference}"):
        latent_cache.cache_latents(config, progress=False)
    assert files(cache) == before


MISTAKES = [
    ("crops=0", ["crops is 0", "at least 1"]),
    ("shard_size=0", ["shard_size is 0"]),
    ("seed=-1", ["seed is -1"]),
    ("dtype=int8", ["dtype is 'int8'", "float16"]),
    ("device=cuda:9", ["device is 'cuda:9'", "cpu"]),
    ("data.train=[]", ["data.train is empty"]),
    ('data.train=["nowhere/{0..3}.tar"]', ["data.train names", "nowhere/0.tar does not exist"]),
    ("data.latents=.", ["data.latents is '.'", "null"]),
    ("data.augment=false", ["crops is 3", "data.augment is false"]),
    ("backbone.source=nowhere", ["backbone 'nowhere'"]),
    ("crop=3", ["crop"]),
]


@pytest.fixture
def script(load_script, monkeypatch, image_folder: Path, tmp_path: Path):
    """Runs scripts/cache_latents.py in this process, in a folder of its own."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # which it sets itself, and which would stay set
    monkeypatch.chdir(tmp_path)
    module = load_script("cache_latents")

    def run(*overrides: str) -> None:
        GlobalHydra.instance().clear()
        data = (f"data.train=[{image_folder}]", "output=latents")
        monkeypatch.setattr(sys, "argv", ["cache_latents.py", *SMALL, *data, *overrides])
        module.run()

    yield run
    GlobalHydra.instance().clear()


def test_the_script(script, image_folder: Path, tmp_path: Path, cache: Path, capsys) -> None:
    script()
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "18 latents of 6 images, 3 crops each, in latents"
    assert [str(image_folder / "2.png") in line for line in lines] == [True, False], "what is left out is named"
    assert read_index("latents") == read_index(cache) and files(tmp_path / "latents") == files(cache)
    assert [path.name for path in tmp_path.iterdir()] == ["latents"]


@pytest.mark.parametrize(("override", "named"), MISTAKES, ids=[override for override, _ in MISTAKES])
def test_mistakes(script, tmp_path: Path, capsys, override: str, named: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        script(override)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cache_latents: ")
    assert all(part in line for part in named)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stage", ["vae", "diffusion_pretrain", "joint"])
def test_other_stages_need_images(compose, image_folder: Path, cache: Path, stage: str) -> None:
    with pytest.raises(ConfigError, match=f"data.latents is .* but stage {stage} needs images; allowed: null"):
        compose(f"experiment=tiny/{stage}", f"data.train=[{image_folder}]", f"data.latents={cache}")


def test_training_on_latents_needs_no_images(compose, cache: Path) -> None:
    assert compose("experiment=tiny/bottleneck", f"data.latents={cache}", "data.train=[/no/such]").data.latents == str(
        cache
    )
    with pytest.raises(ConfigError, match="data.latents is '/no/such', which does not exist; allowed: a folder that"):
        compose("experiment=tiny/bottleneck", "data.latents=/no/such")
