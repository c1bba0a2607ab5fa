"""Published checkpoints to ours and back: every tensor accounted for, every spelling read, nothing trusted."""

from __future__ import annotations

import json
import os
import pickle
import runpy
import shutil
import sys
from collections import Counter, OrderedDict
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from oscar import OscarCodec, checkpoint
from oscar.bitstream.entropy import uniform_frequencies
from oscar.bottlenecks.vq import HyperEncoder
from oscar.cli.main import main
from oscar.convert.published import (
    KEYS,
    LAYER_LISTS,
    Conversion,
    ConvertError,
    convert,
    export,
    export_codec,
    from_published,
    published_tensors,
    to_published,
)
from oscar.convert.published_files import TOP
from oscar.data.tensors import to_tensor
from oscar.inference.load import load
from oscar.models.backbone import Backbone, BackboneError
from oscar.rates import PAPER_RATES, RATES
from oscar.timesteps import ConstantMapping, PerImageMapping

ROOT = Path(__file__).parents[1]
MANIFEST = json.loads((ROOT / "tests/golden/published/official_manifest.json").read_text())
STATISTICS = ("initted", "cluster_size", "embed_avg")


@pytest.fixture(scope="module")
def official(make_codec, make_backbone, tmp_path_factory) -> Path:
    """A tiny published checkpoint, `oscar.pkl`, its backbone, `backbone`, and another of the same shape, `other`."""
    folder = tmp_path_factory.mktemp("official")
    make_backbone(0).save_pretrained(folder / "backbone")
    make_backbone(1).save_pretrained(folder / "other")
    export_codec(make_codec(), folder / "oscar.pkl")
    return folder


@pytest.fixture
def contents(official: Path) -> dict:
    """What `oscar.pkl` holds, to be changed."""
    return torch.load(official / "oscar.pkl", weights_only=True)


@pytest.fixture(scope="module")
def full() -> OscarCodec:
    """The paper's model at full shape, without storage."""
    config = OmegaConf.to_container(OmegaConf.load(ROOT / "configs/backbone/sd21_random.yaml"))
    with torch.device("meta"):
        backbone = Backbone.from_configs(config["vae"], config["unet"], config["scheduler"])
        architecture = {"bottleneck": {"rates": list(range(8))}, "denoiser": {}, "timesteps": {"kind": "table"}}
        return OscarCodec(*checkpoint.build(architecture, backbone))


def write(contents: object, path: Path) -> Path:
    torch.save(contents, path)
    return path


def refuse(sources: Path | list[Path], backbone: Path | str, error: type[ValueError] = ConvertError) -> str:
    """The one line with which a conversion is refused; nothing is written."""
    sources = sources if isinstance(sources, list) else [sources]
    out = sources[0].parent / "refused/model"
    with pytest.raises(error) as caught:
        convert(sources, out, backbone)
    assert not out.parent.exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# The published layout.


def test_every_tensor_of_the_published_checkpoint_has_its_place(full: OscarCodec) -> None:
    """Names, shapes and types at full size."""
    ours = {
        name: [list(value.shape), str(value.dtype)] for name, (value, _) in published_tensors(full, PAPER_RATES).items()
    }
    expected = {
        "embeddings": MANIFEST["embeddings"],
        **{
            f"{part}.{name}": entry
            for part in ("hyper_encoders", "state_dict_unet")
            for name, entry in MANIFEST[part].items()
        },
    }
    assert ours == expected


def test_what_is_not_kept_is_named() -> None:
    unused = [key.published.rpartition(".")[2] for key in KEYS if key.unused]
    assert sorted(unused) == sorted([*STATISTICS, "{part}"])
    assert all(key.published in ("embeddings",) or key.published.partition(".")[0] in TOP for key in KEYS)


def test_the_other_entries_of_the_published_checkpoint(full: OscarCodec) -> None:
    """The lists of layers in their order, the rank, and nothing else."""
    found = to_published(full)
    assert set(found) == set(MANIFEST["top"]) == set(TOP)
    assert found["rank_unet"] == MANIFEST["rank_unet"]
    for name in LAYER_LISTS:
        assert found[name] == MANIFEST[name]
    assert list(found["state_dict_unet"]) == list(MANIFEST["state_dict_unet"])
    assert isinstance(found["embeddings"], torch.nn.Parameter)


def test_there_and_back(official: Path, contents: dict, tmp_path: Path) -> None:
    result = convert([official / "oscar.pkl"], tmp_path / "model", official / "backbone")
    tensors = len(contents["hyper_encoders"]) + len(contents["state_dict_unet"]) + 1
    assert result.used + sum(result.unused.values()) == tensors
    assert sorted(result.unused.values()) == [2, 3 * 8]
    export(tmp_path / "model", tmp_path / "again.pkl")
    again = torch.load(tmp_path / "again.pkl", weights_only=True)
    assert set(again) == set(contents) == set(TOP)
    assert torch.equal(again["embeddings"], contents["embeddings"]) and again["rank_unet"] == contents["rank_unet"]
    for part in ("hyper_encoders", "state_dict_unet"):
        assert again[part].keys() == contents[part].keys()
        for name, value in contents[part].items():
            assert torch.equal(again[part][name], value) or name.endswith(STATISTICS), name
    for name in LAYER_LISTS:
        assert again[name] == contents[name]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.pkl", "model"]


def test_the_same_images(official: Path, make_codec, make_image, tmp_path: Path) -> None:
    convert([official / "oscar.pkl"], tmp_path / "model", official / "backbone")
    codec, converted = make_codec(), OscarCodec.from_pretrained(tmp_path / "model").eval()
    assert converted.mapping == codec.mapping and converted.bottleneck.rates == PAPER_RATES
    assert converted.backbone.source == str(official / "backbone")
    image = to_tensor(make_image(64, 48))
    for rate in PAPER_RATES[::3]:
        assert torch.equal(converted.reconstruct(image, rate).image, codec.reconstruct(image, rate).image)
        assert (converted.bottleneck.frequencies[rate.id] == uniform_frequencies(rate.codebook_size)).all()


def test_a_bundled_backbone_needs_nothing_else(official: Path, make_image, tmp_path: Path) -> None:
    backbone = Path(shutil.copytree(official / "backbone", tmp_path / "backbone"))
    for bundle, name in ((True, "bundled"), (False, "named")):
        convert([official / "oscar.pkl"], tmp_path / name, backbone, bundle=bundle, dtype=torch.float16)
    shutil.rmtree(backbone)
    codec = load(tmp_path / "bundled", dtype=torch.float32)
    assert codec.decompress(codec.compress(make_image(40, 30), 0.125)).size == (40, 30)
    with pytest.raises(checkpoint.CheckpointError, match=str(backbone)):
        OscarCodec.from_pretrained(tmp_path / "named")


# Stage 1.


def test_files_of_stage_1(contents: dict, official: Path, tmp_path: Path) -> None:
    sources = []
    for place in (7, 2):  # in any order; each tells its rate by its shapes
        state = {
            name.partition(".")[2]: value
            for name, value in contents["hyper_encoders"].items()
            if name.startswith(f"{place}.")
        }
        sources.append(write(state if place == 2 else {"state_dict": state}, tmp_path / f"{place}.pkl"))
    result = convert(sources, tmp_path / "model", official / "backbone")
    codec = OscarCodec.from_pretrained(tmp_path / "model")
    assert [rate.id for rate in codec.bottleneck.rates] == [2, 7] and result.unused == {KEYS[3].unused: 6}
    for rate in codec.bottleneck.rates:
        for part in ("backbone.0.weight", "quantizer._codebook.embed", "proj.12.bias"):
            expected = contents["hyper_encoders"][f"{rate.id}.{part}"]
            assert torch.equal(codec.bottleneck.at(rate).state_dict()[part], expected)
    assert codec.denoiser.options == {"tuning": "lora", "lora_rank": 16, "lora_alpha": 8, "prompt_tokens": 77}
    again = from_published(sources, official / "backbone").codec
    assert again.fingerprint == codec.fingerprint  # also what stage 1 does not hold
    assert not any(value.any() for name, value in codec.named_parameters() if ".lora_B." in name)


def test_a_rate_whose_codebook_has_another_size(official: Path, tmp_path: Path) -> None:
    """The published code's table says 8196, where ours says 8192; and it has no pseudo-timestep for it."""
    torch.manual_seed(0)
    encoder = HyperEncoder(RATES[10], width=8, features=8, codebook_dim=4, codebook_size=8196)
    source = write(encoder.state_dict(), tmp_path / "hyper.pkl")
    assert "no pseudo-timestep for rate 0.0507" in refuse(source, official / "backbone")
    convert([source], tmp_path / "model", official / "backbone", timesteps={"kind": "log"})
    codec = OscarCodec.from_pretrained(tmp_path / "model")
    assert codec.bottleneck.rates == (RATES[10],) and codec.bottleneck.at(RATES[10]).codebook_size == 8196


def test_a_rate_given_twice(contents: dict, official: Path, tmp_path: Path) -> None:
    state = {name[2:]: value for name, value in contents["hyper_encoders"].items() if name.startswith("3.")}
    sources = [write(state, tmp_path / f"{name}.pkl") for name in "ab"]
    assert "has grid 32 and 2048 codes, of which there is another" in refuse(sources, official / "backbone")


# Spellings.


def old_peft(contents: dict) -> None:
    unet = contents["state_dict_unet"]
    contents["state_dict_unet"] = {name.replace(".base_layer", ""): value for name, value in unet.items()}


def own_state_dicts_of_peft(contents: dict) -> None:
    contents["state_dict_unet"] = {
        "base_model.model." + name.replace(f".{adapter}", ""): value
        for name, value in contents["state_dict_unet"].items()
        for adapter in LAYER_LISTS.values()
        if adapter in name
    }


def wrapped(contents: dict) -> None:
    for part, prefix in (("hyper_encoders", "module."), ("state_dict_unet", "module._orig_mod.")):
        contents[part] = {prefix + name: value for name, value in contents[part].items()}


def quantiser_1_8(contents: dict) -> None:
    for name, value in contents["hyper_encoders"].items():
        if name.endswith("initted"):
            contents["hyper_encoders"][name] = torch.Tensor([value])


def quantiser_0_10(contents: dict) -> None:
    quantiser_1_8(contents)
    contents["hyper_encoders"] = {
        name: value for name, value in contents["hyper_encoders"].items() if not name.endswith("embed_avg")
    }


def quantiser_0_8(contents: dict) -> None:
    quantiser_0_10(contents)
    for name, value in contents["hyper_encoders"].items():
        if name.endswith(("embed", "cluster_size")):
            contents["hyper_encoders"][name] = value[0]


SPELLINGS = [old_peft, own_state_dicts_of_peft, wrapped, quantiser_1_8, quantiser_0_10, quantiser_0_8]


@pytest.fixture(scope="module")
def expected(official: Path) -> Conversion:
    return from_published([official / "oscar.pkl"], official / "backbone")


@pytest.mark.parametrize("spell", SPELLINGS)
def test_other_spellings_are_the_same_checkpoint(
    official: Path, contents: dict, expected: Conversion, tmp_path: Path, spell
) -> None:
    def spelling() -> list:
        return [
            (name, value.shape)
            for part in ("hyper_encoders", "state_dict_unet")
            for name, value in contents[part].items()
        ]

    before = spelling()
    spell(contents)
    assert spelling() != before
    found = from_published([write(contents, tmp_path / "spelt.pkl")], official / "backbone")
    assert found.codec.fingerprint == expected.codec.fingerprint and found.used == expected.used


# The backbone.


def test_another_backbone(official: Path, make_backbone, tmp_path: Path) -> None:
    """Of the same shape: told by conv_in, which published checkpoints carry."""
    message = refuse(official / "oscar.pkl", official / "other")
    assert "state_dict_unet.conv_in.base_layer." in message and "differs from that of backbone" in message


def test_a_backbone_in_half_precision_is_the_same(official: Path, tmp_path: Path) -> None:
    backbone = Backbone.from_pretrained(official / "backbone")
    torch.nn.Module.to(backbone, torch.float16).save_pretrained(tmp_path / "half")
    assert from_published([official / "oscar.pkl"], tmp_path / "half").used


def test_a_backbone_of_another_shape(official: Path, tmp_path: Path) -> None:
    config = OmegaConf.to_container(OmegaConf.load(ROOT / "configs/backbone/tiny.yaml"))
    for name, change, words in (
        ("wide", {"block_out_channels": [16, 32]}, "has shape"),
        ("deep", {"layers_per_block": 2}, "has layer down_blocks.0.attentions.1."),
        ("text", {"cross_attention_dim": 12}, "embeddings has shape (4, 8); allowed: (4, 12)"),
    ):
        backbone = Backbone.from_configs(config["vae"], {**config["unet"], **change}, config["scheduler"])
        backbone.save_pretrained(tmp_path / name)
        assert words in refuse(official / "oscar.pkl", tmp_path / name)


def test_a_missing_backbone(official: Path) -> None:
    assert "backbone 'nowhere' could not be read" in refuse(official / "oscar.pkl", "nowhere", BackboneError)


# Bad files.


def edited(part: str, name: str, value: object):
    def edit(contents: dict) -> None:
        contents[part][name] = value

    return edit


def without(part: str, name: str):
    def edit(contents: dict) -> None:
        del contents[part][name]

    return edit


def at_top(name: str, value: object):
    return lambda contents: contents.update({name: value})


LORA = "conv_out.lora_A.default_decoder.weight"
EDITS = [
    (lambda contents: contents.pop("rank_unet"), "lacks rank_unet; allowed: hyper_encoders, embeddings"),
    (at_top("optimizer", {}), "'optimizer' is unknown"),
    (at_top("rank_unet", 4), "allowed: of rank_unet, 4"),
    (at_top("rank_unet", "2"), "rank_unet is '2'; allowed: whole numbers"),
    (at_top("embeddings", None), "embeddings is no tensor"),
    (at_top("embeddings", torch.zeros(4, 9)), "embeddings has shape (4, 9); allowed: (4, 8)"),
    (at_top("hyper_encoders", []), "holds a list where tensors by name are allowed"),
    (at_top("hyper_encoders", {}), "holds hyper-encoders []"),
    (at_top("unet_lora_others_modules", "all"), "unet_lora_others_modules is no list of layers"),
    (at_top("unet_lora_others_modules", []), "has layer mid_block."),
    (edited("state_dict_unet", LORA, torch.zeros(3, 8, 3, 3)), f"{LORA} has shape (3, 8, 3, 3); allowed: of rank_unet"),
    (edited("state_dict_unet", "time_embedding.linear_1.weight", torch.zeros(1)), "unknown state_dict_unet.time_"),
    (without("state_dict_unet", LORA), f"lacks state_dict_unet.{LORA} (1 tensors in all)"),
    (without("hyper_encoders", "4.proj.12.bias"), "lacks hyper_encoders.4.proj.12.bias (1 tensors in all)"),
    (without("hyper_encoders", "4.quantizer._codebook.embed"), "hyper-encoder 4 lacks"),
    (edited("hyper_encoders", "9.proj.12.bias", torch.zeros(4)), "allowed: 0, 1 and so on"),
    (edited("hyper_encoders", "4.proj.12.bias", torch.zeros(5)), "has shape (5,); allowed: (4,)"),
    (edited("hyper_encoders", "4.proj.12.bias", torch.zeros(4).int()), "is torch.int32; allowed: torch.float32"),
    (edited("hyper_encoders", "4.proj.12.bias", torch.full((4,), torch.nan)), "values that are not finite"),
    (edited("hyper_encoders", "4.proj.12.bias", 3), "'4.proj.12.bias' is no tensor"),
    (edited("hyper_encoders", "4.backbone.0.weight", torch.zeros(4)), "hyper-encoder 4 has tensors of too few"),
    (edited("hyper_encoders", "4.quantizer._codebook.embed", torch.zeros(1, 17, 4)), "has grid 64 and 17 codes"),
]


@pytest.mark.parametrize(("edit", "words"), EDITS, ids=[words for _, words in EDITS])
def test_a_checkpoint_that_does_not_fit(official: Path, contents: dict, tmp_path: Path, edit, words: str) -> None:
    edit(contents)
    path = write(contents, tmp_path / "odd.pkl")
    message = refuse(path, official / "backbone")
    assert words in message and message.startswith(str(path))


class Command:
    """Runs a command when it is unpickled, if that is allowed."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "pickle"])
def test_a_pickle_with_code_in_it(official: Path, contents: dict, tmp_path: Path, legacy: bool) -> None:
    trap, path = tmp_path / "trapped", tmp_path / "evil.pkl"
    contents["hyper_encoders"] = OrderedDict(contents["hyper_encoders"], evil=Command(trap))
    torch.save(contents, path, _use_new_zipfile_serialization=not legacy)
    message = refuse(path, official / "backbone")
    assert message == (
        f"{path}: refused, since it asks for {os.system.__module__}.system, which could run code; "
        "allowed: tensors, numbers and text"
    )
    assert not trap.exists()


def test_files_that_are_no_checkpoint(official: Path, contents: dict, tmp_path: Path) -> None:
    data = (official / "oscar.pkl").read_bytes()
    torch.save(contents, tmp_path / "old.pkl", _use_new_zipfile_serialization=False)
    old = (tmp_path / "old.pkl").read_bytes()
    bad = {
        "empty": b"",
        "text": b"no checkpoint",
        "protocol": b"\x80\x02}q\x00.",
        "zip": b"PK\x05\x06" + bytes(18),
        "pickled": pickle.dumps({"hyper_encoders": [1, 2]}),
        **{f"cut {share}": data[: int(len(data) * share)] for share in (0.001, 0.5, 0.999)},
        **{f"old {share}": old[: int(len(old) * share)] for share in (0.001, 0.5, 0.999)},
    }
    for name, content in bad.items():
        path = tmp_path / f"{name}.pkl"
        path.write_bytes(content)
        message = refuse(path, official / "backbone")
        assert message.startswith(f"{path}: ") and ("damaged" in message or "neither a" in message), name
    assert "neither a published checkpoint" in refuse(write([1, 2], tmp_path / "list.pkl"), official / "backbone")
    assert "No such file" in refuse(tmp_path / "none.pkl", official / "backbone")
    assert "Is a directory" in refuse(tmp_path, official / "backbone")


# Back.


@torch.no_grad()
def test_what_the_published_layout_has_no_place_for(make_codec, tmp_path: Path) -> None:
    def refused(change) -> str:
        codec = make_codec(rates=[0, 7])
        change(codec)
        with pytest.raises(ConvertError) as error:
            to_published(codec)
        return str(error.value)

    with pytest.raises(ConvertError, match="denoiser.tuning is 'full'; allowed in a published checkpoint: 'lora'"):
        to_published(make_codec(tuning="full"))
    with pytest.raises(ConvertError, match="denoiser.lora_alpha is 16; allowed in a published checkpoint: 8"):
        to_published(make_codec(lora_alpha=16))
    assert "timesteps is 'per_image'" in refused(lambda codec: codec.set_mapping(PerImageMapping()))
    assert "timesteps is 'constant'" in refused(lambda codec: codec.set_mapping(ConstantMapping(300)))
    other = type(make_codec(rates=[0]).mapping)({0: 501, 7: 150})
    assert "timestep of rate 0.0019 is 501" in refused(lambda codec: codec.set_mapping(other))
    assert "merged" in refused(lambda codec: codec.denoiser.merge())


# The command.


def test_the_command(official: Path, make_image, tmp_path: Path, capsys) -> None:
    model, new = tmp_path / "model", tmp_path / "new"
    assert main(["convert", str(official / "oscar.pkl"), str(model), "--backbone", str(official / "backbone")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{model}: rates {', '.join(f'{rate.bpp:.4f}' for rate in PAPER_RATES)}"
    assert Counter(line.split()[0] for line in lines[2:]) == {"24": 1, "2": 1}
    make_image(48, 40).save(tmp_path / "photo.png")
    for args in (["compress", "photo.png", "a.oscar", "--rate", "0.125"], ["decompress", "a.oscar", "b.png"]):
        paths = [str(tmp_path / arg) if "." in arg and arg[0] != "0" else arg for arg in args]
        assert main([*paths, "--model", str(model)]) == 0
    assert main(["convert", "--back", str(model), str(tmp_path / "back.pkl")]) == 0
    assert from_published([tmp_path / "back.pkl"], official / "backbone").used
    capsys.readouterr()
    for args, words in (
        ([official / "oscar.pkl", model, "--backbone", official / "backbone"], "exists already; allow it with"),
        ([official / "oscar.pkl", new, "--backbone", official / "other"], "differs from that of backbone"),
        ([official / "oscar.pkl", new, "--backbone", official / "backbone", "--timesteps", "snr"], "is measured"),
        (["--back", "nano-vq", new], "model 'nano-vq': denoiser.tuning is 'full'"),
        (["--back", "nowhere", new], "model 'nowhere'"),
    ):
        assert main(["convert", *map(str, args)]) == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1 and words in captured.err, captured.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.oscar", "b.png", "back.pkl", "model", "photo.png"]


def test_the_script(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", "oscar.pkl", "model"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "scripts/convert_checkpoint.py"), run_name="__main__")
    assert end.value.code == 2 and "--backbone is missing" in capsys.readouterr().err
