"""Session fixtures: pipelines and bundles that are made once for the whole run, for whichever worker asks first."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from helpers.demo_build import DemoBuild, build_demo
from helpers.tiny_pipeline import build_torch_variants, calibrate_tiny, save_tiny_pipeline, tiny_options

if TYPE_CHECKING:
    from tmpdiff_export.bundling.options import BuildOptions

# Spinning OpenMP threads of one library starve those of another on two cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"
# The host code of packages runs for microseconds here, and takes longest to compile.
os.environ.setdefault("AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL", "O0")

# By nohup, or in the background of a shell without job control, the suite starts with SIGINT ignored, and Python leaves
# it so. Tests interrupt this process, and worker processes that it starts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_CORES = sorted(os.sched_getaffinity(0))
_WORKER = os.environ.get("PYTEST_XDIST_WORKER")
if _WORKER:  # every worker keeps to cores of its own, with all threads and processes that its tests start
    os.sched_setaffinity(0, _CORES[int(_WORKER[2:]) :: int(os.environ["PYTEST_XDIST_WORKER_COUNT"])] or _CORES)

MadeOnce = Callable[[str, Callable[[Path], object]], Path]
Built = Callable[["BuildOptions"], Path]


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> MadeOnce:
    """A folder of a name, filled by a function: once for all workers, whoever comes first. Do not write into it."""
    root = tmp_path_factory.getbasetemp()
    if _WORKER:
        root = root.parent  # that of the run

    def folder_of(name: str, make: Callable[[Path], object]) -> Path:
        folder, done = root / f"once-{name}", root / f"once-{name}.done"
        with open(root / f"once-{name}.lock", "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return folder_of


@pytest.fixture
def all_cores() -> Iterator[None]:
    """For a test that shares cores out among processes of its own: all that this machine has."""
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, _CORES)
    yield
    os.sched_setaffinity(0, own)


@pytest.fixture(scope="session")
def demo_pipeline() -> Path:
    """The embedded pipeline folder."""
    from tmpdiff_export.demo import pipeline_folder

    return pipeline_folder()


@pytest.fixture(scope="session")
def tiny_pipeline(made_once: MadeOnce, demo_pipeline: Path) -> Path:
    """A pipeline that builds in seconds; do not write into it."""
    return (
        made_once("tiny", lambda folder: save_tiny_pipeline(folder / "pipeline", demo_pipeline / "tokenizer"))
        / "pipeline"
    )


@pytest.fixture(scope="session")
def built(made_once: MadeOnce, tiny_pipeline: Path) -> Built:
    """The bundle of the tiny pipeline that is built with given options; do not write into it."""

    def bundle(options: BuildOptions) -> Path:
        from tmpdiff_export.bundling.bundle import build

        name = hashlib.sha256(repr(options).encode()).hexdigest()[:12]
        return made_once(name, lambda folder: build(tiny_pipeline, folder / "bundle", options)) / "bundle"

    return bundle


@pytest.fixture(scope="session")
def tiny_bundle(made_once: MadeOnce, built: Built) -> Path:
    """FP16 and INT8 of the tiny pipeline for ONNX Runtime, T = 4, calibrated; do not write into it."""
    return made_once("tiny-bundle", lambda folder: calibrate_tiny(built(tiny_options()), folder / "bundle")) / "bundle"


@pytest.fixture(scope="session")
def torch_bundle(built: Built) -> Path:
    """FP16, FP8 and INT8 of the tiny pipeline as torch packages for the CPU, made by two workers; do not write into it."""
    return built(tiny_options("fp16", "fp8", "int8", backend="torch", device="cpu", workers=2))


@pytest.fixture(scope="session")
def torch_variants(made_once: MadeOnce, tiny_pipeline: Path) -> Path:
    """A bundle of torch packages for the CPU: FP16 made of the FP8 engine's weights, NVFP4 emulated and with attention in
    FP8; do not write into it.
    """
    return made_once("variants", lambda folder: build_torch_variants(tiny_pipeline, folder / "bundle")) / "bundle"


@pytest.fixture(scope="session")
def demo_build(made_once: MadeOnce, demo_pipeline: Path) -> DemoBuild:
    """The embedded pipeline at all four precisions, calibrated with one prompt; do not write into it."""
    folder = made_once("demo", lambda folder: build_demo(demo_pipeline, folder))
    return DemoBuild(folder / "bundle", folder / "onnx")


@pytest.fixture(scope="session")
def demo_bundle(demo_build: DemoBuild) -> Path:
    """The calibrated bundle of the embedded pipeline; do not write into it."""
    return demo_build.bundle


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """Makes a private copy of a bundle, for tests that damage it."""

    def copy(bundle: Path) -> Path:
        target = tmp_path / "bundle"
        shutil.copytree(bundle, target)
        return target

    return copy


@pytest.fixture(scope="module")
def planted_latencies() -> Iterator[None]:
    """Bundles calibrated in this process have INT8 twice as fast as FP16, however busy the machine is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tmpdiff_export.calibrate.bundle._latencies", lambda *arguments: {"fp16": 2.0, "int8": 1.0})
        patch.setattr("tmpdiff_export.calibrate.bundle._reuse_latency", lambda *arguments: 0.01)
        yield


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A picture in an empty folder."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder / "picture.png"
