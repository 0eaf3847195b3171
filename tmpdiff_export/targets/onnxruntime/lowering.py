"""Lowers a strongly typed FP16 Q/DQ graph to the form ONNX Runtime's CPU provider runs fastest.

Same codes, same scales, other operators, and other forms of weights, which stay data-less: `stored` makes them. What
changes:

- FP16 tensors: computed in FP32, because CPU kernels emulate FP16. Large weights are 16-bit in the file and
  are cast once when the engine is loaded; so are those of a graph exported in FP32.
- INT8: one fused integer product (MatMulIntegerToFloat) per linear layer or convolution, with the activation's zero
  point moved from 0 (signed) to 128 (unsigned): the same 256 codes, for which x86 has an instruction.
- FP8: emulated. Weights are dequantized when the engine is loaded, activations are rounded to E4M3. One operator: a
  Cast and a Mul would leave two float32 weights in memory where one is.
- INT8 of weights only, of text encoders: weights are dequantized when the engine is loaded.
- INT4: MatMulNBits on the packed codes.
- NVFP4: emulated. Weights are dequantized when the engine is loaded, from 8-bit integers in blocks (`nvfp4`),
  activations are quantized to E2M1 with dynamic block scales and dequantized, in a function of standard operators.
  Branches of low rank are products like others.

The fused operators are ONNX Runtime's contrib operators, written explicitly and not left to its optimizer:
its Q/DQ passes were seen to compute wrong results silently on such graphs.
"""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from tmpdiff_export.onnx_graphs.export import drop_unused
from tmpdiff_export.onnx_graphs.external import data_less
from tmpdiff_export.onnx_graphs.fp32 import to_fp32
from tmpdiff_export.onnx_graphs.qdq_nvfp4 import DYNAMIC_QUANTIZE, TRT_DOMAIN
from tmpdiff_export.onnx_graphs.stored import LOW_RANK_UP
from tmpdiff_export.quantization.nvfp4 import BLOCK_SIZE
from tmpdiff_export.targets.onnxruntime import nvfp4
from tmpdiff_export.targets.onnxruntime.convolution import gather_taps

CONTRIB = "com.microsoft"
# MatMulNBits: 0 computes in FP32; 4 would round activations to INT8 and no longer be weight-only.
NBITS_FP32_COMPUTE = 0


def lower_for_cpu(
    model: onnx.ModelProto, source: torch.dtype = torch.float16
) -> tuple[onnx.ModelProto, dict[str, int]]:
    """A lowered copy of `model` and what was done, as counts for the manifest.

    Args:
        model: strongly typed graph without weights, with or without Q/DQ from `qdq.insert_qdq`.
        source: of a graph in FP32, what most of the model's numbers come in: large weights are stored in 16 bits.

    Returns:
        The lowered graph, without weights (float inputs and outputs are FP32), and a count per rewrite, for example
        {"fp16-weights": 60, "MatMulIntegerToFloat": 40}.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    counts: Counter[str] = Counter()
    to_fp32(graph, source, counts)
    counts["low-rank-branches"] = sum(item.name.endswith(f".{LOW_RANK_UP}") for item in graph.initializer)
    lowering = _Lowering(graph, counts)
    nodes = [lowered for node in graph.node for lowered in lowering.lower(node)]
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]
    drop_unused(graph)
    versions = {item.domain: item for item in result.opset_import}
    if TRT_DOMAIN in versions:
        result.opset_import.remove(versions[TRT_DOMAIN])
    domains = {node.domain for node in graph.node}
    if CONTRIB in domains:
        result.opset_import.append(helper.make_opsetid(CONTRIB, 1))
    if nvfp4.DOMAIN in domains:
        result.opset_import.append(helper.make_opsetid(nvfp4.DOMAIN, 1))
        result.functions.extend([nvfp4.function(versions[""].version)])
    return result, dict(sorted((+counts).items()))


class _Lowering:
    def __init__(self, graph: onnx.GraphProto, counts: Counter[str]) -> None:
        self.graph = graph
        self.counts = counts
        self.initializers = {item.name: item for item in graph.initializer}
        self.kinds = {item.name: item.data_type for item in graph.initializer}
        self.dims = {item.name: tuple(item.dims) for item in graph.initializer}
        self.producers = {name: node for node in graph.node for name in node.output}
        self.readers_of: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self.readers_of.setdefault(name, []).append(node)
        self.readers = Counter({name: len(nodes) for name, nodes in self.readers_of.items()})
        self.readers.update(item.name for item in graph.output)
        # A DequantizeLinear with a computed scale is NVFP4's: the scales of its blocks are quantized themselves.
        self.block_scales = {
            node.input[1]
            for node in graph.node
            if node.op_type == "DequantizeLinear" and node.input[1] in self.producers
        }
        self.not_needed: set[str] = set()  # outputs of nodes that others stand for
        self.fused_bias: dict[str, onnx.NodeProto] = {}
        for node in graph.node:
            self._find_bias(node)

    def lower(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """The nodes that stand for `node` in the lowered graph."""
        if node.op_type == "Add" and any(self.fused_bias.get(name) is node for name in node.input):
            return []
        if node.output[0] in self.not_needed:
            return []
        weight = self._quantized_weight(node)
        if weight is not None:
            kind = self.kinds[weight.input[0]]
            if kind == TensorProto.INT8 and node.op_type == "Conv":
                return self._integer_convolution(node, weight)
            if kind == TensorProto.INT8:
                return self._integer_product(node, weight)
            if kind == TensorProto.INT4:
                return self._nbits_product(node, weight)
        if node.op_type == DYNAMIC_QUANTIZE:
            return []  # its DequantizeLinear stands for both
        if node.op_type == "DequantizeLinear":
            block_scale = self.producers.get(node.input[1])
            if block_scale is not None:
                return self._nvfp4(node, block_scale)
            if node.output[0] in self.block_scales:
                return []  # it goes before its reader
            if self.kinds.get(node.input[0]) == TensorProto.FLOAT8E4M3FN:
                self.counts["fp8-emulated"] += 1
            if self.kinds.get(node.input[0]) == TensorProto.INT8 and self._weight_only(node):
                self.counts["int8-weights"] += 1
        return [node]

    def _store(self, name: str, data_type: int, dims: tuple[int, ...]) -> None:
        """Gives a data-less initializer another form."""
        self.initializers[name].CopyFrom(data_less(name, data_type, dims))

    def _quantized_weight(self, node: onnx.NodeProto) -> onnx.NodeProto | None:
        """The DequantizeLinear of a stored weight that `node` multiplies by."""
        if node.op_type not in ("MatMul", "Conv"):
            return None
        source = self.producers.get(node.input[1])
        if source is None or source.op_type != "DequantizeLinear" or source.input[0] not in self.initializers:
            return None
        if self.kinds[source.input[0]] == TensorProto.INT8 and self._weight_only(source):
            return None
        return source

    def _weight_only(self, weight: onnx.NodeProto) -> bool:
        """Whether a weight's DequantizeLinear is read by a product whose other side has no codes."""
        data = (self.producers.get(reader.input[0]) for reader in self.readers_of[weight.output[0]])
        return any(source is None or source.op_type != "DequantizeLinear" for source in data)

    def _find_bias(self, node: onnx.NodeProto) -> None:
        """Notes an Add of a bias that only reads a quantized product."""
        if node.op_type != "Add":
            return
        for index in (0, 1):
            product = self.producers.get(node.input[index])
            bias = self.initializers.get(node.input[1 - index])
            if product is None or bias is None or self.readers[node.input[index]] != 1:
                continue
            weight = self._quantized_weight(product)
            codes = "" if weight is None else weight.input[0]
            if (
                codes
                and product.op_type == "MatMul"
                and self.kinds[codes] in (TensorProto.INT8, TensorProto.INT4)
                and tuple(bias.dims) == self.dims[codes][1:]
            ):
                self.fused_bias[product.output[0]] = node
                return

    def _outputs(self, node: onnx.NodeProto) -> tuple[str, str]:
        """Bias (or "") and output name of a product after fusing its Add."""
        add = self.fused_bias.get(node.output[0])
        if add is None:
            return "", node.output[0]
        bias = add.input[1] if add.input[0] == node.output[0] else add.input[0]
        return bias, add.output[0]

    def _integer_product(self, node: onnx.NodeProto, weight: onnx.NodeProto) -> list[onnx.NodeProto]:
        nodes, codes, scale, zero = self._unsigned_codes(node.input[0])
        bias, output = self._outputs(node)
        inputs = [codes, weight.input[0], scale, weight.input[1], zero, "", bias]
        return [*nodes, self._matmul_integer(node.name, inputs, output)]

    def _integer_convolution(self, node: onnx.NodeProto, weight: onnx.NodeProto) -> list[onnx.NodeProto]:
        nodes, codes, scale, zero = self._unsigned_codes(node.input[0])
        dims = self.dims[weight.input[0]]
        gathered = gather_taps(node, codes, zero, dims)
        self.graph.initializer.extend(gathered.initializers)
        self._store(weight.input[0], TensorProto.INT8, (math.prod(dims[1:]), dims[0]))
        product, bias = f"{node.output[0]}_channels_last_product", node.input[2] if len(node.input) > 2 else ""
        inputs = [gathered.data, weight.input[0], scale, weight.input[1], zero, "", bias]
        back = helper.make_node("Transpose", [product], node.output, name=f"{product}/back", perm=[0, 3, 1, 2])
        return [*nodes, *gathered.nodes, self._matmul_integer(node.name, inputs, product), back]

    def _unsigned_codes(self, activation: str) -> tuple[list[onnx.NodeProto], str, str, str]:
        """The node that makes an activation's codes, if they are not made yet; names of codes, scale, zero point."""
        dequantize = self.producers[activation]
        scale = dequantize.input[1]
        quantize = self.producers[dequantize.input[0]]
        zero, codes = f"{scale}_zero_point_u8", f"{quantize.output[0]}_u8"
        if zero in self.initializers:
            return [], codes, scale, zero
        tensor = numpy_helper.from_array(np.uint8(128), zero)
        self.initializers[zero] = tensor
        self.graph.initializer.append(tensor)
        node = helper.make_node("QuantizeLinear", [quantize.input[0], scale, zero], [codes], name=codes)
        return [node], codes, scale, zero

    def _matmul_integer(self, name: str, inputs: list[str], output: str) -> onnx.NodeProto:
        """inputs: data, weight, both scales, zero point, "" and the bias or ""."""
        self.counts["MatMulIntegerToFloat"] += 1
        return helper.make_node(
            "MatMulIntegerToFloat", inputs if inputs[-1] else inputs[:5], [output], name=name, domain=CONTRIB
        )

    def _nbits_product(self, node: onnx.NodeProto, weight: onnx.NodeProto) -> list[onnx.NodeProto]:
        codes, scale = weight.input[0], weight.input[1]
        depth, width = self.dims[codes]
        blocks = self.dims[scale][0]
        block_size = depth // blocks
        self._store(codes, TensorProto.UINT8, (width, blocks, block_size // 2))
        self._store(scale, TensorProto.FLOAT, (width, blocks))
        bias, output = self._outputs(node)
        inputs = [node.input[0], codes, scale, "", "", bias]
        self.counts["MatMulNBits"] += 1
        return [
            helper.make_node(
                "MatMulNBits",
                inputs if bias else inputs[:3],
                [output],
                name=node.name,
                domain=CONTRIB,
                K=depth,
                N=width,
                bits=4,
                block_size=block_size,
                accuracy_level=NBITS_FP32_COMPUTE,
            )
        ]

    def _nvfp4(self, node: onnx.NodeProto, block_scale: onnx.NodeProto) -> list[onnx.NodeProto]:
        """A weight, or an activation with its dynamic quantization, behind a double DequantizeLinear."""
        tensor_scale, output = block_scale.input[1], node.output[0]
        quantize = self.producers.get(node.input[0])
        if quantize is not None:
            self.counts["nvfp4-emulated-activations"] += 1
            return [nvfp4.fake_quantize_node(quantize.input[0], tensor_scale, output)]
        self.counts["nvfp4-emulated"] += 1
        codes, scale = node.input[0], block_scale.input[0]
        width, depth = self.dims[codes]
        self._store(codes, TensorProto.INT8, (depth, width))
        self._store(scale, TensorProto.FLOAT8E4M3FN, (depth // BLOCK_SIZE, width))
        # They are stored as MatMul reads them, in FP32.
        cast = self.readers_of[output][0]
        transpose = self.readers_of[cast.output[0]][0]
        self.not_needed.update((cast.output[0], transpose.output[0]))
        return [block_scale, nvfp4.dequantize_node(codes, block_scale.output[0], transpose.output[0])]
