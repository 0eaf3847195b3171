"""The fake execution context does what its docstrings say: checks, order, captures, faults."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fakes.fake_memory import FakeCudaError
from fakes.install import Fakes
from helpers.fake_engines import SIZE, X, build, expected, fetch, load, new_log, ready, upload


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


# Several optimization profiles


@pytest.fixture
def two(fakes: Fakes, onnx_file: Callable[[str], str]) -> SimpleNamespace:
    """A ready context of an engine that takes batches of 1 to 4, or of 8."""
    trt, log = fakes.tensorrt, new_log(fakes.tensorrt)

    def add(config: Any) -> None:
        profile = trt.Builder(log).create_optimization_profile()
        profile.set_shape("x", *[(8, SIZE)] * 3)
        config.add_optimization_profile(profile)

    engine = load(trt, log, build(trt, log, onnx_file("fp16"), configure=add))
    made = ready(trt, engine)
    made.engine, made.log, made.trt = engine, log, trt
    return made


def bind(item: SimpleNamespace, batch: int) -> None:
    """Memory for the context's shapes."""
    assert item.context.set_input_shape("x", (batch, SIZE)), item.log.errors
    for name in "xy":
        assert item.context.set_tensor_address(name, item.cuda.cudaMalloc(2 * batch * SIZE)[1])
    size = item.context.update_device_memory_size_for_shapes()
    item.context.set_device_memory(item.cuda.cudaMalloc(size)[1], size)


def test_shapes_are_those_of_the_profile_that_is_chosen(two: SimpleNamespace) -> None:
    stream = int(two.stream)
    assert not two.context.set_input_shape("x", (8, SIZE))
    assert two.context.set_optimization_profile_async(1, stream)
    assert two.context.infer_shapes() == ["x"]  # a switch forgets them
    assert not two.context.set_input_shape("x", (2, SIZE))
    assert "out of range of profile 1" in two.log.errors[-1]
    assert not two.context.execute_async_v3(stream)
    bind(two, 8)
    assert tuple(two.context.get_tensor_shape("y")) == (8, SIZE)
    assert two.context.execute_async_v3(stream)
    assert not two.context.set_optimization_profile_async(2, stream)
    assert "invalid profile 2" in two.log.errors[-1]
    assert two.context.active_optimization_profile == 1


def test_scratch_of_the_profile_before_does_not_suffice(two: SimpleNamespace) -> None:
    assert two.engine.device_memory_size_v2 == two.engine.get_device_memory_size_for_profile_v2(1)
    assert two.engine.get_device_memory_size_for_profile_v2(0) < two.engine.device_memory_size_v2
    assert two.context.set_optimization_profile_async(1, int(two.stream))
    assert two.context.set_input_shape("x", (8, SIZE))
    assert not two.context.execute_async_v3(int(two.stream))
    assert "needs" in two.log.errors[-1]


def test_work_on_another_stream_has_to_wait_for_the_switch(two: SimpleNamespace) -> None:
    other = two.cuda.cudaStreamCreateWithFlags(two.cuda.cudaStreamNonBlocking)[1]
    assert two.context.set_optimization_profile_async(1, int(other))
    bind(two, 8)
    with pytest.raises(FakeCudaError, match=r"race: execute tiny .* and profile switch"):
        two.context.execute_async_v3(int(two.stream))
    two.cuda.cudaStreamSynchronize(other)
    assert two.context.execute_async_v3(int(two.stream))


def test_a_switch_is_no_part_of_a_graph_and_needs_an_execution_before_the_next_one(two: SimpleNamespace) -> None:
    mode = two.cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    assert two.context.execute_async_v3(int(two.stream))
    two.cuda.cudaStreamBeginCapture(two.stream, mode)
    assert not two.context.set_optimization_profile_async(1, int(two.stream))
    two.cuda.cudaStreamEndCapture(two.stream)
    assert "not permitted when stream is capturing" in two.log.errors[-1]
    for profile, batch in ((1, 8), (0, 2)):
        assert two.context.set_optimization_profile_async(profile, int(two.stream))
        bind(two, batch)
    two.cuda.cudaStreamBeginCapture(two.stream, mode)
    assert not two.context.execute_async_v3(int(two.stream))  # although it ran at these shapes, before the switches
    two.cuda.cudaStreamEndCapture(two.stream)
    assert "enqueue once before capture" in two.log.errors[-1]
