from __future__ import annotations

import math
import os
import weakref

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from oscar.inference import row_blocks, tiling
from oscar.inference.cpu.fewer import use_fewer_multiplications
from oscar.inference.cpu.lean import make_lean
from oscar.inference.cpu.winograd import use_winograd
from oscar.inference.memory import MemoryBudget
from oscar.inference.row_blocks import Stream
from oscar.inference.tiling import decode, encode

TIGHT = MemoryBudget(1)  # the least that can be done with
LITTLE, SOME = MemoryBudget(1_500_000), MemoryBudget(2_000_000)  # enough, in these tests, for some of the maps
FULL = pytest.mark.skipif(os.environ.get("OSCAR_FULL_SIZE") != "1", reason="takes minutes; set OSCAR_FULL_SIZE=1")


def difference(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape and one.dtype == other.dtype
    return float((one - other).abs().max())


def test_blocks_give_what_the_whole_gives(make_images, small_limits, standin_vae) -> None:
    images = make_images()
    moments = standin_vae.quant_conv(standin_vae.encoder(images))
    assert difference(encode(standin_vae, images), moments) < 1e-5
    latent = moments[:, :4]
    whole = standin_vae.decode(latent).sample
    assert difference(decode(standin_vae, latent), whole) < 1e-5 * float(whole.abs().max())


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "height", "width"), [("standin", 152, 136), pytest.param("sd21_random", 1032, 1024, marks=FULL)]
)
def test_no_seams(
    backbone_config, make_images, request, capsys, monkeypatch, name: str, height: int, width: int
) -> None:
    """Where all fit: against one block of all rows, and against diffusers' own pass, which rounds elsewhere."""
    if name == "standin":
        request.getfixturevalue("small_limits")
    torch.manual_seed(0)
    networks = {torch.float32: AutoencoderKL.from_config(backbone_config(name)["vae"]).eval()}
    networks[torch.bfloat16] = AutoencoderKL.from_config(backbone_config(name)["vae"]).eval()
    networks[torch.bfloat16].load_state_dict(networks[torch.float32].state_dict())
    nn.Module.to(networks[torch.bfloat16], torch.bfloat16)
    assert tiling.can_be_cut(networks[torch.float32])
    latent = networks[torch.float32].encode(make_images(1, height, width)).latent_dist.mode()
    exact = networks[torch.float32].decode(latent).sample
    for dtype, network in networks.items():
        blocks = decode(network, latent.to(dtype), TIGHT)
        with monkeypatch.context() as patch:
            patch.setattr(row_blocks, "BLOCK", {"cpu": 8 * height * width})
            patch.setattr(row_blocks, "QUERIES", height * width)
            uncut = decode(network, latent.to(dtype))
        whole = network.decode(latent.to(dtype)).sample
        pairs = {
            "blocks against one block": (blocks, uncut),
            "blocks against the whole": (blocks, whole),
            "blocks against the whole in float32": (blocks, exact),
            "the whole against the whole in float32": (whole, exact),
        }
        seams = {what: (one.float() - other.float()).abs() * 127.5 for what, (one, other) in pairs.items()}
        if name == "sd21_random":
            with capsys.disabled():
                for what, seam in seams.items():
                    print(f"\n{dtype}, {what}: at most {seam.max():.3g}/255, mean {seam.mean():.3g}/255")
        mean = {what: float(seam.mean()) for what, seam in seams.items()}
        assert mean["blocks against one block"] < 0.5
        if dtype == torch.float32:
            assert mean["blocks against the whole"] < 1e-3
        exactly = mean["the whole against the whole in float32"]
        assert mean["blocks against the whole in float32"] <= 1.1 * exactly + 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_budget_changes_no_bit(make_images, small_limits, standin_vae, dtype: torch.dtype) -> None:
    network = AutoencoderKL.from_config(standin_vae.config).eval().requires_grad_(False)
    network.load_state_dict(standin_vae.state_dict())
    nn.Module.to(network, dtype)
    images = make_images().to(dtype)
    latent = encode(network, images)[:, :4]
    result = decode(network, latent)
    assert result.dtype == dtype
    for budget in (TIGHT, LITTLE, SOME, MemoryBudget()):
        assert torch.equal(encode(network, images, budget)[:, :4], latent)
        assert torch.equal(decode(network, latent, budget), result)


def test_a_smaller_budget_takes_less_and_computes_more(small_limits, standin_vae) -> None:
    for half, enough in enumerate((LITTLE, SOME)):
        none, some, tight = (tiling.plan(standin_vae, 152, 136, torch.float32, x)[half] for x in (None, enough, TIGHT))
        assert none.peak > enough.limit >= some.peak >= tight.peak
        assert none.recomputed == 0 < some.recomputed < tight.recomputed


@torch.no_grad()
def test_a_plan_is_what_a_run_does(make_images, small_limits, standin_vae) -> None:
    for budget in (None, LITTLE, SOME, TIGHT):
        runs = []
        for run, value in ((Stream.encode, make_images()), (Stream.decode, torch.randn(1, 4, 19, 17))):
            stream = Stream(math.inf if budget is None else budget.limit, torch.float32, torch.device("cpu"))
            run(stream, standin_vae, value)
            runs.append((stream.peak, stream.recomputed))
        assert runs == list(tiling.plan(standin_vae, 152, 136, torch.float32, budget))


@pytest.mark.parametrize("budget", [None, LITTLE, SOME, TIGHT])
def test_no_other_maps_are_alive_than_are_counted(make_images, small_limits, standin_vae, monkeypatch, budget) -> None:
    alive: weakref.WeakSet[row_blocks._Kept] = weakref.WeakSet()
    create, note, counts = row_blocks._Kept.__init__, Stream.note, []

    def created(self, *arguments, **options) -> None:
        create(self, *arguments, **options)
        alive.add(self)

    def noted(self, maps, more, channels) -> None:
        counts.append(len(maps))
        assert sum(kept.bytes for kept in alive) == sum(kept.bytes for kept in maps)
        note(self, maps, more, channels)

    monkeypatch.setattr(row_blocks._Kept, "__init__", created)
    monkeypatch.setattr(Stream, "note", noted)
    latent = encode(standin_vae, make_images(), budget)[:, :4]
    decode(standin_vae, latent, budget)
    assert max(counts) == 2


@pytest.mark.parametrize("make_fast", [lambda vae: use_winograd(vae, min_channels=8), use_fewer_multiplications])
def test_other_kinds_of_convolutions(make_images, small_limits, standin_vae, make_fast) -> None:
    fast = AutoencoderKL.from_config(standin_vae.config).eval().requires_grad_(False)
    fast.load_state_dict(standin_vae.state_dict())
    make_lean(fast)
    make_fast(fast)
    images = make_images()
    latent = encode(standin_vae, images)[:, :4]
    assert difference(encode(fast, images)[:, :4], latent) < 1e-4
    result = decode(fast, latent)
    assert difference(result, decode(standin_vae, latent)) < 1e-4 * float(result.abs().max())
    assert torch.equal(decode(fast, latent, TIGHT), result)


def test_statistics_of_a_map_far_from_zero() -> None:
    torch.manual_seed(0)
    values = 1000 + torch.randn(1, 8, 300, 5) * torch.linspace(0.1, 1, 300)[:, None]
    norm = nn.GroupNorm(4, 8).requires_grad_(False)
    norm.weight.normal_()
    norm.bias.normal_()
    stream = Stream(math.inf, torch.float32, torch.device("cpu"))
    stream.block = 100
    change = stream.normalisation(norm, nn.SiLU(), row_blocks._Kept(values))
    exact = nn.functional.silu(norm.double()(values.double()))
    assert difference(change(values).double(), exact) < 1e-3
    assert change(values[:, :, 10:20]).equal(change(values)[:, :, 10:20])
