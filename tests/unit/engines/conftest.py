"""A bundle for the CPU, for tests of what runs bundles."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.demo_build import linked_copy
from helpers.stored import schedule_path, setting_name
from helpers.tiny_pipeline import tiny_options

from engines.bundle import Bundle
from engines.schedule import Schedule


@pytest.fixture(scope="session")
def small_bundle(made_once: Callable[[str, Callable[[Path], object]], Path], built: Callable[[object], Path]) -> Path:
    """The tiny pipeline at all four precisions, with 4 steps and a schedule of 2 precisions; do not write into it."""

    def make(folder: Path) -> None:  # one worker alone needs torch
        bundle = linked_copy(built(tiny_options("fp16", "fp8", "int8", "int4")), folder / "bundle")
        schedule = Schedule(
            bundle_id=Bundle.open(bundle).manifest.bundle_id,
            setting=setting_name(bundle),
            precisions=("fp16", "int8", "int8", "fp16"),
            origin="by hand",
        )
        schedule.save(schedule_path(bundle))

    return made_once("small", make) / "bundle"
