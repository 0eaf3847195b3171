"""Attention to a text for the `torch` backend, in layers of diffusers' own class (`Attention`): SDXL's, PixArt's."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch.nn import functional as F

from tmpdiff_export.targets.torch.joint import plain_processor
from tmpdiff_export.targets.torch.kernels.cross_attention import cross_attention
from tmpdiff_export.targets.torch.layers import takes_codes


class CrossProcessor:
    """diffusers' processor of cross attention, over one kernel, which makes the codes of the output projection.

    With a mask attention is torch's.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """As the processor it replaces: [B, S, C], text [B, S1, K] and what is added to logits, [B, 1, S1] -> [B, S, C]."""
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        layers = (attn.to_q, hidden_states), (attn.to_k, text), (attn.to_v, text)
        query, key, value = (layer(data).unflatten(-1, (attn.heads, -1)) for layer, data in layers)
        last = attn.to_out[0]
        if attention_mask is None:
            codes = (last.input_scale, last.codes.dtype) if takes_codes(last) else ()
            heads = cross_attention(query, key, value, *codes)
        else:
            query, key, value = (item.transpose(1, 2) for item in (query, key, value))
            heads = F.scaled_dot_product_attention(query, key, value, attention_mask[:, None]).transpose(1, 2)
        output = last(heads.flatten(2))
        result: torch.Tensor = attn.to_out[1](output)
        return result


def use_cross_processor(module: torch.nn.Module) -> int:
    """Gives layers of cross attention `CrossProcessor`, where they have diffusers' plain one.

    Returns:
        How many layers got it.
    """
    count = 0
    for layer in module.modules():
        if isinstance(layer, Attention) and _fits(layer):
            layer.processor = CrossProcessor()
            count += 1
    return count


def _fits(layer: Attention) -> bool:
    plain = layer.is_cross_attention and plain_processor(layer) is AttnProcessor2_0
    return plain and layer.norm_q is None and layer.norm_k is None
