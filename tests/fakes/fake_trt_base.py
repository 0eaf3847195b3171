"""What all parts of the fake TensorRT share: the state of one installation, enumerations, loggers, Dims, host memory."""

from __future__ import annotations

import enum
import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fakes.fake_cuda import FakeCuda
from fakes.fake_memory import FakeCudaError

API = Path(__file__).parent / "api"

# Lowest compute capability whose tensor cores know a type; the builder refuses graphs that have it elsewhere.
MINIMUM_CAPABILITY = {"BF16": (8, 0), "INT8": (7, 5), "INT4": (8, 0), "FP8": (8, 9), "FP4": (10, 0), "E8M0": (10, 0)}

_installed: list[Installation] = []


class FakeCrashError(FakeCudaError):
    """The real library would end the process here (a segmentation fault)."""


@dataclass
class Build:
    """One call of build_serialized_network that got as far as timing layers."""

    layers: int
    timed: int  # layers that were not in the timing cache
    flags: tuple[str, ...]
    options: dict[str, Any]


@dataclass
class Installation:
    """One installed fake TensorRT and its switches for tests.

    Attributes:
        cuda: the driver it runs on.
        version: of the library.
        lean: no builder, no parser, no inspector class.
        refused_ops: ONNX operators the parser has no importer for.
        build_error: if set, every build logs it as an error and gives None.
        build_exception: if set, every build raises it (tests of clean-up and retries).
        unquantized: the engine pretends that no layer runs in low precision.
        layer_ms: fake time of one layer by the type it computes in.
        formats: how the inspector spells types: "long" ("Row major linear FP16 format") or "short" ("Half").
        first_logger_wins: a logger given later logs nothing; all goes to the first one (it does in some messages of
            the real library, which keeps one logger per process).
        classes: those of the module, by name.
        builds: what was built.
    """

    cuda: FakeCuda
    version: str = "11.4.0.106"
    lean: bool = False
    refused_ops: set[str] = field(default_factory=set)
    build_error: str | None = None
    build_exception: BaseException | None = None
    unquantized: bool = False
    layer_ms: dict[str, float] = field(
        default_factory=lambda: {
            "FP32": 0.04,
            "FP16": 0.02,
            "BF16": 0.02,
            "INT8": 0.01,
            "FP8": 0.01,
            "INT4": 0.012,
            "FP4": 0.006,
        }
    )
    formats: str = "long"
    first_logger_wins: bool = False
    first_logger: Any = None
    classes: dict[str, type] = field(default_factory=dict)
    builds: list[Build] = field(default_factory=list)

    @property
    def major(self) -> int:
        return int(self.version.split(".")[0])


def installation() -> Installation:
    """The installed fake TensorRT."""
    if not _installed:
        raise FakeCudaError("no fake TensorRT is installed; call fakes.install.install")
    return _installed[-1]


def set_installation(item: Installation | None) -> None:
    _installed[:] = [] if item is None else [item]


class TensorRtEnum(enum.Enum):
    """Like a pybind11 enumeration: int() works, arithmetic and comparison with integers do not."""

    def __int__(self) -> int:
        return self.value

    def __index__(self) -> int:
        return self.value

    def __repr__(self) -> str:
        return f"<{type(self).__name__}.{self.name}: {self.value}>"

    def __str__(self) -> str:
        return f"{type(self).__name__}.{self.name}"


class DataTypeEnum(TensorRtEnum):
    """`DataType` also has a size in bytes."""

    @property
    def itemsize(self) -> float:
        return ITEM_SIZES[self.name]


ITEM_SIZES = {
    "FLOAT": 4, "HALF": 2, "BF16": 2, "INT8": 1, "INT32": 4, "INT64": 8, "BOOL": 1, "UINT8": 1, "FP8": 1,
    "INT4": 0.5, "FP4": 0.5, "E8M0": 1,
}  # fmt: skip


@functools.cache
def read_api(version: str, *, lean: bool = False) -> dict[str, Any]:
    """The real API of one of the versions in `api/` (see `read_api`)."""
    return json.loads((API / f"tensorrt{'_lean' if lean else ''}-{version}.json").read_text())


@functools.cache
def api_version(version: str) -> str:
    """The version in `api/` that stands for `version`: itself, or else the newest of the same major version."""
    if (API / f"tensorrt-{version}.json").exists():
        return version
    return "10.16.1.11" if version.startswith("10.") else "11.4.0.106"


@functools.cache  # so that members compare by identity
def _enums(described: str) -> dict[str, type[TensorRtEnum]]:
    return {
        name: (DataTypeEnum if name == "DataType" else TensorRtEnum)(name, members)
        for name, members in read_api(described)["enums"].items()
    }


def enums_of(version: str) -> dict[str, type[TensorRtEnum]]:
    """Every enumeration of a version, with its real values."""
    return _enums(api_version(version))


def enums() -> dict[str, type[TensorRtEnum]]:
    """The enumerations of the installed version."""
    return enums_of(installation().version)


def flag(name: str, member: str) -> Any:
    """A member of an enumeration of the installed fake, for example flag("BuilderFlag", "REFIT")."""
    return getattr(enums()[name], member)


class Severity(TensorRtEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class ILogger:
    """Subclass it and implement `log`; a subclass must call ILogger.__init__."""

    Severity = Severity
    INTERNAL_ERROR = Severity.INTERNAL_ERROR
    ERROR = Severity.ERROR
    WARNING = Severity.WARNING
    INFO = Severity.INFO
    VERBOSE = Severity.VERBOSE

    def __init__(self) -> None:
        self._fake_initialised = True

    def log(self, severity: Severity, msg: str) -> None:
        raise NotImplementedError("ILogger.log")


class Logger(ILogger):
    """Prints messages of at least `min_severity`."""

    def __init__(self, min_severity: Severity = Severity.WARNING) -> None:
        ILogger.__init__(self)
        self.min_severity = min_severity

    def log(self, severity: Severity, msg: str) -> None:
        if severity.value <= self.min_severity.value:
            print(f"[TRT] [{severity.name}] {msg}")


def checked_logger(logger: Any) -> ILogger:
    """The logger that gets the messages, if the real bindings would take `logger`.

    Raises:
        TypeError: no ILogger, or a subclass that did not call ILogger.__init__.
    """
    if not isinstance(logger, ILogger) or not getattr(logger, "_fake_initialised", False):
        raise TypeError(f"incompatible constructor arguments: expected an initialised ILogger, received {logger!r}")
    here = installation()
    here.first_logger = here.first_logger or logger
    return here.first_logger if here.first_logger_wins else logger


class Dims:
    """Shape; behaves like a tuple, as the real one (no hash, not equal to a list)."""

    MAX_DIMS = 8

    def __init__(self, shape: Any = ()) -> None:
        self._dims = tuple(int(item) for item in shape)
        if len(self._dims) > self.MAX_DIMS:
            raise ValueError("input dims exceed maximum dimensions")

    def __len__(self) -> int:
        return len(self._dims)

    def __getitem__(self, index: Any) -> Any:
        return self._dims[index]

    def __iter__(self) -> Iterator[int]:
        return iter(self._dims)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, (tuple, Dims)) and tuple(other) == self._dims

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(self._dims)


class IHostMemory(bytearray):
    """Library-owned bytes with the buffer protocol and nothing else; memoryview() and bytes() take it, len() does not.

    A bytearray underneath, because a Python 3.11 class cannot offer the buffer protocol by itself.
    """

    @property
    def nbytes(self) -> int:
        return bytearray.__len__(self)

    @property
    def dtype(self) -> Any:
        return flag("DataType", "INT8")

    def __bool__(self) -> bool:
        return True

    def __len__(self) -> int:
        raise TypeError("object of type 'IHostMemory' has no len()")

    def __getitem__(self, index: Any) -> Any:
        raise TypeError("'IHostMemory' object is not subscriptable")

    def __enter__(self) -> IHostMemory:
        return self

    def __exit__(self, *exc: object) -> None: ...


class IProfiler:
    """Subclass it and implement `report_layer_time`."""

    def __init__(self) -> None: ...

    def report_layer_time(self, layer_name: str, ms: float) -> None:
        raise NotImplementedError("IProfiler.report_layer_time")


class IProgressMonitor:
    """Subclass it and implement all three."""

    def __init__(self) -> None: ...

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        raise NotImplementedError("IProgressMonitor.phase_start")

    def step_complete(self, phase_name: str, step: int) -> bool:
        raise NotImplementedError("IProgressMonitor.step_complete")

    def phase_finish(self, phase_name: str) -> None:
        raise NotImplementedError("IProgressMonitor.phase_finish")


class IStreamReaderV2:
    """Subclass it; `read` gives the next bytes of a plan, `seek` moves."""

    def __init__(self) -> None: ...

    def read(self, num_bytes: int, stream: int) -> bytes:
        raise NotImplementedError("IStreamReaderV2.read")

    def seek(self, offset: int, where: Any) -> bool:
        raise NotImplementedError("IStreamReaderV2.seek")
