"""A bundle for the CPU, for tests of what runs bundles."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from helpers.tiny_pipeline import PROMPTS

MadeOnce = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> MadeOnce:
    """A folder of a name, filled by a function: once for all workers, whoever comes first. Do not write into it."""
    root = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
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


@pytest.fixture(scope="session")
def small_bundle(request: pytest.FixtureRequest, made_once: MadeOnce) -> Path:
    """The tiny pipeline at all four precisions, with 4 steps and a schedule of 2 precisions; do not write into it."""
    return made_once("small", partial(_build_small, request)) / "bundle"


def _build_small(request: pytest.FixtureRequest, folder: Path) -> None:
    from engines.bundle import SCHEDULE_NAME, Bundle
    from engines.precision import DEFAULT_PRECISIONS
    from engines.schedule import Schedule
    from tmpdiff_export.bundling.bundle import build
    from tmpdiff_export.bundling.options import BuildOptions

    pipeline = request.getfixturevalue("tiny_pipeline")  # here, so that one worker alone needs torch
    build(pipeline, folder / "bundle", BuildOptions(DEFAULT_PRECISIONS, PROMPTS, num_steps=4))
    schedule = Schedule(
        bundle_id=Bundle.open(folder / "bundle").manifest.bundle_id,
        precisions=("fp16", "int8", "int8", "fp16"),
        origin="by hand",
    )
    schedule.save(folder / "bundle" / SCHEDULE_NAME)
