"""A bundle that an earlier release calibrated: its schedule runs, and the calibration is to be made anew."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import EXPORT, assert_refused, called, save_prompts
from helpers.demo_build import linked_copy
from helpers.stored import schedule_path, sensitivity_path, setting_name
from helpers.tiny_pipeline import tiny_options

from engines.bundle import Bundle
from engines.documents import write_document
from engines.schedule import Schedule

REMEDY = "has format version 2, which holds no error vectors; calibrate the bundle anew: tmpdiff-export calibrate"


@pytest.fixture
def bundle(built: Callable[[Any], Path], tmp_path: Path) -> Path:
    """FP16 and INT8 of the tiny pipeline with a schedule and a sensitivity document of format 2."""
    folder = linked_copy(built(tiny_options()), tmp_path / "bundle")
    bundle_id = Bundle.open(folder).manifest.bundle_id
    schedule = Schedule(version=1, bundle_id=bundle_id, precisions=("fp16", "int8", "int8", "fp16"), origin="by hand")
    data = schedule.model_dump(mode="json")
    del data["setting"]  # as schedules of that release
    write_document(schedule_path(folder), data)
    sensitivity_path(folder).write_text(json.dumps({"version": 2, "predictor": "mixed-power"}))
    return folder


def test_what_needs_its_schedule_alone_goes_on(bundle: Path, tmp_path: Path) -> None:
    assert called(EXPORT, "verify", bundle).returncode == 0
    picture = tmp_path / "picture.png"
    drawn = called(EXPORT, "run", bundle, "--prompt", "a red circle", "--seed", 0, "--out", picture)
    assert drawn.returncode == 0, drawn.stderr
    assert picture.exists()
    timed = called(EXPORT, "bench", bundle, "--rounds", 1, "--json")
    assert timed.returncode == 0, timed.stderr
    assert {row["name"] for row in json.loads(timed.stdout)["rows"]} == {"fp16", "int8"}


def test_it_is_inspected_with_a_word_on_what_to_do(bundle: Path) -> None:
    shown = called(EXPORT, "inspect", bundle)
    assert shown.returncode == 0
    assert "schedule: fp16 0 | int8 1-2 | fp16 3" in shown.stdout
    assert f"{REMEDY} {bundle} --prompts FILE" in shown.stderr
    data = called(EXPORT, "inspect", bundle, "--json")
    found = json.loads(data.stdout)
    setting = found["settings"][setting_name(bundle)]
    assert setting["schedule"]["precisions"] == ["fp16", "int8", "int8", "fp16"]
    assert setting["sensitivity"] is None
    assert REMEDY in data.stderr


def test_its_schedule_is_shown_without_predictions(bundle: Path) -> None:
    shown = called(EXPORT, "schedule", bundle, "--json")
    assert shown.returncode == 0
    assert json.loads(shown.stdout)["schedule"]["predicted_error"] is None
    assert REMEDY in shown.stderr


def test_what_needs_the_calibration_says_what_to_do(bundle: Path, tmp_path: Path) -> None:
    for words in (
        ("report", bundle, "--out", tmp_path / "report.html"),
        ("calibrate", bundle, "--prompts", save_prompts(tmp_path), "--from", bundle),
    ):
        assert_refused(called(EXPORT, *words), f"{REMEDY} {bundle} --prompts FILE")
    assert not (tmp_path / "report.html").exists()
