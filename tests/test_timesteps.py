from __future__ import annotations

import json

import pytest

from oscar.rates import PAPER_RATES, RATES
from oscar.timesteps import TableMapping, mapping_from_config


def test_the_paper_table() -> None:
    mapping = TableMapping.paper()
    assert [mapping(rate) for rate in PAPER_RATES] == [500, 400, 310, 280, 210, 190, 170, 150]
    mapping.check(PAPER_RATES, 1000)


def test_config_round_trip() -> None:
    mapping = TableMapping({0: 700, 9: 330})
    assert mapping_from_config(json.loads(json.dumps(mapping.to_config()))) == mapping
    assert mapping_from_config({"kind": "table"}) == TableMapping.paper()
    assert mapping_from_config({"kind": "table", "timesteps": "paper"}) == TableMapping.paper()


def test_a_rate_without_an_entry() -> None:
    with pytest.raises(ValueError, match=r"no pseudo-timestep for rate 0\.0024; it has 0\.0019, 0\.0098"):
        TableMapping.paper()(RATES[8])
    with pytest.raises(ValueError, match=r"0\.0024"):
        TableMapping.paper().check(RATES, 1000)


@pytest.mark.parametrize("timestep", [-1, 1000])
def test_outside_the_schedule(timestep: int) -> None:
    with pytest.raises(ValueError, match=f"{timestep} of rate 0.0019 is outside the schedule; allowed: 0 to 999"):
        TableMapping({0: timestep}).check(RATES[:1], 1000)


@pytest.mark.parametrize("kind", ["tabel", None])
def test_unknown_kind(kind) -> None:
    with pytest.raises(ValueError, match="timesteps.kind .* does not exist; allowed: table"):
        mapping_from_config({"kind": kind})


@pytest.mark.parametrize("table", ["papr", 3, None, {"x": 1}, {"12": 1}, {"0": "late"}, {"0": None}])
def test_malformed_table(table) -> None:
    with pytest.raises(ValueError, match="timesteps.timesteps must be 'paper' or a table"):
        mapping_from_config({"kind": "table", "timesteps": table})
