"""The GPU that engines are built for and run on, and the check of every CUDA call."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from engines.errors import BackendError

VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Gpu:
    """Facts about one GPU.

    Attributes:
        index: CUDA device index.
        name: as the driver reports it, for example "NVIDIA H200".
        compute_capability: (major, minor).
        total_bytes: device memory.
        free_bytes: of it, free when asked.
        driver: newest CUDA version the driver supports, for example "13.0".
    """

    index: int
    name: str
    compute_capability: tuple[int, int]
    total_bytes: int
    free_bytes: int
    driver: str

    @property
    def architecture(self) -> str:
        """For example "sm90"."""
        return f"sm{self.compute_capability[0]}{self.compute_capability[1]}"

    @property
    def described(self) -> str:
        """How manifests name the GPU that an engine was built for, for example "sm90 NVIDIA H200"."""
        return f"{self.architecture} {self.name}"


def cuda(result: tuple[Any, ...]) -> Any:
    """Unpacks what a cuda-bindings runtime call returned: None, one value or a tuple of values.

    Raises:
        BackendError: the call failed; CUDA's own words.
    """
    from cuda.bindings import runtime

    return _unpacked(result, runtime.cudaError_t.cudaSuccess, runtime.cudaGetErrorString, "CUDA call")


def driver(result: tuple[Any, ...]) -> Any:
    """The same for a cuda-bindings driver call.

    Raises:
        BackendError: the call failed; CUDA's own words.
    """
    from cuda.bindings import driver as api

    return _unpacked(result, api.CUresult.CUDA_SUCCESS, api.cuGetErrorString, "CUDA driver call")


def _unpacked(result: tuple[Any, ...], success: Any, words_of: Callable[[Any], tuple[Any, Any]], call: str) -> Any:
    status, *values = result
    if status != success:
        _, words = words_of(status)
        text = words.decode() if isinstance(words, bytes) else str(words)
        raise BackendError(f"{call} failed with {status.name}: {text}")
    if not values:
        return None
    return values[0] if len(values) == 1 else tuple(values)


def gpu_count() -> int:
    """GPUs that this process sees, one at least; makes no context on any.

    Raises:
        BackendError: cuda-bindings is not installed, or there is no driver or no GPU.
    """
    try:
        from cuda.bindings import runtime
    except ModuleNotFoundError as error:
        raise BackendError(
            "counting GPUs needs the module cuda.bindings, which is not installed; pip install cuda-bindings"
        ) from error
    status, count = runtime.cudaGetDeviceCount()
    if status != runtime.cudaError_t.cudaSuccess or not count:
        raise BackendError(
            f"no NVIDIA GPU was found ({status.name}); run on a host with a GPU and a driver that is new enough"
        )
    return int(count)


def current_gpu() -> Gpu:
    """The GPU of the calling thread's current CUDA device.

    Always ask before making a TensorRT Runtime or Builder: without a usable driver the Runtime
    constructor only logs an error, and the object it returns crashes the process when used
    (seen with the lean runtime 11.4).

    Raises:
        BackendError: cuda-bindings is not installed, or there is no driver or no GPU.
    """
    try:
        from cuda.bindings import runtime
    except ModuleNotFoundError as error:
        raise BackendError(
            "running on a GPU needs the module cuda.bindings, which is not installed; pip install cuda-bindings"
        ) from error
    status, count = runtime.cudaGetDeviceCount()
    if status != runtime.cudaError_t.cudaSuccess or not count:
        raise BackendError(
            f"found no NVIDIA GPU ({status.name}); run on a host with a GPU and a driver that is new "
            "enough, or use a bundle built with --backend onnxruntime"
        )
    index = cuda(runtime.cudaGetDevice())
    properties = cuda(runtime.cudaGetDeviceProperties(index))
    free, total = cuda(runtime.cudaMemGetInfo())
    version = cuda(runtime.cudaDriverGetVersion())
    name = properties.name
    return Gpu(
        index=int(index),
        name=(name.decode() if isinstance(name, bytes) else str(name)).rstrip("\0"),
        compute_capability=(int(properties.major), int(properties.minor)),
        total_bytes=int(total),
        free_bytes=int(free),
        driver=f"{version // 1000}.{version % 1000 // 10}",
    )


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES has to be for a process to see one GPU, for each GPU that this one sees.

    Raises:
        BackendError: cuda-bindings is not installed, or there is no driver or no GPU.
    """
    count = gpu_count()
    chosen = os.environ.get(VISIBLE_DEVICES)
    names = [str(index) for index in range(count)] if chosen is None else [name.strip() for name in chosen.split(",")]
    return names[:count]
