"""A model's folder: where it is, what its JSON says, and whether its files are whole. No torch."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from oscar.utils.errors import hub_reason
from oscar.utils.extras import how_to_install
from oscar.utils.former import LEFT, explain_former_model
from oscar.utils.provenance import MODEL, SHIPPED, WEIGHTS

FORMAT = 1
CONFIG = MODEL
RUNTIME, DATA = "runtime.json", "graphs.data"  # of a model with graphs (`oscar export`)


class CheckpointError(ValueError):
    """A checkpoint that cannot be found, read or used."""


@contextlib.contextmanager
def reading(source: str | Path, *expected: type[Exception]) -> Iterator[tuple[Path, dict]]:
    """The folder and description of a checkpoint; all that fails while it is read becomes a CheckpointError.

    Args:
        source: name of a shipped model ("nano"), a folder, or a hub id.
        expected: errors whose words say enough by themselves.
    """
    folder = locate(source)
    try:
        config = json.loads((folder / CONFIG).read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"model {str(source)!r}: {CONFIG} cannot be read ({error})") from None
    version = config.get("format") if isinstance(config, dict) else None
    if version != FORMAT:
        raise CheckpointError(f"model {str(source)!r}: format is {version!r}; allowed: {FORMAT}")
    try:
        own = config["bottleneck"]
        for setting, why in LEFT.items():
            if own.get("kind", "vq") == "vq" and (name := setting.removeprefix("bottleneck.")) in own:
                raise CheckpointError(
                    f"{setting} is {own[name]}, which is there no more: {why}; allowed: models without it"
                )
        yield folder, config
    except (CheckpointError, *expected) as error:
        raise CheckpointError(f"model {str(source)!r}: {error}") from None
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"model {str(source)!r} cannot be read: {type(error).__name__}: {error}") from None


def find_here(source: str | Path) -> Path | None:
    """The folder of a shipped model, or a local folder, in this order; None if it is neither."""
    folders = (SHIPPED / str(source), Path(source))
    return next((folder for folder in folders if (folder / CONFIG).is_file()), None)


def locate(source: str | Path) -> Path:
    """The folder of a shipped model, a local folder, or a hub id (downloaded), in this order."""
    if (folder := find_here(source)) is not None:
        return folder
    if (explained := explain_former_model(str(source))) is not None:
        raise CheckpointError(f"model {str(source)!r} is not there; {explained}")
    if Path(source).is_dir():
        raise CheckpointError(f"model {str(source)!r} is a folder without {CONFIG}; allowed: an OSCAR checkpoint")
    names = sorted(path.parent.name for path in SHIPPED.glob(f"*/{CONFIG}"))
    allowed = f"allowed: {', '.join([*names, 'a checkpoint folder', 'a hub id'])}"
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        get = how_to_install("huggingface_hub")
        raise CheckpointError(f"model {str(source)!r} does not exist here; {allowed}, after {get}") from None
    try:
        return Path(snapshot_download(str(source), allow_patterns=["*.json", "*.safetensors", "*.onnx", DATA]))
    except Exception as error:  # the hub client raises its HTTP library's errors too
        raise CheckpointError(f"model {str(source)!r} does not exist: {hub_reason(error)}; {allowed}") from None


def identity(config: dict) -> str:
    """The fingerprint that a checkpoint's description states."""
    return f"{int(config['fingerprint'], 16):064x}"


def check_hashes(
    folder: Path, hashes: Mapping[str, str], described_by: str = CONFIG, needed: Iterable[str] = (WEIGHTS,)
) -> None:
    """Refuse (CheckpointError) a folder whose files are not what a JSON file in it says of them.

    Args:
        folder: of the model.
        hashes: SHA-256 by path within the folder.
        described_by: the JSON file's name.
        needed: files of which it must say something.
    """
    for name, expected in {**dict.fromkeys(needed, ""), **hashes}.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"{described_by} names {name!r}; allowed: files in the model's folder")
        if sha256(folder / name) != expected:
            raise CheckpointError(f"{name} is damaged (its SHA-256 is not that of {described_by})")


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write a checkpoint to, which takes its name, and an earlier checkpoint's place, at the end.

    Raises:
        CheckpointError: if there is something of this name that is no checkpoint.
    """
    if folder.exists() and not (folder / CONFIG).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists and is not an OSCAR checkpoint; allowed: a new folder or a checkpoint")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield temporary
        os.chmod(temporary, 0o755)  # mkdtemp's folder is private, and so are safetensors' files
        for path in temporary.rglob("*.safetensors"):
            os.chmod(path, 0o644)
        _replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace(new: Path, folder: Path) -> None:
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
