"""`oscar push` and `from_pretrained` with a stand-in for the hub: what is sent, what is refused, and the way back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from oscar import OscarCodec
from oscar.cli.main import main
from oscar.evaluation.codecs import make_codec
from oscar.evaluation.evaluate import evaluate
from oscar.metrics.image import MetricSet


class Hub:
    """The hub's client, on a folder; no network."""

    def __init__(self, folder: Path):
        self.folder, self.private, self.commits = folder, {}, 0

    def create_repo(self, repository: str, private: bool, exist_ok: bool) -> str:
        assert exist_ok
        self.private.setdefault(repository, private)
        return f"https://hub/{repository}"

    def create_commit(self, repository: str, operations, commit_message: str) -> None:
        self.commits += 1
        for operation in operations:
            path = self.folder / repository / operation.path_in_repo
            path.parent.mkdir(parents=True, exist_ok=True)
            data = operation.path_or_fileobj
            path.write_bytes(data if isinstance(data, bytes) else Path(data).read_bytes())

    def snapshot_download(self, repository: str, allow_patterns: list[str]) -> str:
        assert allow_patterns == ["*.json", "*.safetensors", "*.onnx", "graphs.data"]
        return str(self.folder / repository)


@pytest.fixture
def hub(monkeypatch, tmp_path: Path) -> Hub:
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    return hub


@pytest.fixture
def results(tiny_folder: Path, make_image, tmp_path: Path) -> Path:
    """An evaluation of the tiny model on two images, one of them too small for MS-SSIM."""
    images = [tmp_path / f"{name}.png" for name in "ab"]
    for path, side in zip(images, (170, 64), strict=True):
        make_image(side, side).save(path)
    codec = make_codec("oscar", model=str(tiny_folder), device="cpu", dtype="float32")
    metrics = MetricSet(["psnr", "ms_ssim"], "cpu")
    config = {"data": {"images": "/data/kodak"}}
    evaluate(codec, images, metrics, tmp_path / "results", [0.0019, 0.125], progress=False, config=config)
    return tmp_path / "results"


def test_there_and_back(hub: Hub, tiny_folder: Path, results: Path, make_image, tmp_path: Path, capsys) -> None:
    arguments = [str(tiny_folder), "me/tiny", "--results", str(results), "--license", "openrail++", "--private"]
    assert main(["push", *arguments]) == 0
    assert capsys.readouterr().out.strip() == "https://hub/me/tiny"
    assert hub.private == {"me/tiny": True} and hub.commits == 1
    sent = {path.relative_to(hub.folder / "me/tiny").as_posix() for path in hub.folder.rglob("*.*")}
    there = {path.relative_to(tiny_folder).as_posix() for path in tiny_folder.rglob("*.*")}
    assert sent == {*there, "README.md"}
    ours, theirs = OscarCodec.from_pretrained(tiny_folder).eval(), OscarCodec.from_pretrained("me/tiny").eval()
    assert theirs.fingerprint == ours.fingerprint
    data = ours.compress(make_image(70, 50), 0.125)
    assert theirs.decompress(data).tobytes() == ours.decompress(data).tobytes()
    card = (hub.folder / "me/tiny/README.md").read_text()
    assert "license: openrail++" in card and f"tag {ours.fingerprint[:4]}" in card
    assert "Kodak: means over 2 images, protocol bitstream" in card
    assert "| 0.1250 |" in card and "MS-SSIM: 1 of 2 images have no value" in card


def test_a_dry_run_sends_nothing(hub: Hub, tiny_folder: Path, capsys) -> None:
    assert main(["push", str(tiny_folder), "me/tiny", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "## Training" in out and "None was given." in out and "oscar.safetensors" in out.splitlines()[-1]
    assert not hub.folder.exists() and not hub.private


def named_backbone(folder: Path, tiny_folder: Path, name: str) -> Path:
    """The tiny model, as if its backbone were named in place of bundled."""
    folder.mkdir()
    (folder / "oscar.safetensors").symlink_to(tiny_folder / "oscar.safetensors")
    description = json.loads((tiny_folder / "oscar.json").read_text())
    description["sha256"] = {"oscar.safetensors": description["sha256"]["oscar.safetensors"]}
    (folder / "oscar.json").write_text(json.dumps({**description, "backbone": name}))
    return folder


def test_a_backbone_of_this_machine_gets_its_public_name(hub: Hub, tiny_folder: Path, tmp_path: Path, capsys) -> None:
    model = named_backbone(tmp_path / "model", tiny_folder, "/data/sd21")
    assert main(["push", str(model), "me/tiny"]) == 2
    assert "the backbone is '/data/sd21', which others do not have; allowed: --backbone" in capsys.readouterr().err
    assert main(["push", str(model), "me/tiny", "--backbone", "org/sd21"]) == 0
    assert json.loads((hub.folder / "me/tiny/oscar.json").read_text())["backbone"] == "org/sd21"
    assert "base_model: org/sd21" in (hub.folder / "me/tiny/README.md").read_text()
    assert {path.name for path in (hub.folder / "me/tiny").iterdir()} == {
        "README.md",
        "oscar.json",
        "oscar.safetensors",
    }
    assert json.loads((model / "oscar.json").read_text())["backbone"] == "/data/sd21", "ours stays as it is"


def test_what_is_refused(hub: Hub, tiny_folder: Path, results: Path, tmp_path: Path, capsys) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in tiny_folder.iterdir():
        (damaged / path.name).symlink_to(path)
    (damaged / "oscar.safetensors").unlink()
    (damaged / "oscar.safetensors").write_bytes(b"cut")
    pickled = named_backbone(tmp_path / "pickled", tiny_folder, "org/sd21")
    description = json.loads((pickled / "oscar.json").read_text())
    (pickled / "unet.bin").write_bytes(b"")
    description["sha256"]["unet.bin"] = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    (pickled / "oscar.json").write_text(json.dumps(description))
    for arguments, message in (
        ([str(tiny_folder), "nano"], "'nano' is no name of a repository; allowed: USER/NAME"),
        ([str(tiny_folder), "a/b/c"], "'a/b/c' is no name"),
        ([str(tmp_path), "me/tiny"], "is a folder without oscar.json"),
        ([str(damaged), "me/tiny"], "oscar.safetensors is damaged"),
        ([str(pickled), "me/tiny"], "has weights in unet.bin; allowed: safetensors"),
        ([str(tiny_folder), "me/tiny", "--backbone", "a/b"], "the checkpoint holds its own"),
        ([str(tiny_folder), "me/tiny", "--results", str(tmp_path / "no")], "no results of an evaluation"),
        (["nano", "me/nano", "--results", str(results)], "results of another model"),
    ):
        assert main(["push", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1, error
    assert not hub.private and not hub.folder.exists()


@pytest.mark.parametrize("path", ["../secret", "/etc/hostname", "denoiser.onnx"])
def test_graphs_are_checked_before_they_are_sent(
    path: str, hub: Hub, tiny_folder: Path, tmp_path: Path, capsys
) -> None:
    """Nothing leaves that is not of the model's folder, or is damaged."""
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    for file in (tmp_path / "secret", folder / "denoiser.onnx"):
        file.write_bytes(b"")
    (folder / "runtime.json").write_text(json.dumps({"sha256": {path: "0" * 64}}))
    assert main(["push", str(folder), "me/tiny"]) == 2
    words = "denoiser.onnx is damaged" if path == "denoiser.onnx" else f"runtime.json names '{path}'; allowed: files in"
    assert words in capsys.readouterr().err
    assert not hub.commits


def test_a_hub_that_says_no(tiny_folder: Path, monkeypatch, hub: Hub, capsys) -> None:
    def refuse(*args, **kwargs):
        raise OSError("401 Client Error: Unauthorized")

    monkeypatch.setattr(hub, "create_repo", refuse)
    assert main(["push", str(tiny_folder), "me/tiny"]) == 2
    error = capsys.readouterr().err
    assert (
        "me/tiny cannot be written: 401 Client Error" in error and "HF_TOKEN" in error and len(error.splitlines()) == 1
    )
