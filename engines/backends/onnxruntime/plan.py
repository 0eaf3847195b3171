"""An ONNX graph in device memory: a session at fixed sizes, bound to the shared buffers."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engines.backends.cuda.gpu import Gpu
from engines.backends.cuda.memory import SharedMemory, Stream
from engines.backends.cuda.plan import Shapes, Tensor
from engines.backends.onnxruntime.provider import memory_advice, open_session
from engines.backends.onnxruntime.session import DTYPES, OnnxSession, axis_sizes, library, words
from engines.errors import BackendError
from engines.manifest import EngineEntry

Sizes = dict[str, int]  # of symbolic axes, by symbol
# The sizes that engines were used with last, by their input names: all denoisers of a bundle have the same.
LastSizes = MutableMapping[tuple[str, ...], Sizes]


@dataclass(frozen=True)
class Place:
    """Where plans live.

    Attributes:
        device: CUDA device index.
        stream: what all of them run on; owned by the host.
        last_sizes: shared by the plans of a host, which write and read it.
        optimized: see `provider.open_session`.
    """

    device: int
    stream: Stream
    last_sizes: LastSizes
    optimized: Path | None = None


class OrtPlan:
    """See `engines.backends.cuda.plan.DevicePlan`.

    A session has one set of sizes (`provider.open_session` says why), and a plan has one session: another batch size
    loads the file again. A plan that comes back into memory opens at the sizes that engines of its kind were used
    with last, before it is asked for a context; the first time there are none, and the session opens then.

    Attributes:
        name: for messages.
        inputs: by name.
        outputs: by name.
    """

    note: str | None = None  # a CUDA graph is never tried

    def __init__(self, name: str, entry: EngineEntry, path: Path, place: Place) -> None:
        """
        Args:
            name: for messages.
            entry: its manifest entry.
            path: the ONNX file, whose hash has been checked.
            place: where it lives.

        Raises:
            BackendError: as `provider.open_session`.
        """
        self.name = name
        self.inputs = {spec.name: Tensor.of(spec) for spec in entry.inputs}
        self.outputs = {spec.name: Tensor.of(spec) for spec in entry.outputs}
        self._specs, self._path, self._place = entry.inputs, path, place
        self._kind = tuple(self.inputs)
        self._closed = False
        self._session: OnnxSession | None = None
        self._sizes: Sizes = {}
        self._context: OrtContext | None = None
        if self._kind in place.last_sizes:
            self._open(place.last_sizes[self._kind])

    def context(self, shapes: Shapes, stream: Stream) -> OrtContext:
        """See `DevicePlan.context`."""
        if self._closed:
            raise BackendError(f"engine {self.name} was closed")
        if set(shapes) != set(self.inputs):
            raise BackendError(f"engine {self.name} takes inputs {sorted(self.inputs)}, received {sorted(shapes)}")
        if stream.number != self._place.stream.number:
            raise BackendError(f"engine {self.name} was loaded for another CUDA stream; load it on this one")
        sizes = axis_sizes(self.name, self._specs, shapes)
        if self._session is None or sizes != self._sizes:
            self._drop()  # frees its device memory before the next one takes it
            self._open(sizes)
        self._place.last_sizes[self._kind] = sizes
        if self._context is None:
            assert self._session is not None  # `_open` has made it
            self._context = OrtContext(self, self._session, shapes, self._place.device)
        return self._context

    def close(self) -> None:
        """See `DevicePlan.close`."""
        self._closed = True
        self._drop()

    def _open(self, sizes: Sizes) -> None:
        place = self._place
        session = open_session(
            self._path,
            name=self.name,
            sizes=sizes,
            device=place.device,
            stream=place.stream.number,
            optimized=place.optimized,
        )
        _require_same(self.name, "inputs", self.inputs, session.library_session.get_inputs())
        _require_same(self.name, "outputs", self.outputs, session.library_session.get_outputs())
        self._session, self._sizes = session, sizes

    def _drop(self) -> None:
        """Frees binding and session, in this order."""
        if self._context is not None:
            self._context.close()
        self._context = self._session = None


class OrtContext:
    """See `engines.backends.cuda.plan.DeviceContext`; scratch comes from the session's own allocator."""

    note: str | None = None

    def __init__(self, plan: OrtPlan, session: OnnxSession, shapes: Shapes, device: int) -> None:
        self._name = plan.name
        self._inputs, self._outputs = plan.inputs, plan.outputs
        self._session: Any = session.library_session
        self._device = device
        self.output_shapes = {
            item.name: _static(plan.name, item.name, item.shape) for item in self._session.get_outputs()
        }
        self._shapes = {**shapes, **self.output_shapes}
        self._options = library().RunOptions()
        self._options.log_severity_level = 4  # what fails is raised
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")  # the loop never waits
        self._bound: dict[str, int] = {}
        self._binding: Any = None

    def bind(self, memory: SharedMemory) -> dict[str, int]:
        """See `DeviceContext.bind`."""
        inputs, outputs = self._inputs.values(), self._outputs.values()
        addresses = {item.name: memory.device(item.buffer, self.size_bytes(item)) for item in (*inputs, *outputs)}
        if addresses != self._bound:
            binding = self._session.io_binding()
            for items, bind in ((inputs, binding.bind_input), (outputs, binding.bind_output)):
                for item in items:
                    shape = list(self._shapes[item.name])
                    bind(item.name, "cuda", self._device, item.dtype.type, shape, addresses[item.name])
            self._binding, self._bound = binding, addresses
        return addresses

    def enqueue(self, stream: Stream) -> None:
        """See `DeviceContext.enqueue`; the session is on the plan's stream, which `OrtPlan.context` has compared."""
        if self._binding is None:
            raise BackendError(f"engine {self._name}: no memory is bound; call bind first")
        try:
            self._session.run_with_iobinding(self._binding, self._options)
        except Exception as error:  # its exception classes share no public base
            said = words(error)
            raise BackendError(f"engine {self._name} failed to run: {said}{memory_advice(str(error))}") from error

    def size_bytes(self, tensor: Tensor) -> int:
        """See `DeviceContext.size_bytes`."""
        return tensor.dtype.itemsize * int(np.prod(self._shapes[tensor.name], dtype=np.int64))

    def close(self) -> None:
        """Lets go of binding and session."""
        self._binding = self._session = None
        self._bound = {}


def require_runnable(name: str, entry: EngineEntry, gpu: Gpu) -> None:
    """Refuses a graph that was checked on a GPU of another architecture.

    ONNX Runtime would load it: the file belongs to none. But which kernels it picks depends on the architecture, and
    the manifest's SQNR would be that of others.

    Raises:
        BackendError: naming both.
    """
    if gpu.architecture != entry.device.split()[0]:
        raise BackendError(
            f"engine {name} was built for {entry.device}; this GPU is {gpu.described}; build the bundle on such a GPU"
        )


def _require_same(engine: str, what: str, tensors: dict[str, Tensor], found: list[Any]) -> None:
    """Refuses a file whose inputs or outputs are not those of the manifest: memory is bound by the latter."""
    expected = {name: tensor.dtype for name, tensor in tensors.items()}
    held = {item.name: DTYPES.get(item.type, item.type) for item in found}
    if held != expected:
        raise BackendError(
            f"engine {engine}: the file has {what} {_listed(held)}, the manifest says {_listed(expected)}; "
            "build the bundle again"
        )


def _listed(dtypes: dict[str, Any]) -> str:
    return ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())


def _static(engine: str, name: str, shape: list[int | str | None]) -> tuple[int, ...]:
    if not all(isinstance(size, int) for size in shape):
        raise BackendError(
            f"engine {engine}: the shape of output {name} is {shape}, expected sizes; build the bundle again"
        )
    return tuple(int(size) for size in shape if isinstance(size, int))
