"""The functions of the fake `cuda.bindings.driver`: modules from PTX, and kernels that run as Python.

The PTX is read as far as a launch needs it: target architecture, names and parameters of the entries. A launch
whose parameters do not match the entry in number or size raises `FakeCudaError` (a real one reads garbage).
"""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from typing import Any

from fakes.cuda_enums import CUresult
from fakes.fake_cuda import DRIVER_API, FakeCuda, api, kernels
from fakes.fake_memory import FakeCudaError

OK = CUresult.CUDA_SUCCESS
KERNEL_MS = 0.002
MAX_THREADS_PER_BLOCK = 1024

_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)")
_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.([a-z])(\d+)\s+[\w$]+(?:\[(\d+)\])?")
_TARGET = re.compile(r"\.target\s+sm_(\d+)([af]?)")


@dataclass(frozen=True)
class Module:
    """Entries of a loaded PTX text: name -> size in bytes of each parameter."""

    entries: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Function:
    name: str
    sizes: tuple[int, ...]


@api(DRIVER_API)
def cuInit(cuda: FakeCuda, Flags):
    return (OK,)


def cuGetErrorString(cuda: FakeCuda, error):
    return OK, error.name.encode()


DRIVER_API["cuGetErrorString"] = cuGetErrorString


@api(DRIVER_API, 1)
def cuModuleLoadData(cuda: FakeCuda, image):
    """Needs the primary context: a runtime call that uses the device must have come before."""
    if not cuda.context_active:
        return CUresult.CUDA_ERROR_INVALID_CONTEXT, None
    cuda.scheduler.refuse_in_capture("cuModuleLoadData", relaxed=True)
    text = bytes(image).decode("ascii", "replace")
    target = _TARGET.search(text)
    if target is None:
        return CUresult.CUDA_ERROR_INVALID_PTX, None
    major, minor = cuda.compute_capability
    wanted, exact = int(target[1]), bool(target[2])
    if wanted > 10 * major + minor or (exact and wanted != 10 * major + minor):
        return CUresult.CUDA_ERROR_NO_BINARY_FOR_GPU, None
    entries = {
        name: tuple(int(bits) // 8 * int(count or 1) for _, bits, count in _PARAMETER.findall(parameters))
        for name, parameters in _ENTRY.findall(text)
    }
    return OK, cuda.add("CUmodule", Module(entries))


@api(DRIVER_API, 1)
def cuModuleGetFunction(cuda: FakeCuda, hmod, name):
    """The function's handle lives as long as its module and is not listed as a leak."""
    if not isinstance(name, bytes):
        raise TypeError(f"name must be bytes, received {type(name).__name__}")
    module = cuda.get(hmod, Module)
    text = name.decode()
    if text not in module.entries:
        return CUresult.CUDA_ERROR_NOT_FOUND, None
    return OK, cuda.add_function(hmod, Function(text, module.entries[text]))


@api(DRIVER_API)
def cuModuleUnload(cuda: FakeCuda, hmod):
    cuda.drop(hmod, Module)
    cuda.drop_functions(hmod)
    return (OK,)


@api(DRIVER_API)
def cuLaunchKernel(
    cuda: FakeCuda,
    f,
    gridDimX,
    gridDimY,
    gridDimZ,
    blockDimX,
    blockDimY,
    blockDimZ,
    sharedMemBytes,
    hStream,
    kernelParams,
    extra,
):
    function = cuda.function(f)
    grid, block = (gridDimX, gridDimY, gridDimZ), (blockDimX, blockDimY, blockDimZ)
    if min(grid + block) < 1 or blockDimX * blockDimY * blockDimZ > MAX_THREADS_PER_BLOCK:
        return (CUresult.CUDA_ERROR_INVALID_VALUE,)
    args = _arguments(function, kernelParams)
    if function.name not in kernels:
        raise FakeCudaError(f"no Python implementation of kernel {function.name!r} in fake_cuda.kernels")
    run = kernels[function.name]
    cuda.scheduler.enqueue(
        cuda.stream(hStream), function.name, lambda: run(grid, block, list(args)), milliseconds=KERNEL_MS
    )
    return (OK,)


def _arguments(function: Function, parameters: Any) -> tuple[Any, ...]:
    """Values of the documented (values, types) form, each passed through its C type."""
    values, types = parameters if parameters else ((), ())
    if len(values) != len(types):
        raise FakeCudaError(f"kernel {function.name}: {len(values)} values, {len(types)} types")
    converted = []
    for value, kind in zip(values, types, strict=True):
        item = value if kind is None else kind(int(value) if kind is ctypes.c_void_p else value)
        if not isinstance(item, ctypes._SimpleCData):
            raise FakeCudaError(
                f"kernel {function.name}: a parameter without a type must be a ctypes value, got {value!r}"
            )
        converted.append(item)
    sizes = tuple(ctypes.sizeof(item) for item in converted)
    if sizes != function.sizes:
        raise FakeCudaError(f"kernel {function.name} takes parameters of {function.sizes} bytes, received {sizes}")
    return tuple(item.value or 0 for item in converted)
