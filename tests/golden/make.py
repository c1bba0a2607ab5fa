"""Make the golden data that this code base computes itself: `python tests/golden/make.py [PART ...] [--force]`.

Parts, in the order in which they are made:

    images    ours/images: what is compressed and trained on, from scikit-image's photographs
    models    ours/vq and ours/hyperprior: tiny models, trained for a moment (minutes)
    files     ours/files: `.oscar` files of these models, with their symbols and decoded images
    losses    ours/losses.json: five optimiser steps of every stage
    shipped   shipped: the same as `files` for the models that come with the package

Without PART all but `images` and `models`. What is there is compared with what is made anew, and nothing that differs
is overwritten without --force. `README.md` says when goldens may be made anew. The tests read and compare through this
module, so that what they know of the codec's interface stands here alone.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

from oscar import OscarCodec
from oscar.bitstream.entropy import uniform_frequencies
from oscar.data.tensors import to_tensor
from oscar.inference.load import load
from oscar.timesteps import PerImageMapping

HERE = Path(__file__).parent
LEVELS = 1  # of 255, by which decoded images may differ: another processor rounds otherwise
LOSS_TOLERANCE = 2e-5  # relative, and 1e-6 beside it; README.md has the spread that was measured
SMALL, LARGE = ((1, 1), (7, 5)), (131, 67)
TRAIN_SIZE = (96, 80)


class Case(NamedTuple):
    """A file: of which model, at which operating point (a rate or a quality), image size and effort."""

    model: str
    point: float
    size: tuple[int, int]
    effort: int = 0

    @property
    def name(self) -> str:
        effort = f"_effort{self.effort}" if self.effort else ""
        return f"{self.point:.4f}_{self.size[0]}x{self.size[1]}{effort}"

    @classmethod
    def of(cls, path: Path) -> Case:
        """The case of a file, from its path."""
        point, size, *effort = path.name.removesuffix(path.suffix).split("_")
        width, height = map(int, size.split("x"))
        degree = int(effort[0].removeprefix("effort")) if effort else 0
        return cls(path.parent.name, float(point), (width, height), degree)


RATES = (0.0019, 0.0098, 0.0313, 0.0430, 0.0625, 0.0781, 0.0937, 0.1250)
SHIPPED_RATES = (0.0019, 0.0098, 0.0234, 0.0313, 0.0430, 0.0937, 0.1093, 0.1250)
FILES = (
    *(Case("vq", rate, LARGE) for rate in RATES),
    *(Case("vq", rate, size) for rate in (0.0019, 0.0625, 0.1250) for size in SMALL),
    *(Case("vq", rate, LARGE, 5) for rate in (0.0313, 0.0430, 0.1250)),
    *(Case("vq_per_image", rate, size) for rate in (0.0313, 0.1250) for size in (SMALL[0], LARGE)),
    *(Case("hyperprior", quality, LARGE) for quality in (0, 0.25, 0.5, 0.75, 1)),
    *(Case("hyperprior", quality, size) for quality in (0.5, 1) for size in SMALL),
)
SHIPPED = (
    *(Case("nano-vq", rate, LARGE) for rate in SHIPPED_RATES),
    Case("nano-vq", 0.1250, SMALL[0]),
    Case("nano-vq", 0.0937, LARGE, 5),
    *(Case("nano", quality, LARGE) for quality in (0, 0.3, 0.5, 0.7, 1)),
    Case("nano", 0.5, SMALL[0]),
)
CONTEXT_RATES, PACKED_RATE = (2, 4, 7), 5  # ids: coded by context; with a uniform table, so that none is shorter

SMALL_CONTEXT = (
    "backbone=tiny",
    "bottleneck=tiny",
    "data.crop=64",
    "stage.context.neighbours=6",
    "stage.context.hidden=12",
    "stage.context.features=8",
)
# Stages whose losses are kept: name -> overrides of scripts/train.py. {vq} and {hyperprior} are the stored models.
STAGES = {
    "vq/vae": ("experiment=tiny/vae",),
    "vq/diffusion_pretrain": ("experiment=tiny/diffusion_pretrain",),
    "vq/bottleneck": ("experiment=tiny/bottleneck", "stage.table_batches=1"),
    "vq/joint": ("experiment=tiny/joint", "stage.table_batches=1"),
    "vq/context": ("experiment=nano_vq/context", "init_from={vq}", "data.batch_size=2", *SMALL_CONTEXT),
    "vq/bottleneck, from the model": ("experiment=tiny/bottleneck", "init_from={vq}", "stage.table_batches=1"),
    "vq/joint, from the model": ("experiment=tiny/joint", "init_from={vq}", "stage.table_batches=1"),
    "hyperprior/bottleneck": ("experiment=tiny/hyperprior_bottleneck", "stage.table_batches=1"),
    "hyperprior/joint": ("experiment=tiny/hyperprior_joint",),
    "hyperprior/bottleneck, from the model": ("experiment=tiny/hyperprior_bottleneck", "init_from={hyperprior}",
                                         "stage.table_batches=1"),
    "hyperprior/joint, from the model": ("experiment=tiny/hyperprior_joint", "init_from={hyperprior}"),
}  # fmt: skip
STEPS = 5


# What is known of the codec's interface.


def load_codec(name: str, root: Path) -> OscarCodec:
    """A model of ours, or a shipped one, as a user loads it, in float32."""
    if name in {case.model for case in SHIPPED}:
        return load(name, dtype=torch.float32)
    if name != "vq_per_image":
        return load(root / "ours" / name, dtype=torch.float32)
    codec = OscarCodec.from_pretrained(root / "ours/vq")
    codec.set_mapping(PerImageMapping())
    with tempfile.TemporaryDirectory() as folder:
        codec.save_pretrained(Path(folder) / name)
        return load(Path(folder) / name, dtype=torch.float32)


def compress(codec: OscarCodec, image: Image.Image, case: Case) -> bytes:
    """The file of an image."""
    return codec.compress(image, case.point, case.effort)


def read_symbols(codec: OscarCodec, data: bytes) -> np.ndarray:
    """What a file says before any network: indices (rows, columns), or the coder's integers (C, h, w)."""
    return codec.read(data).symbols[0][0].numpy().astype(np.int32)


@torch.inference_mode()
def encode_latent(codec: OscarCodec, image: Image.Image, case: Case) -> np.ndarray:
    """The latent (1, C, h, w) of the padded image."""
    return codec.encode_latent(to_tensor(image), codec.find_point(case.point)).numpy()


@torch.inference_mode()
def write_latent(codec: OscarCodec, latent: np.ndarray, case: Case) -> bytes:
    """The file of a latent."""
    (width, height), point = case.size, codec.find_point(case.point)
    return codec.write(codec.quantise(torch.from_numpy(latent), point, case.effort), point, height, width)[0]


def train(output: Path, images: Path, *overrides: str) -> tuple[str, ...]:
    """Run a stage with overrides of scripts/train.py on one thread; the names of its losses in the log."""
    from accelerate.state import AcceleratorState, GradientState
    from hydra import compose, initialize_config_dir

    from oscar.config import parse, register
    from oscar.training.build import build_stage
    from oscar.training.trainer import Trainer

    register()
    options = [
        f"data.train=[{images}]",
        f"output={output}",
        "data.workers=0",
        "trainer.log_every=1",
        "trainer.threads=1",
        "logger.tensorboard=false",
    ]
    with initialize_config_dir(str(HERE.parents[1] / "configs"), version_base="1.3"):
        config = parse(compose("train", overrides=[*overrides, *options]))
    try:
        trainer = Trainer(build_stage(config), config)
        trainer.run()
        return trainer.stage.metrics
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


# The parts. Each writes below `new`; what it needs of other parts is below `root`.


def photographs() -> list[Image.Image]:
    """Those of scikit-image's whose licence is plain, public domain (the first) or CC0; pixels without a profile."""
    from oscar.data.folders import find_images

    found = {path.stem: Image.fromarray(np.asarray(Image.open(path).convert("RGB"))) for path in find_images()}
    return [found[name] for name in ("astronaut", "chelsea", "coffee", "rocket")]


def make_images(new: Path, root: Path) -> None:
    images, lanczos = new / "ours/images", Image.Resampling.LANCZOS
    (images / "train").mkdir(parents=True)
    for number, image in enumerate(photographs()):
        image.resize(TRAIN_SIZE, lanczos).save(images / f"train/{number}.png", optimize=True)
    for size, box in ((LARGE, (100, 60, 362, 194)), *((size, (20, 20, 76, 60)) for size in SMALL)):
        part = photographs()[0].crop(box).resize(size, lanczos)
        part.save(images / f"{size[0]}x{size[1]}.png", optimize=True)


def make_models(new: Path, root: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "photographs").mkdir()
        for number, image in enumerate(photographs()):
            image.save(work / f"photographs/{number}.png")

        def run(name: str, experiment: str, steps: int, lr: float, *overrides: str) -> Path:
            train(
                work / name,
                work / "photographs",
                f"experiment={experiment}",
                f"trainer.max_steps={steps}",
                f"optimiser.lr={lr}",
                f"trainer.checkpoint_every={steps}",
                *overrides,
            )
            return work / name / "final"

        vae = run("vae", "tiny/vae", 400, 4e-3)
        pretrained = run("diffusion_pretrain", "tiny/diffusion_pretrain", 200, 2e-3, f"backbone.source={vae}")
        source = f"backbone.source={pretrained}"
        bundled = "stage.vae=decoder"  # a backbone that is trained on is stored with the codec
        first = run("bottleneck", "tiny/bottleneck", 200, 2e-3, source, "stage.table_batches=1")
        joint = run("joint", "tiny/joint", 200, 1e-3, f"init_from={first}", bundled, "stage.table_batches=20")
        context = run("context", "nano_vq/context", 150, 1e-2, f"init_from={joint}", *SMALL_CONTEXT)
        codec = OscarCodec.from_pretrained(context)
        contexts = codec.bottleneck.contexts
        codec.bottleneck.contexts = {number: contexts[number] for number in contexts if number in CONTEXT_RATES}
        codec.bottleneck.frequencies[PACKED_RATE] = uniform_frequencies(len(codec.bottleneck.frequencies[PACKED_RATE]))
        codec.forget_fingerprint()
        codec.save_pretrained(new / "ours/vq", torch.float16)  # half the size
        first = run("hyperprior_bottleneck", "tiny/hyperprior_bottleneck", 300, 5e-3, source, "stage.table_batches=1")
        joint = run("hyperprior_joint", "tiny/hyperprior_joint", 200, 1e-3, f"init_from={first}", bundled)
        OscarCodec.from_pretrained(joint).save_pretrained(new / "ours/hyperprior", torch.float16)


def make_files(new: Path, root: Path) -> None:
    write_cases(FILES, new / "ours/files", root)


def make_shipped(new: Path, root: Path) -> None:
    write_cases(SHIPPED, new / "shipped", root)


def write_cases(cases: tuple[Case, ...], folder: Path, root: Path) -> None:
    """Files, decoded images, and for each model the symbols and latents of its files."""
    for model in dict.fromkeys(case.model for case in cases):
        codec, arrays = load_codec(model, root), {}
        (folder / model).mkdir(parents=True)
        for case in (case for case in cases if case.model == model):
            image = source_image(case, root)
            data = compress(codec, image, case)
            latent = encode_latent(codec, image, case)
            check_margin(codec, latent, case, data)
            (folder / model / f"{case.name}.oscar").write_bytes(data)
            codec.decompress(data).save(folder / model / f"{case.name}.png", optimize=True)
            arrays[f"{case.name}.symbols"] = read_symbols(codec, data)
            arrays[f"{case.name}.latent"] = latent
        contiguous = {key: np.ascontiguousarray(value) for key, value in arrays.items()}  # others are stored wrongly
        save_file(contiguous, folder / model / "arrays.safetensors")


def check_margin(codec: OscarCodec, latent: np.ndarray, case: Case, data: bytes) -> None:
    """Refuse an image whose file hangs on the last digits of its latent, which differ between processors."""
    random = np.random.default_rng(0)
    for _ in range(8):
        noise = random.standard_normal(latent.shape) * 1e-5 * (1 + np.abs(latent))
        if write_latent(codec, (latent + noise).astype(np.float32), case) != data:
            raise SystemExit(f"{case}: rounding changes its file; choose another image or another model")


def source_image(case: Case, root: Path) -> Image.Image:
    """The image that a case compresses."""
    return Image.open(root / f"ours/images/{case.size[0]}x{case.size[1]}.png").convert("RGB")


def make_losses(new: Path, root: Path) -> None:
    losses = {name: seeded_losses(name, root) for name in STAGES}
    (new / "ours").mkdir(parents=True, exist_ok=True)
    (new / "ours/losses.json").write_text(json.dumps(losses, indent=1) + "\n")


def seeded_losses(name: str, root: Path) -> dict[str, list[float]]:
    """Five optimiser steps of a stage: the loss and those of its terms that every step has."""
    models = {kind: root / "ours" / kind for kind in ("vq", "hyperprior")}
    overrides = [option.format(**models) for option in STAGES[name]]
    with tempfile.TemporaryDirectory() as folder:
        metrics = train(
            Path(folder) / "run",
            root / "ours/images/train",
            *overrides,
            "seed=0",
            f"trainer.max_steps={STEPS}",
            f"trainer.checkpoint_every={STEPS}",
            "optimiser.lr=1e-3",
            "optimiser.warmup_steps=0",
        )
        with (Path(folder) / "run/log.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
    terms = [key for key in metrics if all(row[key] for row in rows)]
    return {key: [float(row[key]) for row in rows] for key in terms}


# Comparing and writing.


def difference(old: Path, new: Path) -> str | None:
    """How two files differ beyond their tolerance, None if they do not."""
    if new.suffix == ".png":
        one, other = (np.asarray(Image.open(path).convert("RGB"), dtype=int) for path in (old, new))
        if one.shape != other.shape:
            return "another size"
        levels = np.abs(one - other).max()
        return f"{levels} levels" if levels > LEVELS else None
    if new.name == "arrays.safetensors":
        one, other = load_file(old), load_file(new)
        if one.keys() != other.keys() or any(one[key].shape != other[key].shape for key in one):
            return "other arrays"
        wrong = [key for key in one if not np.allclose(one[key], other[key], rtol=1e-4, atol=1e-4)]
        return f"differ: {', '.join(wrong)}" if wrong else None
    if new.name == "losses.json":
        one, other = (json.loads(path.read_text()) for path in (old, new))
        pairs = {name: (one.get(name, {}), other.get(name, {})) for name in one.keys() | other.keys()}
        wrong = [name for name, pair in pairs.items() if pair[0].keys() != pair[1].keys() or not losses_agree(*pair)]
        return f"differ: {', '.join(sorted(wrong))}" if wrong else None
    return None if old.read_bytes() == new.read_bytes() else f"{old.stat().st_size} -> {new.stat().st_size} bytes"


def losses_agree(one: dict[str, list[float]], other: dict[str, list[float]]) -> bool:
    """Whether the losses of a stage are in the other, and equal within the tolerance."""
    return one.keys() <= other.keys() and all(
        np.allclose(other[key], one[key], rtol=LOSS_TOLERANCE, atol=1e-6) for key in one
    )


def files_below(folder: Path) -> Iterator[Path]:
    return (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())


PARTS: dict[str, tuple[Callable[[Path, Path], None], tuple[str, ...]]] = {
    "images": (make_images, ("ours/images",)),
    "models": (make_models, ("ours/vq", "ours/hyperprior")),
    "files": (make_files, ("ours/files",)),
    "losses": (make_losses, ("ours/losses.json",)),
    "shipped": (make_shipped, ("shipped",)),
}


def main(arguments: list[str] | None = None, root: Path = HERE) -> int:
    """Make parts anew, say what changed, and write it if it may be; 1 if it may not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"among {', '.join(PARTS)}")
    parser.add_argument("--force", action="store_true", help="overwrite what differs")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - PARTS.keys():
        parser.error(f"part {min(unknown)!r} does not exist; allowed: {', '.join(PARTS)}")
    refused = False
    for part in [part for part in PARTS if part in (options.parts or [*PARTS][2:])]:
        make, targets = PARTS[part]
        with tempfile.TemporaryDirectory() as folder:
            new = Path(folder)
            make(new, root)
            made = list(files_below(new))
            there = [path for path in files_below(root) if any(path.is_relative_to(target) for target in targets)]
            gone = sorted(set(there) - set(made))
            changed = {path: difference(root / path, new / path) if path in there else "new" for path in made}
            changed = {path: what for path, what in changed.items() if what is not None}
            print(f"{part}: {len(made) - len(changed)} of {len(made)} files as they were")
            for path, what in changed.items():
                print(f"  {path}: {what}")
            for path in gone:
                print(f"  {path}: no longer made")
            if there and (changed or gone) and not options.force:
                print(f"{part}: nothing overwritten; --force does")
                refused = True
                continue
            for path in changed:
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(new / path, root / path)
            for path in gone:
                (root / path).unlink()
    return int(refused)


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    sys.exit(main())
