"""A report of a calibration that is made up, and one of the demo bundle, written once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import made_up
from helpers.commands import EXPORT, called
from helpers.report_page import HOSTILE, Parsed

from calibration.document import Sensitivity
from engines.bundle import Bundle
from engines.manifest import Manifest
from tmpdiff_export.report.page import page
from tmpdiff_export.report.pictures import Row, compare


@pytest.fixture(scope="session")
def found() -> Sensitivity:
    return made_up.calibration(20, ("fp16", "fp8", "int8", "int4"))


@pytest.fixture(scope="session")
def manifest(found: Sensitivity) -> Manifest:
    return made_up.manifest(found)


@pytest.fixture(scope="session")
def text(manifest: Manifest, found: Sensitivity) -> str:
    """Its page, with pictures of a hostile prompt."""
    drawn = np.random.default_rng(0).integers(256, size=(4, 16, 16, 3)).astype(np.uint8)
    drawings = [compare(name, picture, drawn[0]) for name, picture in zip(found.precisions, drawn, strict=True)]
    return page(manifest, manifest.settings[0], found, [Row(HOSTILE, 0, tuple(drawings))])


@pytest.fixture(scope="session")
def parsed(text: str) -> Parsed:
    return Parsed(text)


@pytest.fixture(scope="session")
def written(
    demo_bundle: Path, made_once: Callable[[str, Callable[[Path], object]], Path]
) -> tuple[Path, dict[str, Any]]:
    """A report of the demo bundle with one picture of a hostile prompt, and what the command printed."""

    def make(folder: Path) -> None:
        given = ("--prompt", HOSTILE, "--pictures", 1, "--json")
        result = called(EXPORT, "report", demo_bundle, "--out", folder / "report.html", *given)
        assert result.returncode == 0, result.stderr
        (folder / "printed.json").write_text(result.stdout)

    folder = made_once("report", make)
    return folder / "report.html", json.loads((folder / "printed.json").read_text())


@pytest.fixture(scope="session")
def bundle(demo_bundle: Path) -> Bundle:
    return Bundle.open(demo_bundle)
