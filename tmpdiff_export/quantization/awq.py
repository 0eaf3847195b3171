"""AWQ: the scales of channels with which rounding a weight to 4 bits changes the output of its layer least."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from engines.errors import BuildError
from engines.precision import Precision
from tmpdiff_export.quantization.codes import CODE_MAX, largest
from tmpdiff_export.quantization.observers import Observed
from tmpdiff_export.quantization.recipes import Awq

LEAST_SCALE, LARGEST_SCALE = 1e-4, 1e4  # of what multiplies a channel
_TINY = torch.finfo(torch.float32).tiny
_ZERO_AMAX = 2.0**-24  # of a block: its codes are zero


def search_scales(
    module: torch.nn.Module,
    observed: Observed,
    run: Callable[[], None],
    names: Sequence[str],
    search: Awq,
    block_size: int,
) -> dict[str, torch.Tensor]:
    """Runs a module once more, and tries every alpha at every call of every layer.

    A layer's weight is read in its forward hook, before hooks that are there already.

    Args:
        module: float32 export wrapper.
        observed: of `names`, with the mean magnitudes of the same batches.
        run: calls `module` for every batch of the search.
        names: linear layers whose K is a multiple of `block_size`.
        search: the alphas.
        block_size: weights per scale along K.

    Returns:
        `pre_quant_scale` by layer, float32 [K] on the CPU, of every layer alone.

    Raises:
        BuildError: a layer was not called, or an error is not a number.
    """
    judges = {}
    handles = []
    for name in names:
        mean = observed.inputs[name].channel_mean
        assert mean is not None  # observed with batches to average over
        judges[name] = _Judge(mean, search.alpha_step, block_size)
        handles.append(module.get_submodule(name).register_forward_hook(judges[name], prepend=True))
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return {name: judge.found(name) for name, judge in judges.items()}


class _Judge:
    """A forward hook that sums up, over calls of one layer, the error of its output for every alpha."""

    def __init__(self, mean: torch.Tensor, alpha_step: float, block_size: int) -> None:
        self._mean, self._block_size = mean, block_size
        self._alphas = torch.arange(0, 1.0 + alpha_step, alpha_step).tolist()
        self._share: torch.Tensor | None = None
        self._errors: list[torch.Tensor] = []

    def __call__(self, layer: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        """After a call of `layer`, while it still has its weight."""
        weight, data = layer.weight.detach(), args[0]
        if self._share is None:
            self._mean = self._mean.to(weight.device)
            self._share = weight_share(weight, self._block_size)
        errors: list[Any] = []
        for alpha in self._alphas:
            scale = channel_scale(self._mean, self._share, alpha)
            rounded = _rounded(weight * scale, self._block_size)
            errors.append((F.linear(data * (1 / scale), rounded, layer.bias) - output).square().mean())
        self._errors.append(torch.stack(errors))

    def found(self, name: str) -> torch.Tensor:
        """What multiplies the input for the least error."""
        if self._share is None:
            raise BuildError(
                f"layer {name} was never called, so its scales cannot be searched; this is a bug in the recipes"
            )
        errors = torch.stack(self._errors).sum(0)
        if not bool(errors.isfinite().all()):
            raise BuildError(
                f"layer {name}: AWQ measured errors {errors.tolist()}, expected numbers; its weight is damaged"
            )
        best = self._alphas[int(errors.argmin())]
        return (1.0 / channel_scale(self._mean, self._share, best)).cpu()


def weight_share(weight: torch.Tensor, block_size: int) -> torch.Tensor:
    """How large a channel's weights [N, K] are within their blocks, from 0 to 1, on average over N; float32 [K]."""
    share = weight.abs().reshape(-1, block_size)
    share.div_(share.amax(1, keepdim=True) + _TINY)
    return share.view(weight.shape).mean(0)


def channel_scale(mean: torch.Tensor, share: torch.Tensor, alpha: float) -> torch.Tensor:
    """What multiplies a channel's weights, float32 [K]: `mean^alpha / share^(1 - alpha)`, centred around 1."""
    scale = (mean.pow(alpha) / (share.pow(1 - alpha) + _TINY)).clamp(LEAST_SCALE, LARGEST_SCALE)
    return scale / (scale.max() * scale.min()).sqrt()


def _rounded(weight: torch.Tensor, block_size: int) -> torch.Tensor:
    """A weight [N, K] as 4-bit codes with exact scales stand for it; in place."""
    blocks = weight.view(-1, block_size)
    amax = largest(blocks, 1)[:, None]
    zero = amax <= _ZERO_AMAX
    scale = (torch.full_like(amax, CODE_MAX[Precision.INT4]) / amax).masked_fill_(zero, 0.0)
    blocks.mul_(scale).round_().div_(scale.masked_fill_(zero, 1.0))
    return weight
