"""Loss curves: which lines a log gives, what is smoothed, and scripts/plot_training.py in this process."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from oscar.training.log_plot import LogError, curves, read_log, smooth


@pytest.fixture
def script(load_script):
    return load_script("plot_training")


@pytest.fixture
def runs(tmp_path) -> Path:
    """Logs of a stage without rates, one that trains all in a step, one that trains one in a step, and an empty one."""
    for name, text in {
        "vae": "step,seconds,lr,loss,l1\n10,1.0,0.1,0.9,0.5\n20,2.0,0.1,0.7,0.4\n",
        "bottleneck": "step,lr,loss,loss_0.0625,loss_0.1250,loss_scale\n10,1,-0.5,-0.4,-0.6,8\n20,1,-0.7,-0.6,-0.8,8\n",
        "joint": "step,lr,loss,rate,gan\n10,1,0.9,0.0625,\n20,1,0.3,0.12500000298,\n30,1,0.7,0.0625,\n",
        "empty": "step,lr,loss\n",
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.csv").write_text(text)
    return tmp_path


def test_rates_come_from_columns_or_from_the_rate_of_the_step(runs):
    assert curves(read_log(runs / "vae")) == {}
    hyper = curves(read_log(runs / "bottleneck"))
    assert {rate: series.to_dict() for rate, series in hyper.items()} == {
        0.0625: {10: -0.4, 20: -0.6},
        0.125: {10: -0.6, 20: -0.8},
    }
    joint = curves(read_log(runs / "joint/log.csv"))
    assert {rate: series.to_dict() for rate, series in joint.items()} == {0.0625: {10: 0.9, 30: 0.7}, 0.125: {20: 0.3}}


def test_running_mean_is_centred_and_keeps_its_ends():
    values = pd.Series([0.0, 3, 6, 9, 100])
    assert smooth(values, 0.6).tolist() == pytest.approx([1.5, 3, 6, 115 / 3, 54.5])
    assert smooth(values, 0.01).equals(values)


@pytest.mark.parametrize(
    ("name", "column", "words"),
    [
        ("nowhere", "loss", "nowhere: no such file; allowed: the log of a training run"),
        ("vae", "gan", "no column gan of numbers; allowed: seconds, lr, loss, l1"),
        ("joint", "gan", "no row has a gan"),
        ("empty", "loss", "empty/log.csv: no column loss of numbers"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_one_line(runs, name, column, words):
    with pytest.raises(LogError) as error:
        read_log(runs / name, column)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_script_draws_a_panel_for_each_run(script, runs, tmp_path, capsys):
    folders = [str(runs / name) for name in ("vae", "bottleneck", "joint")]
    out = tmp_path / "docs/curves"
    assert script.main([*folders, "--out", str(out), "--formats", "svg"]) == 0
    assert capsys.readouterr().out == f"{out}.svg\n"
    assert [path.name for path in out.parent.iterdir()] == ["curves.svg"]
    drawn = out.with_suffix(".svg").read_text()
    for label in ("vae  (20 steps)", "joint  (30 steps)", "0.0625 bpp", "0.1250 bpp", "all rates"):
        assert f"<!-- {label} -->" in drawn
    assert "0.0019" not in drawn


def test_script_names_runs_apart_and_answers_mistakes_in_one_line(script, runs, tmp_path, capsys):
    assert script.name_runs([runs / "vae", runs / "joint/log.csv"]) == ["vae", "joint"]
    assert script.name_runs([Path("/a/x/vae"), Path("/b/y/vae")][:1]) == ["x"]  # neither exists: taken for logs
    other = tmp_path / "other"
    (other / "vae").mkdir(parents=True)
    assert script.name_runs([runs / "vae", other / "vae"]) == [f"{runs.name}/vae", "other/vae"]
    for arguments, words in (([str(runs / "vae")] * 2, "a run is named twice"), (["nowhere"], "no such file")):
        assert script.main([*arguments, "--out", str(tmp_path / "none/x")]) == 2
        error = capsys.readouterr().err
        assert error.startswith("plot_training: error: ") and words in error and error.count("\n") == 1
    assert not (tmp_path / "none").exists()
