"""Study design: which override goes to which stage, what cannot run, and models of both kinds from end to end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from safetensors.torch import load_file

from oscar.config import config_folder
from oscar.metrics.weights import WeightsUnavailable
from oscar.reproduce.actions import Actions
from oscar.reproduce.design import Design

HYPERPRIOR = (
    "recipe.bottleneck=[experiment=tiny/hyperprior_bottleneck,trainer.max_steps=2,stage.table_batches=1]",
    "recipe.joint=[experiment=tiny/hyperprior_joint,trainer.max_steps=2]", "points=[0,0.5,1]",
)  # fmt: skip
ALL = "+variants.all=[]"


@pytest.fixture(scope="module")
def backbone(stage1: Path) -> str:
    """The backbone of the checkpoint of stage 1, which has no OSCAR model around it."""
    return str(stage1) if (stage1 / "vae").is_dir() else json.loads((stage1 / "oscar.json").read_text())["backbone"]


def test_overrides_go_to_the_stages_that_have_them(make_config, backbone, tmp_path: Path) -> None:
    config = make_config(
        "design", tmp_path, *HYPERPRIOR, f"model={backbone}", ALL, "+variants.small=[bottleneck.hyperprior.hidden=4]",
        "+variants.loss=[stage.image_losses.l1=0,stage.cosine=0.1]", "seeds=[3]",
        "+variants.rates=['stage.lambdas=[1,2]','stage.table_batches=2']",
    )  # fmt: skip
    jobs = {job.name: job for job in Design(config).jobs()}
    assert [name for name in jobs if "on" not in name] == [
        "seed3-bottleneck", "all-seed3", "small-seed3-bottleneck", "small-seed3", "loss-seed3",
        "rates-seed3-bottleneck", "rates-seed3",
    ]  # fmt: skip
    starts = {name: job.needs for name, job in jobs.items() if job.command == "train"}
    assert starts["all-seed3"] == starts["loss-seed3"] == ("seed3-bottleneck",)  # which does not change stage 1
    assert starts["small-seed3"] == ("small-seed3-bottleneck",) and starts["seed3-bottleneck"] == ()
    for name, word in (("small", "bottleneck.hyperprior.hidden=4"), ("rates", "stage.lambdas=[1,2]")):
        assert word in jobs[f"{name}-seed3-bottleneck"].arguments and word in jobs[f"{name}-seed3"].arguments
    assert "stage.table_batches=2" in jobs["rates-seed3-bottleneck"].arguments
    assert "stage.table_batches=2" not in jobs["rates-seed3"].arguments  # which has no such field with a hyperprior
    assert {"stage.image_losses.l1=0", "stage.cosine=0.1"} < set(jobs["loss-seed3"].arguments)
    assert f"init_from={tmp_path}/runs/small-seed3-bottleneck/final" in jobs["small-seed3"].arguments
    for job in jobs.values():
        assert job.command != "train" or "seed=3" in job.arguments
        assert job.command != "evaluate" or (job.work[1] == 3 * 3 and "points=[0.0,0.5,1.0]" in job.arguments)


def test_without_stage_1_each_goes_on_from_its_own_checkpoint(make_config, golden, tmp_path: Path) -> None:
    own = golden.parent / "ours/hyperprior"
    other = shutil.copytree(own, tmp_path / "other")
    config = make_config(
        "design", tmp_path / "out", "recipe.bottleneck=[]", HYPERPRIOR[1], "points=[0,1]", "seeds=[3]", f"model={own}",
        ALL, f"+variants.other=['init_from={other}',stage.cosine=0.1]", "+variants.again=[seed=4]",
    )  # fmt: skip
    jobs = {job.name: job for job in Design(config).jobs()}
    assert list(jobs) == [f"{name}-seed3{end}" for name in ("all", "other", "again") for end in ("", "-on-photos")]
    composed = {name: Actions(config_folder()).compose("train", jobs[f"{name}-seed3"].arguments) for name in
                ("all", "other", "again")}  # fmt: skip
    assert [value.init_from for value in composed.values()] == [str(own), str(other), str(own)]
    assert [value.seed for value in composed.values()] == [3, 3, 4]
    assert [value.stage.cosine for value in composed.values()] == [0, 0.1, 0]
    assert jobs["other-seed3"].reads == (str(other),) and not any(jobs[f"{name}-seed3"].needs for name in composed)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            [*HYPERPRIOR, "+variants.odd=['bottleneck.hyperprior.groups=[7]']"],
            "variants.odd cannot be: .*groups are .7.",
        ),
        ([*HYPERPRIOR, "points=[2]"], "variants.all cannot be: quality is 2"),
        (["points=[0.3]"], "variants.all cannot be: rate 0.3 does not exist; allowed: 0.0019, "),
        (["+variants.odd=[stage.gann=0]"], "gann"),
        (["model=nano"], "backbone.vae.* but backbone.source '.*nano' has"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_does(
    study, backbone, tmp_path: Path, words: list[str], message: str
) -> None:
    with pytest.raises(Exception, match=message):
        study("design", tmp_path / "out", f"model={backbone}", ALL, *words)
    assert not (tmp_path / "out").exists()


def test_the_presets_of_nano_can_run(study, tmp_path: Path, capsys) -> None:
    assert study("design_nano", tmp_path, "recipe=nano", "dry_run=true", "seeds=[0]") == 0
    *jobs, last = capsys.readouterr().out.splitlines()
    assert len(jobs) == 3 * 7 - 2 and last.startswith("19 jobs; to do: about ") and "?" not in last


def test_shapes_of_nano_can_go_on_from_trained_weights(study, tmp_path: Path, capsys) -> None:
    words = [f"variants.{name}=[init_from=nano]" for name in ("wide", "wide_deep")]
    assert study("design_wide", tmp_path, "recipe=nano_trained", "model=nano", *words, "dry_run=true") == 0
    *jobs, last = capsys.readouterr().out.splitlines()
    assert len(jobs) == 2 * 5 and last.startswith("10 jobs; to do: about ") and "?" not in last


def test_losses_near_the_end_are_designs_too(study, tmp_path: Path, capsys) -> None:
    words = ["recipe=nano_trained", "model=nano", "dry_run=true"]
    with pytest.raises(WeightsUnavailable, match="squeezenet.*allowed: .stage.network_files.squeezenet=FILE"):
        study("design_perceptual", tmp_path, *words)
    assert study("design_perceptual", tmp_path, *words, "~variants.features") == 0
    *jobs, last = capsys.readouterr().out.splitlines()
    trained = [line for line in jobs if "scripts/train.py" in line]
    assert len(jobs) == 2 * len(trained) == 6 and "?" not in last
    assert [("stage.gan=" in line, "seed=1" in line) for line in trained] == [(0, 0), (0, 1), (1, 0)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "smaller", "seeds"),
    [
        (['train=["logger.tensorboard=false","bottleneck.rates=[0.0019,0.125]"]'], "bottleneck.features=4", [0, 1]),
        ([*HYPERPRIOR], "bottleneck.hyperprior.hidden=4", [0]),
    ],
    ids=["vq", "hyperprior"],
)
def test_from_end_to_end(study, backbone, tmp_path: Path, words: list[str], smaller: str, seeds: list[int]) -> None:
    words = [*words, f"model={backbone}", ALL, f"+variants.small=[{smaller}]", "data.limit=2", f"seeds={seeds}"]
    assert study("design", tmp_path, *words, "metrics.names=[psnr]") == 0
    assert len(list(tmp_path.glob("jobs/*.json"))) == len(seeds) * (2 + 2 + 2)
    found = pd.read_csv(tmp_path / "tables/bytes_psnr_photos.csv").set_index("variant")
    assert list(found.index) == ["all", "small", "all, seed 1 against 0"][: 1 + len(seeds)]
    assert found.loc["small", "seeds"] == len(seeds) and (found["of_images"][1:] == 2).all()
    assert len(seeds) == 1 or found["verdict"].iloc[-1] == "spread of seeds"
    saved = {name: load_file(tmp_path / f"runs/{name}-seed0/final/oscar.safetensors") for name in ("all", "small")}
    saved = {name: sum(own[key].numel() for key in own if key.startswith("bottleneck.")) for name, own in saved.items()}
    sizes = found[["bottleneck_millions", "model_millions"]].loc[["all", "small"]] * 1e6
    assert sizes["bottleneck_millions"].to_list() == pytest.approx([saved["all"], saved["small"]], rel=0.05)
    assert saved["small"] < saved["all"] and sizes.diff(axis=1)["model_millions"].nunique() == 1  # the same backbone
    page = (tmp_path / "index.html").read_text()
    assert page.count("<img") == 1 and (tmp_path / "plots/rd_photos/rd_psnr.svg").stat().st_size
