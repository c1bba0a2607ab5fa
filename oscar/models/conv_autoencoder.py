"""An autoencoder of residual convolutions without normalisation, for small backbones that are to keep detail.

It begins as a block transform, the lowest frequencies of luminance and chrominance, and learns what to add to that; so
a short training starts from images that are blurred, not from none. Nothing is computed at more than a quarter of the
image's resolution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, EncoderOutput
from torch import Tensor, nn

PATCH = 4
_CHROMA_SHARE = 0.2  # of the latent's channels, for each of the two


class _Block(nn.Module):
    """Residual block that begins as the identity."""

    def __init__(self, channels: int):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = _zero(nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.silu(self.first(x)))


class _Sum(nn.Module):
    """A linear map of blocks of pixels and what convolutions, which begin at 0, add to it."""

    def __init__(self, blocks: nn.Sequential, layers: Sequence[nn.Module]):
        super().__init__()
        self.blocks = blocks
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x) + self.layers(x)


class AutoencoderConv(ModelMixin, ConfigMixin):
    """Images (B, 3, H, W) to latents (B, C, H/f, W/f) and back, in the manner of diffusers' autoencoders.

    Args:
        latent_channels: C.
        widths: channels at each resolution, the first at a quarter of the image's, each next at half.
        encoder_blocks, decoder_blocks: residual blocks at each resolution.
        scaling_factor: by which latents are multiplied before they are used (`Backbone.encode`).

    Attributes:
        spatial_compression_ratio: f.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 64,
        widths: Sequence[int] = (64, 128, 192),
        encoder_blocks: Sequence[int] = (1, 1, 1),
        decoder_blocks: Sequence[int] = (1, 1, 1),
        scaling_factor: float = 1.0,
    ):
        super().__init__()
        factor = self.spatial_compression_ratio = PATCH * 2 ** (len(widths) - 1)
        down = nn.Conv2d(3 * factor**2, latent_channels, 1)
        up = nn.Conv2d(latent_channels, 3 * factor**2, 1)
        basis = lowest_frequencies(latent_channels, factor)
        for layer, weight in ((down, basis), (up, basis.t())):
            layer.weight.data.copy_(weight[:, :, None, None])
            nn.init.zeros_(layer.bias)
        layers: list[nn.Module] = [nn.PixelUnshuffle(PATCH), nn.Conv2d(3 * PATCH**2, widths[0], 3, padding=1)]
        for level, width in enumerate(widths):
            if level:
                layers.append(nn.Conv2d(widths[level - 1], width, 3, stride=2, padding=1))
            layers += [_Block(width) for _ in range(encoder_blocks[level])]
        layers.append(_zero(nn.Conv2d(widths[-1], latent_channels, 3, padding=1)))
        self.encoder = _Sum(nn.Sequential(nn.PixelUnshuffle(factor), down), layers)
        layers = [nn.Conv2d(latent_channels, widths[-1], 3, padding=1)]
        for level in reversed(range(len(widths))):
            layers += [_Block(widths[level]) for _ in range(decoder_blocks[level])]
            if level:
                layers += [nn.Conv2d(widths[level], 4 * widths[level - 1], 3, padding=1), nn.PixelShuffle(2)]
        layers += [_zero(nn.Conv2d(widths[0], 3 * PATCH**2, 3, padding=1)), nn.PixelShuffle(PATCH)]
        self.decoder = _Sum(nn.Sequential(up, nn.PixelShuffle(factor)), layers)

    def encode(self, images: Tensor) -> EncoderOutput:
        return EncoderOutput(latent=self.encoder(images))

    def decode(self, latent: Tensor) -> DecoderOutput:
        return DecoderOutput(sample=self.decoder(latent))


def lowest_frequencies(count: int, side: int) -> Tensor:
    """The lowest frequencies of the cosine transform of RGB blocks (3, side, side), orthonormal (count, 3 side^2)."""
    chroma = max(1, int(_CHROMA_SHARE * count)) if count > 2 else 0
    planes = cosine_transform(side)
    return torch.cat([plane[:kept] for plane, kept in zip(planes, (count - 2 * chroma, chroma, chroma), strict=True)])


def cosine_transform(side: int) -> Tensor:
    """The cosine transform of RGB blocks, orthonormal (3, side^2, 3 side^2): luminance and two planes of chrominance,
    each from low frequencies to high ones."""
    place = torch.arange(side) + 0.5
    waves = torch.cos(math.pi / side * place * torch.arange(side)[:, None]) * (2 / side) ** 0.5
    waves[0] /= 2**0.5
    colours = torch.tensor([[1.0, 1, 1], [1, 0, -1], [-1, 2, -1]])
    colours /= colours.norm(dim=1, keepdim=True)
    pairs = ((row, column) for row in range(side) for column in range(side))
    order = sorted(pairs, key=lambda pair: (pair[0] ** 2 + pair[1] ** 2, pair))
    rows, columns = map(list, zip(*order, strict=True))
    return torch.einsum("pc,ny,nx->pncyx", colours, waves[rows], waves[columns]).flatten(2)


def _zero(layer: nn.Conv2d) -> nn.Conv2d:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
