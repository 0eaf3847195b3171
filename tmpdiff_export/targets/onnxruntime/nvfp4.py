"""NVFP4 on ONNX Runtime's CPU provider, which has no 4-bit floats: the same codes and scales in standard operators.

Weights stay 4-bit in the file and are dequantized when the engine is loaded. Activations are quantized and
dequantized in FP32 for every input, as the precision defines it. Exact, and slow.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper

from tmpdiff_export.quantization import nvfp4

DOMAIN = "tmpdiff"
DEQUANTIZE = "Nvfp4Dequantize"
FAKE_QUANTIZE = "Nvfp4FakeQuantize"

_E2M1_VALUES = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(float).tolist()

# Codes are unsigned 4-bit integers here: the same bytes, in a type that the provider reads.
_DEQUANTIZE_BODY = f"""
{DEQUANTIZE} (codes, block_scale, tensor_scale) => (weight)
{{
    e2m1_values = Constant <value_floats = {_E2M1_VALUES}> ()
    index = Cast <to = {TensorProto.INT32}> (codes)
    values = Gather (e2m1_values, index)
    block_shape = Constant <value_ints = [-1, {nvfp4.BLOCK_SIZE}]> ()
    blocks = Reshape (values, block_shape)

    block_scale_fp32 = Cast <to = {TensorProto.FLOAT}> (block_scale)
    scale = Mul (block_scale_fp32, tensor_scale)
    column = Constant <value_ints = [-1, 1]> ()
    scales = Reshape (scale, column)

    dequantized = Mul (blocks, scales)
    shape = Shape (values)
    weight = Reshape (dequantized, shape)
}}
"""

# From 0 to 2, 2 to 4 and 4 to 6 the E2M1 numbers are the multiples of 0.5, 1 and 2, and those with an even code are
# the even multiples: Round, which takes ties to even, gives the nearest code.
_FAKE_QUANTIZE_BODY = f"""
{FAKE_QUANTIZE} (x, tensor_scale) => (y)
{{
    shape = Shape (x)
    block_shape = Constant <value_ints = [-1, {nvfp4.BLOCK_SIZE}]> ()
    blocks = Reshape (x, block_shape)

    last_axis = Constant <value_ints = [-1]> ()
    e2m1_max = Constant <value_float = {nvfp4.E2M1_MAX}> ()
    smallest = Constant <value_float = {nvfp4.SMALLEST_BLOCK_SCALE}> ()
    magnitude = Abs (blocks)
    amax = ReduceMax (magnitude, last_axis)
    covered = Mul (tensor_scale, e2m1_max)
    wanted = Div (amax, covered)
    not_zero = Max (wanted, smallest)
    block_scale = Cast <to = {TensorProto.FLOAT8E4M3FN}, saturate = 1> (not_zero)
    block_scale_fp32 = Cast <to = {TensorProto.FLOAT}> (block_scale)
    scale = Mul (block_scale_fp32, tensor_scale)

    scaled = Div (blocks, scale)
    e2m1_min = Neg (e2m1_max)
    clipped = Clip (scaled, e2m1_min, e2m1_max)
    size = Abs (clipped)
    half = Constant <value_float = 0.5> ()
    one = Constant <value_float = 1.0> ()
    two = Constant <value_float = 2.0> ()
    four = Constant <value_float = 4.0> ()
    below_two = Less (size, two)
    below_four = Less (size, four)
    coarse = Where (below_four, one, two)
    step = Where (below_two, half, coarse)
    steps = Div (clipped, step)
    whole_steps = Round (steps)
    code = Mul (whole_steps, step)

    dequantized = Mul (code, scale)
    y = Reshape (dequantized, shape)
}}
"""


def functions(opset: int) -> list[onnx.FunctionProto]:
    """The two operators that the lowered graph calls, as model-local functions of standard ones at its `opset`.

    `Nvfp4Dequantize`: codes uint4 [N, K], block scales float8e4m3fn [N, K / 16] and a tensor scale to float
    [N, K]. `Nvfp4FakeQuantize`: float [..., K] and a tensor scale to float [..., K], as `nvfp4.fake_quantize`.
    """
    header = f'<domain: "{DOMAIN}", opset_import: ["": {opset}]>'
    return [onnx.parser.parse_function(header + body) for body in (_DEQUANTIZE_BODY, _FAKE_QUANTIZE_BODY)]


def dequantize_node(codes: onnx.TensorProto, block_scale: str, tensor_scale: str, output: str) -> onnx.NodeProto:
    """The node that makes a weight; its codes become unsigned integers in place."""
    codes.data_type = TensorProto.UINT4
    inputs = [codes.name, block_scale, tensor_scale]
    return helper.make_node(DEQUANTIZE, inputs, [output], name=output, domain=DOMAIN)


def fake_quantize_node(data: str, tensor_scale: str, output: str) -> onnx.NodeProto:
    """The node that quantizes and dequantizes an activation."""
    return helper.make_node(FAKE_QUANTIZE, [data, tensor_scale], [output], name=output, domain=DOMAIN)
