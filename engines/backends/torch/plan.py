"""A torch package in device memory: contexts over shared buffers, with CUDA graphs."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np

from engines.backends.cuda.gpu import Gpu
from engines.backends.cuda.memory import SharedMemory, Stream
from engines.backends.cuda.plan import Shapes, Tensor
from engines.backends.torch.device_weights import OwnedWeights
from engines.backends.torch.library import torch
from engines.backends.torch.package import package_of
from engines.backends.torch.runner import Runner, run_in_pieces
from engines.errors import BackendError, first_line
from engines.manifest import EngineEntry

_MOST_CONTEXTS = 4  # per plan


class TorchPlan:
    """See `engines.backends.cuda.plan.DevicePlan`.

    Attributes:
        name: for messages.
        inputs: by name.
        outputs: by name.
    """

    def __init__(self, name: str, entry: EngineEntry, runner: Runner, weights: OwnedWeights, graphs: Any) -> None:
        """
        Args:
            name: for messages.
            entry: its manifest entry.
            runner: the loaded package; owned by the caller.
            weights: its weights in device memory; given back by `close`.
            graphs: the memory pool that the CUDA graphs of all plans share: they run one after the other.
        """
        self.name = name
        self.inputs = {spec.name: Tensor.of(spec) for spec in entry.inputs}
        self.outputs = {spec.name: Tensor.of(spec) for spec in entry.outputs}
        self._batch = package_of(name, entry).batch
        self._runner, self._graphs = runner, graphs
        self._weights: OwnedWeights | None = weights
        self._contexts: OrderedDict[tuple[tuple[str, tuple[int, ...]], ...], TorchContext] = OrderedDict()

    @property
    def note(self) -> str | None:
        """See `DevicePlan.note`."""
        return next(reversed(self._contexts.values())).note if self._contexts else None

    def context(self, shapes: Shapes, stream: Stream) -> TorchContext:
        """See `DevicePlan.context`."""
        if set(shapes) != set(self.inputs):
            raise BackendError(f"engine {self.name} takes inputs {sorted(self.inputs)}, received {sorted(shapes)}")
        rows = {shape[:1] for shape in shapes.values()}
        for name, shape in shapes.items():
            wanted = self.inputs[name].shape
            if len(shape) != len(wanted) or any(b not in (-1, a) for a, b in zip(shape, wanted, strict=True)):
                raise BackendError(f"engine {self.name}: input {name} has shape {shape}, expected {wanted} (-1: any)")
        if len(rows) != 1:
            raise BackendError(f"engine {self.name}: inputs differ in their number of rows: {dict(shapes)}")
        key = tuple(sorted(shapes.items()))
        if key not in self._contexts:
            while len(self._contexts) >= _MOST_CONTEXTS:
                self._contexts.popitem(last=False)[1].close()
            self._contexts[key] = TorchContext(self, shapes, stream)
        self._contexts.move_to_end(key)
        return self._contexts[key]

    def run(self, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
        """Enqueues one inference on torch's current stream; tensors in the order of `inputs` and `outputs`."""
        if self._weights is None:
            raise BackendError(f"engine {self.name} was closed")
        run_in_pieces(self._runner, self._weights.tensors, inputs, outputs, self._batch)

    def close(self) -> None:
        """See `DevicePlan.close`."""
        for context in self._contexts.values():
            context.close()
        self._contexts.clear()
        if self._weights is not None:
            self._weights.close()
            self._weights = None


class TorchContext:
    """See `engines.backends.cuda.plan.DeviceContext`.

    The first inference is a plain call, in which torch and cuBLAS finish their set-up; the next one is captured in a
    CUDA graph, and later ones launch it. A graph holds addresses: it is dropped when other buffers are bound.
    """

    def __init__(self, plan: TorchPlan, shapes: Shapes, stream: Stream) -> None:
        self.note: str | None = None
        self._plan = plan
        self._stream = torch.cuda.ExternalStream(stream.number)
        rows = next(iter(shapes.values()))[0]
        self.output_shapes = {name: (rows, *tensor.shape[1:]) for name, tensor in plan.outputs.items()}
        self._shapes = {**shapes, **self.output_shapes}
        self._bound: tuple[int, ...] | None = None
        self._tensors: tuple[list[torch.Tensor], list[torch.Tensor]] = [], []
        self._graph: torch.cuda.CUDAGraph | None = None
        self._ready = False

    def bind(self, memory: SharedMemory) -> dict[str, int]:
        """See `DeviceContext.bind`; activations come from torch's own allocator."""
        plan = self._plan
        tensors = (*plan.inputs.values(), *plan.outputs.values())
        addresses = {item.name: memory.device(item.buffer, self.size_bytes(item)) for item in tensors}
        bound = tuple(addresses.values())
        if bound != self._bound:
            self.close()
            views = [_view(addresses[item.name], self._shapes[item.name], item.dtype) for item in tensors]
            self._tensors = views[: len(plan.inputs)], views[len(plan.inputs) :]
            self._bound = bound
        return addresses

    def enqueue(self, stream: Stream) -> None:
        """See `DeviceContext.enqueue`."""
        if self._bound is None:
            raise BackendError(f"engine {self._plan.name}: no memory is bound; call bind first")
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            if self._ready and self._graph is None and self.note is None:
                self._capture()
            if self._graph is not None:
                self._graph.replay()
                return
            try:
                self._plan.run(*self._tensors)
            except RuntimeError as error:
                raise BackendError(f"engine {self._plan.name} failed to run: {first_line(error)}") from error
            self._ready = True

    def size_bytes(self, tensor: Tensor) -> int:
        """See `DeviceContext.size_bytes`."""
        return tensor.dtype.itemsize * int(np.prod(self._shapes[tensor.name], dtype=np.int64))

    def close(self) -> None:
        """Drops the graph."""
        self._graph, self._ready = None, False

    def _capture(self) -> None:
        """Captures an inference in a graph; where that fails, says why in `note`."""
        graph = torch.cuda.CUDAGraph()
        try:
            # Thread-local: another thread may be loading an engine, and its allocations must not end the capture.
            graph.capture_begin(pool=self._plan._graphs, capture_error_mode="thread_local")
            try:
                self._plan.run(*self._tensors)
            finally:
                graph.capture_end()
            self._graph = graph
        except RuntimeError as error:
            self.note = f"engine {self._plan.name} runs without a CUDA graph: {first_line(error)}"


def require_runnable(name: str, entry: EngineEntry, gpu: Gpu) -> None:
    """Refuses, before anything is loaded, a package that cannot run here.

    Raises:
        BackendError: the entry describes no package, or it was compiled by another torch or for another GPU.
    """
    package_of(name, entry)
    built_for = entry.device.split()[0]
    if gpu.architecture != built_for:
        raise BackendError(
            f"engine {name} was compiled for {entry.device}; this GPU is {gpu.described}; "
            "build the bundle on such a GPU"
        )


class _Memory:
    """Device memory that somebody else owns, as torch reads it."""

    def __init__(self, address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.__cuda_array_interface__ = {
            "data": (address, False),
            "shape": shape,
            "typestr": dtype.str,
            "version": 3,
        }


def _view(address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> torch.Tensor:
    return torch.as_tensor(_Memory(address, shape, dtype), device="cuda")
