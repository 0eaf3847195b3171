"""The fake TensorRT loads plans, and shows their layers and weights, as its docstrings say."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from fakes.fake_trt_base import FakeCrashError
from fakes.install import Fakes, install
from helpers.fake_engines import SIZE, WEIGHTS, X, build, expected, fetch, load, new_log, ready, upload

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
