"""Puts the fakes in the place of `tensorrt` and `cuda.bindings` for one test."""

from __future__ import annotations

import importlib.machinery
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

# Imported before anything is taken out, as it keeps classes of modules that are: one first imported beside the fakes would
# keep classes that nobody else has afterwards.
import tmpdiff_export.targets.tensorrt.settings  # noqa: F401
from fakes import fake_trt_base
from fakes.fake_cuda import FakeCuda, make_module, set_current
from fakes.fake_driver_api import DRIVER_API
from fakes.fake_runtime_api import RUNTIME_API
from fakes.fake_tensorrt import make_module as make_tensorrt
from fakes.fake_trt_base import Installation

# Modules that keep what they imported; they are taken out for the test, so that each side imports its own.
CACHING = (
    "engines.backends.cuda",
    "engines.backends.onnxruntime.host",
    "engines.backends.onnxruntime.plan",
    "engines.backends.onnxruntime.provider",
    "engines.backends.tensorrt",
    "tmpdiff_export.targets.onnxruntime.cuda",
    "tmpdiff_export.targets.tensorrt.target",
    "polygraphy",  # whole: its registries refuse a second registration
)
FAKED = ("tensorrt", "tensorrt_lean", "tensorrt_bindings", "tensorrt_lean_bindings", "cuda")


@dataclass(frozen=True)
class Fakes:
    """What a test asserts on.

    Attributes:
        cuda: calls, memory, faults (`fail`), `scheduler.policy`.
        tensorrt: the module that code under test imports.
        settings: switches of the fake TensorRT (refused_ops, unquantized, layer_ms, build_error, ...) and `builds`.
    """

    cuda: FakeCuda
    tensorrt: ModuleType
    settings: Installation


def install(
    monkeypatch: Any,
    *,
    version: str = "11.4.0.106",
    lean: bool = False,
    gpus: int = 1,
    compute_capability: tuple[int, int] = (9, 0),
    memory: int = 8 << 30,
    name: str = "Fake H200",
    driver_version: int = 13000,
    policy: str = "younger_first",
) -> Fakes:
    """Installs the fakes until the test ends; calling it again replaces them (another version, another GPU).

    Args:
        monkeypatch: pytest's fixture.
        version: of TensorRT; classes and enumerations are those of the nearest in `api/` (see `api_version`).
        lean: provide `tensorrt_lean` and no `tensorrt`.
        gpus: number of GPUs; with 0, CUDA calls return cudaErrorNoDevice.
        memory: bytes of device memory; cudaMalloc, engines and contexts beyond it fail.
        driver_version: 1000 * major + 10 * minor.
        policy: in which order streams run, see `fake_streams`.
    """
    cuda = FakeCuda(gpus, name, compute_capability, memory, driver_version, policy=policy)
    settings = Installation(cuda, version, lean)
    set_current(cuda)
    fake_trt_base.set_installation(settings)
    tensorrt_name = "tensorrt_lean" if lean else "tensorrt"
    tensorrt = make_tensorrt(tensorrt_name, settings)
    bindings = ModuleType("cuda.bindings")
    runtime = make_module("cuda.bindings.runtime", RUNTIME_API, cuda)
    driver = make_module("cuda.bindings.driver", DRIVER_API, cuda)
    package: Any = ModuleType("cuda")
    package.bindings, bindings.runtime, bindings.driver = bindings, runtime, driver  # type: ignore[attr-defined]
    package.__path__, bindings.__path__ = [], []  # type: ignore[attr-defined]
    modules = {tensorrt_name: tensorrt, "cuda": package, "cuda.bindings": bindings}
    modules |= {"cuda.bindings.runtime": runtime, "cuda.bindings.driver": driver}
    for module_name, module in modules.items():
        is_package = hasattr(module, "__path__")
        module.__spec__ = importlib.machinery.ModuleSpec(module_name, None, is_package=is_package)
    other = "tensorrt" if lean else "tensorrt_lean"
    _replace(monkeypatch, modules, absent=other)
    return Fakes(cuda, tensorrt, settings)


class _Restore(dict[str, Any]):
    """monkeypatch removes what it set in here when the test ends, and that puts the caching modules back."""

    def __init__(self) -> None:
        super().__init__()
        self._before = drop_cached()

    def __delitem__(self, key: str) -> None:
        super().__delitem__(key)
        drop_cached()
        for name, module in self._before.items():
            sys.modules[name] = module
            parent, _, child = name.rpartition(".")
            setattr(sys.modules[parent], child, module)
        set_current(None)
        fake_trt_base.set_installation(None)


def _replace(monkeypatch: Any, modules: dict[str, ModuleType], *, absent: str) -> None:
    monkeypatch.setitem(_Restore(), "installed", True)
    for name in [name for name in sys.modules if name.split(".")[0] in FAKED]:
        monkeypatch.delitem(sys.modules, name)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, absent, None)  # importing it raises ModuleNotFoundError


def drop_cached() -> dict[str, ModuleType]:
    """Forgets the modules that keep what they imported of the faked packages; returns them, parents first."""
    dropped = {}
    for name in sorted(sys.modules):
        if any(name == item or name.startswith(f"{item}.") for item in CACHING):
            dropped[name] = sys.modules.pop(name)
            parent, _, child = name.rpartition(".")
            if hasattr(sys.modules.get(parent), child):
                delattr(sys.modules[parent], child)
    return dropped
