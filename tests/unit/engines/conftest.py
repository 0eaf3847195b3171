"""A bundle for the CPU, for tests of what runs bundles."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from helpers.made_once import made_once
from helpers.tiny_pipeline import PROMPTS


@pytest.fixture(scope="session")
def small_bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline at all four precisions, with 4 steps and a schedule of 2 precisions; do not write into it."""
    return made_once(tmp_path_factory, "small", partial(_build_small, request)) / "bundle"


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
