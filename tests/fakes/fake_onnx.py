"""ONNX models behind the fakes: what they hold, which layers an engine would have, and running them.

Running is real: ONNX Runtime on the CPU, without the optimizers that miscompute FP16 graphs with FP8 Q/DQ.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from fakes.fake_plan import LayerInfo, TensorInfo

DATA_TYPES = {
    TensorProto.FLOAT: "FLOAT",
    TensorProto.FLOAT16: "HALF",
    TensorProto.BFLOAT16: "BF16",
    TensorProto.INT8: "INT8",
    TensorProto.INT32: "INT32",
    TensorProto.INT64: "INT64",
    TensorProto.BOOL: "BOOL",
    TensorProto.UINT8: "UINT8",
    TensorProto.FLOAT8E4M3FN: "FP8",
    TensorProto.INT4: "INT4",
    TensorProto.FLOAT4E2M1: "FP4",
}
LOW_PRECISION = ("INT8", "FP8", "INT4", "FP4")
COMPUTE = {"FLOAT": "FP32", "HALF": "FP16"}  # DataType -> name in LayerInfo.compute, where it differs
NUMPY = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT8": np.int8,
    "INT32": np.int32,
    "INT64": np.int64,
    "BOOL": np.bool_,
    "UINT8": np.uint8,
}

_FOLDED = {"Constant", "Identity", "QuantizeLinear", "DequantizeLinear", "Shape", "Cast", "Unsqueeze", "Squeeze"}
_MATRIX = {"MatMul", "Gemm", "Conv", "Einsum"}
_DISABLED = ["MatMulAddFusion", "QDQPropagationTransformer", "WeightBiasQuantization"]
_KEPT_SESSIONS = 8
_sessions: dict[str, Any] = {}


def load(path: str) -> onnx.ModelProto:
    """The model with its external data; unlike onnx, the libraries take files that have further names."""
    model = onnx.load(path, load_external_data=False)
    for item in model.graph.initializer:
        if item.data_location == TensorProto.EXTERNAL:
            place = {entry.key: entry.value for entry in item.external_data}
            with open(os.path.join(os.path.dirname(path), place["location"]), "rb") as file:
                file.seek(int(place.get("offset", 0)))
                item.raw_data = file.read(int(place.get("length", -1)))
            item.data_location = TensorProto.DEFAULT
            del item.external_data[:]
    return model


def inferred(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the shapes and types of all its tensors, as far as ONNX's own inference finds them."""
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


def tensors(model: onnx.ModelProto) -> tuple[TensorInfo, ...]:
    """Inputs and outputs; an unnamed dynamic dimension gets a name of its own.

    Raises:
        ValueError: an element type that TensorRT does not have.
    """
    constants = {item.name for item in model.graph.initializer}
    found = []
    for values, is_input in ((model.graph.input, True), (model.graph.output, False)):
        for value in values:
            if is_input and value.name in constants:
                continue
            kind = value.type.tensor_type
            if kind.elem_type not in DATA_TYPES:
                raise ValueError(
                    f"tensor {value.name} has the unsupported type {TensorProto.DataType.Name(kind.elem_type)}"
                )
            dims = tuple(
                item.dim_value if item.HasField("dim_value") else item.dim_param or f"{value.name}_{index}"
                for index, item in enumerate(kind.shape.dim)
            )
            found.append(TensorInfo(value.name, DATA_TYPES[kind.elem_type], dims, is_input))
    return tuple(found)


def weight_bytes(model: onnx.ModelProto) -> dict[str, int]:
    """Bytes of each initializer, 4-bit types packed."""
    found = {}
    for item in model.graph.initializer:
        name = DATA_TYPES.get(item.data_type, "FLOAT")
        size = {"INT4": 0.5, "FP4": 0.5, "HALF": 2, "BF16": 2, "INT64": 8}.get(
            name, 1 if name in ("INT8", "UINT8", "BOOL", "FP8") else 4
        )
        found[item.name] = math.ceil(math.prod(item.dims) * size)
    return found


def types_used(model: onnx.ModelProto) -> set[str]:
    """DataType members of all initializers, inputs and outputs."""
    kinds = {item.data_type for item in model.graph.initializer}
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name in ("output_dtype", "to", "dtype"):
                kinds.add(attribute.i)
            elif attribute.HasField("t"):
                kinds.add(attribute.t.data_type)
    return {DATA_TYPES[kind] for kind in kinds if kind in DATA_TYPES} | {item.dtype for item in tensors(model)}


def layers(model: onnx.ModelProto, *, unquantized: bool) -> tuple[LayerInfo, ...]:
    """What the engine's layers would be: one per node that is not folded, Q/DQ fused into what follows.

    A matrix product or convolution computes in the type its inputs were dequantized from; where only its weights
    were (weight-only), that is the weights' type. Everything else computes in the type of its output.

    Args:
        model: as `inferred` returns it.
        unquantized: pretend that no Q/DQ was fused.
    """
    shapes, kinds = _value_info(model)
    producers = {name: node for node in model.graph.node for name in node.output}
    main = next((item.dtype for item in tensors(model) if not item.is_input), "HALF")
    found = []
    for index, node in enumerate(model.graph.node):
        if node.op_type in _FOLDED:
            continue
        sources = [_source(name, producers, kinds, main) for name in node.input if name]
        low = [dtype for _, dtype in sources if dtype in LOW_PRECISION]
        fused = bool(low) and node.op_type in _MATRIX and not unquantized
        output = kinds.get(node.output[0], main)
        compute = low[0] if fused else output
        reads = sources if fused else [(name, kinds.get(name, output)) for name in node.input if name]
        found.append(
            LayerInfo(
                name=f"{node.name or f'{node.op_type}_{index}'}_myl0_{index}",
                kind="gemm" if node.op_type in _MATRIX else "kgen",
                operator=node.op_type,
                compute=COMPUTE.get(compute, compute),
                inputs=tuple((name, shapes.get(name, ()), dtype) for name, dtype in reads),
                outputs=tuple((name, shapes.get(name, ()), kinds.get(name, main)) for name in node.output),
            )
        )
    return tuple(found)


def _source(name: str, producers: Mapping[str, Any], kinds: Mapping[str, str], main: str) -> tuple[str, str]:
    """The tensor a layer really reads, and its type: behind a DequantizeLinear and reshapes, the quantized one."""
    seen = name
    while (node := producers.get(seen)) is not None and node.op_type in ("Transpose", "Reshape", "Identity"):
        seen = node.input[0]
    if node is not None and node.op_type == "DequantizeLinear":
        quantized = node.input[0]
        if quantized in producers and producers[quantized].op_type == "QuantizeLinear":
            zero = producers[quantized].input[2:3]
            return quantized, kinds.get(zero[0] if zero else "", "INT8")
        return quantized, kinds.get(quantized, "INT8")
    return name, kinds.get(name, main)


def _value_info(model: onnx.ModelProto) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    shapes, kinds = {}, {}
    for item in model.graph.initializer:
        shapes[item.name], kinds[item.name] = tuple(item.dims), DATA_TYPES.get(item.data_type, "FLOAT")
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        kind = value.type.tensor_type
        shapes[value.name] = tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in kind.shape.dim)
        kinds[value.name] = DATA_TYPES.get(kind.elem_type, "FLOAT")
    return shapes, kinds


def strip(model: onnx.ModelProto) -> tuple[bytes, tuple[str, ...]]:
    """The model without its floating and quantized weights of more than 64 elements, and their names."""
    stripped = onnx.ModelProto()
    stripped.CopyFrom(model)
    names = []
    for item in stripped.graph.initializer:
        if item.data_type != TensorProto.INT64 and math.prod(item.dims) > 64:
            names.append(item.name)
            for data in ("raw_data", "float_data", "int32_data"):
                item.ClearField(data)
    return stripped.SerializeToString(), tuple(names)


def refit(stripped: bytes, names: tuple[str, ...], source: onnx.ModelProto) -> bytes:
    """The stripped model with the weights of `source`.

    Raises:
        ValueError: a weight is missing there or has another type or shape.
    """
    model = onnx.ModelProto.FromString(stripped)
    weights = {item.name: item for item in source.graph.initializer}
    for item in model.graph.initializer:
        if item.name not in names:
            continue
        other = weights.get(item.name)
        if other is None or list(other.dims) != list(item.dims) or other.data_type != item.data_type:
            raise ValueError(f"weights {item.name} are missing or of another shape or type")
        item.CopyFrom(other)
    return model.SerializeToString()


@functools.lru_cache
def output_shapes(model: bytes, inputs: tuple[tuple[str, str, tuple[int, ...]], ...]) -> dict[str, tuple[int, ...]]:
    """Output name -> shape for inputs of a name, DataType and shape each: as ONNX Runtime returns them."""
    results = run(model, {name: np.zeros(shape, NUMPY[dtype]) for name, dtype, shape in inputs})
    return {name: result.shape for name, result in results.items()}


def run(model: bytes, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Output name -> array, by ONNX Runtime."""
    import onnxruntime

    key = hashlib.sha256(model).hexdigest()
    if key not in _sessions:
        while len(_sessions) >= _KEPT_SESSIONS:
            _sessions.pop(next(iter(_sessions)))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 2
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        _sessions[key] = onnxruntime.InferenceSession(
            model, options, providers=["CPUExecutionProvider"], disabled_optimizers=_DISABLED
        )
    session = _sessions[key]
    names = [item.name for item in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))
