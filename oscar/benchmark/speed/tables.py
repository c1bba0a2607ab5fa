"""The parts training and inference of the benchmark: figures that are measured once, and their tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch

from oscar.config import InferenceSpeedConfig, TrainingSpeedConfig
from oscar.utils import former
from oscar.utils.environment import open_record
from oscar.utils.files import atomic_write
from oscar.utils.tables import Table, filled

_TITLES = {
    "inference_latency": {
        "size": "image", "way": "networks", "encode_s": "encode s", "decode_s": "decode s", "both_s": "both s",
        "encode_speedup": "encode × plain", "decode_speedup": "decode × plain", "both_speedup": "both × plain",
        "max_difference": "largest difference", "exact_difference": "with exact norms",
        "psnr_db": "PSNR to plain dB", "other_indices_percent": "other indices %"},
    "inference_memory": {
        "way": "way", "half": "half", "dtype": "precision", "load_s": "load s", "weights_mib": "weights MiB",
        "loaded_mib": "MiB when loaded", "load_peak_mib": "peak MiB of loading", "encode_s": "encode s",
        "decode_s": "decode s", "peak_mib": "peak MiB of the call", "cuda_peak_mib": "peak MiB on the GPU"},
    "inference_large": {
        "half": "half", "size": "image", "dtype": "precision", "weights_mib": "weights MiB",
        "loaded_mib": "MiB when loaded", "peak_mib": "peak MiB of the call", "beyond_mib": "MiB beyond loaded",
        "encode_s": "encode s", "decode_s": "decode s", "cuda_peak_mib": "peak MiB on the GPU"},
    "training_schedules": {
        "schedule": "schedule", "description": "what is computed", "vae_passes": "VAE passes",
        "hyper_steps": "hyper-encoder steps", "seconds": "seconds", "steps_per_s": "steps/s",
        "speedup": "× published"},
    "training_loader": {
        "schedule": "schedule", "workers": "workers", "steps": "steps", "seconds": "seconds",
        "waited_percent": "waiting %", "used_crops_per_s": "crops/s used",
        "alone_crops_per_s": "crops/s of the loader alone", "images": "images", "mean_file_kib": "mean file KiB"},
    "training_joint": {
        "first_step_seconds": "first step s", "step_seconds": "further steps s", "built_mib": "MiB when built",
        "steps_peak_mib": "peak MiB of steps", "process_peak_mib": "peak MiB with building",
        "cuda_peak_mib": "peak MiB on the GPU", "losses": "losses", "left_out": "left out"},
    "training_parameters": {"part": "part", "trained": "trained", "published": "published"},
}  # fmt: skip
# By how a column's name ends; the first that fits.
_DIGITS = {
    "step_seconds": "{:.1f}", "seconds": "{:.2f}", "steps_per_s": "{:.3f}", "crops_per_s": "{:.1f}", "_s": "{:.2f}",
    "speedup": "{:.2f}", "waited_percent": "{:.1f}", "_percent": "{:.2f}", "_mib": "{:,.0f}", "_kib": "{:,.0f}",
    "_difference": "{:.1e}", "_db": "{:.1f}", "trained": "{:,.0f}", "published": "{:,.0f}",
}  # fmt: skip


def run_part(
    part: str,
    config: InferenceSpeedConfig | TrainingSpeedConfig,
    folder: Path,
    device: torch.device,
    frames: Mapping[str, Sequence[str]],
    measure: Callable[[str], Sequence[pd.DataFrame]],
) -> list[Table]:
    """Make the measurements of a configuration that are not in a folder yet.

    Args:
        part: training or inference.
        config: of the part.
        folder: of the figures; those of other settings or machines are removed.
        device: that is measured.
        frames: names of the frames that each measurement gives.
        measure: makes a measurement, by its name.

    Returns:
        Tables to read of all frames that are there.
    """
    settings = {name: value for name, value in asdict(config).items() if name != "measure"}
    identity = open_record(folder, settings, device)
    for name in config.measure:
        paths = [folder / f"{frame}.csv" for frame in frames[name]]
        if not all(path.exists() for path in paths):
            for path, frame in zip(paths, measure(name), strict=True):
                atomic_write(path, frame.to_csv(index=False).encode())
    paths = [folder / f"{frame}.csv" for names in frames.values() for frame in names]
    captions = _captions(part, identity)
    read = {path.stem: pd.read_csv(path).rename(columns=former.KEYS) for path in paths if path.exists()}
    return [_table(f"{part}_{name}", captions[name], frame) for name, frame in read.items()]


def _table(name: str, caption: str, frame: pd.DataFrame) -> Table:
    shown = filled(frame, _TITLES[name])
    fitting = {column: [ending for ending in _DIGITS if column.endswith(ending)] for column in shown}
    formats = {column: _DIGITS[endings[0]].format for column, endings in fitting.items() if endings}
    if "default" in frame:
        frame = frame.assign(way=frame["way"] + frame["default"].map({True: " (default)", False: ""}))
    return Table(name, caption, frame, shown, formats)


def _several(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _captions(part: str, identity: Mapping) -> dict[str, str]:
    settings, machine = identity["settings"], identity["hardware"]
    where = f"{machine['processor']}, {_several(machine['threads'], 'thread')}"
    if not identity["device"].startswith("cpu"):
        where = machine["gpu"]
    if part == "inference":
        model = settings["model"] or f"backbone {settings['backbone']['name']}, random weights"
        what = f"{model}; rate {settings['rate']:.4f}; {where}"
        return {
            "latency": f"Seconds from image to file and back ({what}). plain: as published, in float32 with adapters "
            f"beside the weights. Medians of {_several(settings['repeats'], 'round')}, in turns; ratios are medians "
            "over rounds. Differences are of decoded images, in [-1, 1], from plain as it is, and from plain with "
            "exact normalisations.",
            "memory": f"Loading, and one call with an image of {settings['sizes'][0]}, each row in a process of its "
            f"own ({what}). Resident memory includes Python and the libraries.",
            "large": f"Memory for one large image, budget {settings['large_memory']}, each row in a process of its "
            f"own ({what}).",
        }
    side = settings["crop"]
    shape = f"crops of {side}×{side}, float32, backbone {settings['backbone']['name']}; {where}"
    batch = f"batch {settings['batch_size']}, {shape}"
    return {
        "schedules": f"Hyper-encoder steps per second of stage bottleneck ({batch}). In a round every schedule "
        f"trains every rate by one step; medians of {_several(settings['repeats'], 'round')}, in turns; ratios are "
        "medians over rounds.",
        "loader": f"Share of the time for which steps of stage bottleneck wait for their batch ({batch}), once the "
        "batches that were loaded ahead are used up, and what the loader gives when nothing else is done.",
        "joint": f"A step of stage joint (batch 1, {shape}) with gradient checkpointing, in a process of its own. Its "
        "resident memory includes Python and the libraries. Losses whose weights are not here are left out "
        "(training.joint.network_files gives them).",
        "parameters": "Trained parameters of stage joint, beside those of the published checkpoint of full size, which "
        "holds no critic.",
    }
