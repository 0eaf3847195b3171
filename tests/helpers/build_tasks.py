"""Tasks that worker processes of a build perform in tests: importable there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.documents import FileEntry
from engines.errors import BuildError
from engines.files import sha256_file
from engines.manifest import EngineEntry
from engines.package_entry import PackageEntry


def seen() -> dict[str, Any]:
    """What a worker may use."""
    import torch
    from torch._inductor import config

    return {
        "process": os.getpid(),
        "gpu": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "threads": (torch.get_num_threads(), config.cpp.threads, config.compile_threads),
    }


def slow(seconds: float) -> None:
    """Takes its time."""
    time.sleep(seconds)


def fail() -> None:
    """As where torch refuses a module."""
    raise BuildError("torch cannot compile int8: planted")


def die() -> None:
    """As where the out-of-memory killer comes."""
    os.kill(os.getpid(), signal.SIGKILL)


def compile_for_ever(folder: Path) -> None:
    """Starts what never ends, as a compiler might, and says when."""
    import multiprocessing

    lock = multiprocessing.RLock()  # as tqdm does
    assert lock
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"]) as child:
        (folder / f"compiler-{child.pid}").touch()
        child.wait()


def die_compiling(folder: Path) -> None:
    """Starts a compiler, says so, and is killed."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    (folder / f"compiler-{child.pid}").touch()
    die()


def compiled_shapes(module: Any, inputs: Any, package: Path) -> tuple[tuple[int, ...], ...]:
    """Compiles a module for the CPU; the shapes of its outputs."""
    from tmpdiff_export.targets.torch.compile import compile_package

    return tuple(tuple(item.shape) for item in compile_package(module, "cpu", inputs, package).outputs)


@dataclass(frozen=True)
class Planted:
    """In place of a `PackageTask`: an engine with a planted SQNR, made after `seconds`.

    `before` is called first; it may never return.
    """

    name: str
    folder: Path
    recipe: str
    weights: tuple[FileEntry, ...]
    floor_db: float
    sqnr_db: float
    seconds: float = 0.0
    before: Callable[[], None] | None = None

    @classmethod
    def of(cls, task: Any, sqnr_db: float, **options: Any) -> Planted:
        """For the same engine as a `PackageTask`."""
        return cls(task.name, task.folder, task.recipe, task.weights, task.floor_db, sqnr_db, **options)

    def __call__(self) -> EngineEntry:
        """Writes a package that says which recipe it is of."""
        if self.before is not None:
            self.before()
        time.sleep(self.seconds)
        package = self.folder / "engines" / f"{self.name}.pt2"
        package.write_text(self.recipe)
        return EngineEntry(
            file=FileEntry(path=f"engines/{self.name}.pt2", sha256=sha256_file(package), bytes=package.stat().st_size),
            weights=self.weights,
            backend="torch",
            backend_version="2.9.0",
            device="cpu",
            lowering={},
            onnx_sha256=None,
            recipe=self.recipe,
            sqnr_db=self.sqnr_db,
            sqnr_floor_db=self.floor_db,
            inputs=(),
            outputs=(),
            package=PackageEntry(batch=2, dtype="float16", weights_bytes=1),
        )


@dataclass(frozen=True)
class PlantedPackage:
    """In place of a `PreparedEngine`, with options of `Planted`."""

    prepared: Any
    options: Mapping[str, Any]

    @property
    def tensors(self) -> Any:
        """What the engine reads, as without planting."""
        return self.prepared.tensors

    def task(self, folder: Path, weights: Any) -> Planted:
        """Instead of a task that compiles."""
        return Planted.of(self.prepared.task(folder, weights), **{"sqnr_db": 60.0, **self.options})


def plant(planted: Mapping[str, Mapping[str, Any]]) -> Any:
    """`TorchTarget.prepare` whose tasks are planted; options of `Planted` by engine and recipe, "int8 max"."""
    from tmpdiff_export.targets.torch.target import TorchTarget

    prepare = TorchTarget.prepare

    def instead(self: TorchTarget, job: Any) -> PlantedPackage:
        return PlantedPackage(prepare(self, job), planted.get(f"{job.name} {job.recipe}", {}))

    return instead
