"""Tests that need a GPU; `pytest tests/gpu` on a host that has one. Elsewhere they skip and say why."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _missing()
    if reason is not None:
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))


def _missing() -> str | None:
    """Why no test here can run, or None."""
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
