"""The learned prompt's keys and values, computed once: it is the same for every image."""

from __future__ import annotations

import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn


class PromptAttnProcessor:
    """Attention to a prompt that never changes; its projections are the attention's `prompt_key` and `prompt_value`."""

    def __call__(self, attn: Attention, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        batch, length, _ = hidden_states.shape
        query = attn.to_q(hidden_states).view(batch, length, attn.heads, -1).transpose(1, 2)
        key, value = (part.expand(batch, -1, -1, -1) for part in (attn.prompt_key, attn.prompt_value))
        hidden = F.scaled_dot_product_attention(query, key, value)
        return attn.to_out[0](hidden.transpose(1, 2).reshape(batch, length, -1))


def cache_prompt(unet: nn.Module, prompt: Tensor) -> int:
    """Have every cross-attention of a UNet attend to one prompt (1, tokens, width) from now on.

    Returns:
        the number of attentions.
    """
    found = 0
    for name, attn in unet.named_modules():
        if not (name.endswith("attn2") and isinstance(attn, Attention) and type(attn.processor) is AttnProcessor2_0):
            continue
        for part, project in (("prompt_key", attn.to_k), ("prompt_value", attn.to_v)):
            value = project(prompt)[0].unflatten(-1, (attn.heads, -1)).transpose(0, 1)  # (heads, tokens, channels)
            attn.register_buffer(part, value.contiguous(), persistent=False)
        attn.set_processor(PromptAttnProcessor())
        found += 1
    return found
