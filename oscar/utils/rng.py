"""Randomness that is a function of the step: what a resumed run needs to repeat itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    import torch

POINT_STREAM, NOISE_STREAM, TORCH_STREAM, CRITIC_STREAM, BALANCE_STREAM, LATENT_STREAM = 1, 2, 3, 4, 5, 6
T = TypeVar("T")


@dataclass(frozen=True)
class StepRng:
    """The randomness of one training pass.

    Attributes:
        number: passes before this one (optimiser steps times accumulation, plus the position within).
        seed: of the run.
        rank: of this process.
    """

    number: int
    seed: int
    rank: int = 0

    def shared(self, stream: int) -> np.random.Generator:
        """A generator that is the same on every process, which keeps the rate of a step equal everywhere."""
        return np.random.default_rng((self.seed, stream, self.number))

    def seed_torch(self) -> None:
        """Seed torch's global streams for this pass and process (dropout, dead-code revival, posterior sampling)."""
        import torch

        torch.manual_seed(self._own(TORCH_STREAM))

    def noise(self, device: torch.device, stream: int = NOISE_STREAM) -> torch.Generator:
        """A torch generator of this process alone."""
        import torch

        return torch.Generator(device=device).manual_seed(self._own(stream))

    def _own(self, stream: int) -> int:
        return int(np.random.SeedSequence((self.seed, stream, self.number, self.rank)).generate_state(1)[0])


def choose_points(
    rng: StepRng, points: Sequence[T], weights: Sequence[float], count: int | None, order: str = "random"
) -> list[T]:
    """The distinct operating points of a pass, in their order, the same on every process.

    Args:
        rng: of the pass.
        points, weights: all of them, with the relative probability of each; those of weight 0 are never taken.
        count: how many, all of positive weight if None or more than there are.
        order: "random" draws by weight; "balanced" goes round all points of positive weight, in an order that is
            shuffled anew after as many passes as there are points, in which each is taken `count` times.
    """
    active = [point for point, weight in zip(points, weights, strict=True) if weight > 0]
    if count is None:
        return active
    if order == "balanced":
        block, first = divmod(rng.number, len(active))
        shuffled = replace(rng, number=block).shared(BALANCE_STREAM).permutation(len(active))
        places = {(first * count + offset) % len(active) for offset in range(min(count, len(active)))}
        return [active[position] for position in sorted(shuffled[place] for place in places)]
    probability = np.asarray(weights, dtype=np.float64) / np.sum(weights)
    chosen = rng.shared(POINT_STREAM).choice(len(points), size=min(count, len(active)), replace=False, p=probability)
    return [points[position] for position in sorted(chosen)]
