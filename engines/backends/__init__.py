"""Backends by name. Importing this package imports none of their libraries."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from engines.engine import EngineHost
from engines.errors import BackendError


@dataclass(frozen=True)
class BackendInfo:
    """What a backend needs.

    Attributes:
        modules: alternatives, one of which must be importable.
        also: modules that must be importable as well.
        install: how to get them.
    """

    modules: tuple[str, ...]
    install: str
    also: tuple[str, ...] = ()


BACKENDS: dict[str, BackendInfo] = {
    "onnxruntime": BackendInfo(
        ("onnxruntime",), "pip install onnxruntime (for an NVIDIA GPU onnxruntime-gpu in its place)"
    ),
    "tensorrt": BackendInfo(
        ("tensorrt", "tensorrt_lean"),
        "pip install tensorrt cuda-bindings (tensorrt_lean instead of tensorrt runs version-compatible plans)",
        also=("cuda.bindings",),
    ),
    "torch": BackendInfo(("torch",), "pip install torch safetensors", also=("safetensors",)),
    "tensorrt-rtx": BackendInfo(
        ("onnxruntime_ep_nv_tensorrt_rtx",),
        "pip install onnxruntime-ep-nv-tensorrt-rtx-cu13",
        also=("onnxruntime",),
    ),
}


@dataclass(frozen=True)
class HostOptions:
    """How engines are hosted.

    Attributes:
        threads: worker threads of a CPU backend, None for one per core.
        resident_engines: denoiser engines that a GPU backend keeps in device memory at once, None for all.
    """

    threads: int | None = None
    resident_engines: int | None = None


def open_host(backend: str, device: str, options: HostOptions | None = None) -> EngineHost:
    """An empty host for the engines of one bundle.

    Args:
        backend: a key of `BACKENDS`, as the manifest names it.
        device: what the engines were built for, as the manifest says.
        options: how engines are hosted.

    Raises:
        BackendError: the backend is unknown or not installed, or has no device to run on.
    """
    require_backend(backend)
    options = options or HostOptions()
    if backend == "tensorrt":
        from engines.backends.tensorrt.host import tensorrt_host

        return tensorrt_host(resident_engines=options.resident_engines)
    if backend == "torch" and device != "cpu":
        from engines.backends.torch.host import torch_host

        return torch_host(resident_engines=options.resident_engines)
    if backend == "onnxruntime" and device != "cpu":
        from engines.backends.onnxruntime_cuda.provider import require_provider

        require_provider()  # before what needs cuda-bindings
        from engines.backends.onnxruntime_cuda.host import onnxruntime_cuda_host

        return onnxruntime_cuda_host(resident_engines=options.resident_engines)
    if backend == "tensorrt-rtx":
        from engines.backends.tensorrt_rtx import require_device

        require_device()
    from engines.backends.session_host import SessionHost

    return SessionHost(backend, options.threads)


def require_backend(backend: str) -> None:
    """Checks that a backend exists and its libraries are installed.

    Raises:
        BackendError: naming what was asked, what is there and what to install.
    """
    if backend not in BACKENDS:
        raise BackendError(f"unknown backend {backend!r}; this release has {', '.join(BACKENDS)}")
    info = BACKENDS[backend]
    missing = [] if any(map(_importable, info.modules)) else [" or ".join(info.modules)]
    missing += [name for name in info.also if not _importable(name)]
    if missing:
        raise BackendError(f"backend {backend!r} needs the module {missing[0]}, which is not installed; {info.install}")


def backend_version(backend: str) -> str:
    """Version of a backend's installed library.

    Raises:
        BackendError: unknown or not installed.
    """
    require_backend(backend)
    if backend == "tensorrt":
        from engines.backends.tensorrt.bindings import VERSION

        return VERSION
    if backend == "torch":
        from engines.backends.torch.library import VERSION as torch_version

        return torch_version
    if backend == "tensorrt-rtx":
        from engines.backends.tensorrt_rtx import version as rtx_version

        return rtx_version()
    from engines.backends.onnxruntime import version

    return version()


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package
        return False
