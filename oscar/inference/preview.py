"""A small autoencoder that decodes in the VAE's place, for previews."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderTiny

from oscar.models.backbone import from_diffusers
from oscar.models.modules import drop
from oscar.rates import PIXELS_PER_LATENT
from oscar.utils.errors import first_line


def load_tiny_vae(source: str | Path, latent_channels: int, dtype: torch.dtype) -> AutoencoderTiny:
    """The decoder of a small autoencoder, for previews.

    Args:
        source: diffusers folder or hub id of an AutoencoderTiny.
        latent_channels: that it must have.
        dtype: of its weights.

    Raises:
        ValueError: if it cannot be read or does not fit.
    """
    try:
        with from_diffusers():
            vae, report = AutoencoderTiny.from_pretrained(str(source), torch_dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = first_line(error)
        raise ValueError(f"tiny_vae {str(source)!r} cannot be read as an AutoencoderTiny: {reason}") from error
    if report["missing_keys"]:
        raise ValueError(f"tiny_vae {str(source)!r} lacks {min(report['missing_keys'])}")
    factor = vae.config.upsampling_scaling_factor ** (len(vae.config.num_decoder_blocks) - 1)
    if (vae.config.latent_channels, factor) != (latent_channels, PIXELS_PER_LATENT):
        raise ValueError(
            f"tiny_vae {str(source)!r} has {vae.config.latent_channels} latent channels and enlarges by {factor}; "
            f"allowed: {latent_channels} and {PIXELS_PER_LATENT}, as the model's"
        )
    drop(vae, ("encoder",))
    return vae
