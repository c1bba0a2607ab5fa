"""scripts/evaluate.py: mistakes answered in one line, sweeps, and several processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from hydra.core.global_hydra import GlobalHydra

from oscar.evaluation.results import load_results

ROOT = Path(__file__).parents[1]
SCRIPT = str(ROOT / "scripts/evaluate.py")
SECONDS = ["encode_seconds", "decode_seconds"]
HERE = ["data.images=photos", "codec=jpeg"]


@pytest.fixture
def folder(photos: Path, tmp_path: Path) -> Path:
    """A working directory with images in photos/, none in empty/, and broken ones in broken/."""
    (tmp_path / "photos").symlink_to(photos)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/a.png").write_bytes(b"no image")
    return tmp_path


@pytest.fixture
def evaluate(load_script, monkeypatch, folder: Path):
    """Runs scripts/evaluate.py in this process with some overrides."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # which it sets itself, and which would stay set
    monkeypatch.chdir(folder)
    module = load_script("evaluate")

    def run(*overrides: str) -> None:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *overrides])
        module.run()

    yield run
    GlobalHydra.instance().clear()


def in_processes(folder: Path, *command: str) -> subprocess.CompletedProcess:
    env = {"PATH": "", "HOME": str(folder), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True, timeout=600, env=env)


MISTAKES = [
    (["codec=jpeg"], ["data.images is unset", "a folder of images"]),
    (["codec=jpeg", "data.images=nowhere"], ["nowhere", "no such folder"]),
    (["codec=jpeg", "data.images=empty"], ["data.images", "empty", "holds no image"]),
    (["data.images=photos", "codec=jpg"], ["codec 'jpg' does not exist; allowed: oscar, jpeg, "]),
    (["data.images=photos", "model=nowhere"], ["model 'nowhere'"]),
    ([*HERE, "metrics.names=[psnr,ssmi]"], ["metric 'ssmi' does not exist; allowed: psnr, "]),
    ([*HERE, "metrics.names=[]"], ["metrics.names is empty"]),
    ([*HERE, "metrics=none"], ["metrics/none"]),
    ([*HERE, "+metrics.files={alexnet:nowhere.pth}"], ["metrics.files.alexnet is 'nowhere.pth'"]),
    ([*HERE, "protocol=paper"], ["protocol is 'paper', but codec is 'jpeg'", "bitstream"]),
    ([*HERE, "protocol=official"], ["protocol is 'official'", "bitstream, paper"]),
    (["data.images=photos", "+options={quality:3}"], ["options is {'quality': 3}, but codec oscar has none"]),
    ([*HERE, "+options={quality:3}"], ["jpeg", "quality"]),
    ([*HERE, "points=[]"], ["points is empty"]),
    ([*HERE, "points=[5,101]"], ["jpeg", "101", "allowed"]),
    ([*HERE, "data.limit=0"], ["data.limit is 0", "at least 1"]),
    ([*HERE, "threads=0"], ["threads is 0", "at least 1"]),
    ([*HERE, "dtype=float64"], ["dtype is 'float64'", "float32, float16, bfloat16"]),
    ([*HERE, "device=gpu"], ["device 'gpu' cannot be used"]),
    ([*HERE, "point=[5]"], ["point"]),
]


@pytest.mark.parametrize(("overrides", "named"), MISTAKES, ids=[" ".join(overrides) for overrides, _ in MISTAKES])
def test_mistakes(evaluate, capsys, overrides: list[str], named: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        evaluate(*overrides)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("evaluate: ")
    for part in named:
        assert part in line


def test_nothing_but_broken_images(evaluate, capsys) -> None:
    """Known only once the work has begun: the line comes after its progress, which names each image left out."""
    with pytest.raises(SystemExit) as end:
        evaluate("codec=jpeg", "data.images=broken")
    assert end.value.code == 2
    *progress, line = capsys.readouterr().err.splitlines()
    assert any("left out: a.png" in shown for shown in progress)
    assert line.startswith("evaluate: none of the 1 images could be scored: ") and "a.png: not an image" in line


def test_a_baseline(evaluate, folder: Path, capsys) -> None:
    evaluate(*HERE, "points=[20,5]", "data.limit=2", "save_images=true", "output=out")
    frame, info = load_results(folder / "out")
    assert list(frame.image) == ["0.png", "0.png", "1.png", "1.png"] and list(frame.point) == [5, 20, 5, 20]
    assert info["config"]["data"] == {"images": "photos", "limit": 2} and info["config"]["codec"] == "jpeg"
    sizes = sorted(path.stat().st_size for path in (folder / "out/files").iterdir())
    assert sizes == sorted(frame.file_bytes)
    shown = capsys.readouterr().out
    assert "JPEG on 2 images of photos, 1 process(es)" in shown
    assert f"{frame.psnr[frame.point == 5].mean():.4f}" in shown
    assert {path.name for path in folder.iterdir()} == {"photos", "empty", "broken", "out"}


def test_means_tell_what_they_lack(evaluate, folder: Path, photos: Path, capsys) -> None:
    (folder / "broken/b.png").write_bytes((photos / "0.png").read_bytes())
    evaluate("data.images=broken", "codec=jpeg", "points=[5]", "output=out")
    lines = capsys.readouterr().err.splitlines()
    assert "left out of these means: 1 failure(s), listed in results.json" in lines
    assert list(load_results(folder / "out")[0].image) == ["b.png"]


@pytest.mark.slow
def test_two_processes_equal_one(evaluate, folder: Path, tiny_folder: Path) -> None:
    overrides = ["data.images=photos", f"model={tiny_folder}", "points=[0.0019,0.125]", "device=cpu"]
    evaluate(*overrides, "output=one")
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", SCRIPT]
    result = in_processes(folder, *launch, *overrides, "output=two")
    assert result.returncode == 0, result.stderr
    (one, _), (two, info) = (load_results(folder / name) for name in ("one", "two"))
    pd.testing.assert_frame_equal(one.drop(columns=SECONDS), two.drop(columns=SECONDS))
    shards = sorted(path.read_text().count("\n") for path in (folder / "two/rows").glob("*.jsonl"))
    assert info["processes"] == 2 and shards == [2 * 2, 3 * 2] and len(one) == 5 * 2


def test_a_sweep_over_both_protocols(evaluate, folder: Path, tiny_folder: Path, make_image) -> None:
    (folder / "larger").mkdir()
    for seed in range(2):
        make_image(300, 260, seed).save(folder / f"larger/{seed}.png")
    evaluate(
        "--multirun",
        "data.images=larger",
        "data.limit=2",
        f"model={tiny_folder}",
        "points=[0.0019,0.125]",
        "protocol=bitstream,paper",
        "output=runs/evaluate/${protocol}",
    )
    bitstream, paper = (load_results(folder / "runs/evaluate" / name)[0] for name in ("bitstream", "paper"))
    assert set(bitstream.protocol) == {"bitstream"} and set(paper.protocol) == {"paper"}
    assert bitstream.file_bytes.notna().all() and paper.file_bytes.isna().all() and paper.actual_bpp.isna().all()
    assert list(paper.nominal_bpp) == list(bitstream.nominal_bpp) == list(paper.point)
    assert set(zip(paper.scored_width, paper.scored_height, strict=True)) == {(256, 256)}
    assert "ms_ssim_y" in paper and "ms_ssim" not in paper and "ms_ssim_y" not in bitstream
    names = {path.name for path in folder.iterdir()} - {".cache", ".config"}
    assert names == {"photos", "empty", "broken", "larger", "runs"}
