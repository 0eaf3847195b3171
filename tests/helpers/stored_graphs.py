"""Graphs on disk with their weights, for tests of what is exported, quantized and lowered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import onnx
import torch

from tmpdiff_export.onnx_graphs.external import data_less_tensors, refer, save_checked
from tmpdiff_export.onnx_graphs.qdq import LayerInputs
from tmpdiff_export.onnx_graphs.stored import layer_tensors, plain_tensor
from tmpdiff_export.quantization.codes import QuantizedLayer
from tmpdiff_export.weights.files import WeightFile

Layers = Mapping[str, QuantizedLayer]


def inputs_of(layers: Layers) -> dict[str, LayerInputs]:
    """What the graph holds itself of quantized layers."""
    return {
        name: LayerInputs(
            layer.input_scale, layer.pre_quant_scale, 0 if layer.branch is None else layer.branch.up.shape[1]
        )
        for name, layer in layers.items()
    }


def save_stored(
    graph: onnx.ModelProto,
    path: Path,
    module: torch.nn.Module,
    layers: Layers | None = None,
    tensors_of: Callable[..., dict[str, torch.Tensor]] = layer_tensors,
) -> Path:
    """Writes a copy of a graph and, beside it, a file of weights.

    Args:
        graph: without weights.
        path: of the ONNX file.
        module: whose parameters and buffers they are.
        layers: its quantized layers.
        tensors_of: what is stored of a layer, given its name, itself and the shape of its weight.

    Returns:
        `path`.
    """
    state = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
    codes = {
        name: item
        for layer, quantized in (layers or {}).items()
        for name, item in tensors_of(layer, quantized, module.get_submodule(layer).weight.shape).items()
    }
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    wanted = data_less_tensors(copy)
    with WeightFile(path.with_suffix(".safetensors"), wanted) as file:
        for name, form in wanted.items():
            file.write(name, codes[name] if name in codes else plain_tensor(name, state.__getitem__, form.dtype))
    refer(copy, [file.path])
    save_checked(copy, path)
    return path
