"""The files of docs/extend.md, run as they stand there, from a folder outside the package."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import oscar
from oscar import OscarCodec, registry
from oscar.bitstream import BitstreamError, Container
from oscar.cli.main import main
from oscar.config import BenchmarkConfig, ConfigError, EvaluateConfig, parse
from oscar.data.images import read_image
from oscar.data.tensors import to_tensor
from oscar.training.build import build_stage
from oscar.training.trainer import Trainer

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/extend.md").read_text()
FILES = dict(re.findall(r'^```python title="(\S+)"\n(.*?)^```$', PAGE, re.DOTALL | re.MULTILINE))
CONFIGS = dict(re.findall(r'^```yaml title="(\S+)"\n(.*?)^```$', PAGE, re.DOTALL | re.MULTILINE))
NAMES = ",".join(name.removesuffix(".py") for name in FILES)
REGISTRIES = [value for value in vars(registry).values() if isinstance(value, registry.Registry)]
QUICK = (
    "data.crop=64",
    "data.batch_size=2",
    "data.workers=0",
    "trainer.max_steps=2",
    "trainer.log_every=1",
    "trainer.threads=1",
    "logger.tensorboard=false",
)
WITHOUT_DISTS = ("stage.image_losses.dists=0", "stage.image_losses.edges_dists=0")
NEW = ("denoiser.lora_rank=2", "denoiser.prompt_tokens=4")

pytestmark = pytest.mark.usefixtures("plugins")


@pytest.fixture(scope="module")
def plugins(tmp_path_factory):
    """The page's files in a folder of their own, named in the environment; all is as it was afterwards."""
    folder = tmp_path_factory.mktemp("plugins")
    for name, text in {**FILES, **CONFIGS}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    kept = [(own, list(own), dict(own._entries), dict(own._variants)) for own in REGISTRIES]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setenv(registry.PLUGINS, NAMES)
        yield folder
    for own, _, entries, variants in kept:
        own._entries, own._variants = entries, variants
    for name in NAMES.split(","):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def train(compose, photos, tmp_path_factory):
    """Trains a stage of these overrides for two steps; returns the folder of the run."""
    from accelerate.state import AcceleratorState, GradientState

    def run(*overrides: str) -> Path:
        output = tmp_path_factory.mktemp("run")
        config = compose(f"data.train=[{photos}]", f"output={output}", *QUICK, *overrides)
        if registry.STAGES[config.stage.name].trains_codec:
            config.stage.table_batches = 1
        assert Trainer(build_stage(config), config).run()
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        return output

    return run


@pytest.fixture(scope="module")
def alone(train, photos) -> Path:
    """The run of the scalar bottleneck's first stage."""
    return train(
        "backbone=tiny",
        "bottleneck.kind=scalar",
        "bottleneck.options.levels=[3,9]",
        "timesteps.kind=power",
        "timesteps.scale=90",
        "stage=bottleneck",
        f"validation.images={photos}",
        "validation.limit=1",
        "validation.points=[9]",
        "validation.metrics.names=[psnr,largest]",
        *NEW,
    )


@pytest.fixture(scope="module")
def joint(train, alone) -> Path:
    """The run of its second stage, with a loss of our own."""
    return train(
        f"init_from={alone / 'final'}",
        "stage=joint",
        "stage.critic.lora_rank=2",
        "stage.gan=0.001",
        "stage.image_losses.l1=0",
        *WITHOUT_DISTS,
        "stage.image_losses.charbonnier=1",
        "stage.image_losses.edges_charbonnier=0.5",
    )


@pytest.fixture(scope="module")
def model(joint) -> Path:
    return joint / "final"


@pytest.fixture
def photo(make_image, tmp_path) -> Path:
    path = tmp_path / "photo.png"
    make_image(100, 70).save(path)
    return path


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def composed(name: str, schema: type, *overrides: str):
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return parse(compose(name, overrides=list(overrides)), schema)


def test_every_section_has_a_file_of_at_most_forty_lines() -> None:
    assert len(FILES) == 6 and not [name for name, text in FILES.items() if len(text.splitlines()) > 40]
    assert "oscar" not in {Path(name).stem for name in FILES}
    sections = re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]
    assert all(section.count("```python") == 1 for section in sections)


COMMANDS = re.findall(r"python scripts/(\w+)\.py ([^`\n]*)", PAGE.replace("\\\n", " "))


@pytest.mark.parametrize(("script", "text"), COMMANDS, ids=[text[:40] for _, text in COMMANDS])
def test_commands_of_the_page_are_read(compose, photos, plugins, script, text) -> None:
    place = {"data.train=[photos]": f"data.train=[{photos}]", "data.images=photos": f"data.images={photos}"}
    words = [place.get(word, word) for word in shlex.split(text)]
    if words[0] == "--config-dir":
        words[:2] = [f"hydra.searchpath=[{plugins / words[1]}]"]
    config = compose(*words) if script == "train" else composed(script, EvaluateConfig, *words)
    assert config.output


def test_all_is_registered() -> None:
    assert "scalar" in registry.BOTTLENECKS and registry.BOTTLENECKS["scalar"].__module__ == "scalar"
    assert registry.MAPPINGS["power"].kind == "power" and registry.BASELINES["posterised"].name == "posterised"
    assert {"largest", "largest_p256"} <= registry.METRICS.keys() and "charbonnier" in registry.LOSSES
    assert registry.AUTOENCODERS["BlockAutoencoder"].__name__ == "BlockAutoencoder"


# The bottleneck, the loss and the mapping.


def test_the_first_stage_trains_it(alone) -> None:
    codec = OscarCodec.from_pretrained(alone / "final")
    assert codec.bottleneck.to_config() == {"kind": "scalar", "levels": [3, 9]} and codec.points == (3, 9)
    assert codec.mapping.to_config() == {"kind": "power", "scale": 90.0, "exponent": 0.3}
    start = torch.tensor([4 / 3, 4 / 9]).log().view(2, 1, 1, 1)
    assert ((codec.bottleneck.log_step - start).abs().amax(dim=(1, 2, 3)) > 1e-7).all()  # each point learned
    log = rows(alone / "log.csv")
    assert len(log) == 2 and float(log[1]["loss"]) > 0
    assert float(log[1]["loss"]) == pytest.approx((float(log[1]["loss_3"]) + float(log[1]["loss_9"])) / 2)
    (validated,) = rows(alone / "validation.csv")
    assert float(validated["bpp_9"]) == float(validated["bpp"]) > 0 and float(validated["largest"]) >= 1


def test_the_second_stage_trains_it_by_a_loss_of_ones_own(alone, joint) -> None:
    log = rows(joint / "log.csv")
    assert len(log) == 2 and {"charbonnier", "edges_charbonnier", "gan", "loss_3", "loss_9"} <= log[0].keys()
    assert float(log[0]["charbonnier"]) > 0 and "l1" not in log[0]
    before, after = (OscarCodec.from_pretrained(run / "final") for run in (alone, joint))
    assert not torch.equal(before.bottleneck.log_step, after.bottleneck.log_step)
    assert after.mapping == before.mapping


def test_the_loss_is_the_one_of_the_page() -> None:
    from oscar.training.losses import ImageLoss

    a, b = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).split(1)
    expected = ((a - b).square() + 1e-6).sqrt().mean()
    loss = ImageLoss({"charbonnier": 2.0})
    torch.testing.assert_close(loss(a, b)[0], 2 * expected)
    by_image, _ = loss.by_image(torch.cat([a, b]), torch.cat([b, b]))
    torch.testing.assert_close(by_image, 2 * torch.stack([expected, torch.tensor(1e-3)]))
    with pytest.raises(ValueError, match="image loss 'charbonnie' does not exist; allowed: l1, .*, charbonnier"):
        ImageLoss({"charbonnie": 1.0})


def test_files_by_the_command(model, photo, tmp_path, capsys) -> None:
    file, decoded = tmp_path / "a.oscar", tmp_path / "a.png"
    assert main(["compress", str(photo), str(file), "--model", str(model), "--point", "9"]) == 0
    assert main(["decompress", str(file), str(decoded), "--model", str(model)]) == 0
    assert Image.open(decoded).size == (100, 70)
    codec = oscar.load(model)
    (data,) = codec.compress_batch([read_image(photo)], 9)
    assert data == file.read_bytes()
    point, parsed = codec.find_point(9), codec.read(data)
    latent = codec.encode_latent(to_tensor(read_image(photo)), point)
    symbols = codec.quantise(latent, point).symbols
    assert torch.equal(parsed.symbols.values, symbols.values) and len(symbols.values.unique()) > 2
    assert parsed.symbols.values.shape == (1, 4, 9, 13) and parsed.point == point
    capsys.readouterr()
    assert main(["info", str(file), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["coding"], facts["point_code"], facts["width"]) == ("external", 1, 100)
    assert main(["info", str(model)]) == 0 and "scalar" in capsys.readouterr().out


def test_the_command_at_a_length_and_at_other_points(model, photo, tmp_path, capsys) -> None:
    def run(name: str, *options: str) -> tuple[int, Path]:
        return main(["compress", str(photo), str(tmp_path / name), "--model", str(model), *options]), tmp_path / name

    sizes = {point: run(f"{point}.oscar", "--point", point)[1].stat().st_size for point in ("3", "9")}
    code, path = run("limit.oscar", "--max-bytes", str(sizes["9"] - 1))
    assert code == 0 and path.stat().st_size == sizes["3"] < sizes["9"]
    assert Container.unpack(path.read_bytes()).point_code == 0
    capsys.readouterr()
    for options, message in (
        (("--point", "4"), "levels 4 does not exist; allowed: 3, 9"),
        (("--rate", "0.0625"), "--rate is 0.0625, but this model has levels; allowed: --point 3, 9"),
        (("--effort", "3"), "--effort is 3, but this model has levels; allowed: --point 3, 9"),
    ):
        assert run("no.oscar", *options)[0] == 2
        assert message in capsys.readouterr().err and not (tmp_path / "no.oscar").exists()
    assert main(["decompress", str(path), str(tmp_path / "no.png")]) == 2
    assert "was written by a model with a bottleneck of its own; allowed: its --model" in capsys.readouterr().err
    assert main(["decompress", str(path), str(tmp_path / "no.png"), "--model", "nano"]) == 2
    assert "written by a model with a bottleneck of its own" in capsys.readouterr().err


def test_bytes_that_it_has_not_written(model, photo) -> None:
    codec = oscar.load(model)
    container = Container.unpack(codec.compress(read_image(photo), 9))
    for payload in (b"", container.payload[:-1], container.payload + b"\0", bytes(len(container.payload))):
        forged = Container(container.coding, container.point_code, container.model_tag, 100, 70, b"", payload)
        with pytest.raises(BitstreamError):
            codec.decompress(forged.pack())
    with pytest.raises(BitstreamError, match="levels of code 2, which this model does not have"):
        codec.decompress(Container(container.coding, 2, container.model_tag, 100, 70, b"", container.payload).pack())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("bottleneck.kind=scaler",), "bottleneck.kind is 'scaler'; allowed: vq, hyperprior, scalar"),
        (("bottleneck.kind=scalar", "bottleneck.width=8"), "bottleneck.width is 8, but kind scalar does not use it"),
        (
            ("bottleneck.kind=vq", "bottleneck.options.levels=[3]"),
            "bottleneck.options is .*, but kind vq does not use it",
        ),
        (("bottleneck.kind=scalar", "stage.rate_order=balanced"), "stage bottleneck does not use it with levels"),
        (("bottleneck.kind=scalar", "validation.rates=[0.125]"), "but a model with levels has no rates"),
        (("bottleneck.kind=scalar", "stage.name=context"), "but a model with levels has no such stage"),
    ],
)
def test_configurations_that_are_refused(compose, photos, overrides, message) -> None:
    with pytest.raises(ConfigError, match=message):
        compose("backbone=tiny", "stage=bottleneck", f"data.train=[{photos}]", *overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("bottleneck.options.level=[3]", "timesteps=constant"), "level is unknown to kind scalar; allowed: levels"),
        ((), "timesteps is unset; allowed with bottleneck scalar"),
        (("timesteps=paper",), "timesteps: kind table is for models with rates"),
        (("timesteps.kind=powr",), "timesteps.kind 'powr' does not exist; allowed: table, .*, power"),
        (("timesteps.kind=power", "timesteps.scale=high"), "timesteps.scale is 'high'; allowed: numbers"),
        (("timesteps.kind=power", "timesteps.base=2"), "base is unknown to kind power; allowed: kind, scale, exponent"),
    ],
)
def test_runs_that_are_refused(compose, photos, overrides, message) -> None:
    run = ("backbone=tiny", "stage=bottleneck", f"data.train=[{photos}]", "bottleneck.kind=scalar", *NEW)
    config = compose(*run, *overrides)
    with pytest.raises(ValueError, match=message):
        build_stage(config)


def test_a_run_cannot_change_its_options(compose, photos, alone) -> None:
    config = compose(
        f"init_from={alone / 'final'}", "stage=bottleneck", f"data.train=[{photos}]", "bottleneck.options.levels=[3,5]"
    )
    with pytest.raises(ConfigError, match=r"bottleneck.options.levels is \[3, 5\], but init_from has \[3, 9\]"):
        build_stage(config)


# Evaluation and benchmark: the bottleneck, the metric and the baseline.


def test_evaluation(model, photos, tmp_path) -> None:
    from oscar.evaluation.evaluate import evaluate_config

    config = composed(
        "evaluate",
        EvaluateConfig,
        f"model={model}",
        f"data.images={photos}",
        "data.limit=1",
        "metrics.names=[psnr,largest]",
        f"output={tmp_path}",
        "device=cpu",
    )
    frame = evaluate_config(config)
    assert list(frame["point"]) == [3, 9] and (frame["largest"] >= 1).all()
    assert (frame["actual_bpp"].diff().dropna() > 0).all() and frame["nominal_bpp"].isna().all()
    assert json.loads((tmp_path / "results.json").read_text())["codec"]["point_name"] == "levels"


def test_benchmark(model, photos, tmp_path) -> None:
    from oscar.benchmark.runs import run_benchmark

    config = composed(
        "benchmark",
        BenchmarkConfig,
        f"models.nano={model}",
        "baselines=[]",
        "+baselines.posterised.name=posterised",
        f"data.images={photos}",
        "data.limit=1",
        "metrics.names=[psnr,largest]",
        f"output={tmp_path}",
        "device=cpu",
        "parts=[quality,matched,timing,report]",
        "timing.repeats=1",
        "timing.warmup=0",
        "timing.memory=false",
        "timing.batch_sizes=[1]",
        "report_images=1",
    )
    bench = run_benchmark(config)
    found = {codec: list(group["point"]) for codec, group in bench.rows.groupby("codec")}
    assert found == {"oscar-nano": [3, 9], "posterised": [1, 2, 3]} and not bench.unavailable and not bench.failed
    pixels = np.asarray(read_image(next(iter(bench.images.values()))))
    expected = np.abs(pixels.astype(int) - (pixels // 128 * 128 + 64)).max()
    assert bench.rows.query("codec == 'posterised' and point == 1")["largest"].item() == expected
    assert set(bench.matched["target_point"]) == {3, 9} and (tmp_path / "report.html").exists()
    assert "largest difference" in (tmp_path / "tables/means.md").read_text()


# The backbone.


def test_a_backbone(train, photo, plugins) -> None:
    vae = train(
        "stage=vae",
        "stage.kl=0",
        f"hydra.searchpath=[{plugins / 'configs'}]",
        "backbone=small",
        "stage.image_losses.charbonnier=1",
    )
    prior = train("stage=diffusion_pretrain", f"backbone.source={vae / 'final'}")
    assert json.loads((prior / "final/unet/config.json").read_text())["_class_name"] == "FlatNetwork"
    for tuning in ("lora", "full"):
        run = train(
            "stage=joint",
            f"backbone.source={prior / 'final'}",
            "bottleneck=tiny",
            "bottleneck.rates=[0.125]",
            f"denoiser.tuning={tuning}",
            "denoiser.lora_rank=2",
            "stage.gan=0",
            "stage.vae=decoder",
            *WITHOUT_DISTS,
        )
        codec = oscar.load(run / "final")
        assert type(codec.backbone.vae).__name__ == "BlockAutoencoder"
        assert codec.decompress(codec.compress(read_image(photo))).size == (100, 70)


# Plug-ins that are named wrongly.


def run_script(name: str, plugins: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), registry.PLUGINS: plugins}
    return subprocess.run(
        [sys.executable, str(ROOT / f"scripts/{name}.py"), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_module_that_cannot_be_imported(tmp_path, monkeypatch, capsys, model, photo) -> None:
    (tmp_path / "broken.py").write_text("raise RuntimeError('not today\\nnor tomorrow')\n")
    result = run_script("evaluate", "broken", tmp_path, "data.images=x")
    assert result.returncode == 2 and not result.stdout
    assert re.fullmatch(
        r"evaluate: OSCAR_PLUGINS names 'broken', which cannot be imported \(RuntimeError: not today\)"
        r"; allowed: modules on Python's path or in the current folder, separated by commas\n",
        result.stderr,
    )
    monkeypatch.setenv(registry.PLUGINS, "no_such_module")
    assert main(["compress", str(photo), str(tmp_path / "a.oscar"), "--model", str(model)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("oscar: error: OSCAR_PLUGINS names 'no_such_module', which cannot be imported (ModuleNot")


@pytest.mark.slow
def test_a_script_finds_modules_of_the_current_folder(plugins, model, photos) -> None:
    result = run_script(
        "evaluate",
        NAMES,
        plugins,
        f"model={model}",
        f"data.images={photos}",
        "data.limit=1",
        "metrics.names=[largest]",
        "points=[9]",
        "output=results",
        "device=cpu",
    )
    assert result.returncode == 0, result.stderr
    (row,) = rows(plugins / "results/results.csv")
    assert float(row["point"]) == 9 and float(row["largest"]) >= 1


def test_without_the_module_the_model_is_refused(model, monkeypatch, photo, capsys, tmp_path) -> None:
    monkeypatch.delitem(registry.BOTTLENECKS._entries, "scalar")
    monkeypatch.setenv(registry.PLUGINS, "")
    assert main(["compress", str(photo), str(tmp_path / "a.oscar"), "--model", str(model)]) == 2
    assert "bottleneck.kind is 'scalar'; allowed: vq, hyperprior (a kind of your own is known once OSCAR_PLUGINS" in (
        capsys.readouterr().err
    )


def test_names_are_taken_once() -> None:
    with pytest.raises(ValueError, match="image loss 'l1' is registered already; allowed: a name that is free"):
        registry.LOSSES.register("l1", lambda prediction, target: 0)
