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
