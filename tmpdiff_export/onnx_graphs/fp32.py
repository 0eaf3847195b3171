"""An exported graph in FP32, for a runtime whose kernels emulate FP16, and weights in 16 bits for a graph in FP32."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from tmpdiff_export.onnx_graphs.external import is_external, tensor_type
from tmpdiff_export.quantization.sixteen_bit import narrow_type

_FLOATS = (TensorProto.FLOAT16, TensorProto.FLOAT)


def to_fp32(graph: onnx.GraphProto, source: torch.dtype, counts: Counter[str]) -> None:
    """FP16 tensors to FP32, in place; weights as `narrow_weights` has them.

    Args:
        graph: in FP16 or FP32.
        source: see `narrow_weights`.
        counts: how many tensors of which kind have changed is added here.
    """
    for item in graph.initializer:
        if item.data_type == TensorProto.FLOAT16 and not is_external(item):
            item.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(item).astype(np.float32), item.name))
            counts["fp32-math"] += 1
    retype(graph)
    narrow_weights(graph, source, counts)


def narrow_weights(graph: onnx.GraphProto, source: torch.dtype, counts: Counter[str]) -> None:
    """Has a graph that computes in FP32 read its large weights in 16 bits, each behind a Cast, and small ones in FP32.

    Args:
        graph: its data-less weights are of any floating type; changed in place.
        source: what most of the model's numbers come in.
        counts: how many weights of which kind there are is added here.
    """
    wide: dict[str, str] = {}
    casts = []
    for item in graph.initializer:
        if not is_external(item) or item.data_type not in _FLOATS:
            continue
        # Scales are part of the arithmetic of codes.
        scale = item.name.endswith("_scale")
        stored = torch.float32 if scale else narrow_type(torch.Size(item.dims), source)
        if stored is torch.float32:
            if item.data_type == TensorProto.FLOAT16:
                counts["fp32-math"] += 1
        else:
            wide[item.name] = f"{item.name}_fp32"
            counts["bf16-weights" if stored is torch.bfloat16 else "fp16-weights"] += 1
            casts.append(
                helper.make_node("Cast", [item.name], [wide[item.name]], name=f"{item.name}/fp32", to=TensorProto.FLOAT)
            )
        item.data_type = tensor_type(stored)
    _rename_inputs(graph, wide)
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
            if attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type == TensorProto.FLOAT16:
                wide = numpy_helper.to_array(attribute.t).astype(np.float32)
                attribute.t.CopyFrom(numpy_helper.from_array(wide, attribute.t.name))
            elif attribute.type == onnx.AttributeProto.GRAPH:
                _retype_nodes(attribute.g)
            elif node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT16:
                attribute.i = TensorProto.FLOAT


def _rename_inputs(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = names.get(name, name)
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _rename_inputs(attribute.g, names)
