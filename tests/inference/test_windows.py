from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor

from oscar.inference import windows
from oscar.inference.memory import MemoryBudget
from oscar.inference.windows import WindowedDenoiser, WindowedProcessor
from oscar.models.denoiser import predict

TIGHT = MemoryBudget(1)  # nothing fits whole


def difference(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape and one.dtype == other.dtype
    return float((one - other).abs().max())


@pytest.fixture(scope="module")
def unet(backbone_config) -> UNet2DConditionModel:
    torch.manual_seed(0)
    config = {**backbone_config("standin")["unet"], "cross_attention_dim": 8}
    return UNet2DConditionModel.from_config(config).eval().requires_grad_(False)


def denoise(unet: UNet2DConditionModel, latent: Tensor, prompt: Tensor, memory: MemoryBudget | None = None) -> Tensor:
    denoiser = WindowedDenoiser(unet, None, prompt_tokens=3, merged=True).requires_grad_(False)
    denoiser.prompt.copy_(prompt)
    denoiser.memory = memory
    return denoiser.run_unet(unet, latent, torch.full((len(latent),), 10))


def transformer_blocks(unet: UNet2DConditionModel) -> list[BasicTransformerBlock]:
    return [module for module in unet.modules() if isinstance(module, BasicTransformerBlock)]


@pytest.mark.parametrize("size", [(40, 24), (24, 88)])
def test_feed_forward_in_parts(unet, monkeypatch, size: tuple[int, int]) -> None:
    latent, prompt = torch.randn(2, 4, *size), torch.randn(1, 3, 8)
    whole = predict(unet, latent, 10, prompt)
    monkeypatch.setattr(windows, "FEED_FORWARD", 100)
    parts, blocks = [], transformer_blocks(unet)
    hooks = [block.ff.register_forward_pre_hook(lambda _, rows: parts.append(rows[0].shape[1])) for block in blocks]
    assert difference(denoise(unet, latent, prompt, TIGHT), whole) < 1e-5
    assert len(parts) > len(blocks) and max(parts) <= 100
    parts.clear()
    assert difference(denoise(unet, latent, prompt), whole) < 1e-5
    for hook in hooks:
        hook.remove()
    assert max(parts) == size[0] * size[1]  # whole where it fits
    assert all(block._chunk_size is None for block in blocks)


def test_attention_in_windows(unet, monkeypatch) -> None:
    """Only where a map has too many positions; and close to the whole, which the convolutions see as ever."""
    torch.manual_seed(0)
    latent, prompt = torch.randn(1, 4, 40, 32), torch.randn(1, 3, 8)
    whole = predict(unet, latent, 10, prompt)
    processors = unet.attn_processors
    for name, value in (("FEED_FORWARD", 1024), ("ATTENTION_WHOLE", 1024), ("WINDOW", 24), ("OVERLAP", 8)):
        monkeypatch.setattr(windows, name, value)
    lengths = set()
    hooks = [
        block.attn1.to_q.register_forward_pre_hook(lambda _, rows: lengths.add(rows[0].shape[1]))
        for block in transformer_blocks(unet)
    ]
    windowed = denoise(unet, latent, prompt)
    for hook in hooks:
        hook.remove()
    assert lengths == {24 * 24, 20 * 16, 10 * 8, 5 * 4}  # by level
    assert 0 < difference(windowed, whole) < 0.05 * float(whole.abs().max())
    assert unet.attn_processors == processors


@pytest.mark.parametrize("memory", [None, TIGHT])
def test_attention_is_whole_on_a_gpu(unet, monkeypatch, memory) -> None:
    """Of a CPU that is said to be one."""
    latent, prompt = torch.randn(2, 4, 40, 32), torch.randn(1, 3, 8)
    whole = predict(unet, latent, 10, prompt)
    monkeypatch.setattr(windows, "FEED_FORWARD", 1024)
    monkeypatch.setattr(windows, "ATTENTION_WHOLE", 1024)
    monkeypatch.setattr(windows, "device_type", lambda tensor: "cuda")
    assert difference(denoise(unet, latent, prompt, memory), whole) < 1e-5


def test_the_unet_is_left_as_it_was(unet, monkeypatch) -> None:
    monkeypatch.setattr(windows, "FEED_FORWARD", 64)
    monkeypatch.setattr(windows, "ATTENTION_WHOLE", 64)
    processors = unet.attn_processors
    with pytest.raises(RuntimeError), windows.large_latent(unet, 16, 16, windows=True):
        assert isinstance(unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.processor, WindowedProcessor)
        raise RuntimeError
    assert unet.attn_processors == processors
    assert all(block._chunk_size is None for block in transformer_blocks(unet))


def test_windows_cover_a_side_evenly() -> None:
    for size in (8, 192, 193, 200, 320, 321, 448, 1000, 4096):
        spans = windows._windows(size)
        assert spans[0][0] == 0 and spans[-1][1] == size
        assert {end - begin for begin, end in spans} == {min(size, 192)}
        overlaps = [one[1] - two[0] for one, two in zip(spans, spans[1:], strict=False)]
        assert all(64 <= overlap < 192 for overlap in overlaps)


def test_blending_leaves_no_seam() -> None:
    value = torch.rand(2, 4, 321, 24)
    assert difference(windows.blend(lambda window: window, value), value) < 1e-6
    numbers = iter(range(100))  # each window another brightness: the step of 1 is spread over their overlap
    steps = windows.blend(lambda window: torch.full_like(window, float(next(numbers))), value)
    assert steps[0, 0, 0, 0] == 0 and steps.max() == 2
    assert float(steps.diff(dim=2).abs().max()) < 1.1 / 64
    assert float(steps.diff(dim=3).abs().max()) == 0
