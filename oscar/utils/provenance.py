"""How a model was trained, as its checkpoint says: reading it, and as lines for people. No torch.

A provenance has `step`, `config` (resolved), `origin` (path and provenance of what it began with) and `sessions`: each
start and resume with date, step, processes, overrides of the command and, where it changed, the environment (commit,
dirty state, versions, hardware).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oscar.rates import rate_by_id
from oscar.utils.strict_json import dumps

SHIPPED = Path(__file__).parents[1] / "assets"
MODEL, WEIGHTS = "oscar.json", "oscar.safetensors"  # of a checkpoint
PROVENANCE = "provenance.json"  # of a run, and of a backbone that a run made


def read_provenance(folder: str | Path) -> dict | None:
    """What a backbone's folder says of how it was trained; None if it says nothing."""
    try:
        return json.loads((Path(folder) / PROVENANCE).read_text())
    except (OSError, ValueError):
        return None


def read_model(source: str | Path) -> dict[str, Any] | None:
    """Facts of a checkpoint, JSON-able; None where there is none.

    Args:
        source: its folder, or the name of a model in the package if nothing else has that name.

    Raises:
        ValueError: if its description cannot be read.
    """
    folder = Path(source)
    if not folder.exists() and (SHIPPED / str(source) / MODEL).is_file():
        folder = SHIPPED / str(source)
    if not (folder / MODEL).is_file():
        return None
    try:
        return _facts(source, json.loads((folder / MODEL).read_text()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / MODEL}: no description of a model ({type(error).__name__}: {error})") from None


def _facts(source: str | Path, config: Mapping[str, Any]) -> dict[str, Any]:
    bottleneck = config["bottleneck"]
    points = {"rates": [rate_by_id(rate_id).bpp for rate_id in bottleneck["rates"]]} if "rates" in bottleneck else {}
    return {
        "model": str(source),
        "format": config["format"],
        "model_tag": config["fingerprint"][:4],
        "fingerprint": config["fingerprint"],
        "kind": bottleneck.get("kind", "vq"),
        **points,
        "denoiser": config["denoiser"],
        "timesteps": config["timesteps"],
        "backbone": config["backbone"],
        "sha256": config["sha256"],
        "provenance": config.get("provenance"),
    }


def as_text(facts: Mapping[str, Any]) -> str:
    """The facts of a checkpoint in lines."""
    denoiser = facts["denoiser"]
    tuning = "full" if denoiser["tuning"] == "full" else f"LoRA of rank {denoiser['lora_rank']}"
    lines = [
        ("model tag", facts["model_tag"]),
        ("bottleneck", facts["kind"]),
        *([("rates", ", ".join(f"{bpp:.4f}" for bpp in facts["rates"]))] if "rates" in facts else []),
        ("denoiser", tuning),
        ("timesteps", facts["timesteps"]["kind"]),
        ("backbone", facts["backbone"] or "within the checkpoint"),
    ]
    text = [facts["model"], *(f"  {name:<16} {value}" for name, value in lines)]
    provenance = facts["provenance"]
    if provenance is None:
        return "\n".join([*text, "  provenance       not stored in this checkpoint"])
    before = (provenance["origin"] or {}).get("provenance")
    text += [*_run_lines(provenance), "  configuration", *_nested_lines(provenance["config"], 2)]
    while before is not None:  # the runs that it builds on; their configurations are in the JSON
        text += _run_lines(before)
        before = (before["origin"] or {}).get("provenance")
    return "\n".join(text)


def _run_lines(provenance: Mapping[str, Any]) -> list[str]:
    config, origin = provenance["config"], provenance["origin"]
    text = [f"trained {provenance['step']} steps of stage {config['stage']['name']}, seed {config['seed']}"]
    if origin is not None:
        text.append(f"  from             {origin.get('init_from') or origin['backbone']}")
    for session in provenance["sessions"]:
        processes = f"{session['processes']} process{'es' * (session['processes'] != 1)}"
        text.append(f"  {session['date']}  from step {session['step']}, {processes} on {session['device']}")
        if session["overrides"]:
            text.append(f"    overrides      {' '.join(session['overrides'])}")
        if "environment" in session:
            text += _environment_lines(session["environment"])
    return text


def _environment_lines(environment: Mapping[str, Any]) -> list[str]:
    commit, dirty, hardware = environment["commit"], environment["dirty"], environment["hardware"]
    code = "no repository" if commit is None else f"{commit}{', with changes' if dirty else ''}"
    versions = ", ".join(f"{name} {number}" for name, number in environment["versions"].items() if number)
    place = f"{hardware['processor']}, {hardware['cores']} cores, {hardware['memory_gib']} GiB"
    return [
        f"    commit         {code}",
        f"    versions       {versions}",
        f"    hardware       {place}{', ' + hardware['gpu'] if hardware['gpu'] else ''}",
    ]


def _nested_lines(config: Mapping[str, Any], depth: int) -> list[str]:
    text = []
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            text += [f"{'  ' * depth}{name}:", *_nested_lines(value, depth + 1)]
        else:
            text.append(f"{'  ' * depth}{name}: {dumps(value)}")
    return text
