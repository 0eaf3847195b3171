"""The fake TensorRT does what its docstrings say, also under the real polygraphy and with real ONNX Runtime."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from fakes.fake_memory import FakeCudaError
from fakes.fake_trt_base import FakeCrashError
from fakes.install import Fakes, install
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


@pytest.fixture
def onnx_file(tmp_path: Path) -> Callable[[str], str]:
    def write(kind: str = "fp16") -> str:
        path = tmp_path / f"{kind}.onnx"
        onnx.save(onnx_model(kind), str(path))
        return str(path)

    return write


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    return install(monkeypatch)


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


# --- building and running


@pytest.mark.parametrize("version", ["10.13.2.6", "10.16.1.11", "11.4.0.106"])
@pytest.mark.parametrize("kind", ["fp16", "fp8", "int8", "int4"])
def test_an_engine_computes_its_onnx_graph(
    monkeypatch: pytest.MonkeyPatch, onnx_file: Callable[[str], str], kind: str, version: str
) -> None:
    trt = install(monkeypatch, version=version).tensorrt
    log = new_log(trt)
    item = ready(trt, load(trt, log, build(trt, log, onnx_file(kind))))
    upload(item, X)
    assert item.context.execute_async_v3(int(item.stream)), log.errors
    np.testing.assert_allclose(fetch(item), expected(kind, X), atol=0.02)
    assert log.errors == []


def test_polygraphy_configures_and_builds(fakes: Fakes, onnx_file: Callable[[str], str], tmp_path: Path) -> None:
    from polygraphy.backend.trt import CreateConfig, Profile, engine_bytes_from_network, network_from_onnx_path

    cache = tmp_path / "timing.cache"
    for _ in range(2):
        config = CreateConfig(
            profiles=[Profile().add("x", *PROFILE)],
            builder_optimization_level=1,
            version_compatible=True,
            memory_pool_limits={fakes.tensorrt.MemoryPoolType.WORKSPACE: 1 << 20},
            hardware_compatibility_level=fakes.tensorrt.HardwareCompatibilityLevel.AMPERE_PLUS,
            load_timing_cache=str(cache),
        )
        network = network_from_onnx_path(onnx_file("fp16"), strongly_typed=True)
        plan = engine_bytes_from_network(network, config=config, save_timing_cache=str(cache))
    cold, warm = fakes.settings.builds
    assert (cold.timed, warm.timed) == (cold.layers, 0)
    assert "VERSION_COMPATIBLE" in warm.flags
    assert "TF32" not in warm.flags
    assert warm.options == {
        "optimization_level": 1,
        "workspace_bytes": 1 << 20,
        "max_aux_streams": -1,
        "hardware_compatibility": "AMPERE_PLUS",
    }
    assert load(fakes.tensorrt, new_log(fakes.tensorrt), plan).num_io_tensors == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"shapes": None}, "no optimization profile has been defined"),
        ({"shapes": ((1, 8), (1, 8), (1, 8))}, "static dimension mismatch"),
        ({"shapes": ((1,), (1,), (1,))}, "rank of input x"),
    ],
)
def test_a_profile_that_does_not_fit_fails_the_build(
    fakes: Fakes, onnx_file: Callable[[str], str], arguments: dict[str, Any], words: str
) -> None:
    log = new_log(fakes.tensorrt)
    assert build(fakes.tensorrt, log, onnx_file("fp16"), **arguments) is None
    assert words in log.errors[0]


@pytest.mark.parametrize("shapes", [((2, 8), (1, 8), (4, 8)), ((1, 8), (2, 8), (4,))])
def test_set_shape_refuses_inconsistent_shapes(fakes: Fakes, shapes: Any) -> None:
    profile = fakes.tensorrt.Builder(new_log(fakes.tensorrt)).create_optimization_profile()
    with pytest.raises(ValueError, match="inconsistent"):
        profile.set_shape("x", *shapes)


@pytest.mark.parametrize(
    ("kind", "capability", "built"),
    [("fp8", (8, 6), False), ("fp8", (8, 9), True), ("int4", (7, 5), False), ("fp16", (7, 5), True)],
)
def test_types_the_gpu_does_not_have_fail_the_build(
    monkeypatch: pytest.MonkeyPatch,
    onnx_file: Callable[[str], str],
    kind: str,
    capability: tuple[int, int],
    built: bool,
) -> None:
    trt = install(monkeypatch, compute_capability=capability).tensorrt
    log = new_log(trt)
    assert (build(trt, log, onnx_file(kind)) is not None) == built
    assert any("precision require hardware" in error for error in log.errors) == (not built)


def test_tensorrt_10_refuses_weak_typing_and_precision_flags(
    monkeypatch: pytest.MonkeyPatch, onnx_file: Callable[[str], str]
) -> None:
    trt = install(monkeypatch, version="10.16.1.11").tensorrt
    log = new_log(trt)
    assert build(trt, log, onnx_file("fp16"), flags=("FP16",)) is None
    assert "not allowed in a strongly typed network" in log.errors[0]
    builder = trt.Builder(log)
    network = builder.create_network(0)
    assert trt.OnnxParser(network, log).parse_from_file(onnx_file("fp16"))
    assert builder.build_serialized_network(network, builder.create_builder_config()) is None


def test_the_parser_reports_what_it_refuses(fakes: Fakes, onnx_file: Callable[[str], str], tmp_path: Path) -> None:
    trt = fakes.tensorrt
    fakes.settings.refused_ops.add("Relu")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(Path(onnx_file("fp16")).read_bytes()[:100])
    codes = []
    for path in (onnx_file("fp16"), str(broken), str(tmp_path / "missing.onnx")):
        parser = trt.OnnxParser(trt.Builder(new_log(trt)).create_network(0), new_log(trt))
        assert not parser.parse_from_file(path)
        assert parser.num_errors == 1
        codes.append(parser.get_error(0).code().name)
        if path.endswith("fp16.onnx"):
            assert (parser.get_error(0).node_operator(), parser.get_error(0).node_name()) == ("Relu", "relu")
    assert codes == ["UNSUPPORTED_NODE", "MODEL_DESERIALIZE_FAILED", "MODEL_DESERIALIZE_FAILED"]


@pytest.mark.parametrize("cancel_at", [None, 1])
def test_progress_is_nested_phases_and_can_cancel(
    fakes: Fakes, onnx_file: Callable[[str], str], cancel_at: int | None
) -> None:
    trt, log, seen = fakes.tensorrt, new_log(fakes.tensorrt), []

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            seen.append(("start", phase_name, parent_phase))

        def step_complete(self, phase_name: str, step: int) -> bool:
            seen.append(("step", phase_name, step))
            return step != cancel_at

        def phase_finish(self, phase_name: str) -> None:
            seen.append(("finish", phase_name, None))

    plan = build(trt, log, onnx_file("fp16"), configure=lambda config: setattr(config, "progress_monitor", Monitor()))
    assert (plan is None) == (cancel_at is not None)
    assert bool(log.errors) == (cancel_at is not None)
    starts = [item for item in seen if item[0] == "start"]
    assert [item[2] for item in starts] == [None, starts[0][1]]
    assert [item[1] for item in seen if item[0] == "finish"] == [starts[1][1], starts[0][1]]


def test_timings_of_another_gpu_are_refused(monkeypatch: pytest.MonkeyPatch, onnx_file: Callable[[str], str]) -> None:
    trt = install(monkeypatch, name="Fake L40S", compute_capability=(8, 9)).tensorrt
    data = bytes(trt.Builder(new_log(trt)).create_builder_config().create_timing_cache(b"").serialize())
    trt = install(monkeypatch).tensorrt
    log = new_log(trt)
    config = trt.Builder(log).create_builder_config()
    cache = config.create_timing_cache(data)
    assert not config.set_timing_cache(cache, ignore_mismatch=False)
    assert config.set_timing_cache(cache, ignore_mismatch=True)
    assert config.create_timing_cache(b"rubbish") is None
    assert len(log.errors) == 2


# --- loading


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: b"", "Magic tag"),
        (lambda data: b"X" + data[1:], "Magic tag"),
        (lambda data: data[:-1], "truncated or corrupt"),
        (lambda data: data[:200] + bytes([data[200] ^ 1]) + data[201:], "truncated or corrupt"),
    ],
)
def test_damaged_plans_give_none_and_a_logged_error(
    fakes: Fakes, onnx_file: Callable[[str], str], damage: Callable[[bytes], bytes], words: str
) -> None:
    log = new_log(fakes.tensorrt)
    plan = bytes(build(fakes.tensorrt, log, onnx_file("fp16")))
    assert load(fakes.tensorrt, log, damage(plan)) is None
    assert words in log.errors[0]
    assert fakes.cuda.bytes_in_use == 0


@pytest.mark.parametrize(
    ("flags", "level", "host", "loads"),
    [
        ((), "NONE", {}, True),
        ((), "NONE", {"version": "11.9.0.1"}, False),
        (("VERSION_COMPATIBLE",), "NONE", {"version": "11.9.0.1"}, True),
        (("VERSION_COMPATIBLE",), "NONE", {"version": "11.1.0.1"}, False),
        ((), "NONE", {"compute_capability": (8, 9)}, False),
        ((), "SAME_COMPUTE_CAPABILITY", {"compute_capability": (8, 9)}, False),
        ((), "SAME_COMPUTE_CAPABILITY", {"name": "Fake H100"}, True),
        ((), "AMPERE_PLUS", {"compute_capability": (12, 0)}, True),
        ((), "AMPERE_PLUS", {"compute_capability": (7, 5)}, False),
        ((), "NONE", {"lean": True}, False),
        (("VERSION_COMPATIBLE",), "NONE", {"lean": True}, True),
        ((), "NONE", {"memory": 256}, False),
    ],
)
def test_where_a_plan_loads(
    monkeypatch: pytest.MonkeyPatch,
    onnx_file: Callable[[str], str],
    flags: tuple[str, ...],
    level: str,
    host: dict[str, Any],
    loads: bool,
) -> None:
    trt = install(monkeypatch).tensorrt

    def configure(config: Any) -> None:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel[level]

    plan = bytes(build(trt, new_log(trt), onnx_file("fp16"), flags=flags, configure=configure))
    trt = install(monkeypatch, **host).tensorrt
    log = new_log(trt)
    assert (load(trt, log, plan) is not None) == loads
    assert bool(log.errors) == (not loads)


def test_version_compatible_plans_need_host_code_to_be_allowed(fakes: Fakes, onnx_file: Callable[[str], str]) -> None:
    log = new_log(fakes.tensorrt)
    plan = build(fakes.tensorrt, log, onnx_file("fp16"), flags=("VERSION_COMPATIBLE",))
    assert fakes.tensorrt.Runtime(log).deserialize_cuda_engine(plan) is None
    assert "engine_host_code_allowed" in log.errors[0]


def test_without_a_gpu_the_runtime_logs_and_then_crashes(monkeypatch: pytest.MonkeyPatch) -> None:
    trt = install(monkeypatch, gpus=0).tensorrt
    log = new_log(trt)
    runtime = trt.Runtime(log)
    assert "CUDA initialization failure" in log.errors[0]
    with pytest.raises(FakeCrashError, match="segmentation fault"):
        runtime.deserialize_cuda_engine(b"")
    with pytest.raises(TypeError, match="factory function returned nullptr"):
        trt.Builder(log)


def test_a_logger_must_call_its_base_class(fakes: Fakes) -> None:
    class Log(fakes.tensorrt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None: ...

    with pytest.raises(TypeError, match="initialised ILogger"):
        fakes.tensorrt.Runtime(Log())


def test_the_first_logger_can_be_made_to_get_everything(fakes: Fakes) -> None:
    first, second = new_log(fakes.tensorrt), new_log(fakes.tensorrt)
    fakes.settings.first_logger_wins = True
    fakes.tensorrt.Runtime(first)
    assert fakes.tensorrt.Runtime(second).deserialize_cuda_engine(b"") is None
    assert (len(first.errors), len(second.errors)) == (1, 0)


def test_a_plan_can_be_read_through_a_stream_reader(fakes: Fakes, onnx_file: Callable[[str], str]) -> None:
    trt, log = fakes.tensorrt, new_log(fakes.tensorrt)
    plan = io.BytesIO(bytes(build(trt, log, onnx_file("fp16"))))

    class Reader(trt.IStreamReaderV2):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IStreamReaderV2.__init__(self)

        def read(self, num_bytes: int, stream: int) -> bytes:
            return plan.read(num_bytes)

    assert load(trt, log, Reader()).name == "tiny"


def test_memory_of_engines_and_contexts_is_counted_while_they_live(
    fakes: Fakes, onnx_file: Callable[[str], str]
) -> None:
    log = new_log(fakes.tensorrt)
    engine = load(fakes.tensorrt, log, build(fakes.tensorrt, log, onnx_file("fp16")))
    weights = engine.get_engine_stat(fakes.tensorrt.EngineStat.TOTAL_WEIGHTS_SIZE)
    assert weights == WEIGHTS.nbytes == fakes.cuda.bytes_in_use
    assert engine.device_memory_size_v2 == 4 * 2 * (2 * 4 * SIZE)
    context = engine.create_execution_context()
    assert fakes.cuda.bytes_in_use == weights + engine.device_memory_size_v2
    del engine
    assert fakes.cuda.bytes_in_use > weights  # the context keeps its engine
    del context
    assert fakes.cuda.leaks() == []


def test_a_plan_has_the_buffer_protocol_and_no_length(fakes: Fakes, onnx_file: Callable[[str], str]) -> None:
    plan = build(fakes.tensorrt, new_log(fakes.tensorrt), onnx_file("fp16"))
    assert plan.nbytes == len(bytes(plan)) == memoryview(plan).nbytes
    with pytest.raises(TypeError, match="no len"):
        len(plan)


# --- executing


@pytest.fixture
def item(fakes: Fakes, onnx_file: Callable[[str], str]) -> SimpleNamespace:
    """A ready context of the FP16 engine, with its log."""
    log = new_log(fakes.tensorrt)
    engine = load(fakes.tensorrt, log, build(fakes.tensorrt, log, onnx_file("fp16")))
    made = ready(fakes.tensorrt, engine)
    made.engine, made.log, made.trt = engine, log, fakes.tensorrt
    return made


@pytest.mark.parametrize("shape", [(5, SIZE), (0, SIZE), (1, 8), (1,)])
def test_shapes_outside_the_profile_are_refused(item: SimpleNamespace, shape: tuple[int, ...]) -> None:
    assert not item.context.set_input_shape("x", shape)
    assert "out of range of profile 0" in item.log.errors[0]
    assert tuple(item.context.get_tensor_shape("y")) == (2, SIZE)


def test_what_is_missing_stops_an_execution(item: SimpleNamespace) -> None:
    context = item.engine.create_execution_context(item.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    assert context.infer_shapes() == ["x"]
    words = []

    def refused() -> None:
        assert not context.execute_async_v3(int(item.stream))
        words.append(item.log.errors[-1])

    refused()
    assert context.set_input_shape("x", (2, SIZE))
    refused()
    for name in "xy":
        assert context.set_tensor_address(name, item.address[name])
    refused()
    context.set_device_memory(item.scratch, item.size - 1)
    assert f"{item.size - 1} bytes are less than" in item.log.errors[-1]
    refused()
    assert not context.set_tensor_address("x", item.address["x"] + 2)
    assert not context.set_tensor_address("z", item.address["x"])
    for error, part in zip(
        words, ("shapes of inputs", "Neither address", "device memory", "device memory"), strict=True
    ):
        assert part in error


def test_contexts_that_share_scratch_must_be_ordered(item: SimpleNamespace) -> None:
    other = ready(item.trt, item.engine, scratch=item.scratch)
    upload(item, X)
    upload(other, X)
    assert item.context.execute_async_v3(int(item.stream))
    with pytest.raises(FakeCudaError, match="race: execute tiny"):
        other.context.execute_async_v3(int(other.stream))
    event = item.cuda.cudaEventCreate()[1]
    item.cuda.cudaEventRecord(event, item.stream)
    item.cuda.cudaStreamWaitEvent(other.stream, event, 0)
    assert other.context.execute_async_v3(int(other.stream))
    np.testing.assert_allclose(fetch(other), expected("fp16", X), atol=0.02)


def test_a_captured_execution_replays_on_new_inputs(item: SimpleNamespace) -> None:
    mode = item.cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal

    def capture() -> tuple[bool, Any]:
        item.cuda.cudaStreamBeginCapture(item.stream, mode)
        done = item.context.execute_async_v3(int(item.stream))
        return done, item.cuda.cudaStreamEndCapture(item.stream)[1]

    assert not capture()[0]
    assert "enqueue once before capture" in item.log.errors[-1]
    upload(item, X)
    assert item.context.execute_async_v3(int(item.stream))
    done, graph = capture()
    assert done
    launchable = item.cuda.cudaGraphInstantiate(graph, 0)[1]
    for x in (X, -X):
        upload(item, x)
        item.cuda.cudaGraphLaunch(launchable, item.stream)
        np.testing.assert_allclose(fetch(item), expected("fp16", x), atol=0.02)
    assert item.context.set_input_shape("x", (1, SIZE))
    assert not capture()[0]


def test_a_context_must_outlive_its_queued_work(item: SimpleNamespace) -> None:
    upload(item, X)
    assert item.context.execute_async_v3(int(item.stream))
    del item.context
    with pytest.raises(FakeCudaError, match="destroyed before its queued"):
        item.cuda.cudaStreamSynchronize(item.stream)


def test_calls_and_planned_faults_of_tensorrt(item: SimpleNamespace, fakes: Fakes) -> None:
    fakes.cuda.fail("execute_async_v3", "the GPU fell off the bus")
    assert not item.context.execute_async_v3(int(item.stream))
    assert "fell off the bus" in item.log.errors[-1]
    upload(item, X)
    assert item.context.execute_async_v3(int(item.stream))
    assert fakes.cuda.count("execute_async_v3") == 2
    assert fakes.cuda.names()[-1] == "execute_async_v3"


# --- layers


def layers(engine: Any, trt: Any) -> list[dict[str, Any]]:
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return json.loads(text)["Layers"]


@pytest.mark.parametrize(
    ("kind", "unquantized", "formats"),
    [
        ("fp16", False, ["FP16", "FP16"]),
        ("fp8", False, ["FP8", "FP8"]),
        ("int8", False, ["INT8", "INT8"]),
        ("int4", False, ["FP16", "INT4"]),
        ("int8", True, ["FP16", "FP16"]),
    ],
)
def test_the_inspector_shows_what_the_layers_read(
    fakes: Fakes, onnx_file: Callable[[str], str], kind: str, unquantized: bool, formats: list[str]
) -> None:
    trt, log = fakes.tensorrt, new_log(fakes.tensorrt)
    fakes.settings.unquantized = unquantized
    linear, relu = layers(load(trt, log, build(trt, log, onnx_file(kind))), trt)
    assert [item["Format/Datatype"] for item in linear["Inputs"]] == [
        f"Row major linear {item} format" for item in formats
    ]
    assert relu["Outputs"][0]["Name"] == "y"
    assert relu["Outputs"][0]["Dimensions"] == [-1, SIZE]


@pytest.mark.parametrize("verbosity", ["LAYER_NAMES_ONLY", "NONE"])
def test_less_verbose_engines_say_less(fakes: Fakes, onnx_file: Callable[[str], str], verbosity: str) -> None:
    trt, log = fakes.tensorrt, new_log(fakes.tensorrt)

    def configure(config: Any) -> None:
        config.profiling_verbosity = trt.ProfilingVerbosity[verbosity]

    found = layers(load(trt, log, build(trt, log, onnx_file("fp16"), configure=configure)), trt)
    assert found == (["linear_myl0_0", "relu_myl0_1"] if verbosity == "LAYER_NAMES_ONLY" else [])


def test_the_profiler_gets_the_staged_times(fakes: Fakes, onnx_file: Callable[[str], str]) -> None:
    trt, log = fakes.tensorrt, new_log(fakes.tensorrt)
    fakes.settings.layer_ms |= {"INT8": 0.5, "FP16": 0.25}
    times: dict[str, float] = {}

    class Profiler(trt.IProfiler):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            times[layer_name] = ms

    engine = load(trt, log, build(trt, log, onnx_file("int8")))
    made = ready(trt, engine)
    made.context.profiler = Profiler()
    made.context.enqueue_emits_profile = False
    upload(made, X)
    assert made.context.execute_async_v3(int(made.stream))
    assert times == {}
    assert made.context.report_to_profiler()
    assert list(times.values()) == [0.5, 0.25]
    assert set(times) == {layer["Name"] for layer in layers(engine, trt)}
    assert fakes.cuda.scheduler.clock_ms == pytest.approx(0.75, abs=0.01)


# --- weights


def test_stripped_plans_are_smaller_and_run_once_refitted(fakes: Fakes, onnx_file: Callable[[str], str]) -> None:
    trt, log = fakes.tensorrt, new_log(fakes.tensorrt)
    path = onnx_file("fp16")
    whole, stripped = build(trt, log, path), build(trt, log, path, flags=("STRIP_PLAN",))
    assert whole.nbytes - stripped.nbytes > WEIGHTS.nbytes // 2
    engine = load(trt, log, stripped)
    assert engine.get_engine_stat(trt.EngineStat.STRIPPED_WEIGHTS_SIZE) == WEIGHTS.nbytes
    assert engine.create_execution_context() is None
    refitter = trt.Refitter(engine, log)
    assert refitter.get_missing_weights() == ["W"]
    assert trt.OnnxParserRefitter(refitter, log).refit_from_file(path)
    assert refitter.refit_cuda_engine()
    made = ready(trt, engine)
    upload(made, X)
    assert made.context.execute_async_v3(int(made.stream))
    np.testing.assert_allclose(fetch(made), expected("fp16", X), atol=0.02)
    with pytest.raises(TypeError, match="nullptr"):
        trt.Refitter(load(trt, log, whole), log)


def test_a_weight_streaming_budget_moves_weights_to_the_host(fakes: Fakes, onnx_file: Callable[[str], str]) -> None:
    trt, log = fakes.tensorrt, new_log(fakes.tensorrt)
    engine = load(trt, log, build(trt, log, onnx_file("fp16"), flags=("WEIGHT_STREAMING",)))
    scratch = engine.device_memory_size_v2
    assert engine.weight_streaming_budget_v2 == engine.streamable_weights_size == WEIGHTS.nbytes
    engine.weight_streaming_budget_v2 = 100
    assert fakes.cuda.bytes_in_use == 100
    assert engine.device_memory_size_v2 == scratch + engine.weight_streaming_scratch_memory_size > scratch
    context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    engine.weight_streaming_budget_v2 = 200
    assert engine.weight_streaming_budget_v2 == 100
    assert "while execution contexts exist" in log.errors[-1]
    del context, engine
    assert fakes.cuda.leaks() == []


def test_the_lean_module_has_no_builder_and_no_inspector(
    monkeypatch: pytest.MonkeyPatch, onnx_file: Callable[[str], str]
) -> None:
    trt = install(monkeypatch).tensorrt
    plan = bytes(build(trt, new_log(trt), onnx_file("fp16"), flags=("VERSION_COMPATIBLE",)))
    trt = install(monkeypatch, lean=True).tensorrt
    assert trt is sys.modules["tensorrt_lean"]
    assert not [name for name in ("Builder", "OnnxParser", "EngineInspector") if hasattr(trt, name)]
    engine = load(trt, new_log(trt), plan)
    with pytest.raises(TypeError, match="not registered"):
        engine.create_engine_inspector()
