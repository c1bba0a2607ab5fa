"""A backbone of Stable Diffusion 2.1's shape and a published checkpoint for it, both with random weights.

    python scripts/make_random_model.py random                          # random/backbone, random/oscar.pkl: 4.2 GB
    python scripts/make_random_model.py random --backbone-only
    oscar convert random/oscar.pkl random/model --backbone random/backbone

For trying what full size takes without the weights; the images are noise.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from omegaconf import OmegaConf

from oscar import checkpoint
from oscar.codec import OscarCodec
from oscar.config import config_folder
from oscar.convert.published import export_codec
from oscar.models.backbone import Backbone
from oscar.utils.errors import exit_code


def make(
    out: Path, backbone: str = "sd21_random", bottleneck: str = "paper", seed: int = 0, backbone_only: bool = False
) -> None:
    """Write `out/backbone` (a diffusers folder) and `out/oscar.pkl`.

    Args:
        out: a folder; made if it is not there.
        backbone, bottleneck: names of configurations.
        seed: of all weights.
        backbone_only: write no `oscar.pkl`.
    """
    shapes = OmegaConf.to_container(OmegaConf.load(config_folder() / f"backbone/{backbone}.yaml"))
    sizes = OmegaConf.to_container(OmegaConf.load(config_folder() / f"bottleneck/{bottleneck}.yaml"))
    torch.manual_seed(seed)
    base = Backbone.from_configs(shapes["vae"], shapes["unet"], shapes["scheduler"])
    base.save_pretrained(out / "backbone")
    if backbone_only:
        return
    names = ("width", "features", "codebook_dim")
    codec = OscarCodec(
        *checkpoint.build(
            {
                "bottleneck": {"rates": list(range(len(sizes["rates"]))), **{name: sizes[name] for name in names}},
                "denoiser": {"tuning": "lora"},
                "timesteps": {"kind": "table"},
            },
            base,
        )
    )
    with torch.no_grad():
        for name, value in codec.named_parameters():
            if ".lora_B." in name:  # zero at the start of training, so that adapters would do nothing
                value.normal_(std=0.01)
    export_codec(codec, out / "oscar.pkl")


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder")
    parser.add_argument("--backbone", default="sd21_random", help="configuration with random weights")
    parser.add_argument("--bottleneck", default="paper", help="configuration")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backbone-only", action="store_true", help="to train on")
    options = vars(parser.parse_args(args))
    return exit_code("make_random_model", lambda: make(**options))


if __name__ == "__main__":
    sys.exit(main())
