"""How fast and how large inference is, beside the plain way: `python -m oscar.benchmark.speed.inference`.

The plain way is the published implementation's: float32, adapters beside the weights, the prompt's keys and values
computed on each call, networks as diffusers has them. Both ways run in one process, in turns, on the same images, and
decode the same file. Loading and peak memory are measured in processes of their own, each of which loads one half of
the model, or the whole of it.

What was measured on this machine with these settings is kept in OUTPUT/inference and not measured again.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from oscar import OscarCodec, checkpoint
from oscar.benchmark.speed.clocks import interleaved, paired_ratio, synchroniser
from oscar.benchmark.speed.memory import memory_of, resident_memory, run_child
from oscar.bottlenecks.vq import VQSymbols
from oscar.config import InferenceSpeedConfig
from oscar.inference.kernels import exact_norms
from oscar.inference.load import load
from oscar.utils.strict_json import dumps

if TYPE_CHECKING:
    import pandas as pd

    from oscar.utils.tables import Table

PLAIN = "plain"
COMPILE = {"off": False, "on": True, "graphs": "graphs"}
TIMEOUT = 7200.0  # seconds for loading and one large image
_MIB = 2**20
_SIDES = {"encoder": ("encode",), "decoder": ("decode",)}


def run_inference_speed(config: InferenceSpeedConfig, output: Path, device: str | None = None) -> list[Table]:
    """Make the measurements of a configuration that are not there yet.

    Args:
        config: what is measured.
        output: folder of the benchmark; figures go to its subfolder inference, and the model of random weights.
        device: of the networks; None takes a GPU if there is one.

    Returns:
        Tables to read of all that is there: inference_latency, inference_memory, inference_large.

    Raises:
        TimingError: if a process that is measured fails.
        ValueError: for a model or device that cannot be used.
    """
    from oscar.benchmark.speed.tables import run_part  # here: the process that measures memory shall not hold pandas
    from oscar.evaluation.evaluate import make_accelerator

    place, folder = make_accelerator(device).device, output / "inference"
    measures = {"latency": measure_latency, "memory": measure_memory, "large": measure_large}

    def measure(name: str) -> list[pd.DataFrame]:
        print(f"inference: {name}", flush=True)
        return [measures[name](config, model_folder(config, folder), place)]

    return run_part("inference", config, folder, place, {name: (name,) for name in measures}, measure)


def model_folder(config: InferenceSpeedConfig, folder: Path) -> str:
    """The checkpoint to measure: the configuration's, or one of random weights, made on the first call.

    Its backbone lies beside it, as that of a converted checkpoint does.
    """
    if config.model is not None:
        return config.model
    model = folder / "model"
    if not model.exists():
        from oscar.models.backbone import Backbone

        torch.manual_seed(0)
        shapes, rates = config.backbone, [rate.id for rate in config.bottleneck.rate_points()]
        Backbone.from_configs(shapes.vae, shapes.unet, shapes.scheduler).save_pretrained(folder / "backbone")
        codec = OscarCodec(
            *checkpoint.build(
                {
                    "bottleneck": {"rates": rates, **config.bottleneck.describe()},
                    "denoiser": {"tuning": "lora"},
                    "timesteps": {"kind": "table"},
                },
                Backbone.from_pretrained(folder / "backbone"),
            )
        )
        with torch.no_grad():
            for name, value in codec.denoiser.unet.named_parameters():
                if ".lora_B." in name:  # zero at first, so that the adapters would do nothing
                    value.normal_(std=0.01)
        codec.save_pretrained(model)
    return str(model)


def measure_latency(config: InferenceSpeedConfig, model: str, device: torch.device) -> pd.DataFrame:
    """Encode and decode of every way at every size, with speeds as ratios to the plain way in the same rounds.

    Differences are those of the decoded images, in [-1, 1], of the plain way's file: from the plain way, and from the
    plain way with exact normalisations, which torch's are not on a CPU (see `oscar.inference.cpu.group_norm`).
    """
    import pandas as pd

    ways: dict[str, OscarCodec] = {PLAIN: OscarCodec.from_pretrained(model).eval().requires_grad_(False).to(device)}
    for dtype in config.dtypes:
        for compiled in config.compile:
            precision = "auto" if dtype == "auto" else getattr(torch, dtype)
            codec = load(model, device, precision, compile=COMPILE[compiled])
            name = str(codec.dtype).removeprefix("torch.") + (f", compile {compiled}" if compiled != "off" else "")
            ways.setdefault(name, codec)  # auto may be one of the others
    default = list(ways)[1] if config.dtypes[0] == "auto" else None
    wait = synchroniser([device])
    rows = []
    for size in config.sizes:
        image = make_image(size)
        data = ways[PLAIN].compress(image, config.rate)
        calls: dict[tuple[str, str], Callable[[], object]] = {}
        for name, codec in ways.items():
            calls[name, "encode"] = partial(codec.compress, image, config.rate)
            calls[name, "decode"] = partial(codec.decompress, data)
        seconds = interleaved(calls, config.repeats, config.warmup, wait)
        expected = ways[PLAIN].decompress_tensor([data])[0].float()
        with exact_norms(ways[PLAIN]):
            exact = ways[PLAIN].decompress_tensor([data])[0].float()
        indices = ways[PLAIN].read(data).symbols.indices
        seconds |= {(name, "both"): seconds[name, "encode"] + seconds[name, "decode"] for name in ways}
        for name, codec in ways.items():
            decoded = codec.decompress_tensor([data])[0].float()
            error = (decoded - expected).square().mean().item()
            own = codec.read(codec.compress(image, config.rate)).symbols.indices
            parts = ("encode", "decode", "both")
            rows.append(
                {"size": size, "way": name, "default": name == default}
                | {f"{what}_s": float(np.median(seconds[name, what])) for what in parts}
                | {f"{what}_speedup": paired_ratio(seconds[PLAIN, what], seconds[name, what]) for what in parts}
                | {
                    "max_difference": (decoded - expected).abs().max().item(),
                    "exact_difference": (decoded - exact).abs().max().item(),
                    "psnr_db": 10 * float(np.log10(4 / error)) if error else None,
                    "other_indices_percent": 100 * (own != indices).double().mean().item(),
                }
            )
    return pd.DataFrame(rows)


def measure_memory(config: InferenceSpeedConfig, model: str, device: torch.device) -> pd.DataFrame:
    """Loading and calling the plain way, the whole model and each half, in the default setting."""
    import pandas as pd

    rows = []
    for way, half in ((PLAIN, "both"), ("ours", "both"), ("ours", "encoder"), ("ours", "decoder")):
        request = _request(config, model, device, config.sizes[0], "float32" if way == PLAIN else "auto")
        rows.append({"way": way, "half": half} | _measure({**request, "way": way, "half": half}))
    return pd.DataFrame(rows)


def measure_large(config: InferenceSpeedConfig, model: str, device: torch.device) -> pd.DataFrame:
    """Peak memory of each half on one large image, and beyond what was resident before."""
    import pandas as pd

    request = _request(config, model, device, config.large_size, config.large_dtype)
    request |= {"way": "ours", "memory": config.large_memory}
    rows = [{"half": half, "size": config.large_size} | _measure({**request, "half": half}) for half in _SIDES]
    return pd.DataFrame(rows).assign(beyond_mib=lambda frame: frame["peak_mib"] - frame["loaded_mib"])


def make_image(size: str) -> Image.Image:
    """A photograph of WIDTHxHEIGHT: scikit-image's astronaut, enlarged."""
    from skimage.data import astronaut

    width, height = map(int, size.split("x"))
    return Image.fromarray(astronaut()).resize((width, height), Image.Resampling.BICUBIC)


def _request(config: InferenceSpeedConfig, model: str, device: torch.device, size: str, dtype: str) -> dict:
    return {
        "model": model,
        "device": str(device),
        "size": size,
        "dtype": dtype,
        "rate": config.rate,
        "threads": torch.get_num_threads(),
        "memory": "auto",
    }


def _measure(request: dict) -> dict:
    what = f"{request['way']}, half {request['half']}, {request['size']}"
    print(f"  {what}", flush=True)
    return run_child(__name__, request, what, TIMEOUT)


def _child(request: dict) -> dict:
    """What the process does: load, forget the peak of loading, encode or decode or both, report.

    A decoder gets the symbols of a flat image: which ones does not matter to time and memory.
    """
    torch.set_num_threads(request["threads"])
    device, half = request["device"], request["half"]
    before = resident_memory()[0]
    begin = time.perf_counter()
    if request["way"] == PLAIN:
        codec = OscarCodec.from_pretrained(request["model"]).eval().requires_grad_(False).to(device)
    else:
        dtype = "auto" if request["dtype"] == "auto" else getattr(torch, request["dtype"])
        codec = load(request["model"], device, dtype, half, memory=request["memory"])
    row = {"dtype": str(codec.dtype).removeprefix("torch."), "load_s": time.perf_counter() - begin}
    row["libraries_mib"], row["load_peak_mib"] = before, resident_memory()[1]
    row["weights_mib"] = sum(value.nbytes for value in (*codec.parameters(), *codec.buffers())) / _MIB
    width, height = map(int, request["size"].split("x"))
    rate = codec.bottleneck.parse(request["rate"])
    rms = torch.ones(1, codec.backbone.latent_channels, device=codec.device, dtype=codec.dtype)
    indices = torch.zeros(1, *rate.grid_shape(height, width), dtype=torch.int64, device=codec.device)
    symbols = VQSymbols(indices, rms)
    calls = {
        "encode": lambda: codec.compress(make_image(request["size"]), rate),
        "decode": lambda: codec.decode(symbols, rate),
    }
    wait, seconds = synchroniser([codec.device]), {}

    @torch.inference_mode()
    def call() -> None:
        for name in _SIDES.get(half, tuple(calls)):
            begin = time.perf_counter()
            calls[name]()
            wait()
            seconds[f"{name}_s"] = time.perf_counter() - begin

    memory = memory_of(call, codec.device)
    row |= {"loaded_mib": memory["loaded_mib"], **seconds}
    row["peak_mib"] = memory["call_peak_mib"] or memory["process_peak_mib"]
    if "cuda_call_peak_mib" in memory:
        row["cuda_peak_mib"] = memory["cuda_call_peak_mib"]
    return row


if __name__ == "__main__":
    print(dumps(_child(json.loads(sys.argv[1]))))
