"""Backends by name, and what each of them needs. Importing this imports none of their libraries."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

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


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package
        return False
