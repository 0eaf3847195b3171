"""The embedded pipeline as `conftest.demo_build` builds it, and copies of bundles."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

NUM_STEPS = 8
HIGH_STEPS = 3
GUIDANCE_SCALE = 4.5  # the pipeline's default
DEMO_PROMPTS = (
    "a large red circle in the top left on a dark background",
    "a small blue square in the center and a large yellow ring in the bottom right",
    "a small purple diamond at the top and a large white circle at the bottom",
)


@dataclass(frozen=True)
class DemoBuild:
    """A calibrated bundle and the ONNX files that were exported on the way."""

    bundle: Path
    onnx: Path


def linked_copy(bundle: Path, target: Path) -> Path:
    """A copy of hard links: documents may be replaced in it, nothing may be written into."""

    def link(source: str, copy: str) -> None:
        try:
            os.link(source, copy)
        except OSError:
            shutil.copyfile(source, copy)

    shutil.copytree(bundle, target, copy_function=link)
    return target


def build_demo(pipeline: Path, folder: Path) -> None:
    """Fills a folder as `DemoBuild` has it."""
    from calibration import CalibrationOptions, HighSteps
    from engines.precision import DEFAULT_PRECISIONS
    from engines.text import PromptFile
    from tmpdiff_export.bundling.bundle import build
    from tmpdiff_export.bundling.options import BuildOptions
    from tmpdiff_export.calibrate.bundle import calibrate_bundle

    options = BuildOptions(DEFAULT_PRECISIONS, DEMO_PROMPTS, steps=(NUM_STEPS,), onnx_dir=folder / "onnx")
    build(pipeline, folder / "bundle", options)
    prompts = PromptFile(DEMO_PROMPTS[:1], ("a large cyan square in the top right",))
    calibrate_bundle(folder / "bundle", prompts, CalibrationOptions(HighSteps(HIGH_STEPS)))
