"""A codec's parameters by part."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from oscar.codec import OscarCodec


def parameter_counts(codec: OscarCodec) -> list[dict[str, str | float | int | None]]:
    """Rows `part`, `rate`, `parameters` and `note`; all but those with a note sum to the model's parameters."""
    backbone, denoiser = codec.backbone, codec.denoiser
    vae_decoder = _count(*backbone.decoder_modules())
    adapters = sum(value.numel() for name, value in denoiser.unet.named_parameters() if "lora_" in name)
    rows = [
        ("vae_encoder", None, _count(backbone.vae) - vae_decoder, None),
        ("vae_decoder", None, vae_decoder, None),
        ("unet", None, _count(denoiser.unet) - adapters, None),
        ("prompt", None, 0 if denoiser.prompt is None else denoiser.prompt.numel(), None),
    ]
    if denoiser.tuning == "lora" and denoiser.merged:
        rows.append(("adapters", None, _merged_adapters(denoiser), "merged into the unet, not in its total"))
    else:
        rows.append(("adapters", None, adapters, None))
    rows += codec.bottleneck.parameter_counts()
    return [dict(zip(("part", "rate", "parameters", "note"), row, strict=True)) for row in rows]


def _count(*modules) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def _merged_adapters(denoiser) -> int:
    """Parameters that the adapters had: rank * (inputs + outputs) of each layer, of a convolution's kernel too."""
    from oscar.models.denoiser import lora_targets

    weights = [
        denoiser.unet.get_submodule(name).weight for names in lora_targets(denoiser.unet).values() for name in names
    ]
    return denoiser.options["lora_rank"] * sum(weight[0].numel() + weight.shape[0] for weight in weights)
