import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from oscar.baselines import BASELINES, BaselineUnavailable, make_baseline

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "baselines").glob("*.yaml"))


def test_unknown_names_list_all():
    with pytest.raises(ValueError, match="^codec 'jepg' does not exist; allowed: jpeg, jpeg2000, .*cheng2020-attn$"):
        make_baseline("jepg")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speed": 3}, "^jpeg: option 'speed' does not exist; allowed: subsampling, progressive, name, points, "),
        ({"subsampling": "4:1:1"}, "^jpeg: subsampling '4:1:1' is not allowed; allowed: 4:2:0, 4:2:2, 4:4:4$"),
        ({"progressive": 1}, "^jpeg: progressive 1 is not allowed"),
        ({"points": []}, "^jpeg: points are empty"),
        ({"points": [10, 200]}, "^jpeg: quality 200 is not allowed; allowed: whole numbers from 1 to 100$"),
        ({"downscale": 0}, "^jpeg: downscale 0 is not allowed; allowed: whole numbers from 1 to 64$"),
        ({"alias": "../x"}, "^jpeg: alias '../x' is not allowed"),
    ],
)
def test_wrong_options_are_one_line(options, message):
    with pytest.raises(ValueError, match=message):
        make_baseline("jpeg", **options)


def test_points_are_sorted_and_named():
    codec = make_baseline("jpeg", points=[50, 5, 50], alias="jpeg-mine", label="My JPEG")
    assert (codec.points, codec.name, codec.label) == ((5, 50), "jpeg-mine", "My JPEG")
    assert make_baseline("jpeg").points != codec.points and make_baseline("jpeg").name == "jpeg"


def test_light_baselines_do_not_import_torch():
    code = "import sys, oscar.baselines; oscar.baselines.make_baseline('jpeg'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_are_what_the_code_does_by_default(path):
    """Each file holds one entry of `make_baseline`'s arguments, keyed by the codec's name."""
    ((key, entry),) = OmegaConf.to_container(OmegaConf.load(path)).items()
    if entry["name"] not in ("jpeg", "jpeg2000", "webp", "avif", "jxl"):
        with pytest.raises(BaselineUnavailable):  # programs and weights are not there, but every option is
            make_baseline(**entry | ({"weights": "/nowhere"} if "weights" in entry else {"encoder": "/nowhere"}))
        return
    try:
        codec = make_baseline(**entry)
    except BaselineUnavailable as error:
        pytest.skip(str(error))
    default = make_baseline(entry["name"], downscale=entry.get("downscale", 1))
    assert (codec.name, codec.points, codec.describe()) == (key, default.points, default.describe())


def test_every_baseline_has_a_config():
    entries = [entry for path in CONFIGS for entry in OmegaConf.to_container(OmegaConf.load(path)).values()]
    assert {entry["name"] for entry in entries} == set(BASELINES)
