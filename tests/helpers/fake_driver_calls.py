"""Calls of `cuda.bindings.runtime` as the tests of the fake driver make them."""

from __future__ import annotations

from typing import Any

import numpy as np

HOST_TO_DEVICE = "cudaMemcpyHostToDevice"
DEVICE_TO_HOST = "cudaMemcpyDeviceToHost"
DEVICE_TO_DEVICE = "cudaMemcpyDeviceToDevice"


def ok(result: tuple[Any, ...]) -> Any:
    assert int(result[0]) == 0, result
    return result[1] if len(result) > 1 else None


def new_stream(runtime: Any) -> Any:
    return ok(runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking))


def copy(runtime: Any, target: Any, source: Any, nbytes: int, kind: str, stream: Any) -> None:
    ok(runtime.cudaMemcpyAsync(target, source, nbytes, runtime.cudaMemcpyKind[kind], stream))


def upload(runtime: Any, values: np.ndarray, stream: Any) -> int:
    address = ok(runtime.cudaMalloc(values.nbytes))
    copy(runtime, address, values.ctypes.data, values.nbytes, HOST_TO_DEVICE, stream)
    return address


def download(runtime: Any, address: int, target: np.ndarray, stream: Any) -> None:
    copy(runtime, target.ctypes.data, address, target.nbytes, DEVICE_TO_HOST, stream)


def record(runtime: Any, stream: Any) -> Any:
    event = ok(runtime.cudaEventCreate())
    ok(runtime.cudaEventRecord(event, stream))
    return event


def begin(runtime: Any, stream: Any, mode: str = "cudaStreamCaptureModeThreadLocal") -> None:
    ok(runtime.cudaStreamBeginCapture(stream, runtime.cudaStreamCaptureMode[mode]))
