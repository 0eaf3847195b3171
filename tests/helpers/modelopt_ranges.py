"""Range calibration with modelopt: the judge of our own."""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from engines.precision import Precision
from tmpdiff_export.bundling.observed import SEARCH_BATCHES
from tmpdiff_export.devices import Batch
from tmpdiff_export.quantization.ranges import spread
from tmpdiff_export.quantization.recipes import Awq, SmoothQuant, Variant

_FORMATS: dict[Precision, tuple[dict[str, Any], dict[str, Any] | None]] = {
    Precision.FP8: ({"num_bits": (4, 3), "axis": None}, {"num_bits": (4, 3), "axis": None}),
    Precision.INT8: ({"num_bits": 8, "axis": 0}, {"num_bits": 8, "axis": None}),
    Precision.INT4: ({"num_bits": 4, "block_sizes": {-1: 128, "type": "static"}}, None),
    # For the ranges only: modelopt's own NVFP4 quantizer runs on CUDA tensors alone.
    Precision.NVFP4: ({"num_bits": 8, "axis": 0}, {"num_bits": 8, "axis": None}),
}


@dataclass(frozen=True, eq=False)
class Judged:
    """What modelopt found for a layer, before layers that read one tensor share anything.

    Attributes:
        weight: [N, K], divided by `pre_quant_scale`.
        input_amax: of the scaled input, None for weight-only precisions.
        pre_quant_scale: [K] or None.
        channel_amax: [K], of the input, where it was smoothed.
    """

    weight: np.ndarray
    input_amax: float | None
    pre_quant_scale: np.ndarray | None
    channel_amax: np.ndarray | None


def judged_alone(
    module: torch.nn.Module, names: Sequence[str], precision: Precision, variant: Variant, batches: Sequence[Batch]
) -> dict[str, Judged]:
    """modelopt's ranges of every layer, on a copy of the module."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import modelopt.torch.quantization as mtq

    weight, inputs = _FORMATS[precision]
    algorithm: Any = "max"
    used = list(batches)
    if isinstance(variant.smoothing, SmoothQuant):
        algorithm = {"method": "smoothquant", "alpha": variant.smoothing.alpha}
    elif isinstance(variant.smoothing, Awq):
        algorithm = {"method": "awq_lite", "alpha_step": variant.smoothing.alpha_step}
        used = spread(batches, SEARCH_BATCHES)
    quantizers: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for name in names:
        quantizers.append({"quantizer_name": f"{name}.weight_quantizer", "cfg": weight})
        if inputs is not None:
            quantizers.append({"quantizer_name": f"{name}.input_quantizer", "cfg": inputs})

    def forward_loop(model: torch.nn.Module) -> None:
        for batch in used:
            model(*batch)

    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of every layer that is left out
        quantized = mtq.quantize(copy.deepcopy(module), {"quant_cfg": quantizers, "algorithm": algorithm}, forward_loop)
    found = {}
    for name in names:
        layer = quantized.get_submodule(name)
        assert layer.weight_quantizer.is_enabled
        amax = None if inputs is None else _array(layer.input_quantizer.amax)
        scale = _array(getattr(layer.input_quantizer, "pre_quant_scale", None))
        channels = _array(getattr(layer.input_quantizer, "_amax_for_smoothing", None))
        found[name] = Judged(
            _array(layer.weight.flatten(1)),
            None if amax is None else float(amax.max()),
            None if scale is None else scale.reshape(-1),
            None if channels is None else channels.reshape(-1),
        )
    return found


def judged(
    module: torch.nn.Module,
    names: Sequence[str],
    precision: Precision,
    variant: Variant,
    batches: Sequence[Batch],
    groups: Sequence[Sequence[str]],
) -> dict[str, Judged]:
    """modelopt's ranges, those of layers that read one tensor joined."""
    found = judged_alone(module, names, precision, variant, batches)
    for group in groups:
        alone = [found[name] for name in group]
        scales = [item.pre_quant_scale for item in alone if item.pre_quant_scale is not None]
        amaxes = [item.input_amax for item in alone if item.input_amax is not None]
        shared = None
        if scales:
            shared = np.exp(np.mean([np.log(scale) for scale in scales], axis=0)).astype(np.float32)
            if amaxes:
                amaxes = [float((item.channel_amax * shared).max()) for item in alone]
        for name, item in zip(group, alone, strict=True):
            weight = item.weight if shared is None else item.weight * (item.pre_quant_scale / shared)
            found[name] = Judged(weight, max(amaxes) if amaxes else None, shared, item.channel_amax)
    return found


def _array(tensor: torch.Tensor | None) -> Any:
    return None if tensor is None else tensor.detach().float().cpu().numpy()
