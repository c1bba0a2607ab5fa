"""Checkpoints of the published implementation (`.pkl`) to ours, and back.

A published checkpoint is a pickle of `hyper_encoders` (one after the other, in the order of the paper's table),
`embeddings` (the prompt), `state_dict_unet` (three LoRA adapters, and conv_in as it came with the backbone), the layers
that each adapter covers and its rank. A file of its stage 1 is the state dict of a single hyper-encoder. `KEYS` says
what becomes of every tensor; a tensor that it does not name, or that is missing, is an error. Files are read as
tensors, numbers and text only: no code in them is run.
"""

from __future__ import annotations

import io
import pickle
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
from oscar.models.backbone import Backbone
from oscar.models.denoiser import ADAPTERS, lora_targets
from oscar.rates import LATENT_SIDE, RATES, RatePoint
from oscar.utils.errors import first_line
from oscar.utils.files import atomic_write

LORA_ALPHA = 8  # PEFT's default, which the published code leaves; not in its files
# Codes of a rate where the published code's table departs from ours.
CODEBOOK_SIZES = {10: 8196}
LAYER_LISTS = {  # published name -> adapter
    "unet_lora_encoder_modules": "default_encoder",
    "unet_lora_decoder_modules": "default_decoder",
    "unet_lora_others_modules": "default_others",
}
TOP = ("hyper_encoders", "embeddings", *LAYER_LISTS, "rank_unet", "state_dict_unet")


class ConvertError(ValueError):
    """A checkpoint that cannot be converted; the message is one line."""


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
    Key("hyper_encoders.{rate}.backbone.{layer}", "bottleneck.hyper_encoders.{rate}.backbone.{layer}"),
    Key(
        "hyper_encoders.{rate}.quantizer.project_in.{part}",
        "bottleneck.hyper_encoders.{rate}.quantizer.project_in.{part}",
    ),
    Key(
        "hyper_encoders.{rate}.quantizer.project_out.{part}",
        "bottleneck.hyper_encoders.{rate}.quantizer.project_out.{part}",
    ),
    Key(
        "hyper_encoders.{rate}.quantizer._codebook.initted",
        "bottleneck.hyper_encoders.{rate}.quantizer._codebook.initted",
        _STATISTIC,
    ),
    Key(
        "hyper_encoders.{rate}.quantizer._codebook.cluster_size",
        "bottleneck.hyper_encoders.{rate}.quantizer._codebook.cluster_size",
        _STATISTIC,
    ),
    Key(
        "hyper_encoders.{rate}.quantizer._codebook.embed_avg",
        "bottleneck.hyper_encoders.{rate}.quantizer._codebook.embed_avg",
        _STATISTIC,
    ),
    Key(
        "hyper_encoders.{rate}.quantizer._codebook.embed", "bottleneck.hyper_encoders.{rate}.quantizer._codebook.embed"
    ),
    Key("hyper_encoders.{rate}.proj.{layer}", "bottleneck.hyper_encoders.{rate}.proj.{layer}"),
    Key("embeddings", "denoiser.prompt"),
    Key("state_dict_unet.conv_in.base_layer.{part}", "denoiser.unet.conv_in.base_layer.{part}", _UNTRAINED),
    Key("state_dict_unet.{layer}.lora_A.default_encoder.weight", "denoiser.unet.{layer}.lora_A.default_encoder.weight"),
    Key("state_dict_unet.{layer}.lora_B.default_encoder.weight", "denoiser.unet.{layer}.lora_B.default_encoder.weight"),
    Key("state_dict_unet.{layer}.lora_A.default_decoder.weight", "denoiser.unet.{layer}.lora_A.default_decoder.weight"),
    Key("state_dict_unet.{layer}.lora_B.default_decoder.weight", "denoiser.unet.{layer}.lora_B.default_decoder.weight"),
    Key("state_dict_unet.{layer}.lora_A.default_others.weight", "denoiser.unet.{layer}.lora_A.default_others.weight"),
    Key("state_dict_unet.{layer}.lora_B.default_others.weight", "denoiser.unet.{layer}.lora_B.default_others.weight"),
)
_PLACEHOLDERS = {"rate": r"\d+", "layer": r".+", "part": r"weight|bias"}

# Spellings that other versions and wrappers give the same tensors: pattern and what it stands for.
RESPELLINGS = (
    (r"(?:^|(?<=\.))(?:module|_orig_mod|base_model\.model)\.", ""),  # Accelerate, torch.compile, PEFT's model class
    (r"^conv_in\.(weight|bias)$", r"conv_in.base_layer.\1"),  # PEFT before 0.6 adapted the layer itself
)


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


class _Published(NamedTuple):
    """What published files hold: tensors by published name, rates in the list's order, options of the networks."""

    tensors: dict[str, Tensor]
    rates: list[RatePoint]
    bottleneck: dict[str, Any]
    denoiser: dict[str, Any]
    layers: dict[str, list[str]]  # by adapter; empty for files of stage 1


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
    published = _parse([Path(source) for source in sources])
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

    Its quantisers' training statistics are fresh, and what it has no place for is left out: frequency tables and the
    encoder's dither.

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
        *(
            (f"stages of rate {rate.bpp:.4f}", codec.bottleneck.at(rate).cell ** 2, 1)
            for rate in codec.bottleneck.rates
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


def read_pickle(path: Path) -> Any:
    """The tensors, numbers and containers in a file that `torch.save` wrote; nothing else in it is run.

    Raises:
        ConvertError: in one line, if it is missing, damaged, or holds anything else.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ConvertError(f"{path}: {error.strerror or first_line(error)}") from None
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            raise ConvertError(
                f"{path}: refused, since it asks for {code[1].rstrip('.')}, which could run code; "
                "allowed: tensors, numbers and text"
            ) from None
        raise ConvertError(f"{path}: damaged, or not a checkpoint of PyTorch") from None
    except Exception as error:  # of the zip reader, of pickle's machine on nonsense, of tensors that do not fit
        raise ConvertError(f"{path}: damaged, or not a checkpoint of PyTorch ({type(error).__name__})") from None


def _parse(sources: Sequence[Path]) -> _Published:
    if not sources:
        raise ConvertError("no source; allowed: a published checkpoint, or files of stage 1")
    contents = [read_pickle(path) for path in sources]
    if len(sources) == 1 and isinstance(contents[0], Mapping) and "hyper_encoders" in contents[0]:
        return _parse_joint(contents[0], sources[0])
    tensors = {}
    for place, (path, content) in enumerate(zip(sources, contents, strict=True)):
        for name, value in _respell(_hyper_encoder(content, path), path).items():
            tensors[f"hyper_encoders.{place}.{name}"] = value
    rates, bottleneck = _rates_and_sizes(tensors, ", ".join(map(str, sources)))
    return _Published(tensors, rates, bottleneck, {"lora_alpha": LORA_ALPHA}, {})


def _parse_joint(content: Mapping, path: Path) -> _Published:
    for name in TOP:
        if name not in content:
            raise ConvertError(f"{path}: lacks {name}; allowed: {', '.join(TOP)}")
    for name in content:
        if name not in TOP:
            raise ConvertError(f"{path}: {name!r} is unknown; allowed: {', '.join(TOP)}")
    layers = {}
    for name, adapter in LAYER_LISTS.items():
        if not isinstance(content[name], list) or not all(isinstance(layer, str) for layer in content[name]):
            raise ConvertError(f"{path}: {name} is no list of layers")
        layers[adapter] = content[name]
    rank, prompt = content["rank_unet"], content["embeddings"]
    if type(rank) is not int or rank < 1:
        raise ConvertError(f"{path}: rank_unet is {rank!r}; allowed: whole numbers from 1 up")
    if not isinstance(prompt, Tensor) or prompt.dim() != 2:
        raise ConvertError(f"{path}: embeddings is no tensor of tokens by channels")
    tensors = {"embeddings": prompt.detach()}
    adapters = {layer: adapter for adapter, names in layers.items() for layer in names}
    for part in ("hyper_encoders", "state_dict_unet"):
        for name, value in _respell(content[part], path, adapters).items():
            tensors[f"{part}.{name}"] = value
    for name, value in tensors.items():
        lora = re.search(r"\.lora_([AB])\.", name)
        if lora and (value.dim() < 2 or value.shape[lora[1] == "B"] != rank):
            raise ConvertError(f"{path}: {name} has shape {tuple(value.shape)}; allowed: of rank_unet, {rank}")
    rates, bottleneck = _rates_and_sizes(tensors, str(path))
    denoiser = {"lora_rank": rank, "lora_alpha": LORA_ALPHA, "prompt_tokens": len(prompt)}
    return _Published(tensors, rates, bottleneck, denoiser, layers)


def _hyper_encoder(content: Any, path: Path) -> Mapping:
    """The state dict of one hyper-encoder, also where it is the only entry of another dict."""
    if isinstance(content, Mapping) and len(content) == 1:
        content = next(iter(content.values()))
    if not isinstance(content, Mapping) or not any(str(name).endswith("_codebook.embed") for name in content):
        raise ConvertError(
            f"{path}: neither a published checkpoint (it would hold {TOP[0]}) nor a hyper-encoder of stage 1"
        )
    return content


def _respell(state: Any, path: Path, adapters: Mapping[str, str] | None = None) -> dict[str, Tensor]:
    """A state dict in today's spelling.

    Args:
        state: names to tensors.
        path: its file, for messages.
        adapters: adapter by layer, for names without one, as PEFT's own `get_peft_model_state_dict` writes them.
    """
    if not isinstance(state, Mapping):
        raise ConvertError(f"{path}: holds a {type(state).__name__} where tensors by name are allowed")
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ConvertError(f"{path}: {name!r} is no tensor")
        for pattern, replacement in RESPELLINGS:
            name = re.sub(pattern, replacement, name)
        if match := re.fullmatch(r"(.+)(\.lora_[AB])\.weight", name):
            name = f"{match[1]}{match[2]}.{(adapters or {}).get(match[1], 'unknown')}.weight"
        if name in result:
            raise ConvertError(f"{path}: {name} is there twice")
        result[name] = _with_heads(name, value.detach())
    return result


def _with_heads(name: str, value: Tensor) -> Tensor:
    """Codebooks had no dimension of heads before vector-quantize-pytorch 0.10, and `initted` had one before 1.27."""
    field = name.rpartition("_codebook.")[2] if "_codebook." in name else ""
    dimensions = {"embed": 3, "embed_avg": 3, "cluster_size": 2}.get(field)
    if field == "initted":
        return value.reshape(()) if value.numel() == 1 else value
    return value[None] if dimensions == value.dim() + 1 else value


def _rates_and_sizes(tensors: Mapping[str, Tensor], where: str) -> tuple[list[RatePoint], dict[str, Any]]:
    """The rates of the hyper-encoders, told by their weights' shapes, and the sizes that they share."""
    rates: list[RatePoint] = []
    sizes: dict[str, Any] = {}
    codebook_sizes = {}
    places = {int(match[1]) for name in tensors if (match := re.match(r"hyper_encoders\.(\d+)\.", name))}
    if not places or places != set(range(len(places))):
        raise ConvertError(f"{where}: holds hyper-encoders {sorted(places)}; allowed: 0, 1 and so on")
    for place in sorted(places):
        prefix = f"hyper_encoders.{place}."
        try:
            shapes = [
                tuple(tensors[f"{prefix}{name}"].shape)
                for name in (
                    "backbone.0.weight",
                    "backbone.4.weight",
                    "backbone.9.weight",
                    "quantizer.project_in.weight",
                    "quantizer._codebook.embed",
                )
            ]
            grid = LATENT_SIDE >> sum(shape[2] > 1 for shape in shapes[:3])
            sizes = {"width": shapes[0][0], "features": shapes[3][1], "codebook_dim": shapes[3][0]}
            codes = shapes[4][1]
        except (KeyError, IndexError) as error:
            what = f"lacks {error.args[0]}" if isinstance(error, KeyError) else "has tensors of too few dimensions"
            raise ConvertError(f"{where}: hyper-encoder {place} {what}") from None
        found = [
            rate for rate in RATES if rate.grid == grid and codes in (rate.codebook_size, CODEBOOK_SIZES.get(rate.id))
        ]
        if not found or found[0] in rates:
            allowed = ", ".join(f"{rate.grid} with {rate.codebook_size}" for rate in RATES if rate not in rates)
            raise ConvertError(
                f"{where}: hyper-encoder {place} has grid {grid} and {codes} codes, of which there is "
                f"{'another' if found else 'no rate'}; allowed: {allowed}"
            )
        rates.append(found[0])
        if codes != found[0].codebook_size:
            codebook_sizes[found[0].id] = codes
    return rates, {**sizes, "codebook_sizes": codebook_sizes}


# Fitting it to a backbone.


def _build(published: _Published, backbone: Backbone, timesteps: Mapping[str, Any], where: str) -> OscarCodec:
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


def _match(published: _Published, codec: OscarCodec, where: str) -> dict[str, tuple[Tensor, Key]]:
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
