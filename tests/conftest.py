"""Session fixtures: the embedded pipeline built and calibrated once for the whole suite."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from helpers.demo_build import DEMO_PROMPTS, NUM_STEPS, DemoBuild

# Spinning OpenMP threads of one library starve those of another on two cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"

_CORES = sorted(os.sched_getaffinity(0))
_WORKER = os.environ.get("PYTEST_XDIST_WORKER")
if _WORKER:  # every worker keeps to cores of its own, with all threads and processes that its tests start
    os.sched_setaffinity(0, _CORES[int(_WORKER[2:]) :: int(os.environ["PYTEST_XDIST_WORKER_COUNT"])] or _CORES)


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that `make` fills: once for all workers, whoever comes first."""
    if not _WORKER:
        folder = factory.mktemp(name)
        make(folder)
        return folder
    root = factory.getbasetemp().parent  # that of the run
    folder, done = root / name, root / f"{name}.done"
    with open(root / f"{name}.lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


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
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory, demo_pipeline: Path) -> Path:
    """A pipeline that builds in seconds; do not write into it."""
    from helpers.tiny_pipeline import save_tiny_pipeline

    folder = tmp_path_factory.mktemp("tiny") / "pipeline"
    save_tiny_pipeline(folder, demo_pipeline / "tokenizer")
    return folder


@pytest.fixture(scope="session")
def demo_build(tmp_path_factory: pytest.TempPathFactory, demo_pipeline: Path) -> DemoBuild:
    """Built at all four precisions and calibrated with two prompts; do not write into it."""
    folder = made_once(tmp_path_factory, "demo", partial(_build_demo, demo_pipeline))
    return DemoBuild(folder / "bundle", folder / "onnx")


def _build_demo(pipeline: Path, folder: Path) -> None:
    from calibration import CalibrationOptions, HighSteps
    from engines.precision import DEFAULT_PRECISIONS
    from engines.text import PromptFile
    from tmpdiff_export.bundling.bundle import build
    from tmpdiff_export.bundling.options import BuildOptions
    from tmpdiff_export.calibrate.bundle import calibrate_bundle

    prompts = PromptFile(
        DEMO_PROMPTS,
        (
            "a large cyan square in the top right",
            "a small orange circle at the left and a large blue triangle at the right",
        ),
    )
    build(
        pipeline,
        folder / "bundle",
        BuildOptions(
            precisions=DEFAULT_PRECISIONS,
            prompts=prompts.calibration,
            num_steps=NUM_STEPS,
            onnx_dir=folder / "onnx",
        ),
    )
    used = PromptFile(prompts.calibration[:2], prompts.validation)
    calibrate_bundle(folder / "bundle", used, CalibrationOptions(HighSteps(NUM_STEPS // 3)))


@pytest.fixture(scope="session")
def torch_variants(tmp_path_factory: pytest.TempPathFactory, tiny_pipeline: Path) -> Path:
    """A bundle of torch packages for the CPU: FP16 made of the FP8 engine's weights, NVFP4 emulated and with attention in
    FP8; do not write into it.
    """
    return made_once(tmp_path_factory, "variants", partial(_build_variants, tiny_pipeline)) / "bundle"


def _build_variants(pipeline: Path, folder: Path) -> None:
    from helpers.tiny_pipeline import PROMPTS

    from engines.precision import Precision
    from tmpdiff_export.bundling.bundle import build
    from tmpdiff_export.bundling.options import BuildOptions
    from tmpdiff_export.targets.torch import attention as torch_attention

    options = BuildOptions(
        (Precision.FP16, Precision.FP8, Precision.NVFP4),
        PROMPTS,
        num_steps=4,
        backend="torch",
        device="cpu",
        share_weights=Precision.FP8,
        fp8_attention=(Precision.NVFP4,),
    )
    with pytest.MonkeyPatch.context() as patch:  # its attention is short and narrow
        patch.setattr(torch_attention, "LEAST_TOKENS", 1)
        patch.setattr(torch_attention, "HEAD_SIZES", (8, 16, 24, 32, 64))
        build(pipeline, folder / "bundle", options)


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
def planted_latencies():
    """Bundles calibrated in this process have INT8 twice as fast as FP16, however busy the machine is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tmpdiff_export.calibrate.bundle._latencies", lambda *arguments: {"fp16": 2.0, "int8": 1.0})
        yield


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A picture in an empty folder."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder / "picture.png"
