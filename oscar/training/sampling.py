"""Which rates a pass trains: a pure function of the run's seed and the pass, so that every process takes the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from oscar.rates import RatePoint
from oscar.training.stages.base import Pass, draw_rates

BALANCE_STREAM = 5


def choose_rates(
    turn: Pass, rates: Sequence[RatePoint], weights: Sequence[float], count: int | None, order: str = "random"
) -> list[RatePoint]:
    """The distinct rates of a pass, by id.

    Args:
        turn: the pass.
        rates, weights: the codec's, with the relative probability of each; those of weight 0 are never taken.
        count: how many, all if None or more than there are.
        order: "random" draws by weight; "balanced" goes round all rates of positive weight, in an order that is
            shuffled anew after as many passes as there are rates, in which each is taken `count` times.
    """
    if order == "random" or count is None:
        return draw_rates(turn, rates, weights, count)
    active = [rate for rate, weight in zip(rates, weights, strict=True) if weight > 0]
    block, first = divmod(turn.number, len(active))
    shuffled = replace(turn, number=block).shared(BALANCE_STREAM).permutation(len(active))
    places = {(first * count + offset) % len(active) for offset in range(min(count, len(active)))}
    return [active[position] for position in sorted(shuffled[place] for place in places)]
