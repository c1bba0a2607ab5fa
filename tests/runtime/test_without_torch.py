"""What the base installation does, where no extra is there; `make test-runtime` has an environment of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from oscar.utils.extras import PACKAGES, is_installed

ROOT = Path(__file__).parents[2]
IMAGE = ROOT / "tests/golden/ours/images/131x67.png"
FILE = ROOT / "tests/golden/shipped/nano/0.5000_131x67.oscar"
BLOCKED = """
import sys
sys.modules.update(dict.fromkeys(MODULES))  # "not to be found"
from oscar.cli.main import main
"""
GET = "is not installed; allowed: pip install 'oscar-codec[{}]'"


def run(program: str, *args: str | Path) -> subprocess.CompletedProcess:
    """Run a program in which nothing can be imported that an extra brings."""
    code = BLOCKED.replace("MODULES", repr(sorted(PACKAGES))) + program
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, cwd=ROOT)


def test_what_needs_no_torch_runs_without() -> None:
    program = """
import oscar.bitstream.context, oscar.bitstream.hyperprior, oscar.data.images, oscar.rates, oscar.timesteps
assert main(["info", sys.argv[1]]) == main(["info", "nano"]) == main(["doctor"]) == main(["compress", "--help"]) == 0
found = {name.partition(".")[0] for name, module in sys.modules.items() if module}
assert not found & {"torch", "diffusers", "compressai"}
"""
    done = run(program, FILE)
    assert (done.returncode, done.stderr) == (0, "")
    assert "pip install 'oscar-codec[torch]'" in done.stdout


@pytest.mark.parametrize("model", ["nano", "nano-vq"])
def test_files_and_back(model: str, tmp_path: Path) -> None:
    """Counted in modules: with torch they are some 3,300."""
    program = """
image, file, back, model = sys.argv[1:]
assert main(["compress", image, file, "--model", model]) == main(["decompress", file, back]) == 0
print(sum(module is not None for module in sys.modules.values()))
"""
    file, back = tmp_path / "a.oscar", tmp_path / "a.png"
    done = run(program, IMAGE, file, back, model)
    assert (done.returncode, done.stderr) == (0, "")
    first, second, count = done.stdout.splitlines()
    assert first.startswith(f"{file}: {file.stat().st_size} bytes") and second == f"{back}: 131x67 pixels"
    assert int(count) < 900
    with Image.open(back) as image:
        assert image.size == (131, 67) and image.format == "PNG"


def test_folders_previews_and_targets(tmp_path: Path) -> None:
    program = """
images, folder, back = sys.argv[1:]
words = ["--model", "nano", "--max-bytes", "500", "--batch-size", "2", "--manifest", folder + ".csv"]
assert main(["compress", images, folder, *words]) == 0
assert main(["decompress", folder, back, "--partial", "--format", "webp"]) == 0
"""
    done = run(program, IMAGE.parent, tmp_path / "files", tmp_path / "back")
    assert (done.returncode, done.stderr) == (0, "")
    count = len(list(IMAGE.parent.rglob("*.png")))
    assert done.stdout == f"compressed {count} of {count} files\ndecompressed {count} of {count} files\n"
    assert all(file.stat().st_size <= 500 for file in (tmp_path / "files").rglob("*.oscar"))
    assert len(list((tmp_path / "back").rglob("*.webp"))) == count


def test_a_model_that_is_not_here() -> None:
    done = run("sys.exit(main(sys.argv[1:]))", "compress", IMAGE, "a.oscar", "--model", "user/name")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "model 'user/name' does not exist here; allowed: nano, nano-vq, a checkpoint folder" in done.stderr


REFUSED = {  # package and extra that each command misses first
    ("torch", "torch"): [
        ("merge", "a", "b", "--out", "c"),
        ("add-rates", "a", "b", "--out", "c"),
        ("push", "nano", "user/name", "--dry-run"),
        ("convert", FILE, "a", "--backbone", "b"),
        ("convert", "nano-vq", "a.pkl", "--back"),
        ("export", "nano", "a"),
        ("compress", IMAGE, "a.oscar", "--engine", "torch"),
        ("decompress", FILE, "a.png", "--engine", "torch"),
    ],
    ("hydra-core", "train"): [("train",), ("cache-latents",)],
    ("hydra-core", "eval"): [
        ("evaluate",),
        ("benchmark",),
        ("calibrate-timesteps",),
        ("ablate-timesteps",),
        ("ablate-denoiser",),
    ],
    ("hydra-core", "all"): [("reproduce",)],
}


def test_the_rest_says_which_extra_it_needs() -> None:
    commands = [list(map(str, words)) for listed in REFUSED.values() for words in listed]
    expected = [f"{package} {GET.format(extra)}" for (package, extra), listed in REFUSED.items() for _ in listed]
    done = run("import json; print([main(words) for words in json.loads(sys.argv[1])])", json.dumps(commands))
    assert done.stdout == f"{[2] * len(commands)}\n", done.stderr
    assert [line.partition(": ")[2].removeprefix("error: ") for line in done.stderr.splitlines()] == expected


def test_python_says_so_too() -> None:
    done = run("import oscar\ntry:\n    oscar.load\nexcept ImportError as error:\n    print(error)")
    assert done.stdout == f"torch {GET.format('torch')}\n", done.stderr


def test_a_folder_of_a_packages_name_is_no_package(tmp_path: Path, monkeypatch) -> None:
    """Such as the `wandb` that training leaves in the current folder."""
    (tmp_path / "some_package").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not is_installed("some_package") and is_installed("numpy") and not is_installed("no_such.part")


def test_options_of_torch() -> None:
    done = run("sys.exit(main(sys.argv[1:]))", "compress", IMAGE, "a.oscar", "--memory", "4GB")
    line = "oscar: error: --memory needs torch, which is not installed; allowed: pip install 'oscar-codec[torch]'\n"
    assert (done.returncode, done.stderr) == (2, line)
