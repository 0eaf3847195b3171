"""Sensitivity documents: kept whole, old ones named, and what rows say of the schedule."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import made_up

from calibration.document import OutdatedCalibrationError, Sensitivity
from calibration.records import IntervalRecord
from engines.errors import TmpDiffError


def test_a_document_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    found = made_up.calibration(8, ("fp16", "int8", "int4"))
    found.save(tmp_path / "sensitivity.json")
    assert Sensitivity.load(tmp_path / "sensitivity.json") == found


@pytest.mark.parametrize("version", [1, 2])
def test_an_old_document_is_to_be_made_anew(tmp_path: Path, version: int) -> None:
    path = tmp_path / "bundle" / "sensitivity.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"version": version, "anything": []}))
    with pytest.raises(OutdatedCalibrationError) as caught:
        Sensitivity.load(path)
    assert str(caught.value) == (
        f"sensitivity {path} has format version {version}, which holds no error vectors; calibrate the bundle anew: "
        f"tmpdiff-export calibrate {path.parent} --prompts FILE"
    )


@pytest.mark.parametrize(
    ("version", "words"),
    [(4, "reads up to 3; upgrade"), (True, "version True"), ("2", "expected 3"), (0, "expected 3")],
)
def test_other_versions_are_refused(tmp_path: Path, version: object, words: str) -> None:
    path = tmp_path / "sensitivity.json"
    path.write_text(json.dumps({"version": version}))
    with pytest.raises(TmpDiffError, match=words) as caught:
        Sensitivity.load(path)
    assert not isinstance(caught.value, OutdatedCalibrationError)


def test_a_loss_is_beyond_the_interval_and_no_slower() -> None:
    found = made_up.calibration(10)
    row = next(row for row in found.validation if row.name.startswith("last "))
    worse = row.model_copy(update={"against": IntervalRecord(value=1.2, low=1.1, high=1.3)})
    chosen = found.validation[0]
    assert found.chosen is chosen

    def lost(other: object) -> list[str]:
        return [row.name for row in found.model_copy(update={"validation": (chosen, other)}).losses]

    assert lost(worse) == [row.name]
    assert lost(worse.model_copy(update={"latency": chosen.latency * 1.01})) == []
    assert lost(worse.model_copy(update={"against": IntervalRecord(value=1.2, low=0.9, high=1.3)})) == []
    assert lost(worse.model_copy(update={"sample_errors": (0.1,)})) == []
    assert found.model_copy(update={"validation": ()}).losses == ()
