"""Publishing a model on the Hugging Face hub: its checkpoint as it is, and a card made of what it says of itself.

The card begins with the model's own, README.md in its folder, if there is one. The rest is what the checkpoint's
provenance and results of `oscar.evaluation.evaluate` say, and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from oscar import checkpoint
from oscar.checkpoint import CARD, CONFIG, CheckpointError
from oscar.data.datasets import DATASETS
from oscar.evaluation.evaluate import EvaluationError, load_results, means_per_point, missing_notes
from oscar.metrics.image import METRICS
from oscar.model_folder import RUNTIME, check_hashes, locate, reading
from oscar.utils.errors import hub_reason
from oscar.utils.provenance import as_text, read_model
from oscar.utils.strict_json import dumps
from oscar.utils.tables import Table

TAGS = ["oscar", "image-compression", "diffusion"]


class PublishError(ValueError):
    """A model that cannot be published; the message is one line."""


@dataclass(frozen=True)
class Publication:
    """What goes to the hub.

    Attributes:
        texts: small files by their path there: the card, and the checkpoint's description.
        files: all others: safetensors, JSON, and graphs if there are any.
    """

    texts: dict[str, str]
    files: dict[str, Path]


def prepare(
    source: str | Path,
    repository: str,
    results: Sequence[str | Path] = (),
    backbone: str | None = None,
    licence: str | None = None,
) -> Publication:
    """Check a checkpoint and its results, and make the card; nothing is sent.

    Args:
        source: checkpoint folder, or the name of a model in the package.
        repository: USER/NAME.
        results: folders of `oscar evaluate`, of this model.
        backbone: hub id of the backbone, where the checkpoint names a folder of this machine.
        licence: its identifier on the hub.

    Raises:
        PublishError, CheckpointError, EvaluationError: for what cannot be published, read, or is another model's.
    """
    _check_repository(repository)
    folder, description = checkpoint.read_description(source)
    check_hashes(folder, description["sha256"])
    description = {**description, "backbone": _public_backbone(description["backbone"], backbone)}
    names = list(description["sha256"])
    pickled = [name for name in names if not name.endswith(".safetensors")]
    if pickled:
        raise CheckpointError(f"model {str(source)!r} has weights in {pickled[0]}; allowed: safetensors")
    if description["backbone"] is None:
        names += ["vae/config.json", "unet/config.json", "scheduler/scheduler_config.json"]
    if (folder / RUNTIME).is_file():
        with reading(source):
            graphs = json.loads((folder / RUNTIME).read_text())["sha256"]
            check_hashes(folder, graphs, RUNTIME, ())
        names += [RUNTIME, *graphs]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"model {str(source)!r} lacks {missing[0]}")
    card = make_card(source, repository, description, results, licence)
    return Publication(
        {CARD: card, CONFIG: dumps(description, indent=2, sort_keys=True) + "\n"},
        {name: folder / name for name in names},
    )


def send(publication: Publication, repository: str, private: bool = False) -> str:
    """Make the repository, if it is not there, and put all files into it in one commit; returns its address.

    Raises:
        PublishError: if the hub cannot be reached, or does not let this user in.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    operations = [CommitOperationAdd(name, text.encode()) for name, text in publication.texts.items()]
    operations += [CommitOperationAdd(name, str(path)) for name, path in publication.files.items()]
    api = HfApi()
    try:
        url = api.create_repo(repository, private=private, exist_ok=True)
        api.create_commit(repository, operations, commit_message="OSCAR model")
    except Exception as error:  # the client raises its HTTP library's errors too
        raise PublishError(
            f"{repository} cannot be written: {hub_reason(error)}; allowed: a repository of yours, after "
            "`hf auth login` or with HF_TOKEN set"
        ) from None
    return str(url)


def make_card(
    source: str | Path, repository: str, description: dict, results: Sequence[str | Path], licence: str | None
) -> str:
    """The model card, Markdown with YAML before it."""
    from huggingface_hub import ModelCardData

    folder = locate(source)
    facts = {**read_model(folder), "model": repository, "backbone": description["backbone"]}
    data = ModelCardData(
        license=licence,
        base_model=description["backbone"],
        library_name="oscar",
        pipeline_tag="image-to-image",
        tags=TAGS,
    )
    point = f"--rate {facts['rates'][len(facts['rates']) // 2]:.4f}" if "rates" in facts else "--quality 0.5"
    own = [(folder / CARD).read_text(encoding="utf-8").strip()] if (folder / CARD).is_file() else []
    parts = [
        f"---\n{data.to_yaml()}\n---",
        *(own or [f"# {repository.partition('/')[2]}"]),
        "An image codec of [OSCAR](https://arxiv.org/abs/2505.16091)'s kind: a quantised latent, one denoising step. "
        f"Files that it writes carry the tag {facts['model_tag']}, and are decoded by this model alone.",
        f"    oscar compress photo.png photo.oscar --model {repository} {point}\n"
        f"    oscar decompress photo.oscar photo.png --model {repository}",
        f"```python\nfrom oscar import OscarCodec\n\ncodec = OscarCodec.from_pretrained({repository!r})\n```",
        *(["## Evaluation"] if results or not own else []),
        *(evaluation_table(Path(found), description).to_markdown() for found in results),
        *([] if results or own else ["None was given."]),
        "## Training",
        f"```text\n{as_text(facts)}\n```",
        "## Files",
        "\n".join(f"- `{name}`: SHA-256 {digest}" for name, digest in sorted(description["sha256"].items())),
    ]
    return "\n\n".join(parts) + "\n"


def evaluation_table(folder: Path, description: dict, with_commit: bool = True) -> Table:
    """The means of one evaluation, with what was left out.

    Args:
        folder: of `oscar evaluate`.
        description: of the checkpoint.
        with_commit: whether the caption says at which one it was made.

    Raises:
        EvaluationError: if there is none, or it is of another model.
    """
    frame, record = load_results(folder)
    if record["codec"].get("sha256") != description["sha256"]:
        raise EvaluationError(f"{folder}: results of another model; allowed: those of the model that is published")
    images = Path(record["config"]["data"]["images"]).name
    title = DATASETS[images].title if images in DATASETS else images
    means = means_per_point(frame).reset_index()
    counted = int(means.pop("images").max())
    shown = {"point": record["codec"]["point_name"], "actual_bpp": "actual bpp", "nominal_bpp": "nominal bpp"}
    if record["protocol"] == "paper":
        del shown["actual_bpp"]
    shown |= {name: METRICS[name].label if name in METRICS else name for name in record["metrics"]}
    shown = {name: text for name, text in shown.items() if name in means}
    notes = [f"{name}: unavailable ({reason})" for name, reason in record["unavailable"].items()]
    notes += missing_notes(frame, record["metrics"])
    if record["failed"]:
        notes.append(f"{len(record['failed'])} failure(s) left out")
    made = f", commit {record['commit']}" if with_commit and record.get("commit") else ""
    caption = f"{title}: means over {counted} images, protocol {record['protocol']}{made}"
    return Table("evaluation", caption, means, shown, {"point": "{:.4f}".format}, notes)


def _check_repository(repository: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
        valid = repository.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise PublishError(f"{repository!r} is no name of a repository; allowed: USER/NAME")


def _public_backbone(named: str | None, given: str | None) -> str | None:
    """The backbone as others find it."""
    if named is None:
        if given is not None:
            raise PublishError(f"--backbone is {given!r}, but the checkpoint holds its own; allowed: none")
        return None
    found = given or named
    try:
        local = Path(found).exists()
        _check_repository(found)
    except PublishError:
        local = True
    if local:
        raise PublishError(
            f"the backbone is {found!r}, which others do not have; allowed: --backbone with its id on the hub"
        )
    return found
