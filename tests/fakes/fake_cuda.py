"""State of the fake CUDA driver, and the modules `cuda.bindings.runtime` and `.driver` made from it.

"Device memory" is host memory, so an address works with ctypes and numpy, and every access is checked
(`fake_memory`). All work is queued (`fake_streams`), copies from pageable host memory too: the bytes are read
when the copy runs, so a host buffer that is reused or dropped before a synchronise shows as wrong data. What
is undefined behaviour on a real GPU raises `FakeCudaError`.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np

from fakes import cuda_enums
from fakes.cuda_enums import CUresult, cudaError_t
from fakes.fake_memory import FakeCudaError, Memory
from fakes.fake_streams import Scheduler, Stream

# Functions registered by fake_runtime_api and fake_driver_api: name -> function(cuda, *args).
RUNTIME_API: dict[str, Callable[..., tuple[Any, ...]]] = {}
DRIVER_API: dict[str, Callable[..., tuple[Any, ...]]] = {}

# name of a __global__ function -> callable(grid, block, args). grid and block are (x, y, z); args are Python
# ints, floats and addresses, already rounded to the declared C type. See `device_array`.
kernels: dict[str, Callable[[tuple[int, int, int], tuple[int, int, int], list[Any]], None]] = {}

_current: list[FakeCuda] = []


class Handle:
    """What the real package wraps a pointer in: cudaStream_t, cudaEvent_t, CUmodule, ..."""

    def __init__(self, init_value: int = 0) -> None:
        self._value = int(init_value)

    def __int__(self) -> int:
        return self._value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, (int, Handle)) and int(other) == self._value

    def __hash__(self) -> int:
        return hash(self._value)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._value:#x}>"


_RUNTIME_HANDLES = ("cudaStream_t", "cudaEvent_t", "cudaGraph_t", "cudaGraphExec_t")
_DRIVER_HANDLES = ("CUmodule", "CUfunction", "CUstream")
HANDLES = {name: type(name, (Handle,), {}) for name in (*_RUNTIME_HANDLES, *_DRIVER_HANDLES)}


@dataclass(frozen=True)
class Call:
    """One call into the fakes, in the order of `FakeCuda.calls`."""

    name: str
    args: tuple[Any, ...]


@dataclass
class FakeCuda:
    """The fake driver.

    Attributes:
        gpus, name, compute_capability, total_bytes, driver_version: what the device queries answer;
            every GPU is alike. `driver_version` as 1000 * major + 10 * minor.
        no_gpu_error: what calls return when `gpus` is 0.
        policy: see `fake_streams`; may be changed at any time through `scheduler.policy`.
        calls: every call, and what the other fakes record (execute_async_v3, ...).
        device, pinned: allocations.
    """

    gpus: int = 1
    name: str = "Fake H200"
    compute_capability: tuple[int, int] = (9, 0)
    total_bytes: int = 8 << 30
    driver_version: int = 13000
    no_gpu_error: cudaError_t = cudaError_t.cudaErrorNoDevice
    policy: str = "younger_first"
    calls: list[Call] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.lock = threading.RLock()
        self.device = Memory("device")
        self.pinned = Memory("pinned host")
        self.scheduler = Scheduler(self.policy)
        self.context_active = False  # a call that needs the device has made the primary context
        self._faults: dict[str, dict[int, Any]] = {}
        self._counts: dict[str, int] = {}
        self._handles = 0x1000
        self._objects: dict[int, Any] = {}
        self._functions: dict[int, tuple[int, Any]] = {}  # handle -> (its module's handle, function)
        self._local = threading.local()

    # For tests

    def fail(self, function: str, error: Any, nth: int = 1) -> None:
        """Makes the `nth` call from now (1: the next) of a cuda... or cu... function return `error`."""
        self._faults.setdefault(function, {})[self._counts.get(function, 0) + nth] = error

    def names(self, start: int = 0) -> list[str]:
        """Names of the calls from index `start` on (remember `len(calls)` to look at one stretch)."""
        return [call.name for call in self.calls[start:]]

    def count(self, name: str) -> int:
        return self.names().count(name)

    @property
    def bytes_in_use(self) -> int:
        """Device memory of GPU 0; weights of engines and scratch of contexts included."""
        return self.device.in_use.get(0, 0)

    @property
    def peak_bytes(self) -> int:
        return self.device.peak.get(0, 0)

    def leaks(self) -> list[str]:
        """What is still alive: memory, streams, events, graphs, modules; [] when all was given back."""
        found = [
            f"{item.nbytes} bytes of {memory.kind} memory"
            for memory in (self.device, self.pinned)
            for item in memory.live.values()
        ]
        reserved = sum(self.device.in_use.values()) - sum(item.nbytes for item in self.device.live.values())
        found += [f"{reserved} bytes of engines or contexts"] if reserved else []
        found += [type(item).__name__ for item in self._objects.values()]
        return found + ["Stream" for item in self.scheduler.streams.values() if item.handle and not item.destroyed]

    # For the other fakes

    def record(self, name: str, *args: Any) -> None:
        self.calls.append(Call(name, args))

    def fault(self, name: str) -> Any:
        """The planned error of this call, or None."""
        self._counts[name] = self._counts.get(name, 0) + 1
        return self._faults.get(name, {}).pop(self._counts[name], None)

    def new_handle(self) -> int:
        self._handles += 0x10
        return self._handles

    def add(self, kind: str, item: Any) -> Handle:
        handle = HANDLES[kind](self.new_handle())
        self._objects[int(handle)] = item
        return handle

    def get(self, handle: Any, kind: type) -> Any:
        found = self._objects.get(int(handle))
        if not isinstance(found, kind):
            raise FakeCudaError(f"{int(handle):#x} is not a live {kind.__name__}")
        return found

    def drop(self, handle: Any, kind: type) -> Any:
        found = self.get(handle, kind)
        del self._objects[int(handle)]
        return found

    def add_function(self, module: Any, function: Any) -> Handle:
        handle = HANDLES["CUfunction"](self.new_handle())
        self._functions[int(handle)] = (int(module), function)
        return handle

    def function(self, handle: Any) -> Any:
        if int(handle) not in self._functions:
            raise FakeCudaError(f"{int(handle):#x} is not a function of a loaded module")
        return self._functions[int(handle)][1]

    def drop_functions(self, module: Any) -> None:
        self._functions = {key: item for key, item in self._functions.items() if item[0] != int(module)}

    def stream(self, handle: Any) -> Stream:
        return self.scheduler.stream(int(handle or 0))

    @property
    def current_device(self) -> int:
        """Of the calling thread."""
        return getattr(self._local, "device", 0)

    def set_device(self, device: int) -> None:
        self._local.device = device
        self.context_active = True

    @property
    def free_bytes(self) -> int:
        return self.total_bytes - self.device.in_use.get(self.current_device, 0)

    def reserve(self, nbytes: int) -> bool:
        """Counts device memory without storage; False if there is not so much."""
        if nbytes > self.free_bytes:
            return False
        self.device.reserve(self.current_device, nbytes)
        return True


def api(table: dict[str, Callable[..., tuple[Any, ...]]], values: int = 0) -> Callable[..., Any]:
    """Registers a function; the wrapper records the call, injects faults and answers for a host without a GPU.

    Args:
        table: `RUNTIME_API` or `DRIVER_API`.
        values: how many values the function returns after the status; they are None on an error.
    """

    def register(function: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
        name = function.__name__

        @functools.wraps(function)
        def call(cuda: FakeCuda, *args: Any) -> tuple[Any, ...]:
            with cuda.lock:
                cuda.record(name, *args)
                error = cuda.fault(name)
                if error is None and not cuda.gpus:
                    error = cuda.no_gpu_error if table is RUNTIME_API else CUresult.CUDA_ERROR_NO_DEVICE
                return (error, *(None,) * values) if error is not None else function(cuda, *args)

        table[name] = call
        return call

    return register


def current() -> FakeCuda:
    """The installed fake driver."""
    if not _current:
        raise FakeCudaError("no fake CUDA is installed; call fakes.install.install")
    return _current[-1]


def set_current(cuda: FakeCuda | None) -> None:
    _current[:] = [] if cuda is None else [cuda]


def device_array(address: int, dtype: Any, shape: int | tuple[int, ...]) -> np.ndarray:
    """A writable view of live device memory, for `kernels`.

    Raises:
        FakeCudaError: the range is not inside one live allocation.
    """
    dtype = np.dtype(dtype)
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    nbytes = math.prod(shape) * dtype.itemsize
    allocation = current().device.check(address, nbytes, "kernel")
    start = address - allocation.address
    return allocation.payload[start : start + nbytes].view(dtype).reshape(shape)


def make_module(name: str, table: Mapping[str, Callable[..., Any]]) -> ModuleType:
    """`cuda.bindings.runtime` or `cuda.bindings.driver`; its functions act on the driver that is installed."""
    module = ModuleType(name, "A fake; see fakes.fake_cuda.")
    for function_name, function in table.items():
        setattr(module, function_name, _on_current(function))
    is_runtime = table is RUNTIME_API
    for handle_name in _RUNTIME_HANDLES if is_runtime else _DRIVER_HANDLES:
        setattr(module, handle_name, HANDLES[handle_name])
    for enum_name in ("cudaError_t", "cudaMemcpyKind", "cudaStreamCaptureMode") if is_runtime else ("CUresult",):
        setattr(module, enum_name, getattr(cuda_enums, enum_name))
    for constant, value in cuda_enums.CONSTANTS.items() if is_runtime else ():
        setattr(module, constant, value)
    return module


def _on_current(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        return function(current(), *args, **options)

    return call
