"""FLUX.1's attention for the `torch` backend: normalization and rotation of queries and keys in one kernel.

Inductor makes three to four kernels of them, whose reads of neighbouring pairs lie apart: 6 of the 91 ms of an FP8 step
of FLUX.1-dev on an H200 (docs/performance.md). Here a token is read once and written once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from torch.nn import functional as F

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""query, key, value -> result, all [B, S, heads, D]."""


def norm_rotary(
    first: torch.Tensor,
    first_weight: torch.Tensor,
    second: torch.Tensor,
    second_weight: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    eps: float,
    dtype: torch.dtype,
    factor: float = 1.0,
) -> torch.Tensor:
    """RMS norm over D of two runs of tokens, one after the other, then the rotation of neighbouring pairs.

    Computed in float32 and rounded once.

    Args:
        first: [B, S1, heads, D], contiguous; S1 may be 0.
        first_weight: [D], of its norm.
        second: [B, S2, heads, D], contiguous.
        second_weight: [D].
        rotary: cosines and sines, float32 [S1 + S2, D], each number twice.
        eps: of the norms.
        dtype: of the result; values beyond its range become its largest.
        factor: of the result.

    Returns:
        [B, S1 + S2, heads, D] on the device of `first`.
    """
    if first.is_cuda:
        return _cuda_op()(first, first_weight, second, second_weight, *rotary, eps, factor, dtype)
    size = first.shape[-1:]
    parts = [
        F.rms_norm(data.float(), size, weight.float(), eps)
        for data, weight in ((first, first_weight), (second, second_weight))
    ]
    data = torch.cat(parts, dim=1)
    cos, sin = (table[None, :, None, :] for table in rotary)
    real, imaginary = data.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(-2)
    limit = torch.finfo(dtype).max
    return ((data * cos + turned * sin) * factor).clamp(-limit, limit).to(dtype)


_OP: Any = None


def _cuda_op() -> Any:
    """The operator over the Triton kernel, made at its first use: Triton is installed with CUDA builds of torch only."""
    global _OP
    if _OP is None:
        from tmpdiff_export.triton_rotary import launch

        @torch.library.triton_op("tmpdiff::norm_rotary", mutates_args={})  # type: ignore[untyped-decorator]
        def norm_rotary_op(
            first: torch.Tensor,
            first_weight: torch.Tensor,
            second: torch.Tensor,
            second_weight: torch.Tensor,
            cos: torch.Tensor,
            sin: torch.Tensor,
            eps: float,
            factor: float,
            dtype: torch.dtype,
        ) -> torch.Tensor:
            batch, _, heads, size = second.shape
            tokens = first.shape[1] + second.shape[1]
            result = torch.empty((batch, tokens, heads, size), device=second.device, dtype=dtype)
            launch(
                torch.library.wrap_triton, first, first_weight, second, second_weight, (cos, sin), eps, factor, result
            )
            return result

        _OP = norm_rotary_op
    return _OP


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
        """As the processor it replaces: [B, S, C] and, in blocks that have it, text [B, S1, C] -> the same."""
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
