"""Sensitivity documents: kept whole, old ones named, and what rows say of the schedule."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from helpers import made_up

from calibration.document import OutdatedCalibrationError, Sensitivity
from calibration.records import IntervalRecord
from engines.documents import write_document
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
        f"sensitivity {path} has format version {version}, which holds no error vectors; calibrate the bundle anew"
    )


@pytest.mark.parametrize(
    ("version", "words"),
    [(5, "reads up to 4; upgrade"), (True, "version True"), ("2", "expected 4"), (0, "expected 4")],
)
def test_other_versions_are_refused(tmp_path: Path, version: object, words: str) -> None:
    path = tmp_path / "sensitivity.json"
    path.write_text(json.dumps({"version": version}))
    with pytest.raises(TmpDiffError, match=words) as caught:
        Sensitivity.load(path)
    assert not isinstance(caught.value, OutdatedCalibrationError)


def test_a_document_of_version_3_is_one_without_reuse(tmp_path: Path) -> None:
    found = made_up.calibration(8, ("fp16", "int8", "int4"))
    data = found.model_dump(mode="json") | {"version": 3}
    for added in ("reuse", "fewer_steps"):
        del data[added]
    write_document(tmp_path / "sensitivity.json", data)
    assert Sensitivity.load(tmp_path / "sensitivity.json") == found


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


# documents that contradict themselves -----------------------------------------------------------------------------


@functools.cache
def whole() -> str:
    return made_up.calibration(8, ("fp16", "int8", "int4")).model_dump_json()


def changed(data: dict[str, Any], at: str, value: object) -> None:
    """Puts a value at a place such as "gram.floor.0"; a function gets what is there."""
    node: Any = data
    *path, last = [int(part) if part.isdigit() else part for part in at.split(".")]
    for part in path:
        node = node[part]
    node[last] = value(node[last]) if callable(value) else value


@pytest.mark.parametrize(
    ("at", "value", "words"),
    [
        ("precisions", ["fp16", "int8", "int8"], "distinct plain words"),
        ("precisions.2", "in t4", "distinct plain words"),
        ("latencies_ms.int8", 0.0, "latencies_ms.int8"),
        ("latencies_ms.int8", 1e300, "latencies_ms.int8"),
        ("latencies_ms", {"fp16": 8.0}, "latencies_ms are not of the precisions fp16, int8, int4"),
        ("uniform_departures", {}, "uniform_departures are not of the precisions"),
        ("swap_ms", {"fp16 nvfp4": 1.0}, "swap_ms is not of pairs"),
        ("max_engines", 0, "max_engines"),
        ("dropped", [{"precision": "fp16", "by": "int8", "reason": ""}], "dropped ones are no low precisions"),
        (
            "dropped",
            [{"precision": "int8", "by": "fp16", "reason": ""}],
            "scores are not of int4, which are not dropped",
        ),
        (
            "scores.0.scores",
            lambda scores: scores[1:],
            "scores.0: scores, measured and order of int8 are not of the same",
        ),
        ("scores.0.scores.1", -1.0, "scores.0.scores.1"),
        ("scores.0.scores.1", 1e300, "scores.0.scores.1"),
        ("scores.0.scores.1", 10**400, "scores.0.scores.1"),
        ("scores.0.order.0", 99, "scores.0: scores, measured and order of int8"),
        ("scores.0.calls.fp16", -1, "scores.0.calls.fp16"),
        ("gram", None, "gram is there without scores, or scores without it"),
        ("gram.floor", [0.0], "gram is not of int8, int4 and 8 steps"),
        ("gram.floor.0", -1e-9, "gram.floor.0"),
        ("gram.positions", lambda found: dict(reversed(found.items())), "gram is not of int8, int4 and 8 steps"),
        ("gram.positions.int8", [], "positions of int8 that do not rise within 0..7"),
        ("gram.positions.int8", lambda steps: [-1.0, *steps[1:]], "positions of int8 that do not rise within 0..7"),
        ("gram.positions.int8", lambda steps: [*steps[:-1], 8.0], "positions of int8 that do not rise within 0..7"),
        ("gram.positions.int8", lambda steps: [*steps[1:], steps[0]], "positions of int8 that do not rise"),
        ("gram.positions.int8", lambda steps: steps[1:], "of int8 and int8 that are not"),
        ("gram.correlations", lambda found: found[1:], "correlations of every pair"),
        ("gram.correlations.1.values", lambda rows: [row[1:] for row in rows], "of int8 and int4 that are not"),
        ("gram.correlations.1.values.0.0", 1.1, "gram.correlations.1.values.0.0"),
        ("schedule", ["fp16"] * 7, "a schedule has 7 steps at fp16; expected 8 at fp16, int4, int8"),
        ("schedule.0", "nvfp4", "a schedule has 8 steps at .*nvfp4"),
        ("predicted_error", -1.0, "predicted_error"),
        ("predicted_latency", 0.0, "predicted_latency"),
        ("pareto.0.precisions", [], "a schedule has 0 steps"),
        ("fit_points.0.precisions", ["fp16"], "a schedule has 1 steps"),
        ("fit_points.0.predicted", {"gram": 1.0}, "fit_points.0.predicted"),
        ("fit.0.scatter", 1e6, "fit.0.scatter"),
        ("guard.candidates", [], "guard.candidates"),
        ("guard.candidates", lambda trials: trials[1:], "another winner than the schedule"),
        ("guard.candidates.0.names", [], "guard.candidates.0.names"),
        ("guard.candidates.0.errors", lambda errors: errors[1:], "23 errors of 24 samples, 24 of them leading"),
        ("guard.candidates.0.leading", 25, "24 errors of 24 samples, 25 of them leading"),
        ("guard.candidates.0.leading", 0, "guard.candidates.0.leading"),
        ("guard.candidates.0.samples.3", 4, "errors of 24 samples"),
        ("guard.candidates.0.samples.3", 24, "guard has a sample 24, expected less than 24"),
        ("guard.fragile", [99], "guard has a sample 99"),
        ("validation.0.name", "another", "validation has no row of the schedule"),
        ("validation.1.name", "schedule", "or two rows of one name"),
        ("validation.1.schedules", [], "validation.1.schedules"),
        ("validation.1.schedules.0", ["fp16"], "a schedule has 1 steps"),
        ("validation.1.counts", {"nvfp4": 8}, "counts steps of .* at unknown precisions"),
        ("validation.1.sample_errors", [], "validation.1.sample_errors"),
        ("validation.1.sample_errors", [1e-3], "validation rows are of different samples"),
        ("validation.1.departures.high", 1.5, "validation.1.departures.high"),
        ("validation.1.typical.low", -1.0, "validation.1.typical.low"),
    ],
)
def test_a_document_that_contradicts_itself_is_refused_in_one_line(
    tmp_path: Path, at: str, value: object, words: str
) -> None:
    data = json.loads(whole())
    changed(data, at, value)
    path = tmp_path / "sensitivity.json"
    write_document(path, data)
    with pytest.raises(TmpDiffError, match=words) as caught:
        Sensitivity.load(path)
    assert str(caught.value).startswith(f"sensitivity {path} is malformed: ")
    assert str(caught.value).endswith("; calibrate the bundle anew")
    assert "\n" not in str(caught.value)
