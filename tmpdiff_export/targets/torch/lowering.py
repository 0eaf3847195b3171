"""A denoiser lowered for the `torch` backend: quantized layers in place of its own, in the family's 16-bit type."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch

from engines.precision import Precision
from tmpdiff_export.quantization.codes import AttentionRange, LayerRange, QuantizedLayer
from tmpdiff_export.quantization.ranges import is_pointwise
from tmpdiff_export.quantization.sixteen_bit import sixteen_bit_tensors
from tmpdiff_export.targets.torch import convolutions
from tmpdiff_export.targets.torch.attention import use_fp8_attention
from tmpdiff_export.targets.torch.fusion import fuse, same_input
from tmpdiff_export.targets.torch.layers import FP8_ALIGNMENT, QuantizedLinear, linear_from
from tmpdiff_export.targets.torch.pointwise import as_convolution


def lower_for_torch(
    module: torch.nn.Module,
    layers: Mapping[str, QuantizedLayer],
    dtype: torch.dtype,
    *,
    sixteen_bit: bool = False,
    attention: Mapping[str, AttentionRange] | None = None,
    ranges: Mapping[str, LayerRange] | None = None,
) -> tuple[torch.nn.Module, dict[str, int]]:
    """A copy of an export wrapper in which `layers` run from their codes.

    Args:
        module: float32 export wrapper, on the CPU or on "meta"; not changed.
        layers: by name as in `module.named_modules()`, on the device of the module; empty for the reference.
        dtype: float16 or bfloat16, of everything else.
        sixteen_bit: the layers keep their codes, but all products are in `dtype`.
        attention: by name, the attention layers that compute in FP8.
        ranges: those that `layers` were made with, so that layers which read the same input share its codes; or None.

    Returns:
        The module, and how many layers of which kind were replaced. Layers that torch has no product for run in
        `dtype` from the weight that their codes stand for: convolutions but pointwise ones and FP8's of 3 x 3, and FP8
        layers whose sizes are no multiple of 16.
    """
    lowered = copy.deepcopy(module)
    counts = place_codes(lowered, layers, dtype, sixteen_bit=sixteen_bit)
    if attention:
        use_fp8_attention(lowered, attention)
        counts["fp8 attention"] = len(attention)
    fuse(lowered, same_input(ranges or {}))
    return _in_type(lowered, dtype), counts


def place_codes(
    module: torch.nn.Module, layers: Mapping[str, QuantizedLayer], dtype: torch.dtype, *, sixteen_bit: bool
) -> dict[str, int]:
    """Puts quantized layers in the place of a module's own.

    Args:
        module: changed in place.
        layers: see `lower_for_torch`.
        dtype: of products, float32 for weight-only layers of a module that computes in it.
        sixteen_bit: see `lower_for_torch`.

    Returns:
        How many layers of which kind were replaced.
    """
    counts: dict[str, int] = {}
    for name, layer in layers.items():
        original = module.get_submodule(name)
        assert isinstance(original, torch.nn.Linear | torch.nn.Conv2d)  # `quantizable_layers` names no others
        if (own := _with_product(original, layer, original.bias, dtype)) is not None:
            parent, _, child = name.rpartition(".")
            own.sixteen_bit = sixteen_bit
            setattr(module.get_submodule(parent), child, own)
            emulated = " emulated" if layer.precision is Precision.NVFP4 else ""
            form = "convolution" if isinstance(own, convolutions.Fp8Convolution) else "linear"
            beside = "" if layer.branch is None else f" beside rank {layer.branch.up.shape[1]}"
            kind = f"{layer.precision.value} {form}{beside}{emulated}" + (
                " in a 16-bit product" if sixteen_bit or emulated else ""
            )
            if dtype is torch.float32:
                kind = f"{layer.precision.value} weight in a float32 product"
        else:
            original.weight.data = _stood_for(original, layer)
            kind = f"{layer.precision.value} weight in a 16-bit {type(original).__name__}"
        counts[kind] = counts.get(kind, 0) + 1
    return counts


def torch_tensors(
    name: str, layer: QuantizedLayer, original: torch.nn.Linear | torch.nn.Conv2d, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """What a lowered module has of a quantized layer that is the precision's own, by the module's names.

    Args:
        name: of the layer.
        layer: its codes and scales, on any device, "meta" too.
        original: the layer of the export wrapper; only its kind and the shape of its weight matter.
        dtype: float16 or bfloat16, of the module.

    Returns:
        Tensors on the device of `layer`: `<name>.codes` and scales as `QuantizedLinear` has them, or `<name>.weight` of
        a layer that torch has no product for. The bias is not among them.
    """
    own = _with_product(original, layer, None, dtype)
    if own is None:
        return {f"{name}.weight": _stood_for(original, layer).to(dtype)}
    return {f"{name}.{key}": item for key, item in own.named_buffers()}


def _with_product(
    original: torch.nn.Module, layer: QuantizedLayer, bias: torch.Tensor | None, dtype: torch.dtype
) -> QuantizedLinear | None:
    """The layer over its codes, None where torch has no product for it; called as the original is."""
    if convolutions.has_product(original, layer.precision):
        return convolutions.convolution_from(layer, bias, dtype)
    aligned = layer.precision is not Precision.FP8 or all(size % FP8_ALIGNMENT == 0 for size in layer.codes.shape)
    if not aligned or not (isinstance(original, torch.nn.Linear) or is_pointwise(original)):
        return None
    linear = linear_from(layer, bias, dtype)
    if isinstance(original, torch.nn.Conv2d):
        as_convolution(linear)
    return linear


def _stood_for(original: torch.nn.Linear | torch.nn.Conv2d, layer: QuantizedLayer) -> torch.Tensor:
    """The weight, float32 in its own shape, that the codes stand for."""
    weight = layer.dequantized()
    if layer.pre_quant_scale is not None:
        weight = weight * layer.pre_quant_scale.float()
    return weight.reshape(original.weight.shape)


def _in_type(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    for item in sixteen_bit_tensors(module):
        if item.dtype == torch.float32:  # others are codes
            item.data = item.data.to(dtype)
    return module
