"""FLUX.1's blocks for the `torch` backend, over kernels that do what a compiler makes several of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    FluxSingleTransformerBlock,
)
from torch.nn import functional as F

from tmpdiff_export.torch_layers import makes_codes
from tmpdiff_export.torch_rotary import norm_rotary

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""query, key, value -> result, all [B, S, heads, D]."""


class RotaryProcessor:
    """diffusers' attention processor for FLUX.1, with `norm_rotary`; without IP adapters and attention masks."""

    def __init__(self, attend: Attend | None = None, dtype: torch.dtype | None = None, factor: float = 1.0) -> None:
        """
        Args:
            attend: the attention itself; None for torch's.
            dtype: of the queries and keys it takes; None for the model's.
            factor: of those queries and keys.
        """
        self._attend = attend or _attend
        self._dtype = dtype
        self._factor = factor

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """As the processor it replaces: [B, S, C] and, in blocks that have it, text [B, S1, C] -> the same.

        Raises:
            ValueError: there is an attention mask, or no rotary table.
        """
        if attention_mask is not None or image_rotary_emb is None:
            raise ValueError("expected no attention mask, and a rotary table: FLUX.1 has none, and one")
        query, key, value = (_heads(attn, layer(hidden_states)) for layer in (attn.to_q, attn.to_k, attn.to_v))
        if encoder_hidden_states is None:
            text_query, text_key, text_tokens = query[:, :0], key[:, :0], 0
            text_norms = attn.norm_q, attn.norm_k
        else:
            layers = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            text_query, text_key, text_value = (_heads(attn, layer(encoder_hidden_states)) for layer in layers)
            value = torch.cat([text_value, value], dim=1)
            text_norms = attn.norm_added_q, attn.norm_added_k
            text_tokens = encoder_hidden_states.shape[1]
        dtype = self._dtype or hidden_states.dtype
        query, key = (
            norm_rotary(text, text_norm.weight, image, norm.weight, image_rotary_emb, norm.eps, dtype, self._factor)
            for text, text_norm, image, norm in (
                (text_query, text_norms[0], query, attn.norm_q),
                (text_key, text_norms[1], key, attn.norm_k),
            )
        )
        result = self._attend(query, key, value).flatten(2)
        if encoder_hidden_states is None:
            return result
        text, image = result[:, :text_tokens], result[:, text_tokens:]
        return attn.to_out[1](attn.to_out[0](image.contiguous())), attn.to_add_out(text.contiguous())


def use_rotary_kernel(module: torch.nn.Module, processor: RotaryProcessor | None = None) -> int:
    """Gives FLUX.1's attention layers the processor, one for all; other denoisers stay as they are.

    Layers with a processor of another kind than diffusers' plain one (IP adapters) keep it.

    Returns:
        How many layers got it.
    """
    processor = processor or RotaryProcessor()
    count = 0
    for layer in module.modules():
        if isinstance(layer, FluxAttention) and _fits(layer):
            layer.processor = processor
            count += 1
    return count


class CodesSingleBlock(FluxSingleTransformerBlock):
    """The single block with a quantized `proj_out`, whose input is made in one kernel from what is to be joined."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As the block it replaces."""
        text_tokens = encoder_hidden_states.shape[1]
        residual = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        normed, gate = self.norm(residual, emb=temb)
        attended = self.attn(normed, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
        product = self.proj_out.with_gelu(attended.flatten(0, 1), self.proj_mlp(normed).flatten(0, 1))
        result = residual + gate.unsqueeze(1) * product.unflatten(0, residual.shape[:2])
        if result.dtype == torch.float16:
            result = result.clip(-65504, 65504)
        return result[:, :text_tokens], result[:, text_tokens:]


def use_codes_kernel(module: torch.nn.Module) -> int:
    """Makes FLUX.1's single blocks `CodesSingleBlock` where their `proj_out` takes codes.

    Returns:
        How many blocks.
    """
    count = 0
    for block in module.modules():
        if type(block) is FluxSingleTransformerBlock and makes_codes(block.proj_out):
            block.__class__ = CodesSingleBlock  # the same layers under the same names, with another forward
            count += 1
    return count


def _fits(layer: FluxAttention) -> bool:
    norms = [getattr(layer, name, None) for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")]
    affine = all(norm.weight is not None and norm.eps == layer.norm_q.eps for norm in norms if norm is not None)
    power_of_two = layer.head_dim & (layer.head_dim - 1) == 0
    plain = type(layer.processor) in (FluxAttnProcessor, RotaryProcessor)
    return plain and affine and power_of_two and not layer.fused_projections


def _heads(attn: FluxAttention, data: torch.Tensor) -> torch.Tensor:
    return data.unflatten(-1, (-1, attn.head_dim))


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    parts = (item.transpose(1, 2) for item in (query, key, value))
    return F.scaled_dot_product_attention(*parts).transpose(1, 2)
