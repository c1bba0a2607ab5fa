"""Paths on the command line of Hydra's scripts: which are quoted, what stays syntax, and scripts on such paths."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from oscar.evaluation.results import load_results
from oscar.utils.overrides import quote_overrides

ODD = [
    "a b", "photos (1)", "b=c", "d,e", "50%", "照片", "café", "it's", 'q"r', "[x] y", "{z}", "1_000", "1e3", "range(5)",
    "photos(1)", "a&b;c#d!", "${codec}", "back\\slash", "a\\,b", "~tilde", "lr=1,2 (照片) 100%", "tab\there",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(argument: str, *others: str):
    """What a configuration gets from an override."""
    (quoted, *_) = quote_overrides([argument, *others])
    override = OverridesParser.create().parse_rule(quoted, "override")
    return OmegaConf.to_container(OmegaConf.create({"codec": "C", "key": override.value()}), resolve=True)["key"]


@pytest.mark.parametrize("name", ODD)
def test_paths_that_exist_arrive_as_they_are(folder: Path, name: str) -> None:
    for path in (Path(name), folder / "deep" / name / "inside"):
        path.mkdir(parents=True)
        assert read(f"data.images={path}") == str(path)
        assert read(f"data.train=[{path},{folder}]") == [str(path), str(folder)]
        assert read(f"+data.more={path}", "--multirun") == str(path)


@pytest.mark.parametrize("name", [name for name in ODD if name != "${codec}"])
def test_new_folders_arrive_as_they_are(folder: Path, name: str) -> None:
    for key in ("output", "save_to", "hydra.sweep.output"):
        if "\\," not in name:  # an escape of Hydra's: read as it says
            assert read(f"{key}=runs/{name}") == f"runs/{name}" and read(f"{key}={name}") == name


def test_interpolation_stays_unless_a_path_has_its_very_name(folder: Path) -> None:
    assert read("output=runs/${codec}") == "runs/C" and read("output=runs/${codec} (1)") == "runs/C (1)"
    assert read("output=runs/${codec},b") == "runs/C,b"
    Path("${codec}").mkdir()
    assert read("output=${codec}") == "${codec}" and read("output=${codec}2") == "C2"


def test_the_home_folder(folder: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    assert read("data.images=~/photos (1)") == str(folder / "photos (1)")
    assert read("output=~/runs") == str(folder / "runs")


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("points=[5,50]", [5, 50]), ("trainer.max_steps=10", 10), ("optimiser.lr=1e-3", 1e-3), ("resume=false", False),
        ("timesteps=null", None), ("experiment=nano/joint", "nano/joint"), ('data.images="a (1)"', "a (1)"),
        ("data.images='a,b'", "a,b"), ("+metrics.files={vgg16:a.pth}", {"vgg16": "a.pth"}), ("model=", ""),
        ('data.train=["a",b]', ["a", "b"]), ("data.train=[]", []), ("data.train=[[a,b],c]", [["a", "b"], "c"]),
        ("data.images=a\\,b", "a,b"),
    ],
)  # fmt: skip
def test_syntax_stays_syntax(folder: Path, argument: str, value) -> None:
    for taken in ("10", "false", "null", "1"):  # also where a path is called so
        Path(taken).mkdir()
    assert quote_overrides([argument]) == [argument] and read(argument) == value


@pytest.mark.parametrize(
    "arguments",
    [
        ["--multirun", "timesteps=linear,log"],
        ["-m", "seed=range(1,3)"],
        ["-m", "data.train=[a],[b]"],
        ["-m", "stage=choice(vae,joint)"],
        ["--config-dir", "/a=b (1)"],
        ["~mappings.shuffled"],
        ["photos"],
        ["+timesteps@mappings.new=linear"],
        ["--cfg=job"],
        ["points=[5,50"],
        ["files={a:b=c}"],
    ],
)
def test_what_is_no_path_is_left_alone(folder: Path, arguments: list[str]) -> None:
    assert quote_overrides(arguments) == arguments


def test_sweeps_over_paths(folder: Path) -> None:
    for name in ("a (1)", "b=c", "whole, not parts", "a", "a,b"):
        Path(name).mkdir()
    assert quote_overrides(["-m", "images=a (1),b=c"])[1] == 'images="a (1)","b=c"'
    assert quote_overrides(["-m", "images=whole, not parts"])[1] == 'images="whole, not parts"'
    assert quote_overrides(["-m", "images=a,b"])[1] == "images=a,b", "a exists by itself"
    assert quote_overrides(["-m", "train=[照片],[a]"])[1] == 'train=["照片"],[a]'


def test_entries_of_lists_are_joined_where_only_the_whole_exists(folder: Path) -> None:
    for name in ("a", "b", "a,b", "c, d (2)"):
        Path(name).mkdir()
    assert read("data.train=[a,b]") == ["a", "b"]
    assert read("data.train=[c, d (2),a]") == ["c, d (2)", "a"]
    assert read("data.train=[nowhere=1, b]") == ["nowhere=1", "b"]


# Scripts, in this process.


@pytest.fixture
def run(load_script, monkeypatch, folder: Path):
    """Runs a script with some overrides."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # which scripts set themselves, and which would stay set

    def run(script: str, *overrides: str) -> None:
        module = load_script(script)
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *overrides])
        AcceleratorState._reset_state(reset_partial_state=True)
        GlobalHydra.instance().clear()
        module.run()

    yield run
    GlobalHydra.instance().clear()


@pytest.mark.parametrize("name", ODD)
def test_evaluate_reads_and_writes_odd_paths(run, folder: Path, photos: Path, name: str) -> None:
    images, output = folder / name / "images", folder / "out" / name
    shutil.copytree(photos, images)
    if "${" in name or "\\," in name:
        output.mkdir(parents=True)  # only then is it no interpolation, and no escape
    run("evaluate", "codec=jpeg", "points=[5]", "data.limit=1", f"data.images={images}", f"output={output}")
    frame, record = load_results(output)
    assert list(frame["image"]) == ["0.png"] and record["config"]["data"]["images"] == str(images)
    assert record["config"]["output"] == str(output)


NASTY = "数据 (1), lr=1e-3 50%"


@pytest.mark.slow
def test_other_scripts_on_an_odd_path(run, folder: Path, photos: Path, tiny_folder: Path) -> None:
    images, model = shutil.copytree(photos, folder / NASTY / "images"), folder / NASTY / "model"
    shutil.copytree(tiny_folder, model)
    run(
        "benchmark",
        "~models.nano",
        "baselines=[jpeg]",
        "parts=[quality]",
        "data.limit=1",
        f"data.images={images}",
        f"output={NASTY}/benchmark",
    )
    assert (folder / NASTY / "benchmark/tables/means.md").exists()
    run(
        "cache_latents", f"backbone.source={model}", f"data.train=[{images}]", "data.crop=64", f"output={NASTY}/latents"
    )
    assert list((folder / NASTY / "latents").glob("*.safetensors"))
    run(
        "calibrate_timesteps",
        f"model={model}",
        f"data.images={images}",
        "data.limit=1",
        f"output={NASTY}/calibration",
        f"save_to={NASTY}/calibrated",
    )
    assert (folder / NASTY / "calibrated/oscar.json").exists()
    run("train", "experiment=tiny/vae", "trainer.max_steps=1", f"data.train=[{images}]", f"output={NASTY}/run")
    assert (folder / NASTY / "run/final").is_dir()


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("+metrics.files={vgg16:a=b}", ["override +metrics.files={vgg16:a=b}: ", """'+metrics.files={name:"..."}'"""]),
        ("points=[5,50", ["override points=[5,50: ", """'points=["...","..."]'"""]),
        ("points=5,50", ["points=5,50 has commas", "'points=[5,50]'", """'points="5,50"'""", "--multirun"]),
        ("data.images='a", ["override data.images='a: ", "is quoted, 'data.images="]),
        ("more photos", ["'more photos'", "KEY=VALUE", "quoted for the shell"]),
        ("data.images=no where (2)", ["no where (2)", "no such folder"]),
    ],
)
def test_mistakes_end_in_one_line_that_shows_the_quoting(run, capsys, override: str, parts: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run("evaluate", "codec=jpeg", override)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("evaluate: ") and all(part in line for part in parts), line


def test_a_sweep_over_odd_paths(run, folder: Path, photos: Path) -> None:
    for name in ("a (1)", "b=c"):
        shutil.copytree(photos, folder / name)
    run(
        "evaluate",
        "--multirun",
        "codec=jpeg",
        "points=[5]",
        "data.limit=1",
        "data.images=a (1),b=c",
        "output=out/${data.images}",
    )
    for name in ("a (1)", "b=c"):
        assert load_results(folder / "out" / name)[1]["config"]["data"]["images"] == name
