"""Sana's blocks for the `torch` backend, over kernels that do what a compiler makes several of."""

from __future__ import annotations

import torch
from diffusers.models.attention_processor import Attention, SanaLinearAttnProcessor2_0
from diffusers.models.transformers.sana_transformer import GLUMBConv

from tmpdiff_export.targets.torch.kernels.glu_convolution import glu_convolution
from tmpdiff_export.targets.torch.kernels.linear_attention import linear_attention
from tmpdiff_export.targets.torch.layers import takes_codes
from tmpdiff_export.targets.torch.pointwise import pointwise

HEAD_SIZES = (16, 32, 64, 128)  # that the kernel of linear attention takes


class KernelFeedForward(GLUMBConv):
    """Sana's feed-forward network, with one kernel between its two products, which makes the second one's codes."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """As the network it replaces: [B, C, H, W] -> the same, channels last in memory."""
        data = hidden_states.permute(0, 2, 3, 1).contiguous()
        wide = pointwise(self.conv_inverted, data).contiguous()
        last, middle = self.conv_point, (self.conv_depth.weight, self.conv_depth.bias)
        if takes_codes(last):
            output = last.of_codes(glu_convolution(wide, *middle, last.input_scale, last.codes.dtype))
        else:
            output = pointwise(last, glu_convolution(wide, *middle))
        if self.norm_type == "rms_norm":
            output = self.norm(output)
        return (output + data if self.residual_connection else output).permute(0, 3, 1, 2)


class LinearAttentionProcessor:
    """diffusers' processor of Sana's linear attention, over one kernel."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As the processor it replaces, which takes no notice of a mask: [B, S, C] -> the same."""
        given = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.to_q(hidden_states), attn.to_k(given), attn.to_v(given)
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        query, key, value = (item.unflatten(-1, (attn.heads, -1)) for item in (query, key, value))
        last = attn.to_out[0]
        if takes_codes(last):
            codes = linear_attention(query, key, value, last.input_scale, last.codes.dtype)
            output = last.of_codes(codes.flatten(2))
        else:
            output = last(linear_attention(query, key, value).flatten(2))
        output = attn.to_out[1](output)
        return output.clip(-65504, 65504) if output.dtype == torch.float16 else output


def use_sana_kernels(module: torch.nn.Module) -> int:
    """Gives Sana's feed-forward networks and linear attention their kernels; other denoisers stay as they are.

    Returns:
        How many parts got one.
    """
    count = 0
    for part in module.modules():
        if type(part) is GLUMBConv:
            part.__class__ = KernelFeedForward  # the same layers under the same names, with another forward
        elif isinstance(part, Attention) and type(part.processor) is SanaLinearAttnProcessor2_0 and _fits(part):
            part.processor = LinearAttentionProcessor()
        else:
            continue
        count += 1
    return count


def _fits(layer: Attention) -> bool:
    return layer.inner_dim == layer.inner_kv_dim and layer.inner_dim // layer.heads in HEAD_SIZES
