"""Checkpoints of the published implementation (`.pkl`) to ours, and back.

A published checkpoint is a pickle of `hyper_encoders` (one after the other, in the order of the paper's table),
`embeddings` (the prompt), `state_dict_unet` (three LoRA adapters, and conv_in as it came with the backbone), the layers
that each adapter covers and its rank. A file of its stage 1 is the state dict of a single hyper-encoder. `KEYS` says
what becomes of every tensor; a tensor that it does not name, or that is missing, is an error.
"""

from __future__ import annotations

import io
import re
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from oscar import checkpoint
from oscar.bottlenecks.vq import need_rates
from oscar.codec import OscarCodec
from oscar.convert.published_files import LAYER_LISTS, LORA_ALPHA, ConvertError, Published, read_published
from oscar.models.backbone import Backbone
from oscar.models.denoiser import ADAPTERS, lora_targets
from oscar.rates import RatePoint
from oscar.utils.errors import first_line
from oscar.utils.files import atomic_write


class Key(NamedTuple):
    """One row of the key table.

    Attributes:
        published: name in a published checkpoint, parts joined by dots.
        ours: name in `OscarCodec.state_dict()`.
        unused: why a native checkpoint has no use for it; empty for what it keeps. Such tensors may be missing.
    """

    published: str
    ours: str
    unused: str = ""


_STATISTIC = "a statistic of the quantiser that only training reads"
_UNTRAINED = "the backbone's own, saved but never trained; compared with the backbone's"
# {rate} is a hyper-encoder's place in the published list and the rate's id in ours; {layer} and {part} are the same.
KEYS = (
    *(
        Key(f"hyper_encoders.{{rate}}.{name}", f"bottleneck.hyper_encoders.{{rate}}.{name}", unused)
        for name, unused in (
            ("backbone.{layer}", ""),
            ("quantizer.project_in.{part}", ""),
            ("quantizer.project_out.{part}", ""),
            ("quantizer._codebook.initted", _STATISTIC),
            ("quantizer._codebook.cluster_size", _STATISTIC),
            ("quantizer._codebook.embed_avg", _STATISTIC),
            ("quantizer._codebook.embed", ""),
            ("proj.{layer}", ""),
        )
    ),
    Key("embeddings", "denoiser.prompt"),
    Key("state_dict_unet.conv_in.base_layer.{part}", "denoiser.unet.conv_in.base_layer.{part}", _UNTRAINED),
    *(
        Key(f"state_dict_unet.{{layer}}.{name}.weight", f"denoiser.unet.{{layer}}.{name}.weight")
        for name in (f"{side}.{adapter}" for adapter in LAYER_LISTS.values() for side in ("lora_A", "lora_B"))
    ),
)
_PLACEHOLDERS = {"rate": r"\d+", "layer": r".+", "part": r"weight|bias"}


class Conversion(NamedTuple):
    """A published checkpoint as a codec of ours.

    Attributes:
        codec: in evaluation mode, in float32 on the CPU, adapters not merged.
        used: number of tensors taken over.
        unused: number of tensors that were not, by the reason.
    """

    codec: OscarCodec
    used: int
    unused: dict[str, int]


def convert(
    sources: Sequence[str | Path],
    out: str | Path,
    backbone: str | Path,
    timesteps: Mapping[str, Any] | None = None,
    bundle: bool = False,
    dtype: torch.dtype | None = None,
) -> Conversion:
    """Convert a published checkpoint, or hyper-encoders of its stage 1, to a native checkpoint folder.

    Args:
        sources: one published checkpoint, or files of stage 1, one for each rate. From these comes what the native
            stage `bottleneck` gives: the denoiser is at its start, for stage `joint` to train.
        out: the folder; it appears whole or not at all.
        backbone: diffusers folder or hub id of the backbone that it was trained on.
        timesteps: mapping from rate to pseudo-timestep as in a config; None takes the paper's table.
        bundle: store the backbone in the folder too, which then needs nothing else; otherwise it is only named.
        dtype: floating-point type of the files, None for float32.

    Raises:
        ConvertError: for a source that cannot be used, or that does not fit the backbone.
        BackboneError: for a backbone that cannot be read.
        CheckpointError: if `out` is taken by something else.
    """
    conversion = from_published(sources, backbone, timesteps)
    if bundle:
        conversion.codec.backbone.source = None
    conversion.codec.save_pretrained(out, dtype)
    return conversion


def from_published(
    sources: Sequence[str | Path], backbone: str | Path, timesteps: Mapping[str, Any] | None = None
) -> Conversion:
    """The codec of a published checkpoint, or of hyper-encoders of its stage 1; arguments as for `convert`."""
    published = read_published([Path(source) for source in sources])
    if Path(backbone).is_dir():
        backbone = Path(backbone).resolve()  # the checkpoint names it, and is read from anywhere
    where = ", ".join(str(source) for source in sources)
    codec = _build(published, Backbone.from_pretrained(backbone), timesteps or {"kind": "table"}, where)
    used, unused = 0, Counter()
    with torch.no_grad():
        for name, (target, key) in _match(published, codec, where).items():
            value = published.tensors.get(name)
            if value is None:
                continue
            if key.unused:
                unused[key.unused] += 1
                if name.startswith("state_dict_unet.") and not _equal(value, target):
                    raise ConvertError(
                        f"{where}: {name} differs from that of backbone {backbone}; allowed: the backbone that it was "
                        "trained on"
                    )
                continue
            if not torch.isfinite(value).all():
                raise ConvertError(f"{where}: {name} has values that are not finite")
            target.copy_(value)
            used += 1
    return Conversion(codec.eval(), used, dict(unused))


def to_published(codec: OscarCodec) -> dict[str, Any]:
    """The contents of a published checkpoint; `torch.save` of it is what `from_published` reads.

    Its quantisers' training statistics are fresh, and frequency tables, for which it has no place, are left out.

    Args:
        codec: with LoRA of the paper's scale, adapters not merged, and the paper's timesteps; its tensors are shared.

    Raises:
        ConvertError: for a codec that the published implementation could not run alike.
    """
    options = codec.denoiser.options
    for name, found, allowed in (
        ("denoiser.tuning", options["tuning"], "lora"),
        ("denoiser.lora_alpha", options["lora_alpha"], LORA_ALPHA),
        ("denoiser.prompt", "none" if codec.denoiser.prompt is None else "learned", "learned"),
        ("timesteps", codec.mapping.kind, "table"),
        *(
            (f"timestep of rate {rate.bpp:.4f}", codec.mapping(rate), rate.timestep)
            for rate in codec.bottleneck.rates
            if codec.mapping.kind == "table"
        ),
    ):
        if found != allowed:
            raise ConvertError(f"{name} is {found!r}; allowed in a published checkpoint: {allowed!r}")
    if codec.denoiser.merged:
        raise ConvertError("the adapters are merged into the UNet; allowed: a codec of OscarCodec.from_pretrained")
    parts: dict[str, OrderedDict] = {"hyper_encoders": OrderedDict(), "state_dict_unet": OrderedDict()}
    tensors = {name: value.detach() for name, (value, _) in published_tensors(codec, codec.bottleneck.rates).items()}
    prompt = torch.nn.Parameter(tensors.pop("embeddings"))
    for name, value in tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = value
    layers: dict[str, list[str]] = {adapter: [] for adapter in ADAPTERS}
    for name in parts["state_dict_unet"]:
        if match := re.fullmatch(r"(.+)\.lora_A\.(\w+)\.weight", name):
            layers[match[2]].append(match[1])
    return {
        "hyper_encoders": parts["hyper_encoders"],
        "embeddings": prompt,
        **{name: layers[adapter] for name, adapter in LAYER_LISTS.items()},
        "rank_unet": options["lora_rank"],
        "state_dict_unet": dict(parts["state_dict_unet"]),
    }


def export(source: str | Path, out: str | Path) -> OscarCodec:
    """Write a native checkpoint as a published one.

    Args:
        source: folder or hub id of the native checkpoint.
        out: the `.pkl` file; it appears whole or not at all.

    Returns:
        The native checkpoint's codec.

    Raises:
        CheckpointError: if the source cannot be read.
        ConvertError: if the published layout has no place for it.
    """
    codec = OscarCodec.from_pretrained(source)
    try:
        need_rates(codec.bottleneck, "the published layout")
        export_codec(codec, out)
    except ValueError as error:
        raise ConvertError(f"model {str(source)!r}: {error}") from None
    return codec


def export_codec(codec: OscarCodec, out: str | Path) -> None:
    """Write a codec as a published checkpoint; see `to_published` and `export`."""
    buffer = io.BytesIO()
    torch.save(to_published(codec), buffer)
    atomic_write(Path(out), buffer.getbuffer())


def published_tensors(codec: OscarCodec, rates: Sequence[RatePoint]) -> dict[str, tuple[Tensor, Key]]:
    """A codec's own tensors, not copies, by their published names, with their rows of `KEYS`.

    Args:
        codec: the codec, adapters not merged.
        rates: in the published list's order.
    """
    places = {str(rate.id): str(place) for place, rate in enumerate(rates)}
    patterns = [(_pattern(key.ours), key) for key in KEYS]
    result = {}
    for name, value in codec.state_dict(keep_vars=True).items():
        for pattern, key in patterns:
            if match := pattern.fullmatch(name):
                fields = match.groupdict()
                if "rate" in fields:
                    fields["rate"] = places[fields["rate"]]
                if name == "denoiser.prompt":
                    value = value[0]  # without the dimension of the batch
                result[key.published.format(**fields)] = (value, key)
                break
    return result


# Reading.


# Fitting it to a backbone.


def _build(published: Published, backbone: Backbone, timesteps: Mapping[str, Any], where: str) -> OscarCodec:
    if published.layers:
        targets = lora_targets(backbone.unet)
        for adapter, layers in published.layers.items():
            if odd := set(layers) ^ set(targets.get(adapter, [])):
                which = "lacks" if min(odd) in layers else "has"
                raise ConvertError(
                    f"{where}: backbone {backbone.source} {which} layer {min(odd)} of adapter {adapter}; allowed: the "
                    "backbone that it was trained on"
                )
    ids = sorted(rate.id for rate in published.rates)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # for what files of stage 1 do not hold
            return OscarCodec(
                *checkpoint.build(
                    {
                        "bottleneck": {"rates": ids, **published.bottleneck},
                        "denoiser": {"tuning": "lora", **published.denoiser},
                        "timesteps": timesteps,
                    },
                    backbone,
                )
            )
    except ValueError as error:  # a mapping without one of the rates
        raise ConvertError(f"{where}: {first_line(error)}") from None


def _match(published: Published, codec: OscarCodec, where: str) -> dict[str, tuple[Tensor, Key]]:
    """The codec's tensors under their published names, once each of the files' fits one of them."""
    expected = published_tensors(codec, published.rates)
    if not published.layers:
        expected = {name: entry for name, entry in expected.items() if name.startswith("hyper_encoders.")}
    required = {name for name, (_, key) in expected.items() if not key.unused}
    for problem, names in (
        ("lacks", required - published.tensors.keys()),
        ("has unknown", published.tensors.keys() - expected.keys()),
    ):
        if names:
            raise ConvertError(f"{where}: {problem} {min(names)} ({len(names)} tensors in all)")
    for name, value in published.tensors.items():
        target, key = expected[name]
        if value.shape != target.shape:
            raise ConvertError(f"{where}: {name} has shape {tuple(value.shape)}; allowed: {tuple(target.shape)}")
        if value.is_floating_point() != target.is_floating_point() and not key.unused:
            raise ConvertError(f"{where}: {name} is {value.dtype}; allowed: {target.dtype}")
    return expected


def _equal(value: Tensor, own: Tensor) -> bool:
    """Whether a saved weight of the backbone is the backbone's, where either may have been rounded to 16 bits."""
    return any(torch.equal(value.to(dtype), own.to(dtype)) for dtype in (torch.float32, torch.float16, torch.bfloat16))


def _pattern(name: str) -> re.Pattern:
    """A row's name with its placeholders as named groups."""
    pattern = re.escape(name)
    for field, expression in _PLACEHOLDERS.items():
        pattern = pattern.replace(re.escape(f"{{{field}}}"), f"(?P<{field}>{expression})")
    return re.compile(pattern)
