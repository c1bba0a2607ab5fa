import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import nn

from oscar.inference.cpu.group_norm import normalisation
from oscar.inference.cpu.lean import normalised_conv2d
from oscar.inference.cpu.winograd import (
    WinogradConv2d,
    transform_weight,
    use_winograd,
    winograd_conv2d,
    winograd_matrices,
)
from oscar.inference.statistics import Moments

TOLERANCE = {2: 2e-6, 4: 2e-5}  # for outputs of about 1


def random_conv(inputs=96, outputs=96, **options) -> nn.Conv2d:
    torch.manual_seed(0)
    conv = nn.Conv2d(inputs, outputs, 3, **{"padding": 1, **options})
    nn.init.normal_(conv.weight, std=(9 * inputs) ** -0.5)
    return conv.requires_grad_(False)


def winograd(conv: nn.Conv2d, tile: int = 4) -> nn.Conv2d:
    conv = copy.deepcopy(conv)
    assert use_winograd(conv, tile, min_channels=1) == 1
    return conv


@pytest.mark.parametrize("tile, length", [(2, 3), (4, 3), (3, 2), (5, 2)])
def test_matrices_give_correlation(tile, length):
    output, weights, inputs = winograd_matrices(tile, length)
    values, taps = torch.randn(tile + length - 1, dtype=torch.float64), torch.randn(length, dtype=torch.float64)
    expected = values.unfold(0, length, 1) @ taps
    torch.testing.assert_close(output @ ((weights @ taps) * (inputs @ values)), expected)


@pytest.mark.parametrize("tile", TOLERANCE)
@pytest.mark.parametrize(
    ("batch", "inputs", "outputs", "height", "width"),
    [(1, 32, 48, 16, 16), (2, 48, 16, 13, 9), (1, 16, 16, 37, 150), (1, 16, 32, 200, 5), (3, 8, 8, 1, 1)],
)
def test_same_as_convolution(tile, batch, inputs, outputs, height, width):
    conv = random_conv(inputs, outputs)
    images = torch.randn(batch, inputs, height, width)
    weight = transform_weight(conv.weight, tile)
    expected = F.conv2d(images.double(), conv.weight.double(), conv.bias.double(), padding=1)
    for order in (torch.contiguous_format, torch.channels_last):
        result = winograd_conv2d(images.contiguous(memory_format=order), weight, conv.bias, padding=1)
        assert result.is_contiguous(memory_format=torch.channels_last)
        assert (result - expected).abs().max() < TOLERANCE[tile]
    padded = F.pad(images, (1, 1, 1, 1))
    assert torch.equal(winograd_conv2d(padded, weight, conv.bias), result)
    bare = winograd_conv2d(images, weight, padding=1)
    torch.testing.assert_close(bare + conv.bias[:, None, None], result)


def test_points_are_chosen_for_exactness():
    conv = random_conv(256, 32)
    images = F.silu(torch.randn(1, 256, 32, 32))
    expected = F.conv2d(images.double(), conv.weight.double(), conv.bias.double(), padding=1)
    error = (winograd_conv2d(images, transform_weight(conv.weight), conv.bias, padding=1) - expected).square().mean()
    assert error.sqrt() < 2.2e-6 * expected.square().mean().sqrt()  # 3.1e-6 with the usual points


def test_batch_does_not_change_results():
    conv = winograd(random_conv())
    images = torch.randn(4, 96, 20, 20)
    together = conv(images)
    for index in range(4):
        assert torch.equal(conv(images[index : index + 1])[0], together[index])


def test_use_winograd_takes_what_it_can():
    network = nn.Sequential(
        random_conv(),
        random_conv(96, 64),  # too few channels
        random_conv(stride=2),
        random_conv(groups=2),
        random_conv(padding=0),
        random_conv(dilation=2),
        random_conv(padding_mode="reflect"),
        nn.Conv2d(96, 96, 1),
        nn.ModuleDict({"deep": random_conv()}),
    )
    names = list(network.state_dict())
    assert use_winograd(network) == 2
    assert [type(part) is WinogradConv2d for part in network[:8]] == [True] + 7 * [False]
    assert type(network[8]["deep"]) is WinogradConv2d
    assert list(network.state_dict()) == names
    with pytest.raises(ValueError, match="tile 3 is not supported; allowed: 2, 4"):
        use_winograd(network, tile=3)


@pytest.mark.parametrize(
    ("size", "dtype", "learning"), [(8, torch.float32, False), (32, torch.bfloat16, False), (32, torch.float32, True)]
)
def test_plain_way_where_the_other_does_not_pay(size, dtype, learning):
    conv = random_conv().to(dtype)
    other = winograd(conv)
    images = torch.randn(1, 96, size, size, dtype=dtype, requires_grad=learning)
    result = other(images)
    assert torch.equal(result, conv(images))
    assert other._transformed is None
    assert result.requires_grad == learning


def test_new_weights_are_used():
    conv, new = winograd(random_conv()), random_conv()
    images = torch.randn(1, 96, 24, 24)
    conv(images)
    nn.init.normal_(new.weight)
    conv.load_state_dict(new.state_dict())
    torch.testing.assert_close(conv(images), new(images), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(conv.bfloat16().float()(images), new.bfloat16().float()(images), atol=1e-3, rtol=1e-3)


def test_threads_do_not_change_results():
    conv = random_conv()
    images, weight = torch.randn(2, 96, 70, 90), transform_weight(conv.weight)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(winograd_conv2d(images, weight, conv.bias, padding=1))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.parametrize("tile", TOLERANCE)
def test_normalised_convolution(tile):
    norm, conv = nn.GroupNorm(8, 96).requires_grad_(False), random_conv()
    nn.init.normal_(norm.weight)
    images, shift, residual = torch.randn(2, 96, 26, 70), torch.randn(2, 96), torch.randn(2, 96, 26, 70)
    expected = conv(F.silu(norm(images))) + shift[:, :, None, None] + residual
    for layer in (conv, winograd(conv, tile)):
        torch.testing.assert_close(normalised_conv2d(images, norm, layer, shift, residual), expected, atol=2e-5, rtol=0)
        torch.testing.assert_close(
            normalised_conv2d(images, norm, layer), conv(F.silu(norm(images))), atol=2e-5, rtol=0
        )


@torch.inference_mode()
def test_moments_for_the_next_normalisation():
    """Of ragged blocks with a residual, alike with any number of threads, and for each image as if it were alone."""
    norm, conv, following = nn.GroupNorm(8, 96), winograd(random_conv()), nn.GroupNorm(4, 96)
    images, residual = torch.randn(2, 96, 75, 70), 3 + torch.randn(2, 96, 75, 70)
    found: list[list[Moments]] = []
    result = normalised_conv2d(images, norm, conv, residual=residual, found=found)
    assert [len(parts) for parts in found] == [4, 4]
    scale, shift = normalisation(following, result, found)
    expected = F.group_norm(result.double(), 4)
    assert (scale[..., None, None] * result + shift[..., None, None] - expected).abs().max() < 5e-6
    hidden = normalised_conv2d(result, following, conv, known=found)
    torch.testing.assert_close(hidden, normalised_conv2d(result, following, conv), rtol=0, atol=1e-5)
    alone: list[list[Moments]] = []
    normalised_conv2d(images[1:], norm, conv, residual=residual[1:], found=alone)
    for part, other in zip(found[1], alone[0], strict=True):
        assert part[0] == other[0] and torch.equal(part[1], other[1]) and torch.equal(part[2], other[2])


@torch.inference_mode()
def test_golden_decoder_and_encoder(golden, golden_cases):
    vae = AutoencoderKL.from_pretrained(golden / "sd_tiny", subfolder="vae").eval()
    images = golden_cases["image"]
    latent = vae.encode(images).latent_dist.mode()
    decoded = vae.decode(latent).sample
    assert use_winograd(vae, min_channels=1) > 20
    assert (vae.encode(images).latent_dist.mode() - latent).abs().max() < 1e-4
    assert (vae.decode(latent).sample - decoded).abs().max() < 1e-4


@torch.inference_mode()
def test_wide_decoder():
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(96, 192),
        layers_per_block=1,
        latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 2,
        down_block_types=("DownEncoderBlock2D",) * 2,
    ).eval()
    latent = torch.randn(1, 4, 36, 30)
    plain = vae.decode(latent).sample
    exact = copy.deepcopy(vae).double().decode(latent.double()).sample
    assert use_winograd(vae.decoder) == 13
    fast = vae.decode(latent).sample
    assert not torch.equal(fast, plain)
    assert (fast - exact).abs().max() < 3e-5
    assert (fast - plain).abs().max() < 3e-5
