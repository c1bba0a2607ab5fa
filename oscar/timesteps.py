"""Mappings from rate to pseudo-timestep: how noisy a quantised latent is taken to be (paper section 3.1).

A mapping is a small object that a config names and a checkpoint stores; `mapping_from_config` is the inverse of its
`to_config`. This module knows no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from oscar.rates import PAPER_RATES, RatePoint, rate_by_id


@dataclass(frozen=True)
class TableMapping:
    """One pseudo-timestep per rate, looked up by the rate's id.

    Attributes:
        timesteps: pseudo-timestep by rate id.
    """

    timesteps: Mapping[int, int]
    kind = "table"

    @classmethod
    def paper(cls) -> TableMapping:
        """The paper's table, for the eight rates that its UNet is trained on."""
        return cls({rate.id: rate.timestep for rate in PAPER_RATES})

    def __call__(self, rate: RatePoint) -> int:
        """The pseudo-timestep of a rate.

        Raises:
            ValueError: if the table has no entry for it.
        """
        if rate.id not in self.timesteps:
            allowed = ", ".join(f"{rate_by_id(key).bpp:.4f}" for key in sorted(self.timesteps))
            raise ValueError(f"timesteps: the table has no pseudo-timestep for rate {rate.bpp:.4f}; it has {allowed}")
        return self.timesteps[rate.id]

    def check(self, rates: Iterable[RatePoint], schedule_length: int) -> None:
        """Refuse a table that lacks one of `rates` or points outside the schedule (ValueError)."""
        for rate in rates:
            timestep = self(rate)
            if not 0 <= timestep < schedule_length:
                raise ValueError(
                    f"timesteps: {timestep} of rate {rate.bpp:.4f} is outside the schedule; "
                    f"allowed: 0 to {schedule_length - 1}"
                )

    def to_config(self) -> dict:
        """A JSON-able description, keyed by rate id."""
        return {"kind": self.kind, "timesteps": {str(key): value for key, value in sorted(self.timesteps.items())}}


MAPPINGS = {TableMapping.kind: TableMapping}


def mapping_from_config(config: Mapping) -> TableMapping:
    """The mapping that a config or a checkpoint describes: `kind` and, for a table, `timesteps` ("paper" or a dict).

    Raises:
        ValueError: if the kind is unknown or the table malformed.
    """
    kind = config.get("kind")
    if kind not in MAPPINGS:
        raise ValueError(f"timesteps.kind {kind!r} does not exist; allowed: {', '.join(MAPPINGS)}")
    table = config.get("timesteps", "paper")
    if table == "paper":
        return TableMapping.paper()
    try:
        return TableMapping({rate_by_id(int(key)).id: int(value) for key, value in table.items()})
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"timesteps.timesteps must be 'paper' or a table rate id: timestep ({error})") from None
