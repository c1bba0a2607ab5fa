"""Native checkpoints: a folder of safetensors and JSON.

    oscar.json          format, architecture, pseudo-timesteps, backbone, fingerprint, hashes of the weight files, and
                        how it was trained (`oscar.provenance`)
    oscar.safetensors   bottleneck.*, denoiser.* (adapters and prompt), frequencies.* (integer tables by rate id) and,
                        where there are any, context.* (integer context models by rate id); with a hyperprior coder.*
                        (its integers) in place of tables
    vae/ unet/ scheduler/   the backbone as diffusers writes it, where it is bundled (trained here); else named by id

Loading accounts for every tensor: a missing or an unknown one is an error.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file, save_file
from torch import Tensor

from oscar.bitstream.context import ContextModel
from oscar.bitstream.entropy import check_frequencies
from oscar.bitstream.hyperprior import HyperpriorCoder
from oscar.errors import first_line, hub_reason
from oscar.models.backbone import Backbone, BackboneError, Half
from oscar.models.denoiser import Denoiser, lora_targets
from oscar.models.hyper_encoder import VQBottleneck
from oscar.models.hyperprior import HyperpriorBottleneck
from oscar.models.inference import merge_lora
from oscar.models.loading import WeightsError, count_numbers, drop, fill, part_files, read_tensors, tensor_names
from oscar.provenance import MODEL, SHIPPED
from oscar.rates import rate_by_id
from oscar.timesteps import mapping_from_config

if TYPE_CHECKING:
    from oscar.codec import OscarCodec

FORMAT = 1
CONFIG, WEIGHTS = MODEL, "oscar.safetensors"
LARGE_MODEL = 100_000_000  # parameters from which a narrow precision pays
# Statistics that only training reads, and CompressAI's tables, for which checkpoints keep the codes, or integers,
# themselves; and its constants, of which float16 would make a least likelihood of 0.
_TRAINING_ONLY = ("cluster_size", "embed_avg", "initted", "_quantized_cdf", "_cdf_length", "_offset", "scale_table",
                  ".bound", "scale_bound", "side_model.target", "side_model.quantiles")  # fmt: skip
_DECODER_HALF = (".quantizer._codebook.embed", ".quantizer.codebook", ".quantizer.project_out.", ".proj.",
                 ".log_inverse")  # fmt: skip
# Modules of a hyper-encoder and of its quantiser that a half of the codec does without.
_UNUSED = {"both": (), "encoder": ("proj", "project_out"), "decoder": ("backbone", "project_in")}
# Modules of a hyperprior that its integers stand for, and that a half does without.
_TWINS = ("up1", "up2", "predictors", "side_model", "value_model")
_UNUSED_CONTINUOUS = {"both": _TWINS, "encoder": _TWINS, "decoder": (*_TWINS, "hyper_encoder")}


class CheckpointError(ValueError):
    """A checkpoint that cannot be found, read or used."""


def build(config: dict, backbone: Backbone) -> OscarCodec:
    """A codec of the architecture in `config` (keys bottleneck, denoiser, timesteps) on a backbone, untrained."""
    bottleneck = _build_bottleneck(config, backbone)
    denoiser = Denoiser(backbone.unet, backbone.schedule, **config["denoiser"])
    return _codec_class(bottleneck)(backbone, bottleneck, denoiser, mapping_from_config(config["timesteps"]))


def _codec_class(bottleneck: VQBottleneck | HyperpriorBottleneck) -> type[OscarCodec]:
    from oscar.codec import OscarCodec
    from oscar.continuous import ContinuousCodec

    return ContinuousCodec if isinstance(bottleneck, HyperpriorBottleneck) else OscarCodec


def _build_bottleneck(config: dict, backbone: Backbone) -> VQBottleneck | HyperpriorBottleneck:
    options = dict(config["bottleneck"])
    if options.get("kind") == HyperpriorBottleneck.kind:
        del options["kind"]
        return HyperpriorBottleneck(backbone.latent_channels, **options)
    rates = [rate_by_id(rate_id) for rate_id in options.pop("rates")]
    by_rate = {name: {int(key): value for key, value in options.pop(name, {}).items()}
               for name in ("codebook_sizes", "dither", "stages")}  # fmt: skip
    return VQBottleneck(rates, **by_rate, latent_channels=backbone.latent_channels, **options)


def describe(codec: OscarCodec) -> dict:
    """The architecture in JSON-able form, the inverse of `build`."""
    return {
        "bottleneck": codec.bottleneck.describe(),
        "denoiser": codec.denoiser.options,
        "timesteps": codec.mapping.to_config(),
    }


def tensors(codec: OscarCodec) -> dict[str, Tensor]:
    """The tensors of the weights file, without the bundled backbone's."""
    result = {
        f"bottleneck.{name}": value
        for name, value in codec.bottleneck.state_dict().items()
        if not name.endswith(_TRAINING_ONLY)
    }
    if codec.denoiser.prompt is not None:
        result["denoiser.prompt"] = codec.denoiser.prompt.detach()
    if codec.denoiser.tuning == "lora":
        if codec.denoiser.merged:
            raise CheckpointError("the adapters are merged into the UNet; save the checkpoint before merging")
        result.update(
            {f"denoiser.{name}": value for name, value in codec.denoiser.unet.state_dict().items() if "lora_" in name}
        )
    for rate_id, table in codec.frequencies.items():
        result[f"frequencies.{rate_id}"] = torch.from_numpy(np.asarray(table, dtype=np.int32).copy())
    for rate_id, model in codec.contexts.items():
        arrays = model.arrays().items()
        result.update({f"context.{rate_id}.{name}": torch.from_numpy(value.copy()) for name, value in arrays})
    if isinstance(codec.bottleneck, HyperpriorBottleneck) and codec.bottleneck.coder is not None:
        arrays = codec.bottleneck.coder.arrays().items()
        result.update({f"coder.{name}": torch.from_numpy(value.copy()) for name, value in arrays})
    return {name: value.detach().cpu().contiguous() for name, value in result.items()}


def bundles_backbone(codec: OscarCodec) -> bool:
    """Whether the backbone's weights go into the checkpoint: if trained here or of no source."""
    return codec.denoiser.tuning == "full" or codec.backbone.source is None


def fingerprint(codec: OscarCodec, dtype: torch.dtype | None = None) -> str:
    """SHA-256 of all that decoding depends on but for context models, in hexadecimal.

    Covers, with names, types and shapes: the architecture, the decoder half of the bottleneck, adapters and prompt, the
    frequency tables, and the UNet and VAE decoder where they are bundled; of a backbone that is only named, an evenly
    spaced sample of each tensor.

    Args:
        codec: the codec.
        dtype: floating-point type in which the weights are saved, None for their own.
    """
    digest = hashlib.sha256(json.dumps(describe(codec), allow_nan=False, sort_keys=True).encode())
    digest.update(json.dumps(codec.backbone.schedule.config, allow_nan=False, sort_keys=True).encode())
    digest.update(repr(codec.backbone.vae.config.scaling_factor).encode())
    own = {
        name: value
        for name, value in tensors(codec).items()
        if not name.startswith(("bottleneck.", "context.")) or any(part in name for part in _DECODER_HALF)
    }
    bundled = bundles_backbone(codec)
    state = {f"unet.{name}": value for name, value in codec.backbone.unet.state_dict().items() if "lora_" not in name}
    state.update(
        {
            f"vae.{name}": value
            for name, value in codec.backbone.vae.state_dict().items()
            if name.startswith(("decoder.", "post_quant_conv."))
        }
    )
    for name, value in sorted({**own, **state}.items()):
        value = _cast(value.detach().cpu(), dtype)
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
        if name in state and not bundled:
            value = value.flatten()[:: max(1, value.numel() // 64)]
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save(codec: OscarCodec, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write a checkpoint folder; it appears whole or not at all, and replaces an earlier checkpoint of that name.

    Args:
        codec: the codec, its adapters not merged.
        folder: where to; its parents are made.
        dtype: floating-point type of the file, None for the weights' own.

    Raises:
        CheckpointError: if the folder exists and is not a checkpoint.
    """
    if codec.half != "both":
        raise CheckpointError(f"half is {codec.half!r}, so the other one is not there to be saved; allowed: both")
    folder = Path(folder)
    if folder.exists() and not (folder / CONFIG).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists and is not an OSCAR checkpoint; allowed: a new folder or a checkpoint")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        save_file({name: _cast(value, dtype) for name, value in tensors(codec).items()}, temporary / WEIGHTS)
        bundled = bundles_backbone(codec)
        if bundled:
            part = copy.copy(codec.backbone)
            part._modules = dict(codec.backbone._modules)
            if dtype is not None:
                part.vae, part.unet = (torch.nn.Module.to(copy.deepcopy(m), dtype) for m in (part.vae, part.unet))
            part.save_pretrained(temporary)
        config = {
            "format": FORMAT,
            **describe(codec),
            "backbone": None if bundled else codec.backbone.source,
            **({} if bundled or not codec.backbone.digests else {"backbone_sha256": codec.backbone.digests}),
            **({} if codec.provenance is None else {"provenance": codec.provenance}),
            "fingerprint": fingerprint(codec, dtype),
            "sha256": {
                path.relative_to(temporary).as_posix(): _sha256(path) for path in temporary.rglob("*.safetensors")
            },
        }
        (temporary / CONFIG).write_text(json.dumps(config, allow_nan=False, indent=2, sort_keys=True) + "\n")
        os.chmod(temporary, 0o755)  # mkdtemp's folder is private, and so are safetensors' files
        for path in temporary.rglob("*.safetensors"):
            os.chmod(path, 0o644)
        _replace_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load(source: str | Path, backbone: str | Path | None = None) -> OscarCodec:
    """Read a checkpoint, ready for training (adapters not merged), in float32 on the CPU.

    Args:
        source: name of a shipped model ("nano"), a folder, or a hub id.
        backbone: where the backbone is now that the checkpoint names, if it has moved. It must be the same one.

    Raises:
        CheckpointError: if it cannot be found, is damaged, or does not fit its description.
    """
    with _reading(source) as (folder, config):
        _check_hashes(folder, config["sha256"])
        codec = build(config, _read_backbone(folder, config, backbone))
        state = load_file(folder / WEIGHTS)
        _identify(codec, config)
        _fill(codec, state)
        if backbone is not None and "backbone_sha256" not in config and fingerprint(codec) != config["fingerprint"]:
            raise CheckpointError(f"backbone {str(backbone)!r} is not the one that this checkpoint was made with")
    return codec


def load_merged(
    source: str | Path,
    half: Half = "both",
    dtype: torch.dtype = torch.float32,
    backbone: str | Path | None = None,
    large_dtype: torch.dtype | None = None,
) -> OscarCodec:
    """Read a checkpoint for inference: the adapters in the UNet's weights, and of a half only what that half uses.

    What the other half alone uses is not read, nor are its files checked.

    Args:
        source: name of a shipped model ("nano"), a folder, or a hub id.
        half: "encoder" can only compress, "decoder" only decompress.
        dtype: of the networks.
        backbone: as `load`.
        large_dtype: in its place for models of `LARGE_MODEL` parameters and more, if given.

    Raises:
        CheckpointError: as `load`.
    """
    with _reading(source) as (folder, config):
        path, mapping = folder / WEIGHTS, mapping_from_config(config["timesteps"])
        _check_hashes(folder, {name: digest for name, digest in config["sha256"].items()
                               if half != "encoder" or not name.startswith("unet/")})  # fmt: skip
        if large_dtype not in (None, dtype) and count_parameters(folder, config, backbone) >= LARGE_MODEL:
            dtype = large_dtype
        stored = tensor_names(path)
        adapters = {}
        if half != "encoder":
            names = [name for name in stored if "lora_" in name]
            adapters = {name.removeprefix("denoiser."): value for name, value in read_tensors(path, names)}
        scale = config["denoiser"]["lora_alpha"] / config["denoiser"]["lora_rank"]
        if backbone is not None and "backbone_sha256" not in config:
            load(source, backbone)  # of checkpoints from before, only all of it together tells
        backbone = _read_backbone(folder, config, backbone, half, dtype, merge_lora(adapters, scale))
        small = config["bottleneck"].get("kind") == HyperpriorBottleneck.kind  # CompressAI's models cannot be empty
        with contextlib.nullcontext() if small else init_empty_weights():
            bottleneck = _build_bottleneck(config, backbone)
        expected = {f"bottleneck.{name}" for name in bottleneck.state_dict() if not name.endswith(_TRAINING_ONLY)}
        if half == "encoder":
            denoiser = None
            stored = [name for name in stored if not name.startswith("denoiser.")]
        else:
            denoiser = Denoiser(backbone.unet, backbone.schedule, **config["denoiser"], merged=True)
            expected |= {"denoiser.prompt"} if denoiser.prompt is not None else set()
            expected |= _adapter_names(denoiser)
        codec = _codec_class(bottleneck)(backbone, bottleneck, denoiser, mapping)
        contexts, integers = ([name for name in stored if name.startswith(part)] for part in ("context.", "coder."))
        expected |= {f"frequencies.{rate_id}" for rate_id in codec.frequencies}
        _check_names(set(stored) - {*contexts, *integers}, expected)
        if isinstance(bottleneck, HyperpriorBottleneck):
            drop(bottleneck, _UNUSED_CONTINUOUS[half])
        if not (half == "encoder" and mapping.per_picture):  # that encoder decodes z_hat to measure the timestep
            for rate in codec.rates:
                drop(bottleneck.at(rate), _UNUSED[half])
                drop(bottleneck.at(rate).quantizer, _UNUSED[half])
        own = [name for name in codec.state_dict() if name in expected]
        fill(codec, {name: (path, name) for name in own}, WEIGHTS, dtype, names=own)
        codec.half = half
        _identify(codec, config)
        _set_frequencies(codec, read_tensors(path, [name for name in stored if name.startswith("frequencies.")]))
        _set_contexts(codec, dict(read_tensors(path, contexts)))
        _set_coder(codec, dict(read_tensors(path, integers)))
    return codec


def read_description(source: str | Path) -> tuple[Path, dict]:
    """The folder of a checkpoint and what its JSON says, without its weights.

    Raises:
        CheckpointError: if it cannot be found or read.
    """
    with _reading(source) as (folder, config):
        return folder, config


def content_hash(source: str | Path) -> str:
    """What tells a checkpoint's contents from another's, wherever they lie: 16 hexadecimal digits.

    Raises:
        CheckpointError: if it cannot be found or read.
    """
    _, config = read_description(source)
    content = {name: value for name, value in config.items() if name not in ("backbone", "provenance")}
    return hashlib.sha256(json.dumps(content, allow_nan=False, sort_keys=True).encode()).hexdigest()[:16]


def _read_backbone(folder: Path, config: dict, moved: str | Path | None, *options) -> Backbone:
    """The backbone of a checkpoint from where it is, with the options of `Backbone.from_pretrained`.

    Raises:
        CheckpointError: if it is not there, or not the one that the checkpoint was made with.
    """
    named = config["backbone"]
    if named is None:
        if moved is not None:
            raise CheckpointError(f"backbone is {str(moved)!r}, but the checkpoint holds its own; allowed: none")
        return Backbone.from_pretrained(folder, *options)
    try:
        backbone = Backbone.from_pretrained(moved or named, *options)
    except BackboneError as error:
        raise CheckpointError(f"{error}; if it is elsewhere now: backbone=FOLDER in Python, --backbone FOLDER "
                              "of oscar, backbone.source=FOLDER in training") from None  # fmt: skip
    stored = config.get("backbone_sha256", {})
    for part, digest in backbone.digests.items():
        if stored.get(part, digest) != digest:
            place = str(moved or named)
            raise CheckpointError(f"backbone {place!r} is not the one that this checkpoint was made with: "
                                  f"its {part} has other weights")  # fmt: skip
    return backbone


def count_parameters(folder: Path, config: dict, moved: str | Path | None = None) -> float:
    """Numbers in the files of a checkpoint and its backbone; infinity if the backbone's are on the hub, or in no
    safetensors files. Both halves of a model have the same count."""
    own = sum(count_numbers(folder / name) for name in config["sha256"])
    if config["backbone"] is None:
        return own
    source = str(moved or config["backbone"])
    places = [part_files(source, part) if Path(source).is_dir() else {} for part in ("vae", "unet")]
    if not all(places):
        return math.inf
    return own + sum(count_numbers(path) for part in places for path in {path for path, _ in part.values()})


@contextlib.contextmanager
def _reading(source: str | Path) -> Iterator[tuple[Path, dict]]:
    """The folder and description of a checkpoint; all that fails while it is read becomes a CheckpointError."""
    folder = locate(source)
    try:
        config = json.loads((folder / CONFIG).read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"model {str(source)!r}: {CONFIG} cannot be read ({error})") from None
    version = config.get("format") if isinstance(config, dict) else None
    if version != FORMAT:
        raise CheckpointError(f"model {str(source)!r}: format is {version!r}; allowed: {FORMAT}")
    try:
        yield folder, config
    except (CheckpointError, BackboneError, WeightsError) as error:
        raise CheckpointError(f"model {str(source)!r}: {error}") from None
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"model {str(source)!r} cannot be read: {type(error).__name__}: {error}") from None


def _check_hashes(folder: Path, hashes: dict[str, str]) -> None:
    for name, expected in {WEIGHTS: None, **hashes}.items():
        if _sha256(folder / name) != expected:
            raise CheckpointError(f"{name} is damaged (its SHA-256 is not that of {CONFIG})")


def _identify(codec: OscarCodec, config: dict) -> None:
    """Take the identity from the description: half a codec cannot compute it."""
    codec._fingerprint = f"{int(config['fingerprint'], 16):064x}"
    codec.provenance = config.get("provenance")
    if config["backbone"] is None:
        codec.backbone.source = None


def locate(source: str | Path) -> Path:
    """The folder of a shipped model, a local folder, or a hub id (downloaded), in this order."""
    shipped = SHIPPED / str(source)
    for folder in (shipped, Path(source)):
        if (folder / CONFIG).is_file():
            return folder
    if Path(source).is_dir():
        raise CheckpointError(f"model {str(source)!r} is a folder without {CONFIG}; allowed: an OSCAR checkpoint")
    names = sorted(path.parent.name for path in SHIPPED.glob(f"*/{CONFIG}"))
    allowed = f"allowed: {', '.join([*names, 'a checkpoint folder', 'a hub id'])}"
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # the hub client raises its HTTP library's errors too
        raise CheckpointError(f"model {str(source)!r} does not exist: {hub_reason(error)}; {allowed}") from None


def _fill(codec: OscarCodec, state: dict[str, Tensor]) -> None:
    contexts, integers = ({name: state.pop(name) for name in list(state) if name.startswith(part)}
                          for part in ("context.", "coder."))  # fmt: skip
    expected = tensors(codec)
    _check_names(state, expected)
    for name, value in state.items():
        if value.shape != expected[name].shape:
            raise CheckpointError(
                f"{name} has shape {tuple(value.shape)}; allowed: {tuple(expected[name].shape)}"
            )
    codec.load_state_dict(
        {
            (name if name.startswith("bottleneck") else name.replace("denoiser.", "denoiser.unet.", 1)
             if name != "denoiser.prompt" else name): value.float()
            for name, value in state.items()
            if not name.startswith("frequencies.")
        },
        strict=False,
    )  # fmt: skip
    for rate in codec.rates:
        codec.bottleneck.at(rate).keep_codes()
    _set_frequencies(codec, ((name, value) for name, value in state.items() if name.startswith("frequencies.")))
    _set_contexts(codec, contexts)
    _set_coder(codec, integers)


def _check_names(names: Iterable[str], expected: Iterable[str]) -> None:
    names, expected = set(names), set(expected)
    for problem, found in (("lacks", expected - names), ("has unknown", names - expected)):
        if found:
            raise CheckpointError(f"{WEIGHTS} {problem} {min(found)} ({len(found)} tensors in all)")


def _adapter_names(denoiser: Denoiser) -> set[str]:
    """The adapters' tensors that a checkpoint of this denoiser has."""
    if denoiser.tuning == "full":
        return set()
    return {
        f"denoiser.{layer}.lora_{side}.{adapter}.weight"
        for adapter, layers in lora_targets(denoiser.unet).items()
        for layer in layers
        for side in "AB"
    }


def _set_frequencies(codec: OscarCodec, tables: Iterable[tuple[str, Tensor]]) -> None:
    for name, value in tables:
        try:
            codec.frequencies[int(name.removeprefix("frequencies."))] = check_frequencies(value.numpy())
        except ValueError as error:
            raise CheckpointError(f"{name}: {error}") from None


def _set_contexts(codec: OscarCodec, stored: dict[str, Tensor]) -> None:
    """Take over context models: names are context.<rate id>.<part>."""
    models: dict[str, dict[str, np.ndarray]] = {}
    for name, value in stored.items():
        _, rate_id, part = name.split(".")
        models.setdefault(rate_id, {})[part] = value.numpy()
    sizes = {str(rate.id): codec.bottleneck.at(rate).codebook_size for rate in codec.rates}
    for rate_id, arrays in models.items():
        try:
            model = ContextModel(**arrays)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"context.{rate_id}: {first_line(error)}") from None
        if sizes.get(rate_id) != model.codebook_size:
            raise CheckpointError(f"context.{rate_id} is for {model.codebook_size} codes; "
                                  f"allowed: {sizes.get(rate_id, 'none, as there is no such rate')}")  # fmt: skip
        codec.contexts[int(rate_id)] = model


def _set_coder(codec: OscarCodec, stored: dict[str, Tensor]) -> None:
    """Take over a hyperprior's integers; names are coder.<part>. One that is still being trained has none."""
    if not stored:
        return
    if not isinstance(codec.bottleneck, HyperpriorBottleneck):
        raise CheckpointError(f"{WEIGHTS} has coder.* tensors; allowed: with a hyperprior")
    arrays = {name.removeprefix("coder."): value.numpy() for name, value in stored.items()}
    try:
        coder = HyperpriorCoder.from_arrays(arrays)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"coder: {first_line(error)}") from None
    if coder.channels != codec.backbone.latent_channels:
        raise CheckpointError(f"coder is for {coder.channels} latent channels; "
                              f"allowed: {codec.backbone.latent_channels}")  # fmt: skip
    codec.bottleneck.coder = coder


def _cast(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    return value.to(dtype) if dtype is not None and value.is_floating_point() else value


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _replace_folder(new: Path, folder: Path) -> None:
    old = None
    if folder.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
        os.rename(folder, old / "was")
    try:
        os.rename(new, folder)
    except OSError:
        if old is not None:
            os.rename(old / "was", folder)
            old.rmdir()
        raise
    if old is not None:
        shutil.rmtree(old)
