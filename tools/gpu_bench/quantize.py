"""Quantized forms of a denoiser on the GPU, without leaving it: the same codes and scales as the exporter's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from engines.errors import BuildError
from engines.precision import Precision
from tmpdiff_export.quantization.codes import LayerRange, quantize_layer
from tmpdiff_export.quantization.ranges import fits_convolution, is_pointwise
from tmpdiff_export.quantization.recipes import RECIPES, Recipe, stays_high_precision
from tmpdiff_export.targets.torch import convolutions
from tmpdiff_export.targets.torch.layers import FP8_ALIGNMENT, QuantizedLinear, linear_from
from tmpdiff_export.targets.torch.pointwise import as_convolution


@dataclass(frozen=True)
class Chosen:
    """Which layers a precision quantizes.

    Attributes:
        names: of the linear layers and convolutions that are.
        kept: of the layers that are not, how many for which reason.
    """

    names: tuple[str, ...]
    kept: Mapping[str, int]


def choose_layers(module: torch.nn.Module, precision: Precision, *, linear_only: bool = False) -> Chosen:
    """The exporter's choice of the layers that the `torch` backend has a product for; others stay 16-bit.

    Args:
        module: the denoiser.
        precision: whose recipe chooses.
        linear_only: no convolutions, as torchao's API takes none.

    Raises:
        BuildError: none is left.
    """
    recipe = RECIPES[precision]
    alignment = recipe.block_size or (FP8_ALIGNMENT if precision is Precision.FP8 else 1)
    names: list[str] = []
    kept: dict[str, int] = {}
    for name, layer in module.named_modules():
        if isinstance(layer, torch.nn.Conv2d) and (linear_only or not _convolves(layer, recipe)):
            reason: str | None = "convolution"
        elif isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
            reason = "recipe" if stays_high_precision(name, recipe) is not None else None
            sizes = layer.weight.shape[1:2] if recipe.block_size else layer.weight.shape[:2]
            if reason is None and any(size % alignment for size in sizes):
                reason = f"size no multiple of {alignment}"
        else:
            continue
        if reason is None:
            names.append(name)
        else:
            kept[reason] = kept.get(reason, 0) + 1
    if not names:
        raise BuildError(
            f"{type(module).__name__}: no linear layer can be quantized to {precision.value}; kept: {kept}"
        )
    return Chosen(tuple(names), kept)


def _convolves(layer: torch.nn.Conv2d, recipe: Recipe) -> bool:
    has_product = is_pointwise(layer) or convolutions.has_product(layer, recipe.precision)
    return has_product and fits_convolution(layer, recipe)


def quantized_linear(
    layer: torch.nn.Linear | torch.nn.Conv2d, precision: Precision, input_amax: torch.Tensor | None, dtype: torch.dtype
) -> QuantizedLinear:
    """The module of the `torch` backend for one layer, as `tmpdiff_export.targets.torch.layers.linear_from` makes it.

    Args:
        layer: of the 16-bit denoiser, one that `choose_layers` names; its bias is shared.
        precision: FP8, INT8 or INT4.
        input_amax: float32 [], largest magnitude of the input; not used by INT4.
        dtype: of activations.
    """
    recipe = RECIPES[precision]
    if input_amax is None and not recipe.weight_only:
        raise ValueError(f"input_amax is None, expected the input's largest magnitude: {precision.value} needs a scale")
    found = LayerRange(None if recipe.weight_only or input_amax is None else float(input_amax), None)
    quantized = quantize_layer(layer.weight.flatten(1), found, precision, recipe.block_size)
    bias = None if layer.bias is None else layer.bias.detach()
    if convolutions.has_product(layer, precision):
        return convolutions.convolution_from(quantized, bias, dtype)
    linear = linear_from(quantized, bias, dtype)
    if isinstance(layer, torch.nn.Conv2d):
        as_convolution(linear)
    return linear


def sharing_copy(module: torch.nn.Module) -> torch.nn.Module:
    """A copy of the modules that shares every tensor with the original."""
    tensors = (*module.parameters(), *module.buffers())
    return copy.deepcopy(module, {id(item): item for item in tensors})


def replace_layers(
    module: torch.nn.Module,
    names: tuple[str, ...],
    make: Callable[[str, torch.nn.Linear | torch.nn.Conv2d], torch.nn.Module],
) -> None:
    """Puts `make(name, layer)` in place of every named layer."""
    for name in names:
        layer = module.get_submodule(name)
        assert isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, make(name, layer))


def storages(module: torch.nn.Module) -> dict[int, int]:
    """Address -> bytes of every tensor a module holds, each once; tensor subclasses count as what they are made of."""
    found: dict[int, int] = {}
    for item in (*module.parameters(), *module.buffers()):
        for plain in _plain(item):
            storage = plain.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def _plain(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) and hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            yield from _plain(getattr(tensor, name))
    else:
        yield tensor
