"""Fake Runtime and engine: deserialization with the real one's refusals, and memory sizes by simple rules.

Sizes: weights = sum of the ONNX initializers; scratch of a shape = 4 times the bytes of all inputs and outputs, in
whole 512-byte units; with weight streaming and a budget below the streamable weights, an eighth of the weights more.
Weights are counted as device memory from deserialization until the engine is collected.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from fakes import fake_onnx
from fakes.fake_context import IExecutionContext
from fakes.fake_inspector import EngineInspector
from fakes.fake_plan import Plan, PlanFormatError, TensorInfo, decode, encode
from fakes.fake_trt_base import (
    Dims,
    FakeCrashError,
    IHostMemory,
    ILogger,
    Installation,
    IStreamReaderV2,
    checked_logger,
    flag,
    installation,
)

SCRATCH_UNIT = 512


def scratch_bytes(plan: Plan, shape_of: Callable[[TensorInfo], tuple[int, ...]]) -> int:
    """Activation memory when every tensor has the shape that `shape_of` says."""
    total = 0
    for item in plan.tensors:
        itemsize = flag("DataType", item.dtype).itemsize
        total += int(math.prod(shape_of(item)) * itemsize)
    return -(-4 * total // SCRATCH_UNIT) * SCRATCH_UNIT


def resolve(plan: Plan, inputs: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors from those of the inputs; of outputs with dimensions that no input names, by running it.

    Raises:
        ValueError: two inputs disagree on a named dimension.
    """
    sizes: dict[str, int] = {}
    for item in plan.tensors:
        if item.is_input:
            for dim, size in zip(item.dims, inputs[item.name], strict=True):
                if isinstance(dim, str) and sizes.setdefault(dim, size) != size:
                    raise ValueError(f"dimension {dim} of input {item.name} is {size}, of another input {sizes[dim]}")
    if any(isinstance(dim, str) and dim not in sizes for item in plan.tensors for dim in item.dims):
        kinds = {item.name: item.dtype for item in plan.tensors}
        given = tuple((name, kinds[name], tuple(shape)) for name, shape in sorted(inputs.items()))
        return {**inputs, **fake_onnx.output_shapes(plan.model, given)}
    return {item.name: tuple(sizes[dim] if isinstance(dim, str) else dim for dim in item.dims) for item in plan.tensors}


class Runtime:
    """Deserializes plans.

    Without a usable GPU the constructor logs errors and returns an object whose use crashes: seen with the
    real lean runtime 11.4.
    """

    def __init__(self, logger: ILogger) -> None:
        self._logger = checked_logger(logger)
        self._host_code = False
        self._broken = not installation().cuda.gpus
        if self._broken:
            self._logger.log(
                ILogger.ERROR,
                "createInferRuntime: Error Code 6: API Usage Error (CUDA initialization failure with error: 35)",
            )
        installation().cuda.context_active = True
        self.max_threads = 1
        self.temporary_directory = ""

    def _alive(self) -> None:
        if self._broken:
            raise FakeCrashError("segmentation fault: a Runtime that was made without a usable GPU was used")

    @property
    def logger(self) -> ILogger:
        return self._logger

    @property
    def engine_host_code_allowed(self) -> bool:
        self._alive()
        return self._host_code

    @engine_host_code_allowed.setter
    def engine_host_code_allowed(self, allowed: bool) -> None:
        self._alive()
        self._host_code = bool(allowed)

    @property
    def num_DLA_cores(self) -> int:
        self._alive()
        return 0

    def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None:
        """The engine; None, with the reason logged as an error, if this runtime cannot run it here."""
        self._alive()
        here = installation()
        with here.cuda.lock:
            here.cuda.scheduler.refuse_in_capture("deserialize_cuda_engine")
            here.cuda.record("deserialize_cuda_engine")
            try:
                plan = decode(_all_bytes(serialized_engine))
                problem = self._problem(plan, here)
            except PlanFormatError as error:
                problem = f"IRuntime::deserializeCudaEngine: Error Code 1: Serialization (Serialization assertion failed: {error})"
            fault = here.cuda.fault("deserialize_cuda_engine")
            if fault is not None:
                problem = str(fault)
            if not problem and not here.cuda.reserve(plan.weights_bytes):
                problem = f"Error Code 2: OutOfMemory (Requested size was {plan.weights_bytes} bytes.)"
            if problem:
                self._logger.log(ILogger.ERROR, problem)
                return None
            if plan.gpu != here.cuda.name:
                self._logger.log(
                    ILogger.WARNING,
                    "Using an engine plan file across different models of devices is not supported and is likely to "
                    "affect performance or even cause errors.",
                )
            return here.classes["ICudaEngine"]._fake_create(plan, self, here)

    def _problem(self, plan: Plan, here: Installation) -> str:
        compatible = "VERSION_COMPATIBLE" in plan.flags
        if here.lean and not compatible:
            return "The engine was not built version-compatible; the lean runtime cannot run it. Error Code 6: API Usage Error"
        if compatible and not self._host_code:
            return (
                "Error Code 4: Internal Error (Engine contains host code that must be explicitly allowed; "
                "set engine_host_code_allowed)"
            )
        if plan.version != here.version and not (compatible and _minor(plan.version) <= _minor(here.version)):
            return (
                f"Error Code 6: API Usage Error (The engine plan file is not compatible with this version of TensorRT, "
                f"expecting library version {here.version} got {plan.version}, please rebuild.)"
            )
        capability = here.cuda.compute_capability
        allowed = {
            "NONE": capability == plan.compute_capability,
            "SAME_COMPUTE_CAPABILITY": capability == plan.compute_capability,
            "AMPERE_PLUS": capability >= (8, 0),
        }
        if not allowed[plan.hardware_compatibility]:
            return (
                "Error Code 6: API Usage Error (The engine plan file is generated on an incompatible device, expecting "
                f"compute {'.'.join(map(str, capability))} got compute {'.'.join(map(str, plan.compute_capability))}, please rebuild.)"
            )
        return ""


def _minor(version: str) -> tuple[int, ...]:
    return tuple(int(item) for item in version.split(".")[:2])


def _all_bytes(source: Any) -> bytes:
    if not isinstance(source, IStreamReaderV2):
        return bytes(memoryview(source))
    parts = []
    while part := source.read(1 << 20, 0):
        parts.append(bytes(part))
    return b"".join(parts)


class ICudaEngine:
    """A deserialized plan. The engine lives as long as anything refers to it; contexts do."""

    def __init__(self) -> None:
        raise TypeError("ICudaEngine: No constructor defined!")

    @classmethod
    def _fake_create(cls, plan: Plan, runtime: Runtime, here: Installation) -> ICudaEngine:
        engine = cls.__new__(cls)
        engine.fake_plan = plan
        engine.fake_logger = runtime.logger
        engine.fake_here = here
        engine.fake_contexts = 0
        engine._device = here.cuda.current_device
        engine._reserved = plan.weights_bytes
        engine._budget = plan.weights_bytes
        return engine

    def __del__(self) -> None:
        if hasattr(self, "_reserved"):
            with self.fake_here.cuda.lock:
                self.fake_here.cuda.device.reserve(self._device, -self._reserved)
                self.fake_here.cuda.record("~ICudaEngine", self.fake_plan.name)

    def _error(self, message: str) -> None:
        self.fake_logger.log(ILogger.ERROR, message)

    def _tensor(self, name: str) -> TensorInfo | None:
        found = next((item for item in self.fake_plan.tensors if item.name == name), None)
        if found is None:
            self._error(f"Error Code 3: Given invalid tensor name: {name}.")
        return found

    # Tensors

    @property
    def name(self) -> str:
        return self.fake_plan.name

    @property
    def num_io_tensors(self) -> int:
        return len(self.fake_plan.tensors)

    @property
    def num_layers(self) -> int:
        return len(self.fake_plan.layers)

    def get_tensor_name(self, index: int) -> str:
        return self.fake_plan.tensors[index].name

    def __getitem__(self, index: int) -> str:
        return self.fake_plan.tensors[index].name

    def get_tensor_mode(self, name: str) -> Any:
        item = self._tensor(name)
        return flag("TensorIOMode", "NONE" if item is None else "INPUT" if item.is_input else "OUTPUT")

    def get_tensor_dtype(self, name: str) -> Any:
        item = self._tensor(name)
        return flag("DataType", "FLOAT" if item is None else item.dtype)

    def get_tensor_shape(self, name: str) -> Dims:
        item = self._tensor(name)
        return Dims(() if item is None else item.shape)

    def get_tensor_location(self, name: str) -> Any:
        return flag("TensorLocation", "DEVICE")

    def is_shape_inference_io(self, name: str) -> bool:
        return False

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Dims]:
        item = self._tensor(name)
        if item is None or not item.is_input or not 0 <= profile_index < self.num_optimization_profiles:
            self._error(f"Error Code 3: no profile shape of {name} in profile {profile_index}")
            return []
        return [Dims(shape) for shape in self.fake_plan.profiles[profile_index][name]]

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.fake_plan.profiles)

    @property
    def profiling_verbosity(self) -> Any:
        return flag("ProfilingVerbosity", self.fake_plan.profiling_verbosity)

    @property
    def hardware_compatibility_level(self) -> Any:
        return flag("HardwareCompatibilityLevel", self.fake_plan.hardware_compatibility)

    @property
    def engine_capability(self) -> Any:
        return flag("EngineCapability", "STANDARD")

    @property
    def num_aux_streams(self) -> int:
        return 0

    # Memory

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        largest = {name: shapes[2] for name, shapes in self.fake_plan.profiles[profile_index].items()}
        shapes = resolve(self.fake_plan, largest)
        return scratch_bytes(self.fake_plan, lambda item: shapes[item.name]) + self.weight_streaming_scratch_memory_size

    @property
    def device_memory_size_v2(self) -> int:
        return max(self.get_device_memory_size_for_profile_v2(index) for index in range(self.num_optimization_profiles))

    def get_engine_stat(self, stat: Any = None) -> int:
        kind = "TOTAL_WEIGHTS_SIZE" if stat is None else stat.name
        if kind == "TOTAL_WEIGHTS_SIZE":
            return self.fake_plan.weights_bytes
        if "STRIP_PLAN" not in self.fake_plan.flags:
            self._error("Error Code 3: API Usage Error (kSTRIPPED_WEIGHTS_SIZE of an engine that is not stripped)")
            return -1
        return self.fake_plan.missing_bytes

    @property
    def streamable_weights_size(self) -> int:
        return self.fake_plan.weights_bytes if "WEIGHT_STREAMING" in self.fake_plan.flags else 0

    @property
    def weight_streaming_budget_v2(self) -> int:
        return self._budget if self.streamable_weights_size else 0

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, budget: int) -> None:
        if not self.streamable_weights_size:
            self._error("Error Code 3: the engine was not built with BuilderFlag::kWEIGHT_STREAMING")
        elif self.fake_contexts:
            self._error("Error Code 3: the weight streaming budget cannot be set while execution contexts exist")
        elif budget < 0:
            self._error(f"Error Code 3: the weight streaming budget must not be negative, received {budget}")
        else:
            resident = min(budget, self.streamable_weights_size)
            self.fake_here.cuda.device.reserve(self._device, resident - self._reserved)
            self._reserved, self._budget = resident, budget

    def get_weight_streaming_automatic_budget(self) -> int:
        return min(self.streamable_weights_size, self._reserved + self.fake_here.cuda.free_bytes // 2)

    @property
    def weight_streaming_scratch_memory_size(self) -> int:
        streams = self.streamable_weights_size > self.weight_streaming_budget_v2
        return -(-self.fake_plan.weights_bytes // 8 // SCRATCH_UNIT) * SCRATCH_UNIT if streams else 0

    # Refitting, contexts, inspection

    @property
    def refittable(self) -> bool:
        return bool({"REFIT", "REFIT_IDENTICAL", "REFIT_INDIVIDUAL"} & set(self.fake_plan.flags))

    def create_execution_context(self, strategy: Any = None) -> IExecutionContext | None:
        """A context; None, with the reason logged, if its scratch does not fit or weights are missing."""
        with self.fake_here.cuda.lock:
            self.fake_here.cuda.record("create_execution_context", self.name)
            if self.fake_plan.missing:
                self._error("Error Code 3: the weights were stripped from this engine; refit it first")
                return None
            kind = "STATIC" if strategy is None else strategy.name
            needed = 0 if kind == "USER_MANAGED" else self.device_memory_size_v2
            if not self.fake_here.cuda.reserve(needed):
                self._error(f"Error Code 2: OutOfMemory (Requested size was {needed} bytes.)")
                return None
            return IExecutionContext._fake_create(self, kind, needed)

    def create_engine_inspector(self) -> EngineInspector:
        if self.fake_here.lean:
            raise TypeError(
                "Unable to convert function return value to a Python type! EngineInspector is not registered"
            )
        return EngineInspector._fake_create(self)

    def serialize(self) -> IHostMemory:
        return IHostMemory(encode(self.fake_plan))
