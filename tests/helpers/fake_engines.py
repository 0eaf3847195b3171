"""A small model, its plans and contexts of them, for tests of the fake TensorRT."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIZE = 16
WEIGHTS = np.linspace(-1, 1, SIZE * SIZE, dtype=np.float16).reshape(SIZE, SIZE)
PROFILE = ((1, SIZE), (2, SIZE), (4, SIZE))


def onnx_model(kind: str = "fp16") -> onnx.ModelProto:
    """x [batch, 16] @ W, then Relu; FP16 tensors; `kind` "fp8" or "int8" has Q/DQ on both sides, "int4" on W."""
    nodes, weights = [], [numpy_helper.from_array(WEIGHTS, "W")]
    left, right = "x", "W"
    if kind != "fp16":
        types = {"fp8": TensorProto.FLOAT8E4M3FN, "int8": TensorProto.INT8, "int4": TensorProto.INT4}
        zero = helper.make_tensor("zero", types[kind], [], [0])
        scale = numpy_helper.from_array(np.array(0.02, np.float16), "scale")
        weights += [zero, scale]
        for name in ("W",) if kind == "int4" else ("x", "W"):
            nodes += [
                helper.make_node("QuantizeLinear", [name, "scale", "zero"], [f"{name}_q"]),
                helper.make_node("DequantizeLinear", [f"{name}_q", "scale", "zero"], [f"{name}_dq"]),
            ]
        left, right = "x" if kind == "int4" else "x_dq", "W_dq"
    nodes += [
        helper.make_node("MatMul", [left, right], ["product"], name="linear"),
        helper.make_node("Relu", ["product"], ["y"], name="relu"),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["batch", SIZE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, ["batch", SIZE])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def new_log(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(msg)

    return Log()


def build(
    trt: Any,
    log: Any,
    path: str,
    *,
    shapes: Any = PROFILE,
    flags: tuple[str, ...] = (),
    configure: Callable[[Any], Any] = lambda config: None,
) -> Any:
    """The plan of an ONNX file; None if it was not built."""
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    assert parser.parse_from_file(path), log.errors
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if shapes is not None:
        profile = builder.create_optimization_profile()
        profile.set_shape("x", *shapes)
        config.add_optimization_profile(profile)
    for flag in flags:
        config.set_flag(getattr(trt.BuilderFlag, flag))
    configure(config)
    return builder.build_serialized_network(network, config)


def load(trt: Any, log: Any, plan: Any) -> Any:
    runtime = trt.Runtime(log)
    runtime.engine_host_code_allowed = True
    return runtime.deserialize_cuda_engine(plan)


def ready(trt: Any, engine: Any, batch: int = 2, scratch: int | None = None) -> SimpleNamespace:
    """A user-managed context of `engine`, bound to fresh memory."""
    cuda = sys.modules["cuda.bindings.runtime"]
    context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    assert context.set_input_shape("x", (batch, SIZE))
    nbytes = 2 * batch * SIZE
    address = {name: cuda.cudaMalloc(nbytes)[1] for name in "xy"}
    for name in "xy":
        assert context.set_tensor_address(name, address[name])
    size = context.update_device_memory_size_for_shapes()
    scratch = cuda.cudaMalloc(size)[1] if scratch is None else scratch
    context.set_device_memory(scratch, size)
    stream = cuda.cudaStreamCreateWithFlags(cuda.cudaStreamNonBlocking)[1]
    return SimpleNamespace(
        context=context, address=address, scratch=scratch, size=size, stream=stream, cuda=cuda, batch=batch
    )


def upload(item: SimpleNamespace, x: np.ndarray) -> None:
    kind = item.cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
    item.cuda.cudaMemcpyAsync(item.address["x"], x.ctypes.data, x.nbytes, kind, item.stream)


def fetch(item: SimpleNamespace) -> np.ndarray:
    y = np.zeros((item.batch, SIZE), np.float16)
    kind = item.cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
    item.cuda.cudaMemcpyAsync(y.ctypes.data, item.address["y"], y.nbytes, kind, item.stream)
    assert not y.any()
    item.cuda.cudaStreamSynchronize(item.stream)
    return y


def expected(kind: str, x: np.ndarray) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(onnx_model(kind).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


X = np.random.default_rng(0).standard_normal((2, SIZE)).astype(np.float16)
