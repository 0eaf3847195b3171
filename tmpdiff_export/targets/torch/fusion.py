"""What the `torch` backend writes anew in a denoiser, so that less is read and written between its products."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from diffusers.models.activations import GEGLU, GELU
from diffusers.models.attention import FeedForward

from tmpdiff_export.quantization.codes import LayerRange
from tmpdiff_export.targets.torch.cross import use_cross_processor
from tmpdiff_export.targets.torch.flux import use_codes_kernel, use_rotary_kernel
from tmpdiff_export.targets.torch.joint import use_joint_processor
from tmpdiff_export.targets.torch.kernels.geglu import geglu
from tmpdiff_export.targets.torch.kernels.gelu_codes import TanhGelu
from tmpdiff_export.targets.torch.layers import StaticLinear, makes_codes
from tmpdiff_export.targets.torch.norms import codes_for, use_norm_kernel
from tmpdiff_export.targets.torch.sana import use_sana_kernels
from tmpdiff_export.targets.torch.unet import use_channels_last


def fuse(module: torch.nn.Module, groups: Iterable[Sequence[str]]) -> None:
    """Changes a denoiser in place, with its quantized layers in it: the same functions under the same names of layers.

    Args:
        module: a denoiser or a wrapper of one.
        groups: names of quantized layers that read the same input; of no consequence are layers alone.
    """
    share_codes(module, groups)
    replace_tanh_gelu(module)
    _move_gelu(module)
    use_geglu_kernel(module)
    use_rotary_kernel(module)
    use_codes_kernel(module)
    use_sana_kernels(module)
    use_channels_last(module)
    use_joint_processor(module)
    use_cross_processor(module)
    use_norm_kernel(module)


def same_input(ranges: Mapping[str, LayerRange]) -> list[list[str]]:
    """The layers that have read the same input, in groups: their ranges are equal to the last bit."""
    groups: dict[tuple[float | None, bytes], list[str]] = {}
    for name, found in ranges.items():
        smoothing = b"" if found.pre_quant_scale is None else found.pre_quant_scale.numpy().tobytes()
        groups.setdefault((found.input_amax, smoothing), []).append(name)
    return list(groups.values())


def share_codes(module: torch.nn.Module, groups: Iterable[Sequence[str]]) -> int:
    """Makes layers of one block that read the same input, and so have equal scales, take those of the first of them.

    Returns:
        How many layers got a leader.
    """
    count = 0
    for group in groups:
        leaders: dict[str, StaticLinear] = {}
        for name in group:
            layer = module.get_submodule(name)
            if makes_codes(layer):
                leader = leaders.setdefault(_block_of(name), layer)
                if leader is not layer and leader.codes.dtype == layer.codes.dtype:
                    layer.leader = (leader,)
                    count += 1
    return count


def _block_of(name: str) -> str:
    """The part of a layer's name up to its last number: `transformer_blocks.3` of `transformer_blocks.3.attn.to_q`."""
    parts = name.split(".")
    numbers = [position for position, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[: numbers[-1] + 1]) if numbers else ""


class GeluProjection(torch.nn.Module):
    """diffusers' linear layer with GELU behind it; the layer keeps its name, `proj`."""

    def __init__(self, proj: torch.nn.Module) -> None:
        super().__init__()
        self.proj = proj
        self.gelu = TanhGelu()

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., N]."""
        output: torch.Tensor = self.gelu(self.proj(data))
        return output


def _move_gelu(module: torch.nn.Module) -> None:
    """Leaves the GELU of feed-forward networks to the layer behind it, where that makes codes of the result."""
    for network in module.modules():
        if not isinstance(network, FeedForward):
            continue
        first, *between, last = (item for item in network.net if not isinstance(item, torch.nn.Dropout))
        if isinstance(first, GeluProjection) and not between and makes_codes(last):
            first.gelu = torch.nn.Identity()
            last.after_gelu = True


class CodesGeglu(GEGLU):
    """diffusers' linear layer with GEGLU behind it, which makes the codes of its reader."""

    readers: tuple[torch.nn.Module, ...]  # in a tuple, they are no parts of this layer

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """[..., K] -> [..., N], codes where the reader takes them."""
        return geglu(self.proj(hidden_states), codes_for(self.readers))


def use_geglu_kernel(module: torch.nn.Module) -> int:
    """Makes GEGLU of feed-forward networks one kernel.

    Returns:
        How many networks.
    """
    count = 0
    for network in module.modules():
        if isinstance(network, FeedForward) and type(network.net[0]) is GEGLU:
            first, *_, last = (item for item in network.net if not isinstance(item, torch.nn.Dropout))
            first.__class__ = CodesGeglu  # the same layer under the same name, with another forward
            first.readers = (last,)
            count += 1
    return count


def replace_tanh_gelu(module: torch.nn.Module) -> int:
    """Puts `TanhGelu` in place of every GELU in the tanh approximation; names of layers stay.

    Returns:
        How many were replaced.
    """
    count = 0
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.GELU) and child.approximate == "tanh":
                setattr(parent, name, TanhGelu())
            elif isinstance(child, GELU) and child.approximate == "tanh":
                setattr(parent, name, GeluProjection(child.proj))
            else:
                continue
            count += 1
    return count
