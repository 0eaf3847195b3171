"""Pointwise convolutions as linear layers over channels-last data, for the `torch` backend."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def as_convolution(linear: torch.nn.Module) -> None:
    """Lets a linear layer be called as the pointwise convolution it stands for: [B, K, H, W] -> [B, N, H, W].

    Where the data lies channels last in memory, nothing is moved. `forward` stays the linear layer's.
    """
    linear.register_forward_pre_hook(_channels_last)
    linear.register_forward_hook(_channels_first)


def pointwise(layer: torch.nn.Module, data: torch.Tensor) -> torch.Tensor:
    """A pointwise convolution, or the linear layer in its place, over [..., K] -> [..., N]."""
    if isinstance(layer, torch.nn.Conv2d):
        return F.linear(data, layer.weight.flatten(1), layer.bias)
    output: torch.Tensor = layer.forward(data)
    return output


def _channels_last(_: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (arguments[0].permute(0, 2, 3, 1),)


def _channels_first(_: torch.nn.Module, __: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    return output.permute(0, 3, 1, 2)
