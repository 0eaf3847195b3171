"""The ONNX form of NVFP4 that TensorRT's parser takes: double DequantizeLinear, dynamic quantization of activations.

Weights: E2M1 codes [N, K] and E4M3 block scales [N, K / 16] as initializers; one DequantizeLinear makes the
block scales FP32, a second the weight. Activations: TensorRT's operator TRT_FP4DynamicQuantize in the domain
`trt` takes the data and the constant FP32 tensor scale, and gives codes and block scales; the same two
DequantizeLinear follow. FP16 scales would be subnormal, so this part is FP32, cast to the graph's type at its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from tmpdiff_export.onnx_graphs.external import data_less
from tmpdiff_export.onnx_graphs.stored import BLOCK_SCALE, CODES, SCALE
from tmpdiff_export.quantization import nvfp4

TRT_DOMAIN = "trt"
DYNAMIC_QUANTIZE = "TRT_FP4DynamicQuantize"


@dataclass(frozen=True, eq=False)
class Fragment:
    """A piece of a graph.

    Attributes:
        output: the tensor that it computes.
        nodes: in topological order.
        initializers: what the nodes read.
        types: of the outputs of operators that `onnx` does not know, so that the rest is still checked.
    """

    output: str
    nodes: tuple[onnx.NodeProto, ...]
    initializers: tuple[onnx.TensorProto, ...]
    types: tuple[onnx.ValueInfoProto, ...] = ()


def weight_fragment(name: str, dims: Sequence[int], float_type: int) -> Fragment:
    """The weight of linear layer `name`, [N, K], dequantized to [K, N] of `float_type` (a `TensorProto` type)."""
    codes, block_scale, scale = (f"{name}.{part}" for part in (CODES, BLOCK_SCALE, SCALE))
    output = f"{name}.weight_dequantized"
    width, depth = dims
    return Fragment(
        output,
        (
            *_dequantize(f"{name}.weight", codes, block_scale, scale, f"{output}^T", float_type),
            helper.make_node("Transpose", [f"{output}^T"], [output], name=f"{name}/weight_transpose", perm=[1, 0]),
        ),
        (
            data_less(codes, TensorProto.FLOAT4E2M1, (width, depth)),
            data_less(block_scale, TensorProto.FLOAT8E4M3FN, (width, depth // nvfp4.BLOCK_SIZE)),
            data_less(scale, TensorProto.FLOAT, ()),
        ),
    )


def activation_fragment(stem: str, data: str, input_scale: torch.Tensor, float_type: int) -> Fragment:
    """`data` [..., K] of `float_type`, quantized with dynamic block scales and dequantized; `stem` names its tensors.

    TensorRT's operator takes two or three dimensions.
    """
    codes, block_scale, scale = (f"{stem}_{part}" for part in ("codes", "block_scale", "scale"))
    output = f"{stem}_dequantized"
    quantize = helper.make_node(
        DYNAMIC_QUANTIZE,
        [data, scale],
        [codes, block_scale],
        name=f"{stem}/{DYNAMIC_QUANTIZE}",
        domain=TRT_DOMAIN,
        axis=-1,
        block_size=nvfp4.BLOCK_SIZE,
        scale_type=TensorProto.FLOAT8E4M3FN,
    )
    return Fragment(
        output,
        (quantize, *_dequantize(stem, codes, block_scale, scale, output, float_type)),
        (numpy_helper.from_array(input_scale.numpy(), scale),),
        (
            helper.make_tensor_value_info(codes, TensorProto.FLOAT4E2M1, None),
            helper.make_tensor_value_info(block_scale, TensorProto.FLOAT8E4M3FN, None),
        ),
    )


def _dequantize(
    stem: str, codes: str, block_scale: str, scale: str, output: str, float_type: int
) -> tuple[onnx.NodeProto, ...]:
    wide_scale, wide = f"{stem}_block_scale_fp32", f"{stem}_dequantized_fp32"
    return (
        helper.make_node("DequantizeLinear", [block_scale, scale], [wide_scale], name=f"{stem}/block_scale_dq"),
        helper.make_node(
            "DequantizeLinear",
            [codes, wide_scale],
            [wide],
            name=f"{stem}/dq",
            axis=-1,
            block_size=nvfp4.BLOCK_SIZE,
        ),
        helper.make_node("Cast", [wide], [output], name=f"{stem}/cast", to=float_type),
    )
