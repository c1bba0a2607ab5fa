"""Pseudo-timesteps that are trained with the codec (mapping `learned`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from oscar.rates import RatePoint
from oscar.timesteps import LearnedMapping

_MARGIN = 1e-3  # of the schedule, kept at both ends, where a sigmoid has no gradient


class LearnedTimesteps(nn.Module):
    """One fractional timestep per rate: t = (T - 1) * sigmoid(start + offset), which cannot leave the schedule.

    The offsets begin at 0, so that weight decay pulls to the start. Adam moves an offset by about its learning rate,
    hence t by at most (T - 1) / 4 times as much per step.

    Args:
        mapping: where training starts.
        rates: the codec's; offsets are in the order of their ids.
        schedule_length: T.
    """

    def __init__(self, mapping: LearnedMapping, rates: Sequence[RatePoint], schedule_length: int):
        super().__init__()
        self.rates = tuple(sorted(rates, key=lambda rate: rate.id))
        self.last = schedule_length - 1
        fractions = torch.tensor([mapping(rate) / self.last for rate in self.rates], dtype=torch.float64)
        self.register_buffer("start", fractions.clamp(_MARGIN, 1 - _MARGIN).logit().float())
        self.offset = nn.Parameter(torch.zeros_like(self.start))

    def forward(self, rate: RatePoint) -> Tensor:
        """The timestep of a rate, a scalar with gradient."""
        position = self.rates.index(rate)
        return self.last * torch.sigmoid(self.start[position] + self.offset[position])

    def to_mapping(self) -> LearnedMapping:
        """The timesteps as they are now, for a checkpoint."""
        return LearnedMapping({rate.id: self(rate).item() for rate in self.rates})
