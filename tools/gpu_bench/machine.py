"""Facts about the machine and the libraries that stand beside every result."""

from __future__ import annotations

import datetime
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

LIBRARIES = ("torch", "triton", "diffusers", "torchao", "transformers", "numpy")
_QUERY = ("driver_version", "power.limit", "clocks.max.sm", "clocks.max.memory")


def facts(device: torch.device) -> dict[str, Any]:
    """GPU, driver, clocks and library versions; None for what is not there."""
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "python": platform.python_version(),
        "libraries": {name: _version(name) for name in LIBRARIES},
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    if device.type != "cuda":
        return {**found, "gpu": None}
    properties = torch.cuda.get_device_properties(device)
    return {
        **found,
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "driver": _driver(),
    }


def gpu_state() -> dict[str, str] | None:
    """Clock, power and temperature now, as the driver tells."""
    return _query(("clocks.sm", "power.draw", "temperature.gpu", "clocks_event_reasons.active"))


def _driver() -> dict[str, str] | None:
    return _query(_QUERY)


def _query(names: tuple[str, ...]) -> dict[str, str] | None:
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(names, (word.strip() for word in done.stdout.strip().split(",")), strict=False))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
