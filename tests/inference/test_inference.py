"""What makes networks fast changes nothing beyond rounding."""

from __future__ import annotations

import copy
import math
import os

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import nn

from oscar.bottlenecks.vq import VQSymbols
from oscar.inference import optimise
from oscar.inference.cpu import fewer
from oscar.inference.cpu.fewer import PatchConv2d, SharedUpsample2D, use_fewer_multiplications
from oscar.inference.cpu.group_norm import exact_norms
from oscar.inference.cpu.lean import LeanResnetBlock2D, LeanTransformer2DModel, make_lean
from oscar.inference.cpu.winograd import WinogradConv2d
from oscar.inference.load import load
from oscar.inference.loading import merge_lora
from oscar.inference.optimise import compile_networks
from oscar.inference.precision import WideConv2d, WideLinear, auto_dtype, emulates_dtype, upcast_to_fp32
from oscar.inference.preview import load_tiny_vae
from oscar.inference.prompt import PromptAttnProcessor, cache_prompt
from oscar.inference.row_blocks import Stream
from oscar.models.modules import WeightsError


@pytest.fixture(autouse=True)
def seeded_without_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture
def vae() -> AutoencoderKL:
    """Stable Diffusion's layers, wide enough for Winograd's way."""
    return AutoencoderKL(
        block_out_channels=(96, 96, 96, 96),
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
    ).eval()


@pytest.fixture
def unet() -> UNet2DConditionModel:
    """Stable Diffusion 2.1's layers, narrow."""
    return UNet2DConditionModel(
        block_out_channels=(96, 96, 128),
        down_block_types=["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        layers_per_block=1,
        attention_head_dim=[3, 4, 4],
        cross_attention_dim=24,
        use_linear_projection=True,
        norm_num_groups=32,
    ).eval()


def fast(network: nn.Module) -> nn.Module:
    network = copy.deepcopy(network)
    make_lean(network)
    use_fewer_multiplications(network)
    return network


def kinds(network: nn.Module, kind: type) -> int:
    return sum(type(module) is kind for module in network.modules())


# The autoencoder and the UNet as a whole.


@pytest.mark.parametrize("batch", [1, 3])
def test_the_autoencoder_gives_the_same(vae, batch: int) -> None:
    quick = fast(vae)
    images, latent = torch.rand(batch, 3, 96, 160) * 2 - 1, torch.randn(batch, 4, 12, 20)
    torch.testing.assert_close(
        quick.encode(images).latent_dist.mode(), vae.encode(images).latent_dist.mode(), rtol=1e-4, atol=2e-5
    )
    torch.testing.assert_close(quick.decode(latent).sample, vae.decode(latent).sample, rtol=1e-4, atol=2e-5)
    assert kinds(quick, ResnetBlock2D) == kinds(quick, Upsample2D) == 0
    assert kinds(quick, LeanResnetBlock2D) and kinds(quick, SharedUpsample2D) and kinds(quick, WinogradConv2d)
    assert kinds(vae, ResnetBlock2D)  # the original stayed as it was
    assert quick.state_dict().keys() == vae.state_dict().keys()


@pytest.mark.parametrize("batch", [1, 2])
def test_the_unet_gives_the_same(unet, monkeypatch, batch: int) -> None:
    monkeypatch.setattr(fewer, "HEAVY", 150_000)  # so that some convolutions take each way
    prompt, latent = torch.randn(1, 7, 24), torch.randn(batch, 4, 32, 32)
    expected = unet(latent, 210, encoder_hidden_states=prompt.expand(batch, -1, -1)).sample
    quick = fast(unet)
    cached = cache_prompt(quick, prompt)
    other = torch.zeros(batch, 7, 24)  # is not looked at any more
    torch.testing.assert_close(quick(latent, 210, encoder_hidden_states=other).sample, expected, rtol=1e-4, atol=2e-5)
    assert cached == kinds(quick, BasicTransformerBlock) == kinds(quick, LeanTransformer2DModel) > 0
    assert kinds(quick, PatchConv2d) and kinds(quick, WinogradConv2d) and kinds(quick, SharedUpsample2D)
    assert quick.state_dict().keys() == unet.state_dict().keys()


def test_prompt_projections_are_not_computed_again(unet) -> None:
    cache_prompt(unet, torch.randn(1, 7, 24))
    for name, attention in unet.named_modules():
        if name.endswith("attn2"):
            assert type(attention.processor) is PromptAttnProcessor
            attention.to_k = attention.to_v = None
    unet(torch.randn(1, 4, 16, 16), 210, encoder_hidden_states=torch.randn(1, 7, 24))


def test_fewer_multiplications_are_for_float32(vae) -> None:
    quick = fast(vae).to(torch.bfloat16)
    latent = torch.randn(1, 4, 8, 8)
    difference = quick.decode(latent.bfloat16()).sample.float() - vae.decode(latent).sample
    assert difference.abs().max() < 0.1


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("OSCAR_FULL_SIZE") != "1", reason="takes minutes; set OSCAR_FULL_SIZE=1")
def test_near_to_float64(backbone_config, capsys) -> None:
    """Stable Diffusion's decoder at 512x512, beside diffusers' own in both orders of memory."""
    vae = AutoencoderKL.from_config(backbone_config("sd21_random")["vae"]).eval()
    latent = torch.randn(1, 4, 64, 64)
    last = latent.contiguous(memory_format=torch.channels_last)
    images = {
        "this package": fast(vae).decode(latent).sample,
        "diffusers": vae.decode(latent).sample,
        "diffusers, channels-last": vae.decode(last).sample,
    }
    with exact_norms(vae):
        images["diffusers, channels-last, exact norms"] = vae.decode(last).sample
    stream = Stream(math.inf, torch.float64, latent.device)
    expected = stream.decode(nn.Module.to(vae, torch.float64), latent.double())
    errors = {name: float((image - expected).abs().max()) for name, image in images.items()}
    with capsys.disabled():
        print(f"\n{expected.abs().max():.2f} at most; differences from float64:")
        for name, error in errors.items():
            print(f"{error:.1e}  {name}")
    assert errors["this package"] < 1e-4


# Layer by layer.


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (5, 4), (70, 66)], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("many", [1, 10**6], ids=["winograd", "shared"])
def test_shared_upsampling(size: tuple[int, int], batch: int, many: int, monkeypatch) -> None:
    monkeypatch.setattr(fewer, "MANY_POSITIONS", many)
    layer = Upsample2D(12, use_conv=True, out_channels=20)
    images = torch.randn(batch, 12, *size)
    expected = copy.deepcopy(layer).double()(images.double())
    layer.__class__ = SharedUpsample2D
    result = layer(images)
    assert result.shape == expected.shape and result.is_contiguous(memory_format=torch.channels_last)
    assert (result - expected).abs().max() < 1e-5
    assert torch.equal(layer(images, (2 * size[0], 2 * size[1])), result)
    odd = (2 * size[0] + 1, 2 * size[1] + 1)
    torch.testing.assert_close(layer(images, odd), layer.conv(F.interpolate(images, size=odd, mode="nearest")))


def test_shared_upsampling_cuts_strips_without_seams(monkeypatch) -> None:
    layer = Upsample2D(8, use_conv=True)
    layer.__class__ = SharedUpsample2D
    images = torch.randn(1, 8, 13, 6)
    whole = layer(images)
    monkeypatch.setattr(fewer, "_STRIP", 20)
    torch.testing.assert_close(layer(images), whole)


@pytest.mark.parametrize("stride, padding", [(1, 1), (2, 1), (2, 0)])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (9, 4), (40, 40)], ids=str)
def test_patches(size: tuple[int, int], stride: int, padding: int) -> None:
    conv = nn.Conv2d(6, 10, 3, stride, padding)
    images = F.pad(torch.randn(2, 6, *size), (0, 2, 0, 2))
    expected = conv(images)
    conv.__class__ = PatchConv2d
    torch.testing.assert_close(conv(images), expected, rtol=1e-4, atol=1e-6)
    conv.to(memory_format=torch.channels_last)
    torch.testing.assert_close(conv(images), expected, rtol=1e-4, atol=1e-6)


def test_lean_blocks_leave_their_input_alone() -> None:
    for channels in (32, 64):
        block = ResnetBlock2D(in_channels=32, out_channels=channels, temb_channels=16, output_scale_factor=1.5).eval()
        images, embedding = torch.randn(2, 32, 6, 5), torch.randn(2, 16)
        expected, before = block(images, embedding), images.clone()
        make_lean(block)
        assert type(block) is LeanResnetBlock2D
        torch.testing.assert_close(block(images, embedding), expected)
        assert torch.equal(images, before)


@pytest.mark.parametrize("options", [{"time_embedding_norm": "scale_shift"}, {"up": True}, {"non_linearity": "relu"}])
def test_other_blocks_stay_as_they_are(options: dict) -> None:
    block = ResnetBlock2D(in_channels=32, temb_channels=16, **options)
    make_lean(block)
    assert type(block) is ResnetBlock2D
    transformer = Transformer2DModel(2, 16, in_channels=32, use_linear_projection=False)
    make_lean(transformer)
    assert type(transformer) is Transformer2DModel


# Adapters.


def test_merging_equals_peft(make_codec, make_image) -> None:
    codec = make_codec()
    state = {name: value.clone() for name, value in codec.denoiser.unet.state_dict().items()}
    options = codec.denoiser.options
    adapters = {name: value for name, value in state.items() if "lora_" in name}
    merge = merge_lora(adapters, options["lora_alpha"] / options["lora_rank"])
    codec.denoiser.merge()
    changed = 0
    for name, value in codec.denoiser.unet.state_dict().items():
        plain = state.get(name.replace(".weight", ".base_layer.weight"), state.get(name))
        plain = state.get(name.replace(".bias", ".base_layer.bias"), plain)
        torch.testing.assert_close(merge(name, plain), value)
        changed += not torch.equal(plain, value)
    assert 2 * changed == len(adapters) > 0


def test_an_adapter_that_does_not_fit() -> None:
    adapters = {"a.lora_A.x.weight": torch.ones(2, 5), "a.lora_B.x.weight": torch.ones(7, 2)}
    merge = merge_lora(adapters, 1.0)
    assert torch.equal(merge("a.weight", torch.ones(7, 5)), torch.full((7, 5), 3.0))
    assert torch.equal(merge("b.weight", torch.ones(3)), torch.ones(3))
    merge = merge_lora(adapters, 1.0)
    with pytest.raises(WeightsError, match=r"adapter of a.weight has shapes \(2, 5\) and \(7, 2\)"):
        merge("a.weight", torch.ones(5, 7))


# Options.


def test_auto_dtype(monkeypatch) -> None:
    for found, expected in (
        ({}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": True}, torch.bfloat16),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found)
        assert auto_dtype("cpu") == expected
    for native, expected in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        assert auto_dtype("cuda:1") == expected
    assert auto_dtype("mps") == torch.float16 and auto_dtype("meta") == torch.float32


def test_where_a_precision_is_emulated(monkeypatch) -> None:
    for found, expected in (({}, True), ({"avx512_bf16": True}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found)
        assert emulates_dtype(torch.device("cpu"), torch.bfloat16) == expected
        assert not emulates_dtype(torch.device("cpu"), torch.float32)
        codec = load("nano-vq", dtype=torch.bfloat16)
        assert bool(kinds(codec, WideConv2d)) == expected and bool(kinds(codec, nn.Conv2d)) != expected
    assert not emulates_dtype(torch.device("cuda"), torch.float16)


def test_wide_computation_is_as_exact(vae, unet) -> None:
    latent, prompt = torch.randn(1, 4, 16, 16), torch.randn(1, 7, 24).bfloat16().float()

    def denoise(network: nn.Module, value: torch.Tensor) -> torch.Tensor:
        return network(value, 210, encoder_hidden_states=prompt.to(value.dtype)).sample

    for network, run in ((vae, lambda network, value: network.decode(value).sample), (unet, denoise)):
        narrow = nn.Module.to(network, torch.bfloat16)
        wide, exact = copy.deepcopy(narrow), nn.Module.to(copy.deepcopy(narrow), torch.float32)
        upcast_to_fp32(wide)
        assert kinds(wide, WideConv2d) and kinds(wide, WideLinear)
        assert wide.state_dict().keys() == exact.state_dict().keys()
        result, expected = run(wide, latent.bfloat16()), run(exact, latent.bfloat16().float())
        assert result.dtype == torch.bfloat16
        errors = [(value.float() - expected).square().mean() for value in (result, run(narrow, latent.bfloat16()))]
        assert errors[0] < 1.2 * errors[1] < 1e-2 * expected.square().mean()


def test_compiling_what_cannot_be_compiled(monkeypatch) -> None:
    with pytest.raises(ValueError, match="compile is 'graphs' on device cpu; allowed: a CUDA device"):
        compile_networks([], torch.device("cpu"), graphs=True)
    monkeypatch.setattr(optimise.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="no C\\+\\+ compiler; allowed: with g\\+\\+ or clang\\+\\+, or False"):
        compile_networks([], torch.device("cpu"), graphs=False)


def test_compiling(tiny_folder, monkeypatch) -> None:
    """What is compiled, and how, without the minutes that compiling takes."""
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, mode: compiled.append((type(module).__name__, mode)))
    monkeypatch.setattr(optimise.shutil, "which", lambda name: name)
    load(tiny_folder, compile=True)
    assert compiled == [("Encoder", None), ("Decoder", None), ("UNet2DConditionModel", None)]
    compiled.clear()
    codec = load(tiny_folder, components="decoder", compile=True)
    assert compiled == [("Decoder", None), ("UNet2DConditionModel", None)]
    assert not kinds(codec, WinogradConv2d) and not kinds(codec, SharedUpsample2D)
    compile_networks([codec.denoiser.unet], torch.device("cuda"), graphs=True)
    assert compiled[-1] == ("UNet2DConditionModel", "reduce-overhead")


@pytest.fixture
def tiny_vae(tmp_path):
    """A folder with a random AutoencoderTiny; keywords change it."""

    def make(**options):
        widths, blocks = (8, 8, 8, 8), (1, 1, 1, 1)
        options = {
            "encoder_block_out_channels": widths,
            "decoder_block_out_channels": widths,
            "num_encoder_blocks": blocks,
            "num_decoder_blocks": blocks,
            **options,
        }
        AutoencoderTiny(**options).save_pretrained(tmp_path / "taesd")
        return tmp_path / "taesd"

    return make


def test_previews(tiny_folder, tiny, tiny_vae, make_image) -> None:
    codec = load(tiny_folder, components="decoder", dtype=torch.float32, tiny_vae=tiny_vae())
    assert not [name for name, _ in codec.backbone.vae.named_parameters()]  # neither half of the VAE is kept
    data = tiny.compress(make_image(70, 50), 0.125)
    assert codec.decompress(data).size == (70, 50)
    rms = torch.ones(1, 4)
    symbols = VQSymbols(torch.zeros(1, 8, 8, dtype=torch.int64), rms)
    result, preview = codec.decode(symbols, codec.bottleneck.parse(0.125)), codec.backbone.preview
    torch.testing.assert_close(result.image, preview.decode(result.x0).sample.clamp(-1, 1))
    assert not hasattr(preview, "encoder")


def test_previews_that_do_not_fit(tiny_vae, tmp_path) -> None:
    with pytest.raises(ValueError, match="3 latent channels and enlarges by 8; allowed: 4 and 8"):
        load_tiny_vae(tiny_vae(latent_channels=3), 4, torch.float32)
    with pytest.raises(ValueError, match="4 latent channels and enlarges by 4; allowed: 4 and 8"):
        load_tiny_vae(tiny_vae(num_decoder_blocks=(1, 1, 1), decoder_block_out_channels=(8, 8, 8)), 4, torch.float32)
    with pytest.raises(ValueError, match="none' cannot be read as an AutoencoderTiny: "):
        load_tiny_vae(tmp_path / "none", 4, torch.float32)


# The codec that is loaded.


def test_a_loaded_codec_decodes_as_the_plain_one(golden_codec, golden_cases, tmp_path) -> None:
    """Stable Diffusion's layers, at tiny size: within 1e-4 of the published way, unmerged, and the same indices."""
    golden_codec.save_pretrained(tmp_path / "model")
    quick = load(tmp_path / "model", dtype=torch.float32)
    assert quick.denoiser.merged and not golden_codec.denoiser.merged
    assert kinds(quick, WinogradConv2d) and kinds(quick, SharedUpsample2D) and not kinds(quick, ResnetBlock2D)
    for rate in quick.bottleneck.rates[::4]:
        plain, ours = (codec.reconstruct(golden_cases["image"], rate) for codec in (golden_codec, quick))
        assert torch.equal(plain.symbols.indices, ours.symbols.indices)
        assert (plain.image - ours.image).abs().max() < 1e-4
