"""Fake execution context: the checks of the real one, and executions queued on the fake stream."""

from __future__ import annotations

import contextlib
import itertools
import math
import weakref
from typing import Any

import numpy as np

from fakes import fake_onnx
from fakes.fake_memory import FakeCudaError
from fakes.fake_plan import TensorInfo
from fakes.fake_streams import Operation
from fakes.fake_trt_base import Dims, ILogger, IProfiler, flag

ALIGNMENT = 256
SCRATCH_PATTERN = 0xEE  # what an execution leaves in its scratch
_own_addresses = itertools.count(-1, -1)  # below all memory: what a switch of profiles writes and executions read


class IExecutionContext:
    """One use of an engine. Not thread-safe, as the real one."""

    def __init__(self) -> None:
        raise TypeError("IExecutionContext: No constructor defined!")

    @classmethod
    def _fake_create(cls, engine: Any, strategy: str, reserved: int) -> IExecutionContext:
        context = cls.__new__(cls)
        context.name = "Unnamed Execution Context"
        context.enqueue_emits_profile = True
        context._engine, context._strategy, context._reserved = engine, strategy, reserved
        context._cuda = engine.fake_here.cuda
        context._profile_index = 0
        context._profile_data = (next(_own_addresses), 1)
        context._shapes = {}
        context._addresses = {}
        context._scratch = None
        context._updated = None  # scratch bytes for the current shapes, once asked for
        context._settled_shapes = None  # shapes of the last execution outside a capture
        context._profiler = None
        context._last = None
        engine.fake_contexts += 1
        context._reset_shapes()
        return context

    def __del__(self) -> None:
        if hasattr(self, "_reserved"):
            with self._cuda.lock:
                self._engine.fake_contexts -= 1
                self._cuda.device.reserve(self._engine._device, -self._reserved)
                self._cuda.record("~IExecutionContext", self._engine.name)

    def _error(self, message: str) -> bool:
        self._engine.fake_logger.log(ILogger.ERROR, f"IExecutionContext: {message}")
        return False

    def _reset_shapes(self) -> None:
        self._shapes = {
            item.name: item.shape for item in self._engine.fake_plan.tensors if item.is_input and -1 not in item.shape
        }
        self._updated = None

    def _tensor(self, name: str) -> TensorInfo | None:
        return next((item for item in self._engine.fake_plan.tensors if item.name == name), None)

    @property
    def engine(self) -> Any:
        return self._engine

    # Shapes

    @property
    def active_optimization_profile(self) -> int:
        return self._profile_index

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        """Copies to the device on the stream: what runs on another one has to wait for it."""
        with self._cuda.lock:
            self._cuda.record("set_optimization_profile_async", profile_index, int(stream_handle))
            fault = self._cuda.fault("set_optimization_profile_async")
            stream = self._cuda.stream(stream_handle)
            if fault is not None:
                return self._error(f"setOptimizationProfileAsync: {fault}")
            if stream.capture is not None:
                return self._error("setOptimizationProfileAsync: operation not permitted when stream is capturing")
            if not 0 <= profile_index < self._engine.num_optimization_profiles:
                return self._error(f"setOptimizationProfileAsync: invalid profile {profile_index}")
            if profile_index != self._profile_index:
                self._profile_index = profile_index
                self._settled_shapes = None
                self._reset_shapes()
                self._cuda.scheduler.enqueue(stream, "profile switch", writes=(self._profile_data,))
            return True

    def set_input_shape(self, name: str, shape: Any) -> bool:
        self._cuda.record("set_input_shape", name, tuple(shape))
        item = self._tensor(name)
        if item is None or not item.is_input:
            return self._error(f"setInputShape: {name} is not an input")
        low, _, high = self._engine.fake_plan.profiles[self._profile_index][name]
        shape = tuple(Dims(shape))
        if len(shape) != len(low) or any(not a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
            return self._error(
                f"setInputShape: Error Code 3: API Usage Error (Parameter check failed, condition: engineDims.d[i] == "
                f"dims.d[i]. Set dimensions {shape} of {name} are out of range of profile {self._profile_index}: {low} to {high})"
            )
        if self._shapes.get(name) != shape:
            self._shapes[name] = shape
            self._updated = None
        return True

    @property
    def all_binding_shapes_specified(self) -> bool:
        return not self.infer_shapes()

    def infer_shapes(self) -> list[str]:
        """Inputs without a shape.

        Raises:
            RuntimeError: the shapes contradict each other.
        """
        missing = [
            item.name for item in self._engine.fake_plan.tensors if item.is_input and item.name not in self._shapes
        ]
        if not missing:
            try:
                self._all_shapes()
            except ValueError as error:
                self._error(f"inferShapes: {error}")
                raise RuntimeError(f"Could not infer shapes: {error}") from error
        return missing

    def _all_shapes(self) -> dict[str, tuple[int, ...]]:
        from fakes.fake_engine import resolve

        return resolve(self._engine.fake_plan, self._shapes)

    def get_tensor_shape(self, name: str) -> Dims:
        """Dynamic dimensions that are not known yet are -1."""
        item = self._tensor(name)
        if item is None:
            self._error(f"getTensorShape: invalid tensor name: {name}")
            return Dims(())
        if item.is_input:
            return Dims(self._shapes.get(name, item.shape))
        if all(other.name in self._shapes for other in self._engine.fake_plan.tensors if other.is_input):
            with contextlib.suppress(ValueError):  # shapes that contradict each other
                return Dims(self._all_shapes()[name])
        sizes: dict[int | str, int] = {}
        for other in self._engine.fake_plan.tensors:
            if other.name in self._shapes:
                sizes |= dict(zip(other.dims, self._shapes[other.name], strict=True))
        return Dims(dim if isinstance(dim, int) else sizes.get(dim, -1) for dim in item.dims)

    def get_tensor_strides(self, name: str) -> Dims:
        shape = self.get_tensor_shape(name)
        return Dims(math.prod(shape[index + 1 :]) for index in range(len(shape)))

    def get_max_output_size(self, name: str) -> int:
        item = self._tensor(name)
        if item is None:
            return -1
        return int(math.prod(self.get_tensor_shape(name)) * flag("DataType", item.dtype).itemsize)

    # Memory

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._cuda.record("set_tensor_address", name, int(memory))
        if self._tensor(name) is None:
            return self._error(f"setTensorAddress: invalid tensor name: {name}")
        if int(memory) % ALIGNMENT:
            return self._error(f"setTensorAddress: address {int(memory):#x} of {name} is not {ALIGNMENT}-byte aligned")
        self._addresses[name] = int(memory)
        return True

    def get_tensor_address(self, name: str) -> int:
        return self._addresses.get(name, 0)

    @property
    def _needed(self) -> int:
        if self._updated is not None:
            return self._updated
        return self._engine.get_device_memory_size_for_profile_v2(self._profile_index)

    def update_device_memory_size_for_shapes(self) -> int:
        from fakes.fake_engine import scratch_bytes

        self._cuda.record("update_device_memory_size_for_shapes")
        if self.infer_shapes():
            self._error("updateDeviceMemorySizeForShapes: not all input shapes are set")
            return 0
        shapes = self._all_shapes()
        size = scratch_bytes(self._engine.fake_plan, lambda item: shapes[item.name])
        self._updated = size + self._engine.weight_streaming_scratch_memory_size
        return self._updated

    def set_device_memory(self, memory: int, size: int) -> None:
        self._cuda.record("set_device_memory", int(memory), int(size))
        if self._strategy != "USER_MANAGED":
            self._error("setDeviceMemoryV2: the context does not manage its device memory by the user")
        elif int(memory) % ALIGNMENT:
            self._error(f"setDeviceMemoryV2: address {int(memory):#x} is not {ALIGNMENT}-byte aligned")
        elif int(size) < self._needed:
            self._scratch = None
            self._error(f"setDeviceMemoryV2: {int(size)} bytes are less than the {self._needed} bytes needed")
        else:
            self._scratch = (int(memory), int(size))

    # Running

    def execute_async_v3(self, stream_handle: int) -> bool:
        """Queues one execution. Input and output memory is looked at when it runs."""
        with self._cuda.lock:
            self._cuda.record("execute_async_v3", self._engine.name, int(stream_handle))
            fault = self._cuda.fault("execute_async_v3")
            stream = self._cuda.stream(stream_handle)
            problem = str(fault) if fault is not None else self._problem(stream.capture is not None)
            if problem:
                return self._error(f"enqueueV3: {problem}")
            shapes = self._all_shapes()
            if stream.capture is None:
                self._settled_shapes = dict(self._shapes)
            operation = self._queue(stream, shapes)
            self._last = operation
            if self._profiler is not None and self.enqueue_emits_profile and stream.capture is None:
                self._cuda.scheduler.run_until(operation)
                self._report()
            return True

    def _problem(self, capturing: bool) -> str:
        plan = self._engine.fake_plan
        missing = [item.name for item in plan.tensors if item.is_input and item.name not in self._shapes]
        if missing:
            return f"Error Code 3: shapes of inputs {missing} are not set"
        unset = [item.name for item in plan.tensors if not self._addresses.get(item.name)]
        if unset:
            return f"Error Code 3: Neither address or allocator is set for tensors {unset}. Call setTensorAddress"
        if self._strategy == "USER_MANAGED" and (self._scratch is None or self._scratch[1] < self._needed):
            return f"Error Code 3: the context needs {self._needed} bytes of device memory; call setDeviceMemoryV2"
        if capturing and self._settled_shapes != self._shapes:
            return "Error Code 1: Cuda Runtime (operation not permitted when stream is capturing): enqueue once before capture"
        if capturing and self._profiler is not None and self.enqueue_emits_profile:
            return "Error Code 1: a profiler that enqueue reports to cannot be used while capturing"
        try:
            self._all_shapes()
        except ValueError as error:
            return f"Error Code 3: {error}"
        return ""

    def _queue(self, stream: Any, shapes: dict[str, tuple[int, ...]]) -> Operation:
        plan, cuda = self._engine.fake_plan, self._cuda
        addresses, scratch = dict(self._addresses), self._scratch
        spans = {
            item.name: (
                addresses[item.name],
                math.prod(shapes[item.name]) * np.dtype(fake_onnx.NUMPY[item.dtype]).itemsize,
            )
            for item in plan.tensors
        }

        def view(item: TensorInfo) -> np.ndarray:
            address, nbytes = spans[item.name]
            allocation = cuda.device.check(address, nbytes, f"tensor {item.name} of {plan.name}")
            start = address - allocation.address
            return (
                allocation.payload[start : start + nbytes].view(fake_onnx.NUMPY[item.dtype]).reshape(shapes[item.name])
            )

        alive = weakref.ref(self)

        def action() -> None:
            if alive() is None:
                raise FakeCudaError(f"a context of {plan.name} was destroyed before its queued or captured work ran")
            if scratch is not None:
                allocation = cuda.device.check(*scratch, f"scratch of {plan.name}")
                start = scratch[0] - allocation.address
                allocation.payload[start : start + scratch[1]] = SCRATCH_PATTERN
            inputs = {item.name: view(item).copy() for item in plan.tensors if item.is_input}
            results = fake_onnx.run(plan.model, inputs)
            for item in plan.tensors:
                if not item.is_input:
                    result = results[item.name]
                    if result.shape != shapes[item.name]:
                        raise FakeCudaError(
                            f"output {item.name} has shape {result.shape}, expected {shapes[item.name]}"
                        )
                    view(item)[...] = result

        outputs = tuple(spans[item.name] for item in plan.tensors if not item.is_input)
        return cuda.scheduler.enqueue(
            stream,
            f"execute {plan.name}",
            action,
            reads=(self._profile_data, *(spans[item.name] for item in plan.tensors if item.is_input)),
            writes=outputs if scratch is None else (*outputs, scratch),
            milliseconds=sum(self._engine.fake_here.layer_ms.get(layer.compute, 0.02) for layer in plan.layers),
        )

    # Profiling

    @property
    def profiler(self) -> IProfiler | None:
        return self._profiler

    @profiler.setter
    def profiler(self, profiler: IProfiler | None) -> None:
        if profiler is not None and not isinstance(profiler, IProfiler):
            raise TypeError(f"expected an IProfiler, received {profiler!r}")
        self._profiler = profiler

    def report_to_profiler(self) -> bool:
        """Reports the last execution."""
        if self._profiler is None or self._last is None:
            return self._error("reportToProfiler: no profiler, or nothing was executed")
        if self._last.capture is None:
            self._cuda.scheduler.run_until(self._last)
        self._report()
        return True

    def _report(self) -> None:
        for layer in self._engine.fake_plan.layers:
            self._profiler.report_layer_time(layer.name, self._engine.fake_here.layer_ms.get(layer.compute, 0.02))
