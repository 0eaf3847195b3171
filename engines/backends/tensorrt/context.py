"""An execution context at fixed shapes, in shared memory, with a CUDA graph."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from cuda.bindings import runtime

from engines.backends.cuda.gpu import cuda
from engines.backends.cuda.memory import SharedMemory, Stream
from engines.backends.cuda.plan import Shapes, Tensor
from engines.backends.tensorrt.bindings import trt
from engines.backends.tensorrt.messages import LOG
from engines.errors import BackendError

_HOW = "free GPU memory, or build the bundle again on this host"


class Context:
    """A plan's execution context at fixed shapes, in memory that the caller owns; captured in a CUDA graph.

    The first inference is a plain enqueue, in which TensorRT finishes its set-up for the shapes; the next one
    is captured, and later ones launch the graph. A graph holds addresses and the context's state, so a context
    has one only, and it is dropped when other memory is bound.

    Attributes:
        scratch_bytes: device memory for activations that `bind` must be given at least.
        output_shapes: by output name.
        note: why there is no CUDA graph although one was tried, else None.
    """

    def __init__(
        self,
        name: str,
        engine: trt.ICudaEngine,
        tensors: Iterable[Tensor],
        shapes: Shapes,
        profile: int,
        stream: Stream,
    ) -> None:
        """Makes the context; it takes part in nothing until `bind`.

        Args:
            name: of the plan, for messages.
            engine: the plan's `ICudaEngine`.
            tensors: all its inputs and outputs.
            shapes: of all inputs, within optimization profile `profile`.
            profile: index.
            stream: where the profile is switched; what the context will run on.

        Raises:
            BackendError: TensorRT refuses; its words.
        """
        self._name = name
        self._tensors = tuple(tensors)
        self._bound: tuple[Any, ...] | None = None
        self._ready = False  # for capture
        self._graph: Any = None
        self.note: str | None = None
        self._context: trt.IExecutionContext | None = engine.create_execution_context(
            trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        del engine  # the traceback of an error must not keep its memory
        if self._context is None:
            raise LOG.fail(f"engine {name}: TensorRT makes no execution context", _HOW)
        try:
            if not self._live.set_optimization_profile_async(profile, stream.number):
                raise LOG.fail(f"engine {name}: TensorRT refuses optimization profile {profile}", _HOW)
            self._set_shapes(shapes)
        except BaseException:
            self.close()
            raise

    def bind(self, memory: SharedMemory) -> dict[str, int]:
        """Makes the context use the shared buffers of its tensors and the shared scratch, which grow as needed.

        Returns:
            Device address of every input and output.

        Raises:
            BackendError: there is not enough device memory, or TensorRT refuses an address.
        """
        addresses = {item.name: memory.device(item.buffer, self.size_bytes(item)) for item in self._tensors}
        scratch = memory.device("scratch", self.scratch_bytes)
        bound = (*addresses.values(), scratch)
        if bound != self._bound:
            self._drop_graph()
            self._bound = None
            for name, address in addresses.items():
                if not self._live.set_tensor_address(name, address):
                    raise LOG.fail(
                        f"engine {self._name}: TensorRT refuses the buffer of {name}", "report this as a bug"
                    )
            self._live.set_device_memory(scratch, memory.size_bytes("scratch"))
            self._bound = bound
        return addresses

    def enqueue(self, stream: Stream) -> None:
        """Enqueues one inference over the bound buffers.

        Raises:
            BackendError: nothing is bound, or TensorRT or CUDA refuses.
        """
        if self._bound is None:
            raise BackendError(f"engine {self._name}: no memory is bound; call bind first")
        if self._ready and self._graph is None and self.note is None:
            self._capture(stream)
        if self._graph is not None:
            cuda(runtime.cudaGraphLaunch(self._graph, stream.handle))
            return
        self._enqueue_plain(stream)
        self._ready = True

    def size_bytes(self, tensor: Tensor) -> int:
        """Size of an input or output at the context's shapes."""
        return tensor.dtype.itemsize * int(np.prod(self._shapes[tensor.name], dtype=np.int64))

    def layer_times(self, stream: Stream, repeats: int) -> dict[str, float]:
        """Times every layer over the bound buffers; the context keeps the profiler, so close it then.

        Returns:
            Mean time in ms by layer name, in the order of execution.

        Raises:
            BackendError: an inference failed, or TensorRT reports no times.
        """
        profiler = _LayerTimes()
        self._drop_graph()
        self._live.enqueue_emits_profile = False  # else every enqueue waits for the device
        self._live.profiler = profiler
        for index in range(repeats + 1):
            self._enqueue_plain(stream)
            stream.synchronize()
            profiler.counts = index > 0
            if not self._live.report_to_profiler():
                raise LOG.fail(
                    f"engine {self._name}: TensorRT reports no layer times",
                    "measure again while nothing else uses the GPU",
                )
        return {name: total / repeats for name, total in profiler.total_ms.items()}

    def close(self) -> None:
        """Frees graph and context."""
        self._drop_graph()
        self._context = None

    @property
    def _live(self) -> trt.IExecutionContext:
        if self._context is None:
            raise BackendError(f"engine {self._name}: its execution context was closed")
        return self._context

    def _set_shapes(self, shapes: Shapes) -> None:
        failed = f"engine {self._name}: TensorRT refuses the shapes {dict(shapes)}"
        for name, shape in shapes.items():
            if not self._live.set_input_shape(name, shape):
                raise LOG.fail(failed, _HOW)
        try:
            missing = self._live.infer_shapes()
        except RuntimeError as error:
            raise LOG.fail(failed, _HOW) from error
        if missing:
            raise BackendError(f"{failed}: {', '.join(missing)} not specified; {_HOW}")
        self.scratch_bytes = int(self._live.update_device_memory_size_for_shapes())
        outputs = [tensor.name for tensor in self._tensors if tensor.name not in shapes]
        self.output_shapes = {name: tuple(self._live.get_tensor_shape(name)) for name in outputs}
        self._shapes = {**shapes, **self.output_shapes}

    def _enqueue_plain(self, stream: Stream) -> None:
        if not self._live.execute_async_v3(stream.number):
            raise LOG.fail(f"engine {self._name} failed to run", "check the GPU's state with nvidia-smi")

    def _capture(self, stream: Stream) -> None:
        """Captures an inference in a graph; where that fails, says why in `note`."""
        graph: Any = None
        try:
            # Thread-local: another thread may be loading an engine, and its allocations must not end the capture.
            mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
            cuda(runtime.cudaStreamBeginCapture(stream.handle, mode))
            accepted = False
            try:
                accepted = self._live.execute_async_v3(stream.number)
            finally:
                status, graph = runtime.cudaStreamEndCapture(stream.handle)
            if not accepted:
                raise LOG.fail("TensorRT cannot enqueue while a stream captures", "it runs without")
            cuda((status, graph))
            self._graph = cuda(runtime.cudaGraphInstantiate(graph, 0))
        except BackendError as error:
            self.note = f"engine {self._name} runs without a CUDA graph: {error}"
        finally:
            if graph is not None and int(graph):
                runtime.cudaGraphDestroy(graph)

    def _drop_graph(self) -> None:
        self._ready = False
        if self._graph is not None:
            graph, self._graph = self._graph, None
            runtime.cudaGraphExecDestroy(graph)


class _LayerTimes(trt.IProfiler):
    """Adds up the times that TensorRT reports."""

    def __init__(self) -> None:
        trt.IProfiler.__init__(self)
        self.counts = False
        self.total_ms: dict[str, float] = {}

    def report_layer_time(self, layer_name: str, ms: float) -> None:
        """Called by TensorRT for every layer of an inference."""
        if self.counts:
            self.total_ms[layer_name] = self.total_ms.get(layer_name, 0.0) + ms
