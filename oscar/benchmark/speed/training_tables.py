"""The tables of `oscar.benchmark.speed.training`."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from oscar.utils.tables import Table

_TITLES = {
    "schedules": {"schedule": "schedule", "description": "what is computed", "vae_passes": "VAE passes",
                  "hyper_steps": "hyper-encoder steps", "seconds": "seconds", "steps_per_s": "steps/s",
                  "speedup": "× published"},
    "loader": {"schedule": "schedule", "workers": "workers", "steps": "steps", "seconds": "seconds",
               "waited_percent": "waiting %", "used_crops_per_s": "crops/s used",
               "alone_crops_per_s": "crops/s of the loader alone", "pictures": "pictures",
               "mean_file_kib": "mean file KiB"},
    "joint": {"first_step_seconds": "first step s", "step_seconds": "further steps s", "built_mib": "MiB when built",
              "steps_peak_mib": "peak MiB of steps", "process_peak_mib": "peak MiB with building",
              "cuda_peak_mib": "peak MiB on the GPU", "losses": "losses", "left_out": "left out"},
    "parameters": {"part": "part", "trained": "trained", "published": "published"},
}  # fmt: skip
_FORMATS = {
    "seconds": "{:.2f}", "steps_per_s": "{:.3f}", "speedup": "{:.2f}", "waited_percent": "{:.1f}",
    "used_crops_per_s": "{:.1f}", "alone_crops_per_s": "{:.1f}", "mean_file_kib": "{:,.0f}",
    "first_step_seconds": "{:.1f}", "step_seconds": "{:.1f}", "built_mib": "{:,.0f}", "steps_peak_mib": "{:,.0f}",
    "process_peak_mib": "{:,.0f}", "cuda_peak_mib": "{:,.0f}", "trained": "{:,.0f}", "published": "{:,.0f}",
}  # fmt: skip


def make_tables(frames: Mapping[str, pd.DataFrame], identity: Mapping) -> list[Table]:
    """The measurements as people read them.

    Args:
        frames: by name, those that there are of schedules, loader, joint and parameters.
        identity: `settings` of the measurements, `device` and `hardware`.
    """
    captions = _captions(identity)
    made = []
    for name, frame in frames.items():
        shown = {column: title for column, title in _TITLES[name].items() if frame[column].notna().any()}
        formats = {column: _FORMATS[column].format for column in shown if column in _FORMATS}
        made.append(Table(f"training_{name}", captions[name], frame, shown, formats))
    return made


def _several(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _captions(identity: Mapping) -> dict[str, str]:
    settings, machine = identity["settings"], identity["hardware"]
    where = f"{machine['processor']}, {_several(machine['threads'], 'thread')}"
    if not identity["device"].startswith("cpu"):
        where = machine["gpu"]
    side = settings["crop"]
    shape = f"crops of {side}×{side}, float32, backbone {settings['backbone']['name']}; {where}"
    batch = f"batch {settings['batch_size']}, {shape}"
    return {
        "schedules": f"Hyper-encoder steps per second of stage hyper ({batch}). In a round every schedule trains every "
        f"rate by one step; medians of {_several(settings['repeats'], 'round')}, in turns; ratios are "
        "medians over rounds.",
        "loader": f"Share of the time for which steps of stage hyper wait for their batch ({batch}), once the batches "
        "that were loaded ahead are used up, and what the loader gives when nothing else is done.",
        "joint": f"A step of stage joint (batch 1, {shape}) with gradient checkpointing, in a process of its own. Its "
        "resident memory includes Python and the libraries. Losses whose weights are not here are left out "
        "(training.joint.network_files gives them).",
        "parameters": "Trained parameters of stage joint, beside those of the published checkpoint of full size, which "
        "holds no critic.",
    }
