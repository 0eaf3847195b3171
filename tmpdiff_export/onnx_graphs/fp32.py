"""An exported graph in FP32, for a runtime whose kernels emulate FP16."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tmpdiff_export.onnx_graphs.export import is_float16

# Below this many values a weight is stored in FP32: a cast node costs more than it saves.
SMALL_TENSOR_VALUES = 4096


def to_fp32(graph: onnx.GraphProto, counts: Counter[str]) -> None:
    """FP16 tensors to FP32, in place; large weights are FP16 in the file, behind a Cast."""
    casts = []
    for item in list(graph.initializer):
        if item.data_type not in (TensorProto.FLOAT16, TensorProto.FLOAT):
            continue
        name = item.name
        if len(item.dims) <= 1 or int(np.prod(item.dims)) < SMALL_TENSOR_VALUES or name.endswith("_scale"):
            if is_float16(item):
                item.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(item).astype(np.float32), name))
                counts["fp32-math"] += 1
        else:
            if not is_float16(item):
                item.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(item).astype(np.float16), name))
            item.name = f"{name}_fp16"
            counts["fp16-weights"] += 1
            casts.append(helper.make_node("Cast", [item.name], [name], name=f"{name}/fp32", to=TensorProto.FLOAT))
    retype(graph)
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def retype(graph: onnx.GraphProto) -> None:
    """Nodes, inputs and outputs that are FP16 to FP32, in place."""
    _retype_nodes(graph)
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT


def _retype_nodes(graph: onnx.GraphProto) -> None:
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR and is_float16(attribute.t):
                wide = numpy_helper.to_array(attribute.t).astype(np.float32)
                attribute.t.CopyFrom(numpy_helper.from_array(wide, attribute.t.name))
            elif attribute.type == onnx.AttributeProto.GRAPH:
                _retype_nodes(attribute.g)
            elif node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT16:
                attribute.i = TensorProto.FLOAT
