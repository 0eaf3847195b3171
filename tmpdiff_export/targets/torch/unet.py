"""A UNet's blocks for the `torch` backend: channels last throughout, norms over kernels that add and make codes."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch.nn import functional as F

from tmpdiff_export.targets.torch.kernels.group_norm import Norm, group_norm
from tmpdiff_export.targets.torch.kernels.norms import Affine, add_norm_modulated, norm_modulated
from tmpdiff_export.targets.torch.layers import takes_codes
from tmpdiff_export.targets.torch.norms import codes_for, readers_of, readers_of_network
from tmpdiff_export.targets.torch.pointwise import pointwise

# What flows from block to block of a transformer: a tensor, or two whose sum is meant.
Sum = tuple[torch.Tensor, torch.Tensor]


class ChannelsLastResnet(ResnetBlock2D):
    """The residual block, with each norm, SiLU and what its convolution takes in one operation."""

    def forward(self, input_tensor: torch.Tensor, temb: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """As the block it replaces: [B, C, H, W] and [B, T] -> [B, N, H, W], channels last in memory."""
        data = input_tensor.permute(0, 2, 3, 1).contiguous()
        hidden = _normed(self.norm1, self.conv1, data, None)
        added = None if self.time_emb_proj is None else self.time_emb_proj(F.silu(temb))
        hidden = _normed(self.norm2, self.conv2, hidden, added)
        if self.conv_shortcut is not None:
            data = pointwise(self.conv_shortcut, data)
        return ((data + hidden) / self.output_scale_factor).permute(0, 3, 1, 2)


class ChannelsLastTransformer(Transformer2DModel):
    """The transformer of a UNet, whose tokens are pixels: nothing moves in memory on the way in and out."""

    def _operate_on_continuous_inputs(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, int]:
        data = hidden_states.permute(0, 2, 3, 1).contiguous()
        norm, layer = _norm_of(self.norm, silu=False), self.proj_in
        if takes_codes(layer):
            tokens = layer.of_codes(group_norm(data, norm, None, layer.input_scale, layer.codes.dtype))
        else:
            tokens = pointwise(layer, group_norm(data, norm))
        return tokens.flatten(1, 2), tokens.shape[-1]

    def _get_output_for_continuous_inputs(
        self,
        hidden_states: torch.Tensor | Sum,
        residual: torch.Tensor,
        batch_size: int,
        height: int,
        width: int,
        inner_dim: int,
    ) -> torch.Tensor:
        if not isinstance(hidden_states, torch.Tensor):
            hidden_states = hidden_states[0] + hidden_states[1]
        pixels = pointwise(self.proj_out, hidden_states.unflatten(1, (height, width)))
        return pixels.permute(0, 3, 1, 2) + residual


class NormedBlock(BasicTransformerBlock):
    """The block of a UNet's transformer, with each residual, norm and codes in one kernel.

    It leaves its last sum to the norm of the block behind it, or to the transformer.
    """

    def forward(
        self,
        hidden_states: torch.Tensor | Sum,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: torch.Tensor | None = None,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
    ) -> Sum:
        """As the block it replaces, [B, S, C] or two that are to be added -> two that are to be added.

        Raises:
            ValueError: there are arguments for cross attention.
        """
        if cross_attention_kwargs:
            raise ValueError(f"expected no arguments for cross attention, got {sorted(cross_attention_kwargs)}")
        readers = readers_of(self.attn1)
        if isinstance(hidden_states, torch.Tensor):
            total = hidden_states
            normed = norm_modulated(total, _affine(self.norm1), self.norm1.eps, codes_for(readers))
        else:
            first, branch = hidden_states
            normed, total = _added(self.norm1, first, branch, readers)
        attended = self.attn1(normed, attention_mask=attention_mask)
        readers = readers_of(self.attn2) if encoder_hidden_states is None else (self.attn2.to_q,)
        normed, total = _added(self.norm2, total, attended, readers)
        attended = self.attn2(
            normed, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask
        )
        normed, total = _added(self.norm3, total, attended, readers_of_network(self.ff))
        return total, self.ff(normed)


def use_channels_last(module: torch.nn.Module) -> int:
    """Gives a UNet's residual blocks and transformers their forms for channels-last data; other denoisers stay as they are.

    Returns:
        How many blocks got it; those within transformers are not counted.
    """
    count = 0
    for part in module.modules():
        if type(part) is ResnetBlock2D and _fits(part):
            part.__class__ = ChannelsLastResnet  # the same layers under the same names, with another forward
        elif type(part) is Transformer2DModel and part.is_input_continuous:
            part.__class__ = ChannelsLastTransformer
            if all(type(block) is BasicTransformerBlock and _has_norms(block) for block in part.transformer_blocks):
                for block in part.transformer_blocks:
                    block.__class__ = NormedBlock
        else:
            continue
        count += 1
    return count


def _fits(block: ResnetBlock2D) -> bool:
    plain = block.upsample is None and block.downsample is None and block.time_embedding_norm == "default"
    return plain and not block.skip_time_act and isinstance(block.nonlinearity, torch.nn.SiLU)


def _normed(
    norm: torch.nn.GroupNorm, layer: torch.nn.Module, data: torch.Tensor, added: torch.Tensor | None
) -> torch.Tensor:
    """Norm, SiLU and convolution of [B, H, W, C] plus [B, C] -> [B, H, W, N]."""
    form = _norm_of(norm, silu=True)
    if takes_codes(layer):
        return layer.of_codes(group_norm(data, form, added, layer.input_scale, layer.codes.dtype))
    pixels: torch.Tensor = layer(group_norm(data, form, added).permute(0, 3, 1, 2))
    return pixels.permute(0, 2, 3, 1).contiguous()


def _norm_of(norm: torch.nn.GroupNorm, *, silu: bool) -> Norm:
    return Norm(norm.num_groups, norm.weight, norm.bias, norm.eps, silu)


def _has_norms(block: Any) -> bool:
    """Whether a transformer's block has three layer norms of its own parameters and nothing beside them."""
    norms = block.norm1, block.norm2, block.norm3
    return (
        block.norm_type == "layer_norm"
        and block.pos_embed is None
        and block.attn2 is not None
        and not block.only_cross_attention
        and block._chunk_size is None
        and not hasattr(block, "fuser")
        and all(type(norm) is torch.nn.LayerNorm and norm.bias is not None for norm in norms)
    )


def _affine(norm: torch.nn.LayerNorm) -> Affine:
    return Affine(norm.weight, norm.bias)


def _added(
    norm: torch.nn.LayerNorm, data: torch.Tensor, branch: torch.Tensor, readers: tuple[torch.nn.Module, ...]
) -> Sum:
    """What a norm makes of a sum, for layers that read it, and the sum."""
    return add_norm_modulated(data, branch, _affine(norm), norm.eps, codes_for(readers))
