"""The functions of the fake `cuda.bindings.runtime`; arguments and returned tuples as in cuda-bindings 13.

The first parameter, `cuda`, is bound by `fake_cuda.make_module`. cudaFree does not synchronise: queued work
that still needs the memory finds it freed.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np

from fakes.cuda_enums import WORDS, cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode
from fakes.fake_cuda import HANDLES, RUNTIME_API, FakeCuda, api
from fakes.fake_memory import FakeCudaError, copy
from fakes.fake_streams import Event, Graph

OK = cudaError_t.cudaSuccess
COPY_MS = 0.001

_SIDES = {  # kind -> is the destination on the device, is the source
    cudaMemcpyKind.cudaMemcpyHostToHost: (False, False),
    cudaMemcpyKind.cudaMemcpyHostToDevice: (True, False),
    cudaMemcpyKind.cudaMemcpyDeviceToHost: (False, True),
    cudaMemcpyKind.cudaMemcpyDeviceToDevice: (True, True),
}


@dataclass
class cudaDeviceProp:
    """The fields of the real struct that are used."""

    name: bytes
    major: int
    minor: int
    totalGlobalMem: int
    multiProcessorCount: int = 132
    sharedMemPerBlockOptin: int = 232448
    l2CacheSize: int = 50 << 20


@dataclass
class GraphExec:
    """An instantiated graph."""

    graph: Graph


def address_of(pointer: Any) -> int:
    """Address of what the real package takes as a pointer: an int, None, or an object with a buffer."""
    if pointer is None:
        return 0
    if isinstance(pointer, np.ndarray):
        return pointer.ctypes.data
    try:
        return int(pointer)
    except (TypeError, ValueError):
        return np.frombuffer(pointer, np.uint8).ctypes.data


# Devices


@api(RUNTIME_API, 1)
def cudaGetDeviceCount(cuda: FakeCuda):
    return OK, cuda.gpus


@api(RUNTIME_API, 1)
def cudaGetDevice(cuda: FakeCuda):
    return OK, cuda.current_device


@api(RUNTIME_API)
def cudaSetDevice(cuda: FakeCuda, device):
    if not 0 <= device < cuda.gpus:
        return (cudaError_t.cudaErrorInvalidDevice,)
    cuda.set_device(device)
    return (OK,)


@api(RUNTIME_API, 1)
def cudaGetDeviceProperties(cuda: FakeCuda, device):
    if not 0 <= device < cuda.gpus:
        return cudaError_t.cudaErrorInvalidDevice, None
    return OK, cudaDeviceProp(cuda.name.encode(), *cuda.compute_capability, cuda.total_bytes)


@api(RUNTIME_API, 2)
def cudaMemGetInfo(cuda: FakeCuda):
    cuda.context_active = True
    return OK, cuda.free_bytes, cuda.total_bytes


def cudaDriverGetVersion(cuda: FakeCuda):
    cuda.record("cudaDriverGetVersion")
    return OK, cuda.driver_version if cuda.no_gpu_error != cudaError_t.cudaErrorInsufficientDriver or cuda.gpus else 0


def cudaGetErrorString(cuda: FakeCuda, error):
    return OK, WORDS.get(error, error.name.encode())


RUNTIME_API |= {"cudaDriverGetVersion": cudaDriverGetVersion, "cudaGetErrorString": cudaGetErrorString}


@api(RUNTIME_API)
def cudaDeviceSynchronize(cuda: FakeCuda):
    cuda.scheduler.refuse_in_capture("cudaDeviceSynchronize")
    cuda.scheduler.run_all()
    return (OK,)


# Memory


@api(RUNTIME_API, 1)
def cudaMalloc(cuda: FakeCuda, size):
    cuda.scheduler.refuse_in_capture("cudaMalloc", relaxed=True)
    cuda.context_active = True
    if size == 0:
        return OK, 0
    if size > cuda.free_bytes:
        return cudaError_t.cudaErrorMemoryAllocation, None
    return OK, cuda.device.allocate(cuda.current_device, int(size))


@api(RUNTIME_API)
def cudaFree(cuda: FakeCuda, devPtr):
    cuda.scheduler.refuse_in_capture("cudaFree")
    cuda.context_active = True
    if address_of(devPtr):
        cuda.device.free(address_of(devPtr))
    return (OK,)


@api(RUNTIME_API, 1)
def cudaHostAlloc(cuda: FakeCuda, size, flags):
    cuda.scheduler.refuse_in_capture("cudaHostAlloc", relaxed=True)
    cuda.context_active = True
    return OK, cuda.pinned.allocate(-1, int(size))


@api(RUNTIME_API)
def cudaFreeHost(cuda: FakeCuda, ptr):
    cuda.scheduler.refuse_in_capture("cudaFreeHost")
    cuda.pinned.free(address_of(ptr))
    return (OK,)


@api(RUNTIME_API)
def cudaMemcpyAsync(cuda: FakeCuda, dst, src, count, kind, stream):
    if not isinstance(kind, cudaMemcpyKind):
        raise TypeError(f"kind must be a cudaMemcpyKind, received {kind!r}")
    target, source, count = address_of(dst), address_of(src), int(count)
    stream = cuda.stream(stream)
    if count == 0:
        return (OK,)
    memories = [_memory(cuda, target, "destination"), _memory(cuda, source, "source")]
    if kind != cudaMemcpyKind.cudaMemcpyDefault:
        sides = tuple(memory is cuda.device for memory in memories)
        if sides != _SIDES[kind]:
            raise FakeCudaError(f"{kind.name}, but the destination and the source are on the device: {sides}")

    def check() -> None:
        for memory, address, what in zip(memories, (target, source), ("to", "from"), strict=True):
            if memory is not None:
                memory.check(address, count, f"cudaMemcpyAsync {what}")

    def action() -> None:
        check()
        copy(target, source, count)

    check()
    cuda.scheduler.enqueue(
        stream, "memcpy", action, reads=((source, count),), writes=((target, count),), milliseconds=COPY_MS
    )
    return (OK,)


def _memory(cuda: FakeCuda, address: int, what: str):
    """The device or pinned memory an address lies in; None for pageable host memory."""
    for memory in (cuda.device, cuda.pinned):
        if memory.find(address) is not None:
            return memory
        if memory.was_freed(address):
            raise FakeCudaError(f"cudaMemcpyAsync: the {what} {address:#x} is freed {memory.kind} memory")
    if not address:
        raise FakeCudaError(f"cudaMemcpyAsync: the {what} is a null pointer")
    return None


@api(RUNTIME_API)
def cudaMemsetAsync(cuda: FakeCuda, devPtr, value, count, stream):
    target, count = address_of(devPtr), int(count)

    def action() -> None:
        cuda.device.check(target, count, "cudaMemsetAsync")
        ctypes.memset(target, value, count)

    cuda.device.check(target, count, "cudaMemsetAsync")
    cuda.scheduler.enqueue(cuda.stream(stream), "memset", action, writes=((target, count),), milliseconds=COPY_MS)
    return (OK,)


# Streams


@api(RUNTIME_API, 1)
def cudaStreamCreateWithFlags(cuda: FakeCuda, flags):
    cuda.context_active = True
    handle = cuda.new_handle()
    cuda.scheduler.create(handle, blocking=flags == 0)
    return OK, HANDLES["cudaStream_t"](handle)


@api(RUNTIME_API)
def cudaStreamDestroy(cuda: FakeCuda, stream):
    """Queued work stays queued, as on a real GPU."""
    found = cuda.stream(stream)
    if found.handle == 0 or found.capture is not None:
        raise FakeCudaError("destroying the default stream or a stream that captures")
    found.destroyed = True
    return (OK,)


@api(RUNTIME_API)
def cudaStreamSynchronize(cuda: FakeCuda, stream):
    found = cuda.stream(stream)
    if found.capture is not None:
        raise FakeCudaError("cudaStreamSynchronize of a stream that captures")
    cuda.scheduler.refuse_in_capture("cudaStreamSynchronize", relaxed=True)
    cuda.scheduler.run_until(found.last)
    return (OK,)


@api(RUNTIME_API)
def cudaStreamWaitEvent(cuda: FakeCuda, stream, event, flags):
    record = cuda.get(event, Event).record
    found = cuda.stream(stream)
    if record is not None:
        cuda.scheduler.enqueue(found, "wait", after=(record,))
    return (OK,)


# Capture and graphs


@api(RUNTIME_API)
def cudaStreamBeginCapture(cuda: FakeCuda, stream, mode):
    if not isinstance(mode, cudaStreamCaptureMode):
        raise TypeError(f"mode must be a cudaStreamCaptureMode, received {mode!r}")
    cuda.scheduler.begin_capture(cuda.stream(stream), int(mode))
    return (OK,)


@api(RUNTIME_API, 1)
def cudaStreamEndCapture(cuda: FakeCuda, stream):
    graph = cuda.scheduler.end_capture(cuda.stream(stream))
    if graph is None:
        return cudaError_t.cudaErrorStreamCaptureUnjoined, None
    return OK, cuda.add("cudaGraph_t", graph)


@api(RUNTIME_API, 1)
def cudaGraphInstantiate(cuda: FakeCuda, graph, flags):
    cuda.scheduler.refuse_in_capture("cudaGraphInstantiate", relaxed=True)
    return OK, cuda.add("cudaGraphExec_t", GraphExec(Graph(list(cuda.get(graph, Graph).nodes))))


@api(RUNTIME_API)
def cudaGraphLaunch(cuda: FakeCuda, graphExec, stream):
    cuda.scheduler.launch(cuda.get(graphExec, GraphExec).graph, cuda.stream(stream))
    return (OK,)


@api(RUNTIME_API)
def cudaGraphExecDestroy(cuda: FakeCuda, graphExec):
    """Launches that are still queued run all the same, as on a real GPU."""
    cuda.drop(graphExec, GraphExec)
    return (OK,)


@api(RUNTIME_API)
def cudaGraphDestroy(cuda: FakeCuda, graph):
    cuda.drop(graph, Graph)
    return (OK,)


# Events


@api(RUNTIME_API, 1)
def cudaEventCreate(cuda: FakeCuda):
    cuda.context_active = True
    return OK, cuda.add("cudaEvent_t", Event(timed=True))


@api(RUNTIME_API, 1)
def cudaEventCreateWithFlags(cuda: FakeCuda, flags):
    cuda.context_active = True
    return OK, cuda.add("cudaEvent_t", Event(timed=not flags & 2))


@api(RUNTIME_API)
def cudaEventRecord(cuda: FakeCuda, event, stream):
    found = cuda.get(event, Event)
    found.record = cuda.scheduler.enqueue(cuda.stream(stream), "record")
    return (OK,)


@api(RUNTIME_API)
def cudaEventSynchronize(cuda: FakeCuda, event):
    record = cuda.get(event, Event).record
    cuda.scheduler.refuse_in_capture("cudaEventSynchronize", relaxed=True)
    if record is not None and record.capture is not None:
        raise FakeCudaError("cudaEventSynchronize on an event that was last recorded in a capture")
    cuda.scheduler.run_until(record)
    return (OK,)


@api(RUNTIME_API, 1)
def cudaEventElapsedTime(cuda: FakeCuda, start, end):
    """Fake device time: the sum of the fake durations of what ran in between, on whatever stream."""
    events = [cuda.get(start, Event), cuda.get(end, Event)]
    if any(not item.timed or item.record is None or item.record.capture is not None for item in events):
        return cudaError_t.cudaErrorInvalidResourceHandle, None
    first, last = (item.record.done_ms for item in events)
    if first is None or last is None:
        return cudaError_t.cudaErrorNotReady, None
    return OK, last - first


@api(RUNTIME_API)
def cudaEventDestroy(cuda: FakeCuda, event):
    cuda.drop(event, Event)
    return (OK,)
