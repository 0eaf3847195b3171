"""Puts the fakes in the place of `tensorrt` and `cuda.bindings` for one test."""

from __future__ import annotations

import functools
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

# Modules that keep what they imported: there is one set of them beside the real packages, and one beside the fakes of each
# version, which later tests of that version get again.
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
MESSAGES = "engines.backends.tensorrt.messages"

Side = tuple[str, bool] | None
"""Beside what modules were imported: the fakes of a version, full or lean; None: whatever is really installed."""

_kept: dict[Side, dict[str, ModuleType]] = {}
_side: list[Side] = [None]


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
    faked = _faked_modules(version, lean)
    tensorrt = faked["tensorrt_lean" if lean else "tensorrt"]
    settings.classes = {key: item for key, item in vars(tensorrt).items() if isinstance(item, type)}
    monkeypatch.setitem(_Restore(), "side", (version, lean))
    for module_name in [name for name in sys.modules if name.split(".")[0] in FAKED]:
        monkeypatch.delitem(sys.modules, module_name)
    for module_name, module in faked.items():
        monkeypatch.setitem(sys.modules, module_name, module)
    # importing the other one raises ModuleNotFoundError
    monkeypatch.setitem(sys.modules, "tensorrt" if lean else "tensorrt_lean", None)
    return Fakes(cuda, tensorrt, settings)


@functools.cache
def _faked_modules(version: str, lean: bool) -> dict[str, ModuleType]:
    """Name -> module; they act on the driver and the TensorRT that are installed when they are used."""
    tensorrt_name = "tensorrt_lean" if lean else "tensorrt"
    bindings = ModuleType("cuda.bindings")
    runtime = make_module("cuda.bindings.runtime", RUNTIME_API)
    driver = make_module("cuda.bindings.driver", DRIVER_API)
    package: Any = ModuleType("cuda")
    package.bindings, bindings.runtime, bindings.driver = bindings, runtime, driver  # type: ignore[attr-defined]
    package.__path__, bindings.__path__ = [], []  # type: ignore[attr-defined]
    modules = {tensorrt_name: make_tensorrt(tensorrt_name, version, lean=lean), "cuda": package}
    modules |= {"cuda.bindings": bindings, "cuda.bindings.runtime": runtime, "cuda.bindings.driver": driver}
    for name, module in modules.items():
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=hasattr(module, "__path__"))
    return modules


class _Restore(dict[str, Any]):
    """monkeypatch removes what it set in here when the test ends, and that goes back to the side it came from."""

    def __setitem__(self, key: str, side: Side) -> None:
        super().__setitem__(key, side)
        self._before = _side[0]
        _go_to(side)
        _begin_anew(_kept.get(side, {}))

    def __delitem__(self, key: str) -> None:
        super().__delitem__(key)
        _go_to(self._before)
        if self._before is None:
            set_current(None)
            fake_trt_base.set_installation(None)


def _go_to(side: Side) -> None:
    """Keeps the caching modules there are, and puts those of `side` in their place."""
    _kept[_side[0]] = drop_cached()
    _side[0] = side
    for name, module in _kept.get(side, {}).items():
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)


def _begin_anew(modules: dict[str, ModuleType]) -> None:
    """Forgets what our modules remember of an earlier installation."""
    for name, module in modules.items():
        for item in vars(module).values() if name.startswith(("engines.", "tmpdiff_export.")) else ():
            if hasattr(item, "cache_clear"):
                item.cache_clear()
    if MESSAGES in modules:
        modules[MESSAGES].LOG.clear()


def drop_cached() -> dict[str, ModuleType]:
    """Forgets the modules that keep what they imported of the faked packages; returns them, parents first."""
    dropped = {}
    below = tuple(f"{item}." for item in CACHING)
    for name in sorted(name for name in sys.modules if name in CACHING or name.startswith(below)):
        dropped[name] = sys.modules.pop(name)
        parent, _, child = name.rpartition(".")
        if hasattr(sys.modules.get(parent), child):
            delattr(sys.modules[parent], child)
    return dropped
