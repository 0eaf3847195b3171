"""Range calibration with modelopt: from a torch denoiser and real inputs to per-layer ranges."""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from engines.errors import BuildError
from tmpdiff_export.devices import CPU, Batch, on, placed
from tmpdiff_export.quantization.codes import LayerRange
from tmpdiff_export.quantization.recipes import Recipe, Variant, stays_high_precision

Item = TypeVar("Item")


def quantizable_layers(module: torch.nn.Module, prefix: str, recipe: Recipe) -> list[str]:
    """Names of the layers below `module.<prefix>` that a recipe quantizes.

    They are linear layers, and with `recipe.convolutions` also undilated convolutions of one group.

    Args:
        module: the export wrapper.
        prefix: attribute of the wrapper that holds the denoiser.
        recipe: names what stays in high precision; with a block size, layers whose K is no multiple of it stay too.

    Raises:
        BuildError: no layer is left, so that the "quantized" engine would be an FP16 one.
    """
    names = [
        name
        for name, layer in module.named_modules()
        if (_fits_linear(layer, recipe) or _fits_convolution(layer, recipe))
        and stays_high_precision(name.removeprefix(f"{prefix}."), recipe) is None
    ]
    if not names:
        raise BuildError(
            f"{type(module).__name__}: no layer can be quantized"
            + (f" (none has an input width that is a multiple of {recipe.block_size})" if recipe.block_size else "")
        )
    return names


def _fits_linear(layer: torch.nn.Module, recipe: Recipe) -> bool:
    return isinstance(layer, torch.nn.Linear) and (
        recipe.block_size is None or layer.in_features % recipe.block_size == 0
    )


def _fits_convolution(layer: torch.nn.Module, recipe: Recipe) -> bool:
    return (
        recipe.convolutions
        and isinstance(layer, torch.nn.Conv2d)
        and layer.groups == 1
        and layer.dilation == (1, 1)
        and layer.padding_mode == "zeros"
    )


def calibrate_ranges(
    module: torch.nn.Module,
    names: Sequence[str],
    recipe: Recipe,
    variant: Variant,
    batches: Sequence[Batch],
    device: str = CPU,
) -> dict[str, LayerRange]:
    """Runs modelopt's range calibration on a copy of `module`.

    Args:
        module: float32 export wrapper; called as `module(*batch)`.
        names: layers to quantize, as in `module.named_modules()`.
        recipe: number formats of weights and inputs.
        variant: the algorithm.
        batches: denoiser inputs from real pipeline runs, over all timesteps.
        device: where it runs, "cpu" or "cuda".

    Returns:
        A range per layer name. Layers that read the same activation share `pre_quant_scale` (the
        geometric mean of theirs) and `input_amax`, so that one QuantizeLinear serves them all, and know
        the largest magnitude of all their weights.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import modelopt.torch.quantization as mtq

    quantizers: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for name in names:
        quantizers.append({"quantizer_name": f"{name}.weight_quantizer", "cfg": recipe.weight})
        if recipe.input is not None:
            quantizers.append({"quantizer_name": f"{name}.input_quantizer", "cfg": recipe.input})
    config = {"quant_cfg": quantizers, "algorithm": variant.algorithm}
    used = spread(batches, variant.batch_limit)

    def forward_loop(model: torch.nn.Module) -> None:
        for batch in used:
            model(*on(batch, device))

    changed = copy.deepcopy(module)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(), placed(changed, device):
        warnings.simplefilter("ignore")  # it warns of every layer that the recipe leaves out
        quantized = mtq.quantize(changed, config, forward_loop)
    found: dict[str, LayerRange] = {}
    channel_amax: dict[str, np.ndarray] = {}
    for name in names:
        layer = quantized.get_submodule(name)
        if not layer.weight_quantizer.is_enabled:
            raise BuildError(f"modelopt left layer {name} unquantized; this is a bug in the recipe {recipe.precision}")
        amax = _array(layer.input_quantizer.amax) if recipe.input is not None else None
        scale = _array(getattr(layer.input_quantizer, "pre_quant_scale", None))
        smoothing = _array(getattr(layer.input_quantizer, "_amax_for_smoothing", None))
        if smoothing is not None:
            channel_amax[name] = smoothing.reshape(-1)
        found[name] = LayerRange(
            weight=_array(layer.weight.flatten(1)),
            input_amax=None if amax is None else float(amax.max()),
            pre_quant_scale=None if scale is None else scale.reshape(-1),
        )
    with placed(module, device):
        groups = layers_sharing_inputs(module, names, on(used[0], device))
    for group in groups:
        _share(found, group, channel_amax)
    return found


def layers_sharing_inputs(module: torch.nn.Module, names: Sequence[str], batch: Batch) -> list[list[str]]:
    """Groups of two or more layers that read the very same tensor (a block's q, k and v)."""
    groups: list[list[str]] = []

    def hook(name: str) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
        def note(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            # Noted on the tensor itself, which then lives no longer than it would anyhow.
            group = getattr(args[0], "_tmpdiff_readers", None)
            if group is None:
                group = args[0]._tmpdiff_readers = []
                groups.append(group)
            group.append(name)

        return note

    handles = [module.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        with torch.inference_mode():
            module(*batch)
    finally:
        for handle in handles:
            handle.remove()
    return [group for group in groups if len(group) > 1]


def _share(found: dict[str, LayerRange], group: Sequence[str], channel_amax: dict[str, np.ndarray]) -> None:
    ranges = [found[name] for name in group]
    shared = ranges[0].pre_quant_scale
    scales = [item.pre_quant_scale for item in ranges if item.pre_quant_scale is not None]
    if len(scales) not in (0, len(ranges)):
        raise BuildError(f"layers {', '.join(group)} read one activation, but only some of them were smoothed")
    if shared is not None:
        shared = np.exp(np.mean([np.log(scale) for scale in scales], axis=0)).astype(np.float32)
    amaxes = [item.input_amax for item in ranges if item.input_amax is not None]
    if amaxes and shared is not None:
        amaxes = [float((channel_amax[name] * shared).max()) for name in group]
    weights = [
        item.weight * (item.pre_quant_scale / shared)
        if shared is not None and item.pre_quant_scale is not None
        else item.weight
        for item in ranges
    ]
    weight_amax = max(float(np.abs(weight).max()) for weight in weights)
    for name, weight in zip(group, weights, strict=True):
        found[name] = LayerRange(weight, max(amaxes) if amaxes else None, shared, weight_amax)


def spread(items: Sequence[Item], limit: int | None) -> list[Item]:
    """At most `limit` of them, evenly over the sequence, both ends included; all of them for None."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[round(index)] for index in np.linspace(0, len(items) - 1, limit)]


def _array(tensor: torch.Tensor | None) -> Any:
    return None if tensor is None else tensor.detach().float().cpu().numpy()
