"""diffusers' blocks without the copies that only training needs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from oscar.inference.cpu.group_norm import normalisation
from oscar.inference.cpu.winograd import WinogradConv2d, winograd_conv2d
from oscar.inference.statistics import Moments


class LeanResnetBlock2D(ResnetBlock2D):
    """diffusers' block without its copies: activations and sums in place or within the convolutions."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None, *args, **kwargs) -> Tensor:
        shift = None if self.time_emb_proj is None else self.time_emb_proj(F.silu(temb))
        found: list[list[Moments]] = []
        hidden = normalised_conv2d(input_tensor, self.norm1, self.conv1, shift=shift, found=found)
        residual = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        hidden = normalised_conv2d(hidden, self.norm2, self.conv2, residual=residual, known=found)
        return hidden if self.output_scale_factor == 1 else hidden.div_(self.output_scale_factor)

    @staticmethod
    def replaces(block: nn.Module) -> bool:
        return (
            type(block) is ResnetBlock2D
            and block.upsample is block.downsample is None
            and (block.time_embedding_norm == "default" or block.time_emb_proj is None)
            and block.time_embedding_norm != "scale_shift"
            and not block.skip_time_act
            and isinstance(block.nonlinearity, nn.SiLU)
        )


class LeanTransformer2DModel(Transformer2DModel):
    """diffusers' transformer, keeping the channels-last order that its tokens have anyway."""

    def _get_output_for_continuous_inputs(self, hidden_states, residual, batch_size, height, width, inner_dim):
        hidden = self.proj_out(hidden_states).view(batch_size, height, width, -1).permute(0, 3, 1, 2)
        return hidden.add_(residual)

    @staticmethod
    def replaces(block: nn.Module) -> bool:
        return type(block) is Transformer2DModel and block.is_input_continuous and block.use_linear_projection


def make_lean(network: nn.Module) -> None:
    """Take the copies out of a network's blocks and put its convolutions in channels-last order, in place."""
    for module in network.modules():
        for lean in (LeanResnetBlock2D, LeanTransformer2DModel):
            if lean.replaces(module):
                module.__class__ = lean  # the same parameters under the same names
        if isinstance(getattr(module, "conv_act", None), nn.SiLU):
            module.conv_act.inplace = True  # after a normalisation that nothing else reads
    network.to(memory_format=torch.channels_last)


def normalised_conv2d(
    images: Tensor,
    norm: nn.GroupNorm,
    conv: nn.Conv2d,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    known: Sequence[Sequence[Moments]] | None = None,
    found: list[list[Moments]] | None = None,
) -> Tensor:
    """``conv(silu(norm(images))) + shift + residual``, as in the residual blocks of diffusion models, for inference.

    Args:
        images: (B, I, H, W).
        norm: over I channels.
        conv: any convolution of I to O channels; one that takes Winograd's way does it all without maps in between.
        shift: (B, O).
        residual: (B, O, h, w).
        known: `moments` of the parts of each image, if there are any.
        found: gets those of the results where they come at little cost; else it stays empty.

    Returns:
        (B, O, h, w).
    """
    if isinstance(conv, WinogradConv2d) and conv.pays(images):
        scale, offset = normalisation(norm, images, known or None)
        bias = conv.bias if shift is None else shift if conv.bias is None else shift + conv.bias
        return winograd_conv2d(images, conv.transformed(), bias, 1, scale, offset, residual, found)
    result = conv(F.silu(norm(images), inplace=True))
    if shift is not None:
        result += shift[:, :, None, None]
    if residual is not None:
        result += residual
    return result
