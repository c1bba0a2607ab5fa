"""Write the tiny checkpoint that `cases.safetensors` was computed with, in the published checkpoints' own layout.

Usage: python build_checkpoint.py OUT.pkl            (about 95 MB; every value follows from its tensor's name)
"""

import json
import sys
import zlib
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file


def draw(name, shape):
    """Standard normal values of `shape`, seeded by the CRC-32 of `name`."""
    state = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF)
    return torch.from_numpy(state.standard_normal(tuple(shape)).astype(np.float32))


def rule(name, shape):
    """A weight's value: fan-in scaled normal for matrices, near one for gains, near zero for biases."""
    noise = draw(name, shape)
    if len(shape) >= 2:
        return noise / float(np.sqrt(np.prod(shape[1:])))
    return 1 + 0.1 * noise if name.endswith("weight") else 0.1 * noise


def hyper_value(key, shape, dtype):
    if not dtype.is_floating_point or key.endswith(("initted", "cluster_size")):
        return torch.ones(shape, dtype=dtype)
    if key.endswith(("_codebook.embed", "embed_avg")):
        return torch.nn.functional.normalize(draw("hyper." + key.replace("embed_avg", "embed"), shape), dim=-1)
    return rule("hyper." + key, shape)


def unet_value(key, shape, sd_unet):
    if "lora" in key:
        return rule("lora." + key, shape) * 0.3
    return sd_unet[key.replace(".base_layer", "")]


def main(out):
    here = Path(__file__).parent
    manifest = json.loads((here / "tiny_manifest.json").read_text())
    sd_unet = load_file(here / "sd_tiny/unet/diffusion_pytorch_model.safetensors")
    checkpoint = {
        "hyper_encoders": OrderedDict(
            (k, hyper_value(k, shape, getattr(torch, d.removeprefix("torch."))))
            for k, (shape, d) in manifest["hyper_encoders"].items()
        ),
        "embeddings": torch.nn.Parameter(0.02 * draw("embeddings", manifest["top"]["embeddings"][0])),
        **manifest["modules"],
        "rank_unet": manifest["rank_unet"],
        "state_dict_unet": {k: unet_value(k, shape, sd_unet) for k, (shape, _) in manifest["state_dict_unet"].items()},
    }
    torch.save(checkpoint, out)


if __name__ == "__main__":
    main(sys.argv[1])
