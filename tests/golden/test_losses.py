"""Golden losses: five optimiser steps of every stage give the losses that they gave (see README.md)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LOSSES = json.loads((HERE / "ours/losses.json").read_text())


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str, make_goldens) -> None:
    found = make_goldens.seeded_losses(name, HERE)
    assert make_goldens.losses_agree(LOSSES[name], found), "\n".join(
        f"{term}: {values} -> {found.get(term)}" for term, values in LOSSES[name].items()
    )


def test_every_stage_is_there(make_goldens) -> None:
    assert list(LOSSES) == list(make_goldens.STAGES)
    for losses in LOSSES.values():
        assert all(len(values) == make_goldens.STEPS for values in losses.values())
        assert len(set(losses["loss"])) == make_goldens.STEPS


def test_a_loss_that_moved_is_noticed(make_goldens) -> None:
    losses = LOSSES["vq/joint"]
    for step in range(make_goldens.STEPS):
        moved = [
            value * (1 + 3 * make_goldens.LOSS_TOLERANCE * (number == step))
            for number, value in enumerate(losses["l1"])
        ]
        assert not make_goldens.losses_agree(losses, {**losses, "l1": moved})
    assert not make_goldens.losses_agree(losses, {key: value for key, value in losses.items() if key != "critic"})
    assert make_goldens.losses_agree(losses, {**losses, "another": [0.0]})
