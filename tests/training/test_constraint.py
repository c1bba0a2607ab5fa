"""Codes in stages that cost fewer bits: the function and its script, with the tiny random model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from oscar import OscarCodec
from oscar.data.images import read_image
from oscar.inference.load import load
from oscar.rates import PAPER_RATES
from oscar.training.constraint import constrain_codes

STAGED, PLAIN = PAPER_RATES[4], PAPER_RATES[5]


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("constrain_codes")


@pytest.fixture
def codec(make_codec, photos: Path) -> OscarCodec:
    codec = make_codec(rates=[STAGED.id, PLAIN.id], bottleneck={"stages": {str(STAGED.id): 4}})
    with torch.no_grad():
        codec.bottleneck.finish([codec.backbone.encode(torch.rand(2, 3, 64, 64) * 2 - 1)])
    codec.forget_fingerprint()
    return codec


def test_files_become_shorter_and_other_rates_stay(codec: OscarCodec, photos: Path) -> None:
    paths = sorted(photos.glob("*.png"))
    image = read_image(paths[0])
    before = {rate: codec.compress(image, rate) for rate in codec.bottleneck.rates}
    tag = codec.fingerprint
    plain = {name: value.clone() for name, value in codec.bottleneck.at(PLAIN).state_dict().items()}
    table = codec.bottleneck.frequencies[PLAIN.id]
    constrain_codes(codec, paths, {STAGED.bpp: 0.5})
    assert codec.fingerprint != tag
    assert len(codec.compress(image, STAGED)) < 0.9 * len(before[STAGED])
    assert codec.decompress(codec.compress(image, STAGED)).size == image.size
    assert codec.bottleneck.frequencies[PLAIN.id] is table
    for name, value in codec.bottleneck.at(PLAIN).state_dict().items():
        assert torch.equal(value, plain[name])
    assert (codec.bottleneck.frequencies[STAGED.id] != codec.bottleneck.frequencies[STAGED.id][0]).any()


def test_the_same_again_gives_the_same(make_codec, photos: Path) -> None:
    found = []
    for _ in range(2):
        codec = make_codec(rates=[STAGED.id], bottleneck={"stages": {str(STAGED.id): 4}})
        constrain_codes(codec, sorted(photos.glob("*.png")), {STAGED.bpp: 0.3}, seed=4)
        found.append(codec.bottleneck.at(STAGED).quantizer)
    assert torch.equal(found[0].codebook, found[1].codebook) and torch.equal(found[0].penalty, found[1].penalty)


def test_the_script(script, codec: OscarCodec, photos: Path, tmp_path: Path) -> None:
    codec.save_pretrained(tmp_path / "model")
    command = [
        str(photos),
        "--model",
        str(tmp_path / "model"),
        "--out",
        str(tmp_path / "out"),
        "--pictures",
        "3",
    ]  # --limit, by its former name
    assert script.main([*command, "--strength", "0.0625=0.5"]) == 0
    loaded = load(tmp_path / "out")
    quantizer = loaded.bottleneck.at(STAGED).quantizer
    assert (quantizer.penalty > 0).all()
    assert not torch.equal(quantizer.codebook, codec.bottleneck.at(STAGED).quantizer.codebook)
    image = read_image(sorted(photos.glob("*.png"))[4])
    data = loaded.compress(image, STAGED)
    encoder, decoder = (load(tmp_path / "out", components=half) for half in ("encoder", "decoder"))
    assert encoder.compress(image, STAGED) == data
    assert decoder.decompress(data) == loaded.decompress(data)


@pytest.mark.parametrize(
    ("strength", "message"),
    [
        ("0.0781=0.2", "strength is for rate 0.0781, whose codes have no stages; allowed: 0.0625"),
        ("0.0625=0", "strength of rate 0.0625 is 0.0; allowed: above 0"),
        ("0.0625=nan", "strength of rate 0.0625 is nan; allowed: above 0"),
        ("0.0625", "--strength is '0.0625'; allowed: RATE=SHARE, such as 0.0625=0.2"),
        ("0.5=0.2", "rate 0.5"),
    ],
)
def test_mistakes(script, codec: OscarCodec, photos: Path, tmp_path: Path, capsys, strength: str, message: str) -> None:
    codec.save_pretrained(tmp_path / "model")
    command = [str(photos), "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out")]
    assert script.main([*command, "--strength", strength]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
