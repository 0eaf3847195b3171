"""NVFP4 on ONNX Runtime's CPU provider, which has no 4-bit floats: the same codes and scales in standard operators.

Weights are dequantized when the engine is loaded, by one operator: of 4-bit codes it would take several, and memory for
what each of them makes, 14 times the float32 weights. So they are 8-bit in the file. Activations are quantized and
dequantized in FP32 for every input, as the precision defines it. Exact, and slow.
"""

from __future__ import annotations

import onnx
import torch
from onnx import TensorProto, helper

from tmpdiff_export.quantization import nvfp4

DOMAIN = "tmpdiff"
FAKE_QUANTIZE = "Nvfp4FakeQuantize"

_TWICE_E2M1 = torch.tensor([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], dtype=torch.int8)

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


def function(opset: int) -> onnx.FunctionProto:
    """The operator that the lowered graph calls, as a model-local function of standard ones at its `opset`.

    `Nvfp4FakeQuantize`: float [..., K] and a tensor scale to float [..., K], as `nvfp4.fake_quantize`.
    """
    return onnx.parser.parse_function(f'<domain: "{DOMAIN}", opset_import: ["": {opset}]>' + _FAKE_QUANTIZE_BODY)


def whole_codes(codes: torch.Tensor) -> torch.Tensor:
    """E2M1 bits, uint8 of any shape, as twice the numbers they stand for, int8; their scale is to be halved."""
    if codes.device.type == "meta":
        return torch.empty_like(codes, dtype=torch.int8)
    return _TWICE_E2M1[codes.int()]


def dequantize_node(codes: str, scale: str, output: str) -> onnx.NodeProto:
    """The node that makes a weight [K, N] of whole codes and the scales of blocks [K / 16, N]."""
    return helper.make_node(
        "DequantizeLinear", [codes, scale], [output], name=output, axis=0, block_size=nvfp4.BLOCK_SIZE
    )


def fake_quantize_node(data: str, tensor_scale: str, output: str) -> onnx.NodeProto:
    """The node that quantizes and dequantizes an activation."""
    return helper.make_node(FAKE_QUANTIZE, [data, tensor_scale], [output], name=output, domain=DOMAIN)
