"""Range calibration: from a running torch denoiser and real inputs to per-layer ranges."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeGuard, TypeVar

import numpy as np
import torch

from engines.errors import BuildError
from engines.precision import Precision
from tmpdiff_export.quantization.awq import LARGEST_SCALE, LEAST_SCALE, search_scales
from tmpdiff_export.quantization.codes import LayerRange, largest
from tmpdiff_export.quantization.observers import Observed
from tmpdiff_export.quantization.recipes import RECIPES, Awq, Recipe, SmoothQuant, stays_high_precision

Weight = Callable[[str], torch.Tensor]
"""The weight of a layer by the layer's name, [N, K] or that of a convolution, floating, on any device."""

Item = TypeVar("Item")


def observable_layers(module: torch.nn.Module, prefix: str) -> list[str]:
    """Names of the layers that any recipe quantizes, sorted."""
    return sorted({name for recipe in RECIPES.values() for name in _layers(module, prefix, recipe)})


def quantizable_layers(module: torch.nn.Module, prefix: str, recipe: Recipe) -> list[str]:
    """Names of the layers below `module.<prefix>` that a recipe quantizes.

    They are linear layers, and with `recipe.convolutions` also undilated convolutions of one group and that width.

    Args:
        module: the export wrapper.
        prefix: attribute of the wrapper that holds the denoiser.
        recipe: names what stays in high precision; with a block size, layers whose K is no multiple of it stay too.

    Raises:
        BuildError: no layer is left, so that the "quantized" engine would be an FP16 one.
    """
    names = _layers(module, prefix, recipe)
    if not names:
        raise BuildError(
            f"{type(module).__name__}: no layer can be quantized"
            + (f" (none has an input width that is a multiple of {recipe.block_size})" if recipe.block_size else "")
        )
    return names


def _layers(module: torch.nn.Module, prefix: str, recipe: Recipe) -> list[str]:
    return [
        name
        for name, layer in module.named_modules()
        if (_fits_linear(layer, recipe) or fits_convolution(layer, recipe))
        and stays_high_precision(name.removeprefix(f"{prefix}."), recipe) is None
    ]


def is_pointwise(layer: torch.nn.Module) -> TypeGuard[torch.nn.Conv2d]:
    """Whether a layer is a convolution that computes every pixel from that pixel alone: a linear layer."""
    if not isinstance(layer, torch.nn.Conv2d):
        return False
    whole = layer.kernel_size == (1, 1) and layer.stride == (1, 1) and layer.groups == 1
    return whole and layer.padding in ((0, 0), "same", "valid")


def _fits_linear(layer: torch.nn.Module, recipe: Recipe) -> bool:
    return isinstance(layer, torch.nn.Linear) and (
        recipe.block_size is None or layer.in_features % recipe.block_size == 0
    )


def fits_convolution(layer: torch.nn.Module, recipe: Recipe) -> bool:
    """Whether a layer is a convolution that a recipe quantizes, if its name does not say otherwise."""
    return (
        recipe.convolutions is not None
        and isinstance(layer, torch.nn.Conv2d)
        and min(layer.in_channels, layer.out_channels) >= recipe.convolutions
        and layer.groups == 1
        and layer.dilation == (1, 1)
        and layer.padding_mode == "zeros"
    )


def calibrate_ranges(
    module: torch.nn.Module,
    layers: Mapping[Precision, Sequence[str]],
    observed: Observed,
    search: Callable[[], None],
    weight: Weight,
) -> dict[Precision, dict[str, dict[str, LayerRange]]]:
    """Finds the ranges of all variants of several recipes.

    Args:
        module: float32 export wrapper, which computes (`weights.streamed`) where a variant searches its scales.
        layers: of every precision the layers to quantize, from `quantizable_layers`.
        observed: what these layers have read in real runs.
        search: calls `module` for the batches that count for `LayerInput.channel_mean`; called where a variant searches.
        weight: read outside of the module's calls.

    Returns:
        By precision, name of the variant and name of the layer.

    Raises:
        BuildError: a search was given numbers that are not finite.
    """
    found: dict[Precision, dict[str, dict[str, LayerRange]]] = {}
    for precision, chosen in layers.items():
        recipe = RECIPES[precision]
        found[precision] = {}
        for variant in recipe.variants:
            if isinstance(variant.smoothing, Awq):
                assert recipe.block_size is not None  # scales are searched for blocks
                scales = search_scales(module, observed, search, chosen, variant.smoothing, recipe.block_size)
            elif isinstance(variant.smoothing, SmoothQuant):
                scales = smoothing_scales(observed, chosen, variant.smoothing, weight)
            else:
                scales = {}
            ranges = find_ranges(observed, chosen, recipe, scales, weight)
            found[precision][variant.name] = {name: replace(item, rank=variant.rank) for name, item in ranges.items()}
    return found


def smoothing_scales(
    observed: Observed, names: Sequence[str], smoothing: SmoothQuant, weight: Weight
) -> dict[str, torch.Tensor]:
    """SmoothQuant's `pre_quant_scale` by layer, float32 [K] on the CPU, of every linear layer alone."""
    scales = {}
    for name in names:
        inputs = observed.inputs[name].channel_amax
        if inputs is None:
            continue
        scale = _channel_amax(weight(name)).pow(1 - smoothing.alpha) / inputs.pow(smoothing.alpha)
        # Not a number: a channel that is zero in the input and in the weight.
        scales[name] = scale.nan_to_num(nan=1.0).clamp(LEAST_SCALE, LARGEST_SCALE)
    return scales


def find_ranges(
    observed: Observed, names: Sequence[str], recipe: Recipe, scales: Mapping[str, torch.Tensor], weight: Weight
) -> dict[str, LayerRange]:
    """The ranges of some layers for one way of scaling.

    Args:
        observed: what the layers have read.
        names: the layers that `recipe` quantizes.
        recipe: tells which ranges it takes.
        scales: `pre_quant_scale` of layers alone; empty where nothing is scaled.
        weight: read for NVFP4 only.

    Returns:
        A range per layer name. Layers that read the same activation share `pre_quant_scale` (the geometric mean of
        theirs) and `input_amax`, so that one QuantizeLinear serves them all, and with NVFP4 they know the largest
        magnitude of all their weights.
    """
    used = dict(scales)
    groups = observed.groups_of(names)
    for group in groups:
        given = [scales[name] for name in group if name in scales]
        if len(given) not in (0, len(group)):
            raise BuildError(f"layers {', '.join(group)} read one activation, but only some of them were smoothed")
        if given:
            shared = torch.stack(given).double().log().mean(0).exp().float()
            used.update(dict.fromkeys(group, shared))
    amaxes = {name: _input_amax(observed, name, used.get(name)) for name in names}
    weight_amaxes: dict[str, float] = {}
    for group in groups:
        amaxes.update(dict.fromkeys(group, max(amaxes[name] for name in group)))
        if recipe.precision is Precision.NVFP4:
            largest_weight = max(_weight_amax(weight(name), used.get(name)) for name in group)
            weight_amaxes.update(dict.fromkeys(group, largest_weight))
    return {
        name: LayerRange(None if recipe.weight_only else amaxes[name], used.get(name), weight_amaxes.get(name))
        for name in names
    }


def _input_amax(observed: Observed, name: str, scale: torch.Tensor | None) -> float:
    found = observed.inputs[name]
    if scale is None:
        return found.amax
    assert found.channel_amax is not None  # convolutions are not scaled
    return float((found.channel_amax * scale).max())


def _weight_amax(weight: torch.Tensor, scale: torch.Tensor | None) -> float:
    amax = _channel_amax(weight)
    return float((amax if scale is None else amax / scale).max())


def _channel_amax(weight: torch.Tensor) -> torch.Tensor:
    """[N, K] -> float32 [K] on the CPU."""
    return largest(weight.detach(), 0).float().cpu()


def spread(items: Sequence[Item], limit: int | None) -> list[Item]:
    """At most `limit` of them, evenly over the sequence, both ends included; all of them for None."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[round(index)] for index in np.linspace(0, len(items) - 1, limit)]
