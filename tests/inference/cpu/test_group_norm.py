"""Group normalisation: exact in every order of memory, and what it is elsewhere stays torch's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from oscar.inference.cpu.group_norm import ExactGroupNorm, normalisation


def example(channels: int = 32, size: tuple[int, ...] = (40, 56)) -> tuple[ExactGroupNorm, Tensor]:
    """A normalisation and maps whose channels are far from zero."""
    torch.manual_seed(0)
    norm = ExactGroupNorm(4, channels).requires_grad_(False)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    offsets = 100 * torch.randn(1, channels, *(1 for _ in size))
    return norm, torch.randn(2, channels, *size) + offsets


def expected(norm: nn.GroupNorm, images: Tensor) -> Tensor:
    return nn.functional.group_norm(
        images.double(), norm.num_groups, norm.weight.double(), norm.bias.double(), norm.eps
    )


def test_exact_far_from_zero() -> None:
    norm, images = example()
    scale, shift = normalisation(norm, images)
    result = images * scale[:, :, None, None] + shift[:, :, None, None]
    assert (result - expected(norm, images)).abs().max() < 2e-5


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_order_in_memory_does_not_matter(order: torch.memory_format) -> None:
    norm, images = example(size=(300, 300))
    result = norm(images.contiguous(memory_format=order))
    assert result.is_contiguous(memory_format=order)
    assert (result - expected(norm, images)).abs().max() < 2e-5


def test_tokens_as_the_attention_of_autoencoders_has_them() -> None:
    norm, images = example(size=(35,))
    tokens = images.transpose(1, 2).contiguous().transpose(1, 2)
    assert (norm(tokens) - expected(norm, images)).abs().max() < 2e-5


def test_without_weights() -> None:
    norm, images = nn.GroupNorm(4, 32, affine=False), example()[1]
    scale, shift = normalisation(norm, images)
    plain = nn.functional.group_norm(images.double(), 4, eps=norm.eps)
    assert (images * scale[:, :, None, None] + shift[:, :, None, None] - plain).abs().max() < 2e-5


def test_torchs_own_where_it_learns_or_is_narrow() -> None:
    norm, images = example()
    plain = nn.GroupNorm(4, 32)
    plain.load_state_dict(norm.state_dict())
    images.requires_grad_()
    assert torch.equal(norm(images), plain(images)) and norm(images).requires_grad
    narrow = images.detach().bfloat16()
    assert torch.equal(norm.bfloat16()(narrow), plain.bfloat16()(narrow))
