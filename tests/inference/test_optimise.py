"""A codec is changed from outside: plain modules as they are read, and on a GPU; kernels on a CPU alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from oscar import OscarCodec
from oscar.inference.cpu.fewer import use_fewer_multiplications
from oscar.inference.cpu.lean import make_lean
from oscar.inference.load import load
from oscar.inference.memory import MemoryBudget
from oscar.inference.optimise import module_changes, optimise, use_channels_last
from oscar.inference.precision import upcast_to_fp32
from oscar.inference.prompt import PromptAttnProcessor
from oscar.inference.tiling import TiledBackbone
from oscar.inference.windows import WindowedDenoiser


def of_inference(codec: OscarCodec) -> set[str]:
    """Classes of a codec's modules that inference brought."""
    kinds = {type(module) for module in codec.modules()}
    return {kind.__name__ for kind in kinds if kind.__module__.startswith("oscar.inference")}


@pytest.mark.parametrize(
    ("device", "dtype", "compiled", "native", "expected"),
    [
        ("cuda", torch.float32, False, True, [use_channels_last]),
        ("cuda", torch.bfloat16, False, True, [use_channels_last]),
        ("cuda", torch.bfloat16, True, True, [use_channels_last]),
        ("mps", torch.float16, False, True, [use_channels_last]),
        ("meta", torch.float32, False, True, [use_channels_last]),
        ("cpu", torch.float32, False, True, [make_lean, use_fewer_multiplications]),
        ("cpu", torch.float32, True, True, [make_lean]),
        ("cpu", torch.bfloat16, False, True, [make_lean]),
        ("cpu", torch.bfloat16, False, False, [make_lean, upcast_to_fp32]),
    ],
)
def test_what_is_done_where(
    monkeypatch, device: str, dtype: torch.dtype, compiled: bool, native: bool, expected: list
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": native})
    assert module_changes(torch.device(device), dtype, compiled) == expected


def test_a_codec_as_it_is_read_has_plain_modules(tiny_folder) -> None:
    codec = OscarCodec.from_pretrained(tiny_folder)
    assert not of_inference(codec) and not codec.denoiser.merged
    assert {"TiledBackbone", "WindowedDenoiser", "LeanResnetBlock2D"} <= of_inference(load(tiny_folder))


@pytest.mark.parametrize("model", ["nano", "nano-vq"])
def test_a_codec_that_was_read_becomes_one_that_was_loaded(make_image, model: str) -> None:
    codec = OscarCodec.from_pretrained(model)
    assert optimise(codec) is codec
    loaded, image = load(model, dtype=torch.float32), make_image(72, 40)
    data = loaded.compress(image)
    assert codec.compress(image) == data
    assert codec.decompress(data).tobytes() == loaded.decompress(data).tobytes()
    assert of_inference(codec) == of_inference(loaded)


def test_on_another_device_only_the_prompt_is_prepared(make_codec) -> None:
    """As on a GPU: two wrappers about the standard modules, no kernels."""
    codec = make_codec().requires_grad_(False)
    optimise(codec, "meta", torch.bfloat16, memory="1GB")
    assert of_inference(codec) == {"TiledBackbone", "WindowedDenoiser"}
    assert {parameter.device.type for parameter in codec.backbone.parameters()} == {"meta"} and codec.denoiser.merged
    assert codec.dtype == torch.bfloat16 and not codec.training
    processors = codec.denoiser.unet.attn_processors
    assert all(isinstance(processors[name], PromptAttnProcessor) == ("attn2" in name) for name in processors)
    assert isinstance(codec.backbone, TiledBackbone) and isinstance(codec.denoiser, WindowedDenoiser)
    assert codec.backbone.memory == codec.denoiser.memory == MemoryBudget(10**9)


def test_what_is_compiled_is_called_at_every_size(tiny_folder, make_images, small_limits, monkeypatch) -> None:
    """Large images go whole through the networks that compile was asked for."""
    calls = []

    def compile(module: nn.Module, mode: str | None) -> None:
        module.register_forward_pre_hook(lambda module, args: calls.append((type(module).__name__, args[0].shape[-2:])))

    monkeypatch.setattr(nn.Module, "compile", compile)
    monkeypatch.setattr("oscar.inference.optimise.shutil.which", lambda name: name)
    codec = load(tiny_folder, dtype=torch.float32, compile=True)
    for side in (32, 128):
        calls.clear()
        codec.reconstruct(make_images(1, side, side), 0.125)
        latent = (side // 8, side // 8)
        assert calls == [("Encoder", (side, side)), ("UNet2DConditionModel", latent), ("Decoder", latent)]
