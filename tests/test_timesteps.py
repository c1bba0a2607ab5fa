from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from oscar.rates import PAPER_RATES, RATES
from oscar.timesteps import (
    MAPPINGS,
    CalibratedMapping,
    ConstantMapping,
    CurveMapping,
    LearnedMapping,
    PerImageMapping,
    RampMapping,
    ShuffledMapping,
    TableMapping,
    interpolate,
    mapping_from_config,
    read_calibration,
    timestep_code,
    timestep_of_code,
)

PAPER = [500, 400, 310, 280, 210, 190, 170, 150]
EXAMPLES = {
    "table": TableMapping({0: 700, 9: 330}),
    "cosine": CalibratedMapping({0: 480, 7: 120}, {0: 0.55, 7: 0.93}, "cosine"),
    "snr": CalibratedMapping({0: 480, 7: 120}, {0: 0.7, 7: 0.1}, "snr"),
    "linear": RampMapping(600, 100, "linear"),
    "log": RampMapping(600, 100, "log"),
    "constant": ConstantMapping(280),
    "shuffled": ShuffledMapping({0: 500, 1: 400, 2: 300}, seed=3),
    "per_image": PerImageMapping(),
    "learned": LearnedMapping({0: 481.25, 7: 149.5}),
    "curve": CurveMapping((700.0, 300.0, 20.5), (0.3, 0.8, 0.99)),
}


def test_the_paper_table() -> None:
    mapping = TableMapping.paper()
    assert [mapping(rate) for rate in PAPER_RATES] == PAPER
    mapping.check(PAPER_RATES, 1000)


def test_every_kind_has_an_example() -> None:
    assert EXAMPLES.keys() == set(MAPPINGS)


@pytest.mark.parametrize("kind", EXAMPLES)
def test_config_round_trip(kind: str) -> None:
    mapping = EXAMPLES[kind]
    config = json.loads(json.dumps(mapping.to_config()))
    assert mapping.kind == config["kind"] == kind
    restored = mapping_from_config(config)
    assert restored == mapping and type(restored) is type(mapping) and restored.to_config() == mapping.to_config()
    assert restored.per_image == (kind == "per_image")


def test_the_config_of_a_table_does_not_change() -> None:
    """It is part of a checkpoint's fingerprint, which every file carries."""
    assert TableMapping({7: 150, 0: 500}).to_config() == {"kind": "table", "timesteps": {"0": 500, "7": 150}}


@pytest.mark.parametrize("kind", ["table", "linear", "log", "shuffled", "learned"])
def test_without_further_fields_it_begins_with_the_paper(kind: str) -> None:
    mapping = mapping_from_config({"kind": kind})
    timesteps = [mapping(rate) for rate in PAPER_RATES]
    if kind == "shuffled":
        assert timesteps != PAPER and sorted(timesteps, reverse=True) == PAPER
    elif kind in ("linear", "log"):
        assert (timesteps[0], timesteps[-1]) == (500, 150) and timesteps == sorted(timesteps, reverse=True)
    else:
        assert timesteps == PAPER
    mapping.check(PAPER_RATES, 1000)
    if kind == "learned":
        assert all(isinstance(timestep, float) for timestep in timesteps)


def test_ramps() -> None:
    linear, log = RampMapping(600, 100, "linear"), RampMapping(600, 100, "log")
    for rate in RATES:
        share = (rate.bpp - 0.0019) / (0.125 - 0.0019)
        assert linear(rate) == round(600 - 500 * share)
    assert linear(PAPER_RATES[2]) > log(PAPER_RATES[2])  # most of the rates' logarithms lie at the low end
    assert isinstance(linear(PAPER_RATES[1]), int) and log(PAPER_RATES[0]) == 600 and log(PAPER_RATES[-1]) == 100


def test_a_permutation_is_the_same_everywhere() -> None:
    shuffled = {
        seed: [ShuffledMapping(TableMapping.paper().timesteps, seed)(rate) for rate in PAPER_RATES] for seed in (0, 1)
    }
    assert shuffled[0] == [150, 210, 280, 310, 170, 500, 190, 400]
    assert shuffled[1] == [150, 210, 170, 190, 310, 280, 500, 400]
    with pytest.raises(ValueError, match=r"no pseudo-timestep for rate 0\.0024"):
        ShuffledMapping(TableMapping.paper().timesteps)(RATES[8])


def test_per_image_has_no_timestep_of_a_rate() -> None:
    with pytest.raises(ValueError, match="for each image, not for each rate"):
        PerImageMapping()(RATES[0])
    PerImageMapping().check(RATES, 10)


@pytest.mark.parametrize("length", [1000, 256, 300, 50, 2])
def test_codes_of_timesteps(length: int) -> None:
    reached = [timestep_of_code(code, length) for code in range(256)]
    assert reached[0] == 0 and reached[-1] == length - 1 and reached == sorted(reached)
    assert all(timestep_of_code(timestep_code(timestep, length), length) == timestep for timestep in reached)
    for timestep in range(length):
        nearest = min(abs(timestep - other) for other in reached)
        assert abs(timestep - timestep_of_code(timestep_code(timestep, length), length)) == nearest


def test_codes_do_not_change() -> None:
    """Files hold them."""
    assert [timestep_of_code(code, 1000) for code in (0, 1, 2, 100, 127, 128, 254, 255)] == [
        0,
        4,
        8,
        392,
        498,
        501,
        995,
        999,
    ]
    assert [timestep_code(timestep, 1000) for timestep in (0, 1, 2, 150, 500, 997, 998, 999)] == [
        0,
        0,
        1,
        38,
        128,
        254,
        255,
        255,
    ]


def test_a_rate_without_an_entry() -> None:
    with pytest.raises(ValueError, match=r"no pseudo-timestep for rate 0\.0024; it has 0\.0019, 0\.0098"):
        TableMapping.paper()(RATES[8])
    with pytest.raises(ValueError, match=r"0\.0024"):
        TableMapping.paper().check(RATES, 1000)


@pytest.mark.parametrize("timestep", [-1, 1000])
def test_outside_the_schedule(timestep: int) -> None:
    with pytest.raises(ValueError, match=f"{timestep} of rate 0.0019 is outside the schedule; allowed: 0 to 999"):
        TableMapping({0: timestep}).check(RATES[:1], 1000)


@pytest.mark.parametrize("timestep", [-0.5, 999.5, float("nan")])
def test_fractions_outside_the_schedule(timestep: float) -> None:
    with pytest.raises(ValueError, match="is outside the schedule; allowed: 0 to 999"):
        LearnedMapping({0: timestep}).check(RATES[:1], 1000)


@pytest.mark.parametrize("kind", ["tabel", None])
def test_unknown_kind(kind) -> None:
    with pytest.raises(ValueError, match="timesteps.kind .* does not exist; allowed: table, cosine, .*, learned"):
        mapping_from_config({"kind": kind})


@pytest.mark.parametrize("table", ["papr", 3, None, {"x": 1}, {"12": 1}, {"0": "late"}, {"0": None}, {"0": 3.5}])
def test_malformed_table(table) -> None:
    with pytest.raises(ValueError, match="timesteps.timesteps must be 'paper' or a table"):
        mapping_from_config({"kind": "table", "timesteps": table})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kind": "constant"}, "timesteps.timestep is None; allowed: whole numbers"),
        ({"kind": "constant", "timestep": True}, "timesteps.timestep is True; allowed: whole numbers"),
        ({"kind": "linear", "first": "high"}, "timesteps.first is 'high'; allowed: whole numbers"),
        ({"kind": "log", "last": 1.5}, "timesteps.last is 1.5; allowed: whole numbers"),
        ({"kind": "shuffled", "seed": float("nan")}, "timesteps.seed is nan; allowed: whole numbers"),
        ({"kind": "constant", "timesteps": 3}, "timesteps.timesteps is unknown to kind constant; allowed: kind, time"),
        ({"kind": "per_image", "bits": 8}, "timesteps.bits is unknown to kind per_image; allowed: kind"),
        ({"kind": "learned", "timesteps": {"0": "x"}}, "timesteps.timesteps must be 'paper' or a table"),
        ({"kind": "cosine"}, "timesteps.calibration is unset, but kind cosine is measured; allowed: a calib"),
        ({"kind": "snr", "calibration": None}, "timesteps.calibration is unset, but kind snr is measured"),
        ({"kind": "cosine", "values": {"0": 0.5}, "timesteps": {"1": 3}}, "name different rates"),
        ({"kind": "cosine", "values": "paper", "timesteps": {"1": 3}}, "timesteps.values must be a table rate id: cos"),
    ],
)  # fmt: skip
def test_what_is_refused(config: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        mapping_from_config(config)
    assert "\n" not in str(error.value)


def test_a_calibration_file(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps({"mappings": {kind: EXAMPLES[kind].to_config() for kind in ("cosine", "snr")}}))
    for kind in ("cosine", "snr"):
        assert mapping_from_config(read_calibration({"kind": kind, "calibration": str(path)})) == EXAMPLES[kind]
    for config in ({"kind": "linear", "first": 300}, {"kind": "snr", "calibration": None}):
        assert read_calibration(config) == config


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"mappings": {"snr": {}}}', '{"mappings": {"cosine": 3}}'])
def test_what_is_no_calibration_file(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "calibration.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match="timesteps.calibration is '.*', which cannot be read .*; allowed: a calibra"):
        read_calibration({"kind": "cosine", "calibration": str(path)})


def test_a_curve_is_straight_between_its_knots() -> None:
    curve = CurveMapping((700.0, 300.0, 20.0))
    assert [curve.at(quality) for quality in (0, 0.25, 0.5, 0.75, 1)] == [700, 500, 300, 160, 20]
    assert curve.to_config() == {"kind": "curve", "timesteps": [700.0, 300.0, 20.0]}
    curve.check((), 1000)
    with pytest.raises(ValueError, match=r"700\.0 is outside the schedule; allowed: 0 to 699$"):
        curve.check((), 700)


def test_a_curve_knows_no_rates() -> None:
    with pytest.raises(ValueError, match="kind curve is for models with a hyperprior"):
        CurveMapping.straight().check(PAPER_RATES, 1000)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"timesteps": [5]}, "has 1 knots; allowed: 2 or more"),
        ({"timesteps": [5, 6], "values": [1]}, "has 2 knots; allowed: 2 or more, as many as values"),
        ({"timesteps": "paper"}, "timesteps.timesteps is 'paper'; allowed: a list of numbers"),
        ({"timesteps": [5, "x"]}, "timesteps.timesteps is 'x'; allowed: numbers"),
    ],
)
def test_malformed_curves(config: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        mapping_from_config({"kind": "curve", **config})


def test_between_known_rates_timesteps_lie_on_a_line_over_log_bpp() -> None:
    unseen = [rate for rate in RATES if rate.timestep is None]
    table = interpolate(TableMapping.paper(), PAPER_RATES, unseen)
    assert {rate.id: table(rate) for rate in PAPER_RATES} == TableMapping.paper().timesteps
    # log(0.0024 / 0.0019) / log(0.0098 / 0.0019) = 0.1424 of the way from 500 to 400, and so on
    assert [table(rate) for rate in unseen] == [486, 333, 249, 159]
    learned = interpolate(LearnedMapping({0: 500.5, 1: 400.25}), RATES[:2], [RATES[8], RATES[7]])
    assert learned.kind == "learned" and learned(RATES[7]) == 400.25  # beyond the last known rate
    assert learned(RATES[8]) == pytest.approx(500.5 - 0.14241 * 100.25, abs=1e-2)


@pytest.mark.parametrize("kind", ["table", "shuffled"])
def test_the_papers_table_is_completed_for_the_rates_of_a_model(kind: str) -> None:
    config = {"kind": kind, "timesteps": "paper"}
    assert mapping_from_config(config, PAPER_RATES) == mapping_from_config(config)
    completed = mapping_from_config(config, RATES).timesteps
    assert completed == interpolate(TableMapping.paper(), PAPER_RATES, RATES[8:]).timesteps
    assert (completed[9], completed[11]) == (333, 159)  # 0.0234 and 0.1093
    with pytest.raises(ValueError, match=r"no pseudo-timestep for rate 0\.0234"):
        mapping_from_config({**config, "timesteps": {0: 500}}, RATES)(RATES[9])
