"""The strongly typed ONNX graph of an engine, which all backends but torch begin with, and its weights as it has them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from weakref import WeakKeyDictionary

import onnx
import torch

from tmpdiff_export.onnx_graphs.export import export_graph
from tmpdiff_export.onnx_graphs.external import data_less_tensors, refer, save_checked
from tmpdiff_export.onnx_graphs.fp32 import narrow_weights
from tmpdiff_export.onnx_graphs.qdq import LayerInputs, insert_qdq
from tmpdiff_export.onnx_graphs.shape_folding import fold_shapes
from tmpdiff_export.onnx_graphs.stored import SCALE, TRANSPOSED, layer_tensors
from tmpdiff_export.quantization.codes import QuantizedLayer
from tmpdiff_export.quantization.recipes import RECIPES
from tmpdiff_export.targets.target import EngineJob, Form, SourceModel, layer_on_meta

# All engines of a model come from one export of it.
_EXPORTED: WeakKeyDictionary[SourceModel, onnx.ModelProto] = WeakKeyDictionary()


class OnnxForm:
    """`tmpdiff_export.targets.target.Form`: tensors as the strongly typed graph has them."""

    name = "onnx"

    def codes(self, model: SourceModel, name: str, layer: QuantizedLayer) -> dict[str, torch.Tensor]:
        """See `Form.codes`."""
        tensors = layer_tensors(name, layer, model.module.get_submodule(name).weight.shape)
        scale = f"{name}.{SCALE}"
        return tensors if model.half else {**tensors, scale: tensors[scale].float()}


def typed_graph(job: EngineJob) -> onnx.ModelProto:
    """The graph of an engine without arithmetic on shapes and without weights (`external`), in FP16 or FP32.

    Raises:
        BuildError: the exporter does not support the module, or a layer is not in its graph.
    """
    exported = _exported(job.model)
    if not job.ranges:
        result = onnx.ModelProto()
        result.CopyFrom(exported)
        return result
    layers = {name: LayerInputs.of(found, job.precision) for name, found in job.ranges.items()}
    return insert_qdq(exported, layers, RECIPES[job.precision])


def linear_layers(model: SourceModel) -> list[str]:
    """Names of the linear layers that what a model returns depends on: of some text encoders it is not all of them.

    Raises:
        BuildError: the exporter does not support the module.
    """
    read = {name for node in _exported(model).graph.node for name in node.input}
    linear = (name for name, part in model.module.named_modules() if isinstance(part, torch.nn.Linear))
    return [name for name in linear if not read.isdisjoint((f"{name}.weight", f"{name}.weight{TRANSPOSED}"))]


def _exported(model: SourceModel) -> onnx.ModelProto:
    if model not in _EXPORTED:
        graph = export_graph(model.module, model.inputs, model.outputs, half=model.half)
        fold_shapes(graph, getattr(model.module, "largest_latents", None))
        _EXPORTED[model] = graph
    return _EXPORTED[model]


def strong_graph(job: EngineJob) -> onnx.ModelProto:
    """`typed_graph`, with the large weights of a model in FP32 stored in 16 bits.

    Raises:
        BuildError: as `typed_graph`.
    """
    graph = typed_graph(job)
    if not job.model.half:
        narrow_weights(graph.graph, job.model.dtype, Counter())
    return graph


def plain_tensors(job: EngineJob, graph: onnx.ModelProto, form: Form) -> dict[str, torch.Tensor]:
    """What weight files have to hold for a graph but for codes: `PreparedEngine.tensors`."""
    own = {
        tensor
        for name, found in job.ranges.items()
        for tensor in form.codes(job.model, name, layer_on_meta(job.model.module, name, job.precision, found))
    }
    return {name: item for name, item in data_less_tensors(graph).items() if name not in own}


def write_graph(graph: onnx.ModelProto, path: Path, weights: Sequence[Path]) -> None:
    """Writes a graph beside its weight files, checked.

    Args:
        graph: without weights; it is not changed.
        path: of the ONNX file.
        weights: the files, in the folder of `path`.

    Raises:
        BuildError: the graph is not valid, or a weight is in none of the files.
    """
    stored = onnx.ModelProto()
    stored.CopyFrom(graph)
    refer(stored, weights)
    save_checked(stored, path)
