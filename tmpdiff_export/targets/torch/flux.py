"""FLUX.1's blocks for the `torch` backend, over kernels that do what a compiler makes several of."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    FluxSingleTransformerBlock,
)

from tmpdiff_export.targets.torch.activations import FP8
from tmpdiff_export.targets.torch.attention import (
    SCALES,
    VALUE_SCALE,
    Fp8Processor,
    attend_heads,
    project,
    result_of,
    scales_of,
)
from tmpdiff_export.targets.torch.kernels.rotary import norm_rotary
from tmpdiff_export.targets.torch.layers import makes_codes


class RotaryProcessor:
    """diffusers' attention processor for FLUX.1, with `norm_rotary`; without IP adapters and attention masks.

    Attributes:
        fp8: whether the layer's attention is in FP8.
        leaves_codes: a layer without an output projection returns its FP8 codes, for who knows their scale.
    """

    def __init__(self, *, fp8: bool = False) -> None:
        """fp8: for a layer with attention in FP8, whose queries and keys leave their kernel as codes."""
        self.fp8 = fp8
        self.leaves_codes = False

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """As the processor it replaces: [B, S, C] and, in blocks that have it, text [B, S1, C] -> the same, or codes.

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
        scales, value_scale = scales_of(attn) if self.fp8 else (None, None)
        dtype = query.dtype if scales is None else FP8
        query, key = (
            norm_rotary((text, text_norm.weight), (image, norm.weight), image_rotary_emb, norm.eps, dtype, scale)
            for text, text_norm, image, norm, scale in (
                (text_query, text_norms[0], query, attn.norm_q, None if scales is None else scales[0, 0]),
                (text_key, text_norms[1], key, attn.norm_k, None if scales is None else scales[1, 0]),
            )
        )
        result = attend_heads(query, key, value, scales)
        if encoder_hidden_states is None:
            return result.flatten(2) if self.leaves_codes else result_of(result, value_scale, value.dtype).flatten(2)
        text, image = result[:, :text_tokens], result[:, text_tokens:]
        image, text = (
            project(item, value_scale, layer, value.dtype)
            for item, layer in ((image, attn.to_out[0]), (text, attn.to_add_out))
        )
        return attn.to_out[1](image), text


def use_rotary_kernel(module: torch.nn.Module) -> int:
    """Gives FLUX.1's attention layers `RotaryProcessor`; other denoisers stay as they are.

    Layers with a processor of another kind than diffusers' plain one (IP adapters) keep it. What is in FP8 stays so.

    Returns:
        How many layers got it.
    """
    count = 0
    for layer in module.modules():
        if isinstance(layer, FluxAttention) and _fits(layer):
            layer.processor = RotaryProcessor(fp8=hasattr(layer, SCALES))
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
        if hasattr(
            self.norm, "readers"
        ):  # the sum below is then all that reads them joined, and a compiler joins them there
            normed, gate = self.norm(hidden_states, emb=temb, before=encoder_hidden_states)
        else:
            normed, gate = self.norm(residual, emb=temb)
        attended = self.attn(normed, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
        scale = self.attn.get_buffer(VALUE_SCALE) if attended.dtype is FP8 else None
        product = self.proj_out.with_gelu(attended.flatten(0, 1), self.proj_mlp(normed).flatten(0, 1), scale)
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
            if isinstance(block.attn.processor, RotaryProcessor):
                block.attn.processor.leaves_codes = block.attn.processor.fp8
            count += 1
    return count


def _fits(layer: FluxAttention) -> bool:
    norms = [getattr(layer, name, None) for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")]
    affine = all(norm.weight is not None and norm.eps == layer.norm_q.eps for norm in norms if norm is not None)
    power_of_two = layer.head_dim & (layer.head_dim - 1) == 0
    processor = layer.processor.inner if isinstance(layer.processor, Fp8Processor) else layer.processor
    plain = type(processor) in (FluxAttnProcessor, RotaryProcessor)
    return plain and affine and power_of_two and not layer.fused_projections


def _heads(attn: FluxAttention, data: torch.Tensor) -> torch.Tensor:
    return data.unflatten(-1, (-1, attn.head_dim))
