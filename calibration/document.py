"""The sensitivity document: what calibration measured and what it concluded, stored as `sensitivity.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

from pydantic import Field, ValidationError

from calibration.records import (
    CalibrationSettings,
    DepartureRecord,
    DroppedRecord,
    FitPoint,
    FitRecord,
    GramRecord,
    GuardRecord,
    IntervalRecord,
    ParetoPoint,
    Predictor,
    Record,
    ScoreRecord,
    TransferRecord,
    ValidationRow,
)
from engines.documents import one_line, read_document, read_json, write_document
from engines.errors import TmpDiffError

SENSITIVITY_VERSION: Final = 3
LATENCY_TOLERANCE = 1e-9


class OutdatedCalibrationError(TmpDiffError):
    """A sensitivity document of an earlier format, which holds no error vectors."""


class Sensitivity(Record):
    """Everything a calibration measured, and the schedule it chose.

    Attributes:
        evaluator_key: `Evaluator.key()` of the calibration samples; `validation_key` of the others.
        precisions: all built precisions, the reference first; `dropped` says which are left out and why.
        latencies_ms: measured step latency by precision, as given to `calibrate`.
        swap_ms: "before after" -> ms that a change of precision was charged, where any was.
        max_engines: most distinct precisions that a schedule was allowed, None for any number.
        uniform: typical error of every uniform schedule on the calibration samples, 0 for the reference.
        uniform_departures: of the same runs.
        gram: with `scores` what predicted errors come from; None where every low precision was dropped.
        calls: denoiser calls by stage and precision, everything included.
        search_calls: those spent on scores; `sweep_calls` is what full sweeps would take instead.
        predictor: what schedules were chosen by; `fit` has its figures and those of the other.
        budget: the budget in words.
        schedule: the chosen precision per step index.
        predicted_error: its predicted E.
        pareto: the front, fastest first; a selection of a large one.
        guard: None where there was nothing to compare.
        validation: empty without validation samples.
        settings: None where no bundle was calibrated.
        transfer: where scores were carried from, for method "transfer".
    """

    version: Literal[3] = SENSITIVITY_VERSION
    evaluator_key: str
    validation_key: str | None
    method: Literal["bisection", "sweep", "transfer"]
    num_steps: int = Field(ge=1)
    num_samples: int = Field(ge=1)
    precisions: tuple[str, ...]
    latencies_ms: dict[str, float]
    swap_ms: dict[str, float] = Field(default_factory=dict)
    max_engines: int | None = None
    uniform: dict[str, IntervalRecord]
    uniform_departures: dict[str, DepartureRecord]
    dropped: tuple[DroppedRecord, ...]
    scores: tuple[ScoreRecord, ...]
    gram: GramRecord | None
    calls: dict[str, dict[str, int]]
    search_calls: int
    sweep_calls: int
    predictor: Predictor
    fit: tuple[FitRecord, ...]
    fit_points: tuple[FitPoint, ...]
    budget: str
    schedule: tuple[str, ...]
    predicted_error: float
    predicted_latency: float
    pareto: tuple[ParetoPoint, ...]
    guard: GuardRecord | None
    validation: tuple[ValidationRow, ...]
    settings: CalibrationSettings | None = None
    transfer: TransferRecord | None = None

    @property
    def chosen(self) -> ValidationRow | None:
        """The schedule on validation samples; None without any."""
        return next((row for row in self.validation if row.name == "schedule"), None)

    @property
    def best_rule(self) -> ValidationRow | None:
        """The rule that had the least typical error on calibration samples, on validation samples; None without one."""
        return next((row for row in self.validation if row.name.startswith("best rule: ")), None)

    @property
    def losses(self) -> tuple[ValidationRow, ...]:
        """Rows no slower than the schedule that have less typical error, beyond the interval."""
        if self.chosen is None:
            return ()
        latency = self.chosen.latency * (1 + LATENCY_TOLERANCE)
        return tuple(row for row in self.validation if row.standing == "worse" and row.latency <= latency)

    @classmethod
    def load(cls, path: Path) -> Sensitivity:
        """Reads a sensitivity document.

        Raises:
            OutdatedCalibrationError: the file is of an earlier version.
            TmpDiffError: it is missing, malformed, altered, or of a later version.
        """
        version = read_json(path, "sensitivity", TmpDiffError).get("version")
        if type(version) is int and 1 <= version < SENSITIVITY_VERSION:
            raise OutdatedCalibrationError(
                f"sensitivity {path} has format version {version}, which holds no error vectors; calibrate the bundle anew: "
                f"tmpdiff-export calibrate {path.parent} --prompts FILE"
            )
        data = read_document(path, "sensitivity", SENSITIVITY_VERSION, TmpDiffError)
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise TmpDiffError(f"sensitivity {path} is malformed: {one_line(error)}") from error

    def save(self, path: Path) -> None:
        """Writes the document atomically."""
        write_document(path, self.model_dump(mode="json"))
