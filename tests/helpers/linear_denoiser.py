"""A one-layer strongly typed "denoiser" as the export writes them, for tests of TensorRT builds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

PROFILE = {"latents": ((2, 16, 64), (2, 16, 64), (8, 16, 64)), "timestep": ((2,), (2,), (8,))}
QUANTIZED = {"fp8": TensorProto.FLOAT8E4M3FN, "int8": TensorProto.INT8}


def save_model(path: Path, precision: str, *, external: bool = False, operator: str = "Relu") -> Path:
    """A linear layer with Q/DQ around it as the export writes them, scaled by a float32 timestep, and `operator`."""
    weights = np.random.default_rng(0).normal(0, 0.1, (64, 64)).astype(np.float16)
    scale = numpy_helper.from_array(np.array(0.02, np.float16), "scale")
    if precision == "fp16":
        constants = [numpy_helper.from_array(weights, "weight")]
        nodes = [helper.make_node("MatMul", ["latents", "weight"], ["product"], name="linear")]
    else:
        kind = QUANTIZED[precision]
        codes = np.clip(np.round(weights.astype(np.float32) / 0.02), -100, 100).flatten()
        constants = [
            scale,
            helper.make_tensor("zero", kind, [], [0]),
            helper.make_tensor("weight", kind, [64, 64], codes if precision == "fp8" else codes.astype(np.int8)),
        ]
        nodes = [
            helper.make_node("QuantizeLinear", ["latents", "scale", "zero"], ["quantized"], name="q"),
            helper.make_node("DequantizeLinear", ["quantized", "scale", "zero"], ["dequantized"], name="dq"),
            helper.make_node("DequantizeLinear", ["weight", "scale", "zero"], ["weight_fp16"], name="weight_dq"),
            helper.make_node("MatMul", ["dequantized", "weight_fp16"], ["product"], name="linear"),
        ]
    constants.append(numpy_helper.from_array(np.array([-1, 1, 1], np.int64), "column"))
    nodes += [
        helper.make_node("Cast", ["timestep"], ["timestep_fp16"], name="cast", to=TensorProto.FLOAT16),
        helper.make_node("Reshape", ["timestep_fp16", "column"], ["factor"], name="reshape"),
        helper.make_node("Mul", ["product", "factor"], ["scaled"], name="scaled"),
        helper.make_node(operator, ["scaled"], ["model_output"], name="last"),
    ]
    graph = helper.make_graph(
        nodes,
        "denoiser",
        [
            helper.make_tensor_value_info("latents", TensorProto.FLOAT16, ["batch", 16, 64]),
            helper.make_tensor_value_info("timestep", TensorProto.FLOAT, ["batch"]),
        ],
        [helper.make_tensor_value_info("model_output", TensorProto.FLOAT16, ["batch", 16, 64])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    if external:
        onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=0)
    else:
        onnx.save(model, path)
    return path
