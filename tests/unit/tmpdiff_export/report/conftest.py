"""A report of the demo bundle, written once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import EXPORT, called
from helpers.report_page import HOSTILE, Parsed

from calibration import Sensitivity
from engines.bundle import Bundle


@pytest.fixture(scope="session")
def written(
    demo_bundle: Path, made_once: Callable[[str, Callable[[Path], object]], Path]
) -> tuple[Path, dict[str, Any]]:
    """A report with one picture of a hostile prompt, and what the command printed."""

    def make(folder: Path) -> None:
        given = ("--prompt", HOSTILE, "--pictures", 1, "--json")
        result = called(EXPORT, "report", demo_bundle, "--out", folder / "report.html", *given)
        assert result.returncode == 0, result.stderr
        (folder / "printed.json").write_text(result.stdout)

    folder = made_once("report", make)
    return folder / "report.html", json.loads((folder / "printed.json").read_text())


@pytest.fixture(scope="session")
def text(written: tuple[Path, dict[str, Any]]) -> str:
    return written[0].read_text()


@pytest.fixture(scope="session")
def parsed(text: str) -> Parsed:
    return Parsed(text)


@pytest.fixture(scope="session")
def bundle(demo_bundle: Path) -> Bundle:
    return Bundle.open(demo_bundle)


@pytest.fixture(scope="session")
def found(bundle: Bundle) -> Sensitivity:
    return Sensitivity.load(bundle.sensitivity_path)
