"""A UNet's blocks for the `torch` backend: channels last throughout, group norms over a kernel that makes codes."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch.nn import functional as F

from tmpdiff_export.targets.torch.kernels.group_norm import Norm, group_norm
from tmpdiff_export.targets.torch.layers import takes_codes
from tmpdiff_export.targets.torch.pointwise import pointwise


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
        hidden_states: torch.Tensor,
        residual: torch.Tensor,
        batch_size: int,
        height: int,
        width: int,
        inner_dim: int,
    ) -> torch.Tensor:
        pixels = pointwise(self.proj_out, hidden_states.unflatten(1, (height, width)))
        return pixels.permute(0, 3, 1, 2) + residual


def use_channels_last(module: torch.nn.Module) -> int:
    """Gives a UNet's residual blocks and transformers their forms for channels-last data; other denoisers stay as they are.

    Returns:
        How many blocks got it.
    """
    count = 0
    for part in module.modules():
        if type(part) is ResnetBlock2D and _fits(part):
            part.__class__ = ChannelsLastResnet  # the same layers under the same names, with another forward
        elif type(part) is Transformer2DModel and part.is_input_continuous:
            part.__class__ = ChannelsLastTransformer
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
