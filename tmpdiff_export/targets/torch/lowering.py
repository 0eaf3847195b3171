"""A denoiser lowered for the `torch` backend: quantized layers in place of its own, in the family's 16-bit type."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch

from engines.precision import Precision
from tmpdiff_export.quantization.codes import AttentionRange, QuantizedLayer
from tmpdiff_export.quantization.sixteen_bit import sixteen_bit_tensors
from tmpdiff_export.targets.torch.attention import use_fp8_attention
from tmpdiff_export.targets.torch.fusion import fuse
from tmpdiff_export.targets.torch.layers import FP8_ALIGNMENT, linear_from


def lower_for_torch(
    module: torch.nn.Module,
    layers: Mapping[str, QuantizedLayer],
    dtype: torch.dtype,
    *,
    sixteen_bit: bool = False,
    attention: Mapping[str, AttentionRange] | None = None,
) -> tuple[torch.nn.Module, dict[str, int]]:
    """A copy of an export wrapper in which `layers` run from their codes.

    Args:
        module: float32 export wrapper, on the CPU; not changed.
        layers: by name as in `module.named_modules()`; empty for the reference.
        dtype: float16 or bfloat16, of everything else.
        sixteen_bit: the layers keep their codes, but all products are in `dtype`.
        attention: by name, the attention layers that compute in FP8.

    Returns:
        The module, and how many layers of which kind were replaced. Layers that torch has no product for run in
        `dtype` from the weight that their codes stand for: convolutions, and FP8 layers whose sizes are no multiple
        of 16.
    """
    lowered = copy.deepcopy(module)
    counts: dict[str, int] = {}
    for name, layer in layers.items():
        original = lowered.get_submodule(name)
        assert isinstance(original, torch.nn.Linear | torch.nn.Conv2d)  # `quantizable_layers` names no others
        if isinstance(original, torch.nn.Linear) and _has_product(layer):
            parent, _, child = name.rpartition(".")
            linear = linear_from(layer, original.bias, dtype)
            linear.sixteen_bit = sixteen_bit
            setattr(lowered.get_submodule(parent), child, linear)
            emulated = " emulated" if layer.precision is Precision.NVFP4 else ""
            kind = f"{layer.precision.value} linear{emulated}" + (
                " in a 16-bit product" if sixteen_bit or emulated else ""
            )
        else:
            weight = torch.from_numpy(layer.dequantized().T.copy())
            if layer.pre_quant_scale is not None:
                weight = weight * torch.from_numpy(layer.pre_quant_scale).float()
            original.weight.data = weight.reshape(original.weight.shape)
            kind = f"{layer.precision.value} weight in a 16-bit {type(original).__name__}"
        counts[kind] = counts.get(kind, 0) + 1
    if attention:
        use_fp8_attention(lowered, attention)
        counts["fp8 attention"] = len(attention)
    fuse(lowered)
    return _in_type(lowered, dtype), counts


def _has_product(layer: QuantizedLayer) -> bool:
    return layer.precision is not Precision.FP8 or all(size % FP8_ALIGNMENT == 0 for size in layer.codes.shape)


def _in_type(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    for item in sixteen_bit_tensors(module):
        if item.dtype == torch.float32:  # others are codes
            item.data = item.data.to(dtype)
    return module
