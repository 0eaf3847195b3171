"""Backends by name. Importing this package imports none of their libraries."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from engines.engine import Engine
from engines.errors import BackendError

# name -> (importable module, how to get it)
BACKENDS: dict[str, tuple[str, str]] = {
    "onnxruntime": ("onnxruntime", "pip install onnxruntime"),
}


def load_engine(backend: str, path: Path, *, threads: int | None = None) -> Engine:
    """Loads an engine file whose hash has been checked.

    Args:
        backend: a key of `BACKENDS`, as the manifest names it.
        path: the engine file.
        threads: worker threads of a CPU backend, None for one per core.

    Raises:
        BackendError: the backend is unknown or not installed, or it refuses the file.
    """
    require_backend(backend)
    from engines.backends.onnxruntime import OnnxRuntimeEngine

    return OnnxRuntimeEngine(path, threads=threads)


def require_backend(backend: str) -> None:
    """Checks that a backend exists and its library is installed.

    Raises:
        BackendError: naming what was asked, what is there and what to install.
    """
    if backend not in BACKENDS:
        raise BackendError(f"unknown backend {backend!r}; this release has {', '.join(BACKENDS)}")
    module, how = BACKENDS[backend]
    if importlib.util.find_spec(module) is None:
        raise BackendError(f"backend {backend!r} needs the module {module}, which is not installed; {how}")


def backend_version(backend: str) -> str:
    """Version of a backend's installed library.

    Raises:
        BackendError: unknown or not installed.
    """
    require_backend(backend)
    from engines.backends.onnxruntime import version

    return version()
