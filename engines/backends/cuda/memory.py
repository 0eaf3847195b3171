"""Device memory, pinned host memory, streams and events: owned objects over cuda-bindings.

Each object owns one CUDA handle until `close`, which can be called twice. Closing does not report a failure:
a free can only fail after an earlier call has, and that one was reported.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from cuda.bindings import runtime
from numpy.typing import NDArray

from engines.backends.cuda.gpu import cuda
from engines.errors import BackendError


class DeviceBuffer:
    """Device memory, 256-byte aligned, its content undefined.

    Attributes:
        address: device address, 0 once closed.
        size_bytes: how much was asked for.
    """

    def __init__(self, size_bytes: int, what: str) -> None:
        """Allocates.

        Args:
            size_bytes: may be 0.
            what: names the buffer in an error message.

        Raises:
            BackendError: there is not enough device memory.
        """
        self.address = 0
        self.size_bytes = size_bytes
        try:
            self.address = int(cuda(runtime.cudaMalloc(max(size_bytes, 1))))
        except BackendError as error:
            raise BackendError(
                f"cannot allocate {size_bytes} bytes of GPU memory for {what}: {error}; use a smaller batch or fewer "
                "resident engines, or end other processes on the GPU"
            ) from error

    def close(self) -> None:
        """Frees the memory; work that uses it must have finished."""
        if self.address:
            address, self.address = self.address, 0
            runtime.cudaFree(address)


class PinnedBuffer:
    """Page-locked host memory, which the device copies from and to while the host goes on.

    Attributes:
        size_bytes: its size.
    """

    def __init__(self, size_bytes: int) -> None:
        """Allocates.

        Raises:
            BackendError: the system has no memory that it may lock.
        """
        self.size_bytes = size_bytes
        self._address = int(cuda(runtime.cudaHostAlloc(max(size_bytes, 1), runtime.cudaHostAllocDefault)))

    def view(self, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """A host array over part of the buffer; it must not be used after `close`."""
        size_bytes = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        if offset + size_bytes > self.size_bytes:
            raise ValueError(f"{size_bytes} bytes at {offset} pass the end of a buffer of {self.size_bytes}")
        raw = (ctypes.c_byte * size_bytes).from_address(self._address + offset)
        return np.ndarray(shape, dtype, memoryview(raw))

    def close(self) -> None:
        """Frees the memory; copies from and to it must have finished."""
        if self._address:
            address, self._address = self._address, 0
            runtime.cudaFreeHost(address)


class Event:
    """A point in a stream's work, with a time stamp; a thread that waits for it sleeps."""

    def __init__(self) -> None:
        self._handle: Any = cuda(runtime.cudaEventCreateWithFlags(runtime.cudaEventBlockingSync))

    def record(self, stream: Stream) -> None:
        """Places the event behind everything that was enqueued on `stream` so far."""
        cuda(runtime.cudaEventRecord(self._handle, stream.handle))

    def wait(self) -> None:
        """Blocks the calling thread until the device has passed the event.

        Raises:
            BackendError: work before the event failed on the device.
        """
        cuda(runtime.cudaEventSynchronize(self._handle))

    def seconds_since(self, earlier: Event) -> float:
        """Device time between two events that were passed.

        Raises:
            BackendError: one of them was not.
        """
        return float(cuda(runtime.cudaEventElapsedTime(earlier._handle, self._handle))) / 1000.0

    def close(self) -> None:
        """Destroys the event."""
        if self._handle is not None:
            handle, self._handle = self._handle, None
            runtime.cudaEventDestroy(handle)


class Stream:
    """A queue of device work, independent of the default stream.

    Attributes:
        handle: the CUDA stream, for other calls.
    """

    def __init__(self) -> None:
        self.handle: Any = cuda(runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking))

    @property
    def number(self) -> int:
        """The handle as a number, which TensorRT wants."""
        return int(self.handle)

    def upload(self, target: int, source: NDArray[Any]) -> None:
        """Enqueues a copy of a contiguous view of pinned memory to device address `target`."""
        kind = runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        cuda(runtime.cudaMemcpyAsync(target, source.ctypes.data, source.nbytes, kind, self.handle))

    def download(self, target: NDArray[Any], source: int) -> None:
        """Enqueues a copy from device address `source` to a contiguous view of pinned memory."""
        kind = runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        cuda(runtime.cudaMemcpyAsync(target.ctypes.data, source, target.nbytes, kind, self.handle))

    def synchronize(self) -> None:
        """Blocks until everything enqueued has finished.

        Raises:
            BackendError: some of it failed on the device.
        """
        cuda(runtime.cudaStreamSynchronize(self.handle))

    def rest(self) -> None:
        """Waits like `synchronize` where something has failed already: another failure is not reported."""
        if self.handle is not None:
            runtime.cudaStreamSynchronize(self.handle)

    def close(self) -> None:
        """Destroys the stream."""
        if self.handle is not None:
            handle, self.handle = self.handle, None
            runtime.cudaStreamDestroy(handle)


class SharedMemory:
    """The memory that the engines of a bundle share on one stream: tensors, scratch, and pinned staging.

    A buffer is allocated when first asked for and kept; asked for more, it is replaced by a larger one, after
    the stream has come to rest. Its content is undefined whenever it is handed out.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._buffers: dict[str, DeviceBuffer] = {}
        self._staging: PinnedBuffer | None = None
        self._staged_bytes = 0

    def device(self, what: str, size_bytes: int) -> int:
        """Address of at least `size_bytes` of device memory that belongs to the purpose `what`.

        Raises:
            BackendError: there is not enough device memory.
        """
        held = self._buffers.get(what)
        if held is None or held.size_bytes < size_bytes:
            if held is not None:
                self._stream.synchronize()
                self._buffers.pop(what).close()
            self._buffers[what] = DeviceBuffer(size_bytes, what)
        return self._buffers[what].address

    def size_bytes(self, what: str) -> int:
        """What is allocated for a purpose, 0 for nothing."""
        return self._buffers[what].size_bytes if what in self._buffers else 0

    def stage(self, size_bytes: int) -> None:
        """Makes room for `size_bytes` of pinned views and takes back all earlier ones; the stream must be at rest.

        Raises:
            BackendError: the system has no memory that it may lock.
        """
        self._staged_bytes = 0
        if self._staging is None or self._staging.size_bytes < size_bytes:
            if self._staging is not None:
                staging, self._staging = self._staging, None
                staging.close()
            self._staging = PinnedBuffer(size_bytes)

    def pinned(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """A pinned host array out of the room that `stage` made, valid until `stage` is called again."""
        if self._staging is None:
            raise ValueError("stage was not called")
        view = self._staging.view(self._staged_bytes, shape, dtype)
        self._staged_bytes += staged_bytes(view.nbytes)
        return view

    def upload(self, what: str, values: NDArray[Any]) -> int:
        """Enqueues a copy of a host array, by way of pinned memory; returns its device address.

        Raises:
            BackendError: there is not enough device memory.
        """
        address = self.device(what, values.nbytes)
        view = self.pinned(values.shape, values.dtype)
        view[...] = values
        self._stream.upload(address, view)
        return address

    def close(self) -> None:
        """Frees everything; the stream must be at rest."""
        for buffer in self._buffers.values():
            buffer.close()
        self._buffers.clear()
        if self._staging is not None:
            self._staging.close()
            self._staging = None


def staged_bytes(size_bytes: int) -> int:
    """What a view of `size_bytes` takes of the staging room: the next one starts aligned."""
    return -(-size_bytes // 256) * 256
