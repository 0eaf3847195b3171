"""The sensitivity document: what calibration measured and what it concluded, stored as `sensitivity.json`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, pairwise, permutations
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field, ValidationError, model_validator

from calibration.records import (
    CalibrationSettings,
    Count,
    DepartureRecord,
    DroppedRecord,
    FitPoint,
    FitRecord,
    GramRecord,
    GuardRecord,
    IntervalRecord,
    ParetoPoint,
    Predictor,
    QualityRecord,
    Record,
    ScoreRecord,
    TransferRecord,
    ValidationRow,
)
from calibration.reuse_records import FewerStepsRecord, ReuseRecord
from engines.documents import one_line, read_document, read_json, write_document
from engines.errors import TmpDiffError
from engines.reuse import REUSES

SENSITIVITY_VERSION: Final = 4
"""4: reuse. Documents of version 3 are the same without it."""
OLDEST_VERSION: Final = 3
LATENCY_TOLERANCE = 1e-9

LatencyMs = Annotated[float, Field(ge=1e-6, le=1e12)]
"""A nanosecond at least, as latencies are added in these."""

SwapMs = Annotated[float, Field(ge=0, le=1e12)]


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
        quality: the budget, where it is one in picture quality.
        guard: None where there was nothing to compare, or `quality` was met by measurement instead.
        validation: empty without validation samples.
        settings: None where no bundle was calibrated.
        transfer: where scores were carried from, for method "transfer".
        reuse: None where no step was allowed to reuse model outputs.
        fewer_steps: loops of fewer steps, which reuse was compared with, the best first; empty without reuse.
    """

    version: Literal[4] = SENSITIVITY_VERSION
    evaluator_key: str
    validation_key: str | None
    method: Literal["bisection", "sweep", "transfer"]
    num_steps: int = Field(ge=1)
    num_samples: int = Field(ge=1)
    precisions: tuple[str, ...] = Field(min_length=1)
    latencies_ms: dict[str, LatencyMs]
    swap_ms: dict[str, SwapMs] = Field(default_factory=dict)
    max_engines: int | None = Field(default=None, ge=1)
    uniform: dict[str, IntervalRecord]
    uniform_departures: dict[str, DepartureRecord]
    dropped: tuple[DroppedRecord, ...]
    scores: tuple[ScoreRecord, ...]
    gram: GramRecord | None
    calls: dict[str, dict[str, Count]]
    search_calls: Count
    sweep_calls: Count
    predictor: Predictor
    fit: tuple[FitRecord, ...]
    fit_points: tuple[FitPoint, ...]
    budget: str
    quality: QualityRecord | None = None
    schedule: tuple[str, ...]
    predicted_error: float = Field(ge=0)
    predicted_latency: float = Field(gt=0)
    pareto: tuple[ParetoPoint, ...]
    guard: GuardRecord | None
    validation: tuple[ValidationRow, ...]
    settings: CalibrationSettings | None = None
    transfer: TransferRecord | None = None
    reuse: ReuseRecord | None = None
    fewer_steps: tuple[FewerStepsRecord, ...] = ()

    @model_validator(mode="after")
    def _hangs_together(self) -> Sensitivity:
        """Lengths and names agree, so that no reader has to look twice."""
        for contradiction in chain(
            _of_precisions(self), _of_scores(self), _of_reuse(self), _of_schedules(self), _of_samples(self)
        ):
            raise ValueError(contradiction)
        return self

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
        if type(version) is int and 1 <= version < OLDEST_VERSION:
            raise OutdatedCalibrationError(
                f"sensitivity {path} has format version {version}, which holds no error vectors; calibrate the bundle anew"
            )
        data = read_document(path, "sensitivity", SENSITIVITY_VERSION, TmpDiffError, oldest=OLDEST_VERSION)
        try:
            return cls.model_validate(data | {"version": SENSITIVITY_VERSION})
        except ValidationError as error:
            raise TmpDiffError(
                f"sensitivity {path} is malformed: {one_line(error)}; calibrate the bundle anew"
            ) from error

    def save(self, path: Path) -> None:
        """Writes the document atomically."""
        write_document(path, self.model_dump(mode="json"))


def _of_precisions(found: Sensitivity) -> Iterator[str]:
    """Contradictions among what is given by precision, in words; so do all below."""
    names = found.precisions
    if len(set(names)) < len(names) or not all(name.isalnum() for name in names):
        yield f"precisions are {', '.join(map(repr, names))}, expected distinct plain words"
    for field in ("latencies_ms", "uniform", "uniform_departures"):
        if set(getattr(found, field)) != set(names):
            yield f"{field} are not of the precisions {', '.join(names)}"
    if not set(found.swap_ms) <= {" ".join(pair) for pair in permutations(names, 2)}:
        yield "swap_ms is not of pairs of precisions"
    dropped = {item.precision for item in found.dropped}
    if len(dropped) < len(found.dropped) or not dropped <= set(names[1:]):
        yield "dropped ones are no low precisions, or twice the same"
    low = [name for name in names[1:] if name not in dropped]
    if [record.precision for record in found.scores] != low:
        yield f"scores are not of {', '.join(low) or 'no precision'}, which are not dropped"
    if found.transfer and [check.precision for check in found.transfer.checks] != low:
        yield f"checks are not of {', '.join(low)}, which are not dropped"


def _of_scores(found: Sensitivity) -> Iterator[str]:
    steps, low = found.num_steps, [record.precision for record in found.scores]
    for record in found.scores:
        if len(record.scores) != steps:
            yield f"scores of {record.precision} are of {len(record.scores)} steps, expected {steps}"
    if (found.gram is None) != (not low):
        yield "gram is there without scores, or scores without it"
    if found.gram is None:
        return
    positions = found.gram.positions
    if list(positions) != low or len(found.gram.floor) != steps:
        yield f"gram is not of {', '.join(low)} and {steps} steps"
    for name, at in positions.items():
        if not at or not 0 <= at[0] <= at[-1] <= steps - 1 or any(a >= b for a, b in pairwise(at)):
            yield f"gram has positions of {name} that do not rise within 0..{steps - 1}"
    pairs = [(first, second) for k, first in enumerate(low) for second in low[k:]]
    if [(item.first, item.second) for item in found.gram.correlations] != pairs:
        yield "gram has no correlations of every pair of low precisions, in order"
    for item in found.gram.correlations:
        rows, columns = len(positions[item.first]), len(positions[item.second])
        if [len(row) for row in item.values] != [columns] * rows:
            yield f"gram has correlations of {item.first} and {item.second} that are not {rows} rows of {columns}"


def _of_reuse(found: Sensitivity) -> Iterator[str]:
    if found.reuse is None:
        if found.fewer_steps:
            yield "fewer steps were compared without reuse"
        return
    steps = found.num_steps
    if not set(found.reuse.scores) <= set(REUSES) or any(len(row) != steps for row in found.reuse.scores.values()):
        yield f"scores of reuse are not of {', '.join(REUSES)} and {steps} steps"
    for plan in found.reuse.plans:
        computed = set(plan.choices) - set(REUSES)
        if len(plan.choices) != steps or len(plan.influence) != steps or computed != {found.precisions[0]}:
            yield f"a plan of reuse is not of {steps} steps at {found.precisions[0]}"
        elif plan.choices[0] in REUSES or not set(plan.choices) & set(REUSES):
            yield "a plan of reuse computes no first step, or reuses none"
    if max(found.reuse.samples) >= found.num_samples:
        yield f"reuse has a sample {max(found.reuse.samples)}, expected less than {found.num_samples}"
    if not {record.precision for record in found.fewer_steps} <= set(found.precisions):
        yield "fewer steps are at unknown precisions"


def _of_schedules(found: Sensitivity) -> Iterator[str]:
    reuses = set(REUSES) if found.reuse else set()
    kept = {found.precisions[0], *(record.precision for record in found.scores)}
    measured = found.guard.candidates if found.guard else ()
    of_kept = [found.schedule, *(point.precisions for point in found.pareto)]
    of_kept += [*(point.precisions for point in found.fit_points), *(candidate.precisions for candidate in measured)]
    shorter = {record.name: ((record.precision,) * record.num_steps,) for record in found.fewer_steps}
    of_all = chain.from_iterable(row.schedules for row in found.validation if row.name not in shorter)
    for row in found.validation:
        if row.schedules != shorter.get(row.name, row.schedules):
            yield f"validation of {row.name} is of another run"
    for allowed, schedules in ((kept | reuses, of_kept), (set(found.precisions) | reuses, of_all)):
        for schedule in schedules:
            if len(schedule) != found.num_steps or not set(schedule) <= allowed:
                yield (
                    f"a schedule has {len(schedule)} steps at {', '.join(sorted(set(schedule)))}; expected "
                    f"{found.num_steps} at {', '.join(sorted(allowed))}"
                )
    if measured and measured[0].precisions != found.schedule:
        yield "guard has another winner than the schedule"
    for row in found.validation:
        if not set(row.counts) <= set(found.precisions) | reuses:
            yield f"validation counts steps of {row.name} at unknown precisions"


def _of_samples(found: Sensitivity) -> Iterator[str]:
    if found.guard:
        for samples in (found.guard.fragile, *(trial.samples for trial in found.guard.candidates)):
            if max(samples, default=0) >= found.num_samples:
                yield f"guard has a sample {max(samples)}, expected less than {found.num_samples}"
    names = [row.name for row in found.validation]
    if names and (names.count("schedule") != 1 or len(set(names)) < len(names)):
        yield "validation has no row of the schedule, or two rows of one name"
    if len({len(row.sample_errors) for row in found.validation}) > 1:
        yield "validation rows are of different samples"
