"""Inserts QuantizeLinear / DequantizeLinear around linear layers and convolutions of a clean FP16 graph.

The result is strongly typed, as TensorRT 10 and 11 require: the precision is in the graph and no
builder flag changes it. Weights are stored quantized, activations are signed 8-bit or FP8 (TensorRT's
parser refuses unsigned ones).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from engines.errors import BuildError
from engines.precision import Precision
from tmpdiff_export.onnx_graphs import qdq_nvfp4
from tmpdiff_export.onnx_graphs.export import drop_unused
from tmpdiff_export.quantization.codes import QuantizedLayer
from tmpdiff_export.quantization.recipes import Recipe

IR_VERSION = 10


def insert_qdq(model: onnx.ModelProto, layers: Mapping[str, QuantizedLayer], recipe: Recipe) -> onnx.ModelProto:
    """A copy of `model` with every layer in `layers` quantized.

    All operators are standard ONNX, except for NVFP4's dynamic quantization of activations (`qdq_nvfp4`).

    Args:
        model: as `export.export_graph` returns it.
        layers: codes and scales per module name; `<name>.weight` must be the weight of a MatMul, Gemm or Conv.
        recipe: gives the opset and the block size.

    Raises:
        BuildError: a layer's weight is not found in the graph, so it would silently stay FP16.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    writer = _Writer(graph, layers, recipe)
    for node in list(graph.node):
        writer.add(node)
    missing = sorted(set(layers) - writer.placed)
    if missing:
        raise BuildError(
            f"{recipe.precision.value}: {len(missing)} of {len(layers)} layers were not found in the exported graph, "
            f"first {missing[0]}; it was renamed or fused, or shares its weight with another layer"
        )
    del graph.node[:]
    graph.node.extend(writer.nodes)
    del graph.value_info[:]
    graph.value_info.extend(writer.types)
    drop_unused(graph)
    del result.opset_import[:]
    result.opset_import.append(helper.make_opsetid("", recipe.opset))
    if any(node.domain == qdq_nvfp4.TRT_DOMAIN for node in graph.node):
        result.opset_import.append(helper.make_opsetid(qdq_nvfp4.TRT_DOMAIN, 1))
    result.ir_version = IR_VERSION
    return result


class _Writer:
    """Collects the new node list; one Q/DQ pair per activation, one DQ per weight."""

    def __init__(self, graph: onnx.GraphProto, layers: Mapping[str, QuantizedLayer], recipe: Recipe) -> None:
        self.graph = graph
        self.layers = layers
        self.recipe = recipe
        self.nodes: list[onnx.NodeProto] = []
        self.types: list[onnx.ValueInfoProto] = []
        self.float_types = {item.name: item.data_type for item in graph.initializer}
        self.dims = {item.name: tuple(item.dims) for item in graph.initializer}
        self.placed: set[str] = set()
        self.activations: dict[tuple[str, bytes, bytes], str] = {}

    def add(self, node: onnx.NodeProto) -> None:
        """Appends `node`, quantized if its weight belongs to a layer."""
        name = _layer_of(node, self.layers)
        if name is None:
            self.nodes.append(node)
            return
        layer = self.layers[name]
        float_type = self.float_types[node.input[1]]
        weight = self._weight(name, layer, float_type, node)
        data = self._activation(node.input[0], layer, float_type)
        if node.op_type == "Conv":
            self.nodes.append(helper.make_node("Conv", [data, weight, *node.input[2:]], node.output, name=node.name))
            self.nodes[-1].attribute.extend(node.attribute)
            return
        bias = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else None
        product = f"{node.output[0]}_product" if bias else node.output[0]
        self.nodes.append(helper.make_node("MatMul", [data, weight], [product], name=node.name or f"{name}/MatMul"))
        if bias:
            self.nodes.append(helper.make_node("Add", [product, bias], [node.output[0]], name=f"{name}/Add"))

    def _take(self, fragment: qdq_nvfp4.Fragment) -> str:
        self.nodes.extend(fragment.nodes)
        self.graph.initializer.extend(fragment.initializers)
        self.types.extend(fragment.types)
        return fragment.output

    def _weight(self, name: str, layer: QuantizedLayer, float_type: int, reader: onnx.NodeProto) -> str:
        output = f"{name}.weight_dequantized"
        if name in self.placed:
            return output
        self.placed.add(name)
        if layer.precision is Precision.NVFP4:
            return self._take(qdq_nvfp4.weight_fragment(name, layer, float_type))
        codes, scale = f"{name}.weight_codes", f"{name}.weight_scale"
        if reader.op_type == "Conv":  # [K, N] to [N, C, kh, kw]
            layer = replace(layer, codes=layer.codes.T.reshape(self.dims[reader.input[1]]))
        self.graph.initializer.append(codes_tensor(codes, layer))
        self.graph.initializer.append(numpy_helper.from_array(layer.weight_scale, scale))
        attributes: dict[str, int] = {}
        if layer.precision is Precision.INT8:
            attributes = {"axis": 0 if reader.op_type == "Conv" else 1}
        elif layer.precision is Precision.INT4:
            attributes = {"axis": 0, "block_size": layer.codes.shape[0] // layer.weight_scale.shape[0]}
        self.nodes.append(
            helper.make_node("DequantizeLinear", [codes, scale], [output], name=f"{name}/weight_dq", **attributes)
        )
        return output

    def _activation(self, source: str, layer: QuantizedLayer, float_type: int) -> str:
        key = (source, _bytes(layer.input_scale), _bytes(layer.pre_quant_scale))
        if key in self.activations:
            return self.activations[key]
        data = source
        readers = sum(other[0] == source for other in self.activations)
        stem = f"{source}_{readers}" if readers else source
        if layer.pre_quant_scale is not None:
            self.graph.initializer.append(numpy_helper.from_array(layer.pre_quant_scale, f"{stem}_smoothing"))
            self.nodes.append(
                helper.make_node("Mul", [data, f"{stem}_smoothing"], [f"{stem}_smoothed"], name=f"{stem}/smooth")
            )
            data = f"{stem}_smoothed"
        if layer.input_scale is not None and layer.precision is Precision.NVFP4:
            data = self._take(qdq_nvfp4.activation_fragment(stem, data, layer.input_scale, float_type))
        elif layer.input_scale is not None:
            scale, zero = f"{stem}_scale", f"{stem}_zero_point"
            self.graph.initializer.append(numpy_helper.from_array(np.asarray(layer.input_scale), scale))
            kind = TensorProto.FLOAT8E4M3FN if layer.precision is Precision.FP8 else TensorProto.INT8
            self.graph.initializer.append(helper.make_tensor(zero, kind, [], b"\0", raw=True))
            for op, inputs, output in (
                ("QuantizeLinear", data, f"{stem}_quantized"),
                ("DequantizeLinear", f"{stem}_quantized", f"{stem}_dequantized"),
            ):
                self.nodes.append(helper.make_node(op, [inputs, scale, zero], [output], name=f"{stem}/{op}"))
            data = f"{stem}_dequantized"
        self.activations[key] = data
        return data


def codes_tensor(name: str, layer: QuantizedLayer) -> onnx.TensorProto:
    """The codes as an ONNX tensor, 4-bit ones packed two to a byte (low nibble first)."""
    codes = np.ascontiguousarray(layer.codes)
    if layer.precision is Precision.INT8:
        return numpy_helper.from_array(codes, name)
    if layer.precision is Precision.FP8:
        return helper.make_tensor(name, TensorProto.FLOAT8E4M3FN, codes.shape, codes.tobytes(), raw=True)
    flat = codes.reshape(-1).astype(np.uint8) & 0xF
    packed = flat[0::2] | (flat[1::2] << 4)
    return helper.make_tensor(name, TensorProto.INT4, codes.shape, packed.tobytes(), raw=True)


def _bytes(array: np.ndarray | None) -> bytes:
    return b"" if array is None else array.tobytes()


def _layer_of(node: onnx.NodeProto, layers: Mapping[str, QuantizedLayer]) -> str | None:
    """The layer whose weight `node` multiplies by, if it is one of `layers`."""
    if node.op_type == "MatMul":
        weight = node.input[1].removesuffix("^T")
        transposed = node.input[1].endswith("^T")
    elif node.op_type == "Conv":
        weight, transposed = node.input[1], True  # [N, C, kh, kw], outputs first as in torch
    elif node.op_type == "Gemm":
        weight = node.input[1]
        transposed = any(item.name == "transB" and item.i for item in node.attribute)
    else:
        return None
    name = weight.removesuffix(".weight")
    return name if transposed and weight.endswith(".weight") and name in layers else None
