"""Attention layers of diffusers' own class (`Attention`) for the `torch` backend: SD3's, PixArt's, SDXL's."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, JointAttnProcessor2_0
from diffusers.models.normalization import RMSNorm

from tmpdiff_export.targets.torch.activations import FP8, static_codes
from tmpdiff_export.targets.torch.attention import (
    SCALES,
    Fp8Processor,
    attend_heads,
    padded,
    project,
    query_factor,
    result_of,
    scales_of,
)
from tmpdiff_export.targets.torch.kernels.rotary import norm_rotary

Pair = tuple[torch.Tensor, torch.Tensor]


class JointProcessor:
    """diffusers' attention processors for SD3, and for self-attention elsewhere, over fewer kernels.

    Queries and keys are normed, joined and made codes in one, without norms by attention itself; FP8 results go to the
    output projection as they are.
    Without attention masks.
    """

    def __init__(self, *, fp8: bool) -> None:
        """fp8: for a layer with attention in FP8."""
        self.fp8 = fp8

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor | Pair:
        """As the processors it replaces: [B, S, C] and, in joint attention, text [B, S1, C] -> the same.

        Raises:
            ValueError: there is an attention mask, or text for a layer that has no projections of it.
        """
        if attention_mask is not None or (encoder_hidden_states is not None and attn.add_q_proj is None):
            raise ValueError("expected no attention mask, and no text for a layer without projections of it")
        tokens = hidden_states.shape[1]
        scales, value_scale = scales_of(attn) if self.fp8 else (None, None)
        query, key, value = (_heads(attn, layer, hidden_states) for layer in (attn.to_q, attn.to_k, attn.to_v))
        if encoder_hidden_states is None:
            added = query[:, :0], key[:, :0], value[:, :0]
            added_norms: Any = attn.norm_q, attn.norm_k
        else:
            layers = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
            added = tuple(_heads(attn, layer, encoder_hidden_states) for layer in layers)
            added_norms = attn.norm_added_q, attn.norm_added_k
        size, dtype = query.shape[3], query.dtype
        later = attn.norm_q is None and query_factor(size) == 1.0
        factors = (None, None) if scales is None or later else (_query_scale(scales, size), scales[1, 0])
        query, key = (
            _joined(both, norms, factor, dtype)
            for both, norms, factor in (
                ((query, added[0]), (attn.norm_q, added_norms[0]), factors[0]),
                ((key, added[1]), (attn.norm_k, added_norms[1]), factors[1]),
            )
        )
        value = _beside(value, added[2])
        heads = attend_heads(query, key, value if scales is None else padded(value), scales)[..., :size]
        image = attn.to_out[1](project(heads[:, :tokens], value_scale, attn.to_out[0], dtype))
        if encoder_hidden_states is None:
            return image
        text = heads[:, tokens:]
        if attn.context_pre_only:
            return image, result_of(text, value_scale, dtype).flatten(2)
        return image, project(text, value_scale, attn.to_add_out, dtype)


def use_joint_processor(module: torch.nn.Module) -> int:
    """Gives attention layers `JointProcessor` where it takes something away: a norm of queries, FP8 codes, a division.

    Layers with a processor of another kind than diffusers' plain ones keep it. What is in FP8 stays so.

    Returns:
        How many layers got it.
    """
    count = 0
    for layer in module.modules():
        if isinstance(layer, Attention) and _fits(layer):
            layer.processor = JointProcessor(fp8=hasattr(layer, SCALES))
            count += 1
    return count


def _fits(layer: Attention) -> bool:
    kind = plain_processor(layer)
    joint = kind is JointAttnProcessor2_0
    if not joint and not (kind is AttnProcessor2_0 and not layer.is_cross_attention):
        return False
    normed = ("norm_q", "norm_k", "norm_added_q", "norm_added_k") if layer.norm_q is not None else ()
    norms = [item for item in (getattr(layer, name, None) for name in normed) if item is not None]
    size = layer.inner_dim // layer.heads
    alike = all(
        isinstance(item, RMSNorm) and item.weight is not None and item.bias is None and item.eps == norms[0].eps
        for item in norms
    )
    helps = hasattr(layer, SCALES) or bool(norms) or not joint
    return alike and helps and (not norms or size & (size - 1) == 0)


def plain_processor(layer: Attention) -> type | None:
    """Whose processor a layer has, beneath one for FP8; None where the layer does more than attention."""
    others = (layer.group_norm, layer.spatial_norm, layer.norm_cross)
    if any(others) or layer.residual_connection or layer.rescale_output_factor != 1.0:
        return None
    return type(layer.processor.inner if isinstance(layer.processor, Fp8Processor) else layer.processor)


def _query_scale(scales: torch.Tensor, size: int) -> torch.Tensor:
    return scales[0, 0] if query_factor(size) == 1.0 else scales[0, 0] / query_factor(size)


def _joined(both: Pair, norms: Any, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Two runs of tokens [B, S, H, D], normed where there are norms, one after the other; codes if there is a scale."""
    if norms[0] is not None:
        first, second = ((item.contiguous(), norm.weight) for item, norm in zip(both, norms, strict=True))
        return norm_rotary(first, second, None, norms[0].eps, dtype if scale is None else FP8, scale)
    joined = _beside(*both)
    return joined if scale is None else static_codes(padded(joined), scale, FP8).contiguous()


def _beside(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return torch.cat([first, second], dim=1) if second.shape[1] else first


def _heads(attn: Attention, layer: torch.nn.Module, data: torch.Tensor) -> torch.Tensor:
    heads: torch.Tensor = layer(data).unflatten(-1, (attn.heads, -1))
    return heads
