"""What earlier versions had: keys that older records still have, and what users may still type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KEYS = {
    "picture": "image",
    "pictures": "images",
    "pictures_per_s": "images_per_s",
    "shard_pictures": "shard_images",
}
"""keys of records, and columns of tables that are read back"""
STAGES = {"hyper": "bottleneck", "prior": "diffusion_pretrain"}
"""stages of training"""
MODELS = {"nano-hyperprior": "nano"}
"""models in the package"""
# As Hydra quotes what it does not find, and what to write now.
_SETTINGS = {"report_pictures": "report_images"}
_SETTINGS |= {f"stage/{old}": f"stage={new}" for old, new in STAGES.items()}
_SETTINGS |= {
    f"experiment/{recipe}{old}": f"experiment={recipe}{new}"
    for recipe in ("nano/", "tiny/", "tiny/hyperprior_")
    for old, new in STAGES.items()
}
_SETTINGS |= {f"{group}/nano_hyperprior": f"{group}=nano" for group in ("backbone", "bottleneck")}
_SETTINGS |= {
    f"experiment/nano-hyperprior/{step}": f"experiment=nano/{STAGES.get(step, step)}"
    for step in ("vae", "prior", "hyper", "diffusion_pretrain", "bottleneck", "joint", "longer", "further")
}
_SETTINGS |= {f"experiment/nano/{step}": f"experiment=nano_vq/{step}" for step in ("finetune", "context")}
_SETTINGS |= {"recipe/nano": "recipe=nano_vq"}
LEFT = dict.fromkeys(
    ("bottleneck.dither", "bottleneck.stages", "bottleneck.start_from"),
    "a rate has one plain codebook and one index a position, as in the paper",
)
"""fields of configurations and of checkpoints' descriptions that are gone, and why"""
_STEPS_LEFT = {
    f"experiment/{recipe}/{step}": "nano_vq/further comes after nano_vq/finetune"
    for recipe in ("nano", "nano_vq")
    for step in ("dither", "stages")
}


def with_new_keys(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record of this version or an earlier one, under the keys of this version."""
    return {KEYS.get(key, key): value for key, value in record.items()}


def explain_former_model(name: str) -> str | None:
    """What a model of the package is called now; None if it never had this name."""
    return f"it is called {MODELS[name]} now" if name in MODELS else None


def explain_former(message: str) -> str | None:
    """What became of the setting that a message of Hydra's says it does not find; None if it never was one."""
    for old, new in _SETTINGS.items():
        if f"'{old}'" in message:
            return f"{old.replace('/', '=', 1)} is not there; it is called {new} now"
    for old, why in {**LEFT, **_STEPS_LEFT}.items():
        if f"'{old}'" in message:
            return f"{old.replace('/', '=', 1)} is there no more: {why}; allowed: without it"
    return None
