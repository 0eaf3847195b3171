"""Inserts QuantizeLinear / DequantizeLinear around linear layers and convolutions of a clean FP16 graph.

The result is strongly typed, as TensorRT 10 and 11 require: the precision is in the graph and no
builder flag changes it. Weights are stored quantized, as data-less initializers (`external`), activations are signed
8-bit or FP8 (TensorRT's parser refuses unsigned ones).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from engines.errors import BuildError
from engines.precision import Precision
from tmpdiff_export.onnx_graphs import qdq_nvfp4
from tmpdiff_export.onnx_graphs.export import drop_unused
from tmpdiff_export.onnx_graphs.external import data_less
from tmpdiff_export.onnx_graphs.stored import CODES, LOW_RANK_DOWN, LOW_RANK_UP, SCALE, TRANSPOSED
from tmpdiff_export.quantization.codes import LayerRange, input_scale
from tmpdiff_export.quantization.low_rank import rank_within
from tmpdiff_export.quantization.recipes import Recipe

IR_VERSION = 10
_TYPES = {
    Precision.INT8: TensorProto.INT8,
    Precision.FP8: TensorProto.FLOAT8E4M3FN,
    Precision.INT4: TensorProto.INT4,
}


@dataclass(frozen=True, eq=False)
class LayerInputs:
    """What a graph holds itself of a quantized layer, on the CPU.

    Attributes:
        input_scale: see `QuantizedLayer`.
        pre_quant_scale: see `QuantizedLayer`.
        rank: see `LayerRange`.
    """

    input_scale: torch.Tensor | None
    pre_quant_scale: torch.Tensor | None
    rank: int = 0

    @classmethod
    def of(cls, found: LayerRange, precision: Precision) -> LayerInputs:
        """By a layer's range, before it is quantized."""
        scale = found.pre_quant_scale
        return cls(input_scale(found, precision), None if scale is None else scale.half(), found.rank)


def insert_qdq(model: onnx.ModelProto, layers: Mapping[str, LayerInputs], recipe: Recipe) -> onnx.ModelProto:
    """A copy of `model` with every layer in `layers` quantized.

    All operators are standard ONNX, except for NVFP4's dynamic quantization of activations (`qdq_nvfp4`). A branch of
    low rank is two products and an addition.

    Args:
        model: as `export.export_graph` returns it.
        layers: by module name; `<name>.weight` must be the weight of a MatMul, Gemm or Conv.
        recipe: gives the precision, the opset and the block size.

    Returns:
        A graph whose codes and scales of weights are data-less initializers: `stored.layer_tensors`.

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


@dataclass(frozen=True)
class Activation:
    """The input of a layer, by the names of tensors.

    Attributes:
        smoothed: in 16 bit.
        quantized: as the layer's codes see it.
    """

    smoothed: str
    quantized: str


class _Writer:
    """Collects the new node list; one Q/DQ pair per activation, one DQ per weight."""

    def __init__(self, graph: onnx.GraphProto, layers: Mapping[str, LayerInputs], recipe: Recipe) -> None:
        self.graph = graph
        self.layers = layers
        self.recipe = recipe
        self.nodes: list[onnx.NodeProto] = []
        self.types: list[onnx.ValueInfoProto] = []
        self.float_types = {item.name: item.data_type for item in graph.initializer}
        self.dims = {item.name: tuple(item.dims) for item in graph.initializer}
        self.placed: set[str] = set()
        self.activations: dict[tuple[str, bytes, bytes], Activation] = {}

    def add(self, node: onnx.NodeProto) -> None:
        """Appends `node`, quantized if its weight belongs to a layer."""
        name = _layer_of(node, self.layers)
        if name is None:
            self.nodes.append(node)
            return
        layer = self.layers[name]
        float_type = self.float_types[node.input[1]]
        weight = self._weight(name, float_type, node)
        data = self._activation(node.input[0], layer, float_type)
        if node.op_type == "Conv":
            inputs = [data.quantized, weight, *node.input[2:]]
            self.nodes.append(helper.make_node("Conv", inputs, node.output, name=node.name))
            self.nodes[-1].attribute.extend(node.attribute)
            return
        bias = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else None
        product = f"{node.output[0]}_product" if bias else node.output[0]
        codes = f"{product}_of_codes" if layer.rank else product
        inputs = [data.quantized, weight]
        self.nodes.append(helper.make_node("MatMul", inputs, [codes], name=node.name or f"{name}/MatMul"))
        if layer.rank:
            self._branch(name, node, float_type, data.smoothed)
            self.nodes.append(helper.make_node("Add", [codes, f"{name}.low_rank"], [product], name=f"{name}/low_rank"))
        if bias:
            self.nodes.append(helper.make_node("Add", [product, bias], [node.output[0]], name=f"{name}/Add"))

    def _take(self, fragment: qdq_nvfp4.Fragment) -> str:
        self.nodes.extend(fragment.nodes)
        self.graph.initializer.extend(fragment.initializers)
        self.types.extend(fragment.types)
        return fragment.output

    def _weight(self, name: str, float_type: int, reader: onnx.NodeProto) -> str:
        output = f"{name}.weight_dequantized"
        if name in self.placed:
            return output
        self.placed.add(name)
        dims, precision, block_size = self._dims(reader), self.recipe.precision, self.recipe.block_size
        if precision is Precision.NVFP4:
            return self._take(qdq_nvfp4.weight_fragment(name, dims[::-1], float_type))
        codes, scale = f"{name}.{CODES}", f"{name}.{SCALE}"
        scale_dims: tuple[int, ...] = ()
        attributes: dict[str, int] = {}
        if precision is Precision.INT8:
            axis = 0 if reader.op_type == "Conv" else 1
            attributes, scale_dims = {"axis": axis}, (dims[axis],)
        elif precision is Precision.INT4:
            assert block_size is not None  # the recipe has it
            attributes, scale_dims = {"axis": 0, "block_size": block_size}, (dims[0] // block_size, dims[1])
        self.graph.initializer.append(data_less(codes, _TYPES[precision], dims))
        self.graph.initializer.append(data_less(scale, TensorProto.FLOAT16, scale_dims))
        self.nodes.append(
            helper.make_node("DequantizeLinear", [codes, scale], [output], name=f"{name}/weight_dq", **attributes)
        )
        return output

    def _dims(self, reader: onnx.NodeProto) -> tuple[int, ...]:
        """Of a weight as its reader multiplies by it: [K, N], of a convolution [N, C, kh, kw]."""
        dims = self.dims[reader.input[1]]
        transposed = not reader.input[1].endswith(TRANSPOSED) and reader.op_type == "Gemm"
        return dims[::-1] if transposed else dims

    def _branch(self, name: str, reader: onnx.NodeProto, float_type: int, data: str) -> None:
        """Two products of what has not been quantized; their output is `<name>.low_rank`."""
        depth, width = self._dims(reader)
        rank = rank_within(self.layers[name].rank, (width, depth))
        for part, dims, output in (
            (LOW_RANK_DOWN, (depth, rank), f"{name}.low_rank_narrow"),
            (LOW_RANK_UP, (rank, width), f"{name}.low_rank"),
        ):
            self.graph.initializer.append(data_less(f"{name}.{part}", float_type, dims))
            self.nodes.append(helper.make_node("MatMul", [data, f"{name}.{part}"], [output], name=f"{name}/{part}"))
            data = output

    def _activation(self, source: str, layer: LayerInputs, float_type: int) -> Activation:
        key = (source, _bytes(layer.input_scale), _bytes(layer.pre_quant_scale))
        if key in self.activations:
            return self.activations[key]
        data = source
        readers = sum(other[0] == source for other in self.activations)
        stem = f"{source}_{readers}" if readers else source
        if layer.pre_quant_scale is not None:
            self.graph.initializer.append(numpy_helper.from_array(layer.pre_quant_scale.numpy(), f"{stem}_smoothing"))
            self.nodes.append(
                helper.make_node("Mul", [data, f"{stem}_smoothing"], [f"{stem}_smoothed"], name=f"{stem}/smooth")
            )
            data = f"{stem}_smoothed"
        smoothed = data
        if layer.input_scale is not None and self.recipe.precision is Precision.NVFP4:
            data = self._take(qdq_nvfp4.activation_fragment(stem, data, layer.input_scale, float_type))
        elif layer.input_scale is not None:
            scale, zero = f"{stem}_scale", f"{stem}_zero_point"
            self.graph.initializer.append(numpy_helper.from_array(layer.input_scale.numpy(), scale))
            self.graph.initializer.append(helper.make_tensor(zero, _TYPES[self.recipe.precision], [], b"\0", raw=True))
            for op, inputs, output in (
                ("QuantizeLinear", data, f"{stem}_quantized"),
                ("DequantizeLinear", f"{stem}_quantized", f"{stem}_dequantized"),
            ):
                self.nodes.append(helper.make_node(op, [inputs, scale, zero], [output], name=f"{stem}/{op}"))
            data = f"{stem}_dequantized"
        self.activations[key] = Activation(smoothed, data)
        return self.activations[key]


def _bytes(scale: torch.Tensor | None) -> bytes:
    return b"" if scale is None else scale.numpy().tobytes()


def _layer_of(node: onnx.NodeProto, layers: Mapping[str, LayerInputs]) -> str | None:
    """The layer whose weight `node` multiplies by, if it is one of `layers`."""
    if node.op_type == "MatMul":
        weight = node.input[1].removesuffix(TRANSPOSED)
        transposed = node.input[1].endswith(TRANSPOSED)
    elif node.op_type == "Conv":
        weight, transposed = node.input[1], True  # [N, C, kh, kw], outputs first as in torch
    elif node.op_type == "Gemm":
        weight = node.input[1]
        transposed = any(item.name == "transB" and item.i for item in node.attribute)
    else:
        return None
    name = weight.removesuffix(".weight")
    return name if transposed and weight.endswith(".weight") and name in layers else None
