"""Opens the backend that a bundle names; its libraries are imported when it is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from engines.backends.table import require_backend
from engines.host import EngineHost


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
        from engines.backends.onnxruntime.provider import require_provider

        require_provider()  # before what needs cuda-bindings
        from engines.backends.onnxruntime.host import onnxruntime_cuda_host

        return onnxruntime_cuda_host(resident_engines=options.resident_engines)
    if backend == "tensorrt-rtx":
        from engines.backends.onnxruntime.tensorrt_rtx import require_device

        require_device()
    from engines.backends.session_host import SessionHost

    return SessionHost(backend, options.threads)


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
        from engines.backends.onnxruntime.tensorrt_rtx import version as rtx_version

        return rtx_version()
    from engines.backends.onnxruntime.cpu import version

    return version()
