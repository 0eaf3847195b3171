"""A deserialized plan: what it takes and returns, and its execution contexts."""

from __future__ import annotations

import mmap
from collections import OrderedDict
from pathlib import Path

import numpy as np

from engines.backends.cuda.gpu import Gpu
from engines.backends.cuda.memory import Stream
from engines.backends.cuda.plan import Shapes, Tensor
from engines.backends.tensorrt.bindings import LEAN, VERSION, require_supported, trt
from engines.backends.tensorrt.context import Context
from engines.backends.tensorrt.messages import LOG
from engines.errors import BackendError
from engines.manifest import EngineEntry

_MOST_CONTEXTS = 4  # per plan; a context takes host memory, and some device memory of its own


class Plan:
    """A plan in device memory.

    Attributes:
        name: for messages.
        inputs: by name.
        outputs: by name.
    """

    def __init__(self, name: str, path: Path, *, version_compatible: bool, weight_streaming: bool) -> None:
        """Loads a plan onto the current GPU; `current_gpu` must have been asked before.

        Args:
            name: for messages.
            path: the plan file, whose hash has been checked: TensorRT does not defend itself against altered plans.
            version_compatible: whether it was built so; TensorRT then runs host code that the plan contains.
            weight_streaming: whether weights may stay in host memory; TensorRT decides how much of them.

        Raises:
            BackendError: TensorRT refuses the plan, or device memory does not suffice; TensorRT's words.
        """
        require_supported()
        self.name = name
        self._contexts: OrderedDict[tuple[tuple[str, tuple[int, ...]], ...], Context] = OrderedDict()
        self._engine: trt.ICudaEngine | None = None
        self._runtime: trt.Runtime | None = None
        try:
            LOG.words()  # a runtime that cannot start only logs it
            self._runtime = trt.Runtime(LOG)
            LOG.check("TensorRT cannot start its runtime", "check the driver with nvidia-smi")
            self._runtime.engine_host_code_allowed = version_compatible
            self._engine = self._deserialize(self._runtime, path)
            self._refuse_stripped()
            if weight_streaming:
                self._stream_weights()
            tensors = [self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors)]
            is_input = {item: self.engine.get_tensor_mode(item) == trt.TensorIOMode.INPUT for item in tensors}
            self.inputs = {item: self._tensor(item) for item in tensors if is_input[item]}
            self.outputs = {item: self._tensor(item) for item in tensors if not is_input[item]}
        except BaseException:
            self.close()
            raise

    @property
    def engine(self) -> trt.ICudaEngine:
        """TensorRT's engine; do not keep it.

        Raises:
            BackendError: the plan was closed.
        """
        if self._engine is None:
            raise BackendError(f"engine {self.name} was closed")
        return self._engine

    def context(self, shapes: Shapes, stream: Stream) -> Context:
        """The execution context for these input shapes, made at first use; the oldest of too many is closed.

        Args:
            shapes: of all inputs.
            stream: what the context will be used on; at rest, or running this plan at the same shapes only.

        Raises:
            BackendError: inputs are missing or unknown, no optimization profile takes the shapes (with the bounds of
                each), or TensorRT refuses.
        """
        if set(shapes) != set(self.inputs):
            raise BackendError(f"engine {self.name} takes inputs {sorted(self.inputs)}, received {sorted(shapes)}")
        key = tuple(sorted(shapes.items()))
        if key not in self._contexts:
            while len(self._contexts) >= _MOST_CONTEXTS:
                self._contexts.popitem(last=False)[1].close()
            tensors = (*self.inputs.values(), *self.outputs.values())
            self._contexts[key] = Context(self.name, self.engine, tensors, shapes, self._profile(shapes), stream)
        self._contexts.move_to_end(key)
        return self._contexts[key]

    @property
    def note(self) -> str | None:
        """Why the engine runs without a CUDA graph at the shapes used last; None if it has or may get one."""
        return next(reversed(self._contexts.values())).note if self._contexts else None

    def close_contexts(self) -> None:
        """Frees graphs and contexts; their work must have finished."""
        for context in self._contexts.values():
            context.close()
        self._contexts.clear()

    def close(self) -> None:
        """Frees graphs, contexts, weights and runtime, in this order; their work must have finished."""
        self.close_contexts()
        self._engine = None
        self._runtime = None

    def _deserialize(self, tensorrt: trt.Runtime, path: Path) -> trt.ICudaEngine:
        try:
            with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                engine = tensorrt.deserialize_cuda_engine(data)
        except (OSError, ValueError) as error:
            raise BackendError(f"plan {path} cannot be read: {error}; copy the bundle again") from error
        if engine is None:
            raise LOG.fail(
                f"TensorRT {VERSION} cannot load engine {self.name} ({path.name})",
                "run it with the TensorRT version and GPU that the manifest names, free GPU memory or limit the resident "
                "engines, or build the bundle again on this host",
            )
        return engine

    def _refuse_stripped(self) -> None:
        stripped = _stripped_bytes(self.engine)
        LOG.words()  # it logs an error for plans that are not stripped
        if stripped > 0:
            raise BackendError(
                f"engine {self.name} is a stripped plan: {stripped} bytes of weights were left out; "
                "this release does not refit plans at run time, build the bundle without stripping"
            )

    def _stream_weights(self) -> None:
        if self.engine.streamable_weights_size == 0:
            return
        budget = self.engine.get_weight_streaming_automatic_budget()
        self.engine.weight_streaming_budget_v2 = budget
        if self.engine.weight_streaming_budget_v2 != budget:
            raise LOG.fail(
                f"engine {self.name} cannot stream weights with a budget of {budget} bytes", "free GPU memory"
            )

    def _tensor(self, name: str) -> Tensor:
        if self.engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
            raise BackendError(
                f"engine {self.name}: tensor {name} is a shape tensor in host memory, which is not supported"
            )
        known = {
            trt.DataType.FLOAT: np.float32,
            trt.DataType.HALF: np.float16,
            trt.DataType.INT64: np.int64,
            trt.DataType.INT32: np.int32,
            trt.DataType.BOOL: np.bool_,
        }
        dtype = self.engine.get_tensor_dtype(name)
        if dtype not in known:
            names = ", ".join(item.name for item in known)
            raise BackendError(f"engine {self.name}: tensor {name} is {dtype.name}, expected one of {names}")
        return Tensor(name, np.dtype(known[dtype]), tuple(self.engine.get_tensor_shape(name)))

    def _profile(self, shapes: Shapes) -> int:
        """Index of the first optimization profile that takes `shapes`."""
        refused: dict[str, list[str]] = {}
        for index in range(self.engine.num_optimization_profiles):
            ranges = {name: self._range(name, index) for name in shapes}
            wrong = [name for name, shape in shapes.items() if not _within(shape, *ranges[name])]
            if not wrong:
                return index
            least, most = ranges[wrong[0]]
            refused.setdefault(wrong[0], []).append(f"optimization profile {index} takes {least} to {most}")
        words = [f"input {name} has shape {shapes[name]}, {', '.join(taken)}" for name, taken in refused.items()]
        raise BackendError(
            f"engine {self.name}: {'; '.join(words)}; use a batch and size within one of them, or build the bundle for more"
        )

    def _range(self, name: str, profile: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The least and the largest shape of an input in an optimization profile."""
        fixed = self.inputs[name].shape
        if -1 not in fixed:
            return fixed, fixed
        least, _, most = (tuple(item) for item in self.engine.get_tensor_profile_shape(name, profile))
        return least, most


def _within(shape: tuple[int, ...], least: tuple[int, ...], most: tuple[int, ...]) -> bool:
    return len(shape) == len(least) and all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True))


def _stripped_bytes(engine: trt.ICudaEngine) -> int:
    """Weights that were left out of a plan; 0 before TensorRT 10.14, which cannot tell and makes no context then."""
    if not (hasattr(trt, "EngineStat") and hasattr(engine, "get_engine_stat")):
        return 0
    return int(engine.get_engine_stat(trt.EngineStat.STRIPPED_WEIGHTS_SIZE))


def require_runnable(name: str, entry: EngineEntry, gpu: Gpu) -> None:
    """Refuses, before anything is loaded, a plan that cannot run here.

    Raises:
        BackendError: the entry describes no plan, it was built for other GPUs, or it needs the full TensorRT.
    """
    if entry.plan is None:
        raise BackendError(f"engine {name}: the manifest does not describe its TensorRT plan; build the bundle again")
    if LEAN and not entry.plan.version_compatible:
        raise BackendError(
            f"engine {name} is not version compatible, and only the lean runtime is installed; "
            "pip install tensorrt, or build the bundle with version compatibility"
        )
    built_for = entry.device.split()[0]
    compatibility = entry.plan.hardware_compatibility
    runs = gpu.compute_capability >= (8, 0) if compatibility == "ampere_plus" else gpu.architecture == built_for
    if not runs:
        raise BackendError(
            f"engine {name} was built for {entry.device} with hardware compatibility {compatibility!r}; this GPU is "
            f"{gpu.described}; build the bundle on such a GPU"
        )
