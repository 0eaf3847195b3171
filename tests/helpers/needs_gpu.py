"""The mark of tests that need a GPU; `pytest tests/gpu` on a host that has one. Elsewhere they skip and say why."""

from __future__ import annotations

import importlib.util

import pytest


def missing() -> str | None:
    """Why no such test can run here, or None."""
    try:
        from cuda.bindings import runtime
    except ImportError:
        return "cuda-bindings is not installed"
    status, count = runtime.cudaGetDeviceCount()
    if status != runtime.cudaError_t.cudaSuccess or not count:
        return f"no NVIDIA GPU ({status.name})"
    if all(importlib.util.find_spec(name) is None for name in ("tensorrt", "tensorrt_lean")):
        return "neither tensorrt nor tensorrt_lean is installed"
    return None


needs_gpu = pytest.mark.skipif(missing() is not None, reason=missing() or "")
