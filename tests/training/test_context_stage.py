"""Stage `context`: the models learn to predict, what they learn is what is coded with, and nothing else changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from oscar import OscarCodec
from oscar.bitstream.context import estimated_bits
from oscar.bottlenecks.context import ContextNetwork, similarity_order
from oscar.config import ConfigError
from oscar.inference.load import load
from oscar.training.build import build_stage
from oscar.training.trainer import Trainer
from oscar.utils.rng import StepRng

SMALL = ("stage.context.neighbours=6", "stage.context.hidden=12", "stage.context.features=8")


def trend(seed: int, size: int, side: int = 24) -> np.ndarray:
    """Codes that change slowly, in one of many directions."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[:side, :side] * random.uniform(-0.4, 0.4, 2)[:, None, None]
    return (random.uniform(0, size) + rows + columns).clip(0, size - 1).astype(np.int64)


def test_a_network_learns_and_its_integers_code_as_well() -> None:
    torch.manual_seed(0)
    network = ContextNetwork(torch.linspace(-1, 1, 12)[:, None] ** torch.arange(1, 4), 8, 6, 24, 12)
    optimiser = torch.optim.Adam(network.parameters(), 1e-2)
    grids = np.stack([trend(seed, 12) for seed in range(40)])
    contexts = network.contexts(grids)
    for _ in range(60):
        loss = network(*contexts)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    unseen = np.stack([trend(seed, 12) for seed in range(100, 106)])
    with torch.no_grad():
        bits = network(*network.contexts(unseen)).item()
    assert bits < 0.7 * np.log2(12)
    model = network.integers()
    coded = sum(estimated_bits(grid, model) for grid in unseen) / unseen.size
    assert coded == pytest.approx(bits, rel=0.02)


def test_alike_codes_are_close_in_the_tree() -> None:
    codes = torch.tensor([3.0, 0.0, 2.0, 1.0, 4.0])[:, None] * torch.tensor([[0.6, -0.8]])
    order = [round(float(codes[code].norm())) for code in similarity_order(codes)]
    assert order in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0])


def run(compose, photos: Path, output: Path, source: Path, *overrides: str):
    config = compose(
        "experiment=nano_vq/context",
        "backbone=tiny",
        "bottleneck=tiny",
        f"init_from={source}",
        f"data.train=[{photos}]",
        f"output={output}",
        "data.crop=64",
        "data.batch_size=2",
        "data.workers=0",
        "trainer.log_every=1",
        "trainer.max_steps=4",
        "trainer.threads=1",
        "trainer.checkpoint_every=2",
        "logger.tensorboard=false",
        *SMALL,
        *overrides,
    )
    return config, Trainer(build_stage(config), config)


def test_only_context_models_are_new(compose, photos: Path, tmp_path: Path, tiny_folder: Path, make_image) -> None:
    config, trainer = run(compose, photos, tmp_path / "run", tiny_folder, "+stage.rate_weights={0.0019: 0}")
    assert trainer.run()
    before, after = load(tiny_folder), load(tmp_path / "run/final")
    assert sorted(after.bottleneck.contexts) == [1, 2, 3, 4, 5, 6, 7] and not before.bottleneck.contexts
    assert after.fingerprint == before.fingerprint
    old = before.compress(make_image(200, 120), 0.125)
    assert after.decompress(old) == before.decompress(old)  # files written before still decode
    again = OscarCodec.from_pretrained(tmp_path / "run/final")
    for rate_id, model in after.bottleneck.contexts.items():
        assert model.digest == again.bottleneck.contexts[rate_id].digest
    again.bottleneck.finish([torch.zeros(1, 4, 8, 8)])
    assert not again.bottleneck.contexts  # they were of the indices as they were


@pytest.mark.slow
def test_a_resumed_run_is_the_same(compose, photos: Path, tmp_path: Path, tiny_folder: Path, runs) -> None:
    whole, trainer = run(compose, photos, tmp_path / "whole", tiny_folder)
    trainer.run()
    parts, trainer = run(compose, photos, tmp_path / "parts", tiny_folder)
    trainer.checkpoints.save = stop_after(trainer, 2)
    assert not trainer.run()
    parts, trainer = run(compose, photos, tmp_path / "parts", tiny_folder)
    assert trainer.step == 2 and trainer.run()
    runs.assert_same(whole, parts)


def stop_after(trainer: Trainer, step: int):
    save = trainer.checkpoints.save

    def wrapped(state, name, train_states):
        save(state, name, train_states)
        trainer._stopping = trainer.step == step

    return wrapped


def test_latents_serve_as_well_as_images(compose, photos: Path, tmp_path: Path, tiny_folder: Path) -> None:
    _, trainer = run(compose, photos, tmp_path / "run", tiny_folder)
    stage, images = trainer.stage, torch.rand(2, 3, 64, 64) * 2 - 1
    one = stage(images, StepRng(0, 0))
    stage.takes_latents = True
    with torch.no_grad():
        other = stage(stage.codec.backbone.encode(images), StepRng(0, 0))
    assert one["loss"].item() == other["loss"].item()
    assert list(one) == list(stage.metrics)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage.context.hidden=0", "stage.context.hidden is 0; allowed: at least 1"),
        ("stage.context.neighbours=99", "stage.context.neighbours is 99; allowed: at most 24"),
        ("stage.cosine=1", "stage.cosine is 1.0, but stage context does not use it; allowed there: rate_weights, c"),
        ("trainer.gradient_checkpointing=true", "stage context has no gradient"),
    ],
)
def test_what_cannot_be_is_refused(compose, photos: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose("experiment=nano_vq/context", f"data.train=[{photos}]", override)
    with pytest.raises(ConfigError, match="stage bottleneck does not use it"):
        compose("experiment=nano_vq/bottleneck", f"data.train=[{photos}]", "stage.context.hidden=3")
