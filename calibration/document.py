"""The sensitivity document: what calibration measured and what it concluded, stored as `sensitivity.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engines.documents import one_line, read_document, write_document
from engines.errors import TmpDiffError

SENSITIVITY_VERSION: Final = 2


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ScoreRecord(_Record):
    """Scores of one precision in one direction ("downcast" or "upcast").

    Attributes:
        scores: length T, a mean over the calibration samples; interpolated where not `measured`.
        risk: of a departure, in units of E, length T (`calibration.scores.divergence`); empty for upcast scores and in
            documents that lack it.
        measured: length T.
        order: the step indices measured, in order.
        settled: the search stopped because the ranking was settled, not because its budget ran out.
        calls: denoiser calls spent, per precision.
        sweep_calls: denoiser calls a full sweep takes.
    """

    precision: str
    direction: Literal["downcast", "upcast"]
    scores: tuple[float, ...]
    risk: tuple[float, ...] = ()
    measured: tuple[bool, ...]
    order: tuple[int, ...]
    settled: bool
    calls: dict[str, int]
    sweep_calls: int


class DroppedRecord(_Record):
    """A built precision that is left out: `by` is no slower, errs no more, and is no costlier to change to or from."""

    precision: str
    by: str
    reason: str


class FitRecord(_Record):
    """How well a predictor describes the measured E of random schedules.

    Attributes:
        predictor: see `calibration.scores.predictors`.
        r2: of the regression line of measured on predicted; None with fewer than three schedules or
            where either does not vary.
        spearman: rank correlation; None as `r2`.
        ratio: sum of predicted over sum of measured; None where nothing was measured.
    """

    predictor: str
    r2: float | None
    spearman: float | None
    ratio: float | None


class FitPoint(_Record):
    """A random schedule, its measured E and what each predictor says."""

    precisions: tuple[str, ...]
    measured: float
    predicted: dict[str, float]


class ParetoPoint(_Record):
    """A schedule that no other one beats in relative latency and predicted E."""

    precisions: tuple[str, ...]
    latency: float
    error: float


class ValidationRow(_Record):
    """A schedule run on prompts that calibration has not seen.

    Attributes:
        name: "schedule" for the chosen one, "uniform <precision>", or a baseline's name.
        schedules: the schedules run: one, or every draw of a random baseline (the figures are their mean).
        counts: steps per precision.
        latency: mean step latency relative to the reference, from the measured step latencies.
        error: E on the validation samples, their plain mean.
        error_spread: standard deviation of E over draws, None for a single schedule.
        sample_errors: E of every validation sample, a mean over draws; empty in documents that lack it.
        ssim: mean structural similarity to the reference's pictures, None without a decoder.
        psnr_db: of the mean squared difference from the reference's pictures, None without a decoder or
            where all pictures are identical.
        loses_to: for the chosen schedule, the rows that are no slower and have a smaller E.
    """

    name: str
    schedules: tuple[tuple[str, ...], ...]
    counts: dict[str, int]
    latency: float
    error: float
    error_spread: float | None = None
    sample_errors: tuple[float, ...] = ()
    ssim: float | None = None
    psnr_db: float | None = None
    loses_to: tuple[str, ...] = ()


class TrialRecord(_Record):
    """A schedule that took part in the refinement.

    Attributes:
        origin: "scores" for the one it started from, a fixed rule's name, "<predictor> scores", "front",
            "exchange", or "spares the first N" (`calibration.choose.sparing`).
        latency: mean step latency relative to the reference.
        predicted_error: by the predictor that allocation used.
        errors: measured E by calibration sample, of the leading ones it ran on.
    """

    precisions: tuple[str, ...]
    origin: str
    latency: float
    predicted_error: float
    errors: tuple[float, ...]


class RefinementRecord(_Record):
    """The local search that measures the schedules nearest to allocation's choice, see `calibration.choose.rivals`.

    Attributes:
        trials: every schedule that ran; the first is allocation's choice. None where `max_calls` allow no other.
        rounds: races held.
        max_calls: denoiser calls it was allowed; `calls` is what it took, per precision.
        origin: of the schedule that was not beaten; "scores" where it is allocation's choice.
    """

    trials: tuple[TrialRecord, ...]
    rounds: int
    max_calls: int
    calls: dict[str, int]
    origin: str


class CheckRecord(_Record):
    """Carried downcast scores of one precision against measured ones, see `calibration.scores.transfer.Comparison`."""

    precision: str
    steps: tuple[int, ...]
    carried: tuple[float, ...]
    measured: tuple[float, ...]
    level: float
    scatter: float
    spearman: float | None


class TransferRecord(_Record):
    """Where carried scores come from.

    Attributes:
        bundle_id: of the bundle that was calibrated.
        num_steps: its T.
        guidance_scale: of its calibration.
        checks: one for every precision scored.
    """

    bundle_id: str
    num_steps: int
    guidance_scale: float
    checks: tuple[CheckRecord, ...]


class CalibrationSettings(_Record):
    """What a bundle was calibrated with.

    Attributes:
        bundle_id: of the bundle.
        machine: what the step latencies were measured on.
        batch: pictures at once that they were measured with.
        guidance_scale: of every run.
        seed: of the first calibration sample's noise.
        calibration_prompts: one sample each.
        validation_prompts: one sample each.
    """

    bundle_id: str
    machine: str
    batch: int = 1
    guidance_scale: float
    seed: int
    calibration_prompts: tuple[str, ...]
    validation_prompts: tuple[str, ...]


class Sensitivity(_Record):
    """Everything a calibration measured, and the schedule it chose.

    Attributes:
        evaluator_key: `Evaluator.key()` of the calibration samples; `validation_key` of the others.
        precisions: all built precisions, the reference first; `dropped` says which are left out and why.
        latencies_ms: measured step latency by precision, as given to `calibrate`.
        swap_ms: "before after" -> ms that a change of precision was charged, where any was.
        max_engines: most distinct precisions that a schedule was allowed, None for any number.
        uniform_errors: E(all p) on the calibration samples by precision, 0 for the reference; scores, fit and
            predictions are limited means like these (`calibration.measure.metrics.limited`).
        calls: denoiser calls by stage and precision, everything included.
        search_calls: those spent on scores; `sweep_calls` is what full sweeps would take instead.
        predictor: the predictor that allocation used; `fit` has its figures and those of the others.
        budget: the budget in words.
        schedule: the chosen precision per step index.
        predicted_error: its predicted E; `measured_error` is its E on the validation samples.
        pareto: the front, fastest first; a selection where `pareto_size`, its real size, is larger.
        loses_to: as in the "schedule" row of `validation`.
        settings: None where no bundle was calibrated.
        refinement: the local search; None for a budget in picture quality, which allocation meets by measurement.
        transfer: where scores were carried from, for method "transfer".
    """

    version: Literal[2] = SENSITIVITY_VERSION
    evaluator_key: str
    validation_key: str | None
    method: Literal["bisection", "sweep", "transfer"]
    num_steps: int = Field(ge=1)
    num_samples: int = Field(ge=1)
    precisions: tuple[str, ...]
    latencies_ms: dict[str, float]
    swap_ms: dict[str, float] = Field(default_factory=dict)
    max_engines: int | None = None
    uniform_errors: dict[str, float]
    dropped: tuple[DroppedRecord, ...]
    scores: tuple[ScoreRecord, ...]
    calls: dict[str, dict[str, int]]
    search_calls: int
    sweep_calls: int
    predictor: str
    fit: tuple[FitRecord, ...]
    fit_points: tuple[FitPoint, ...]
    fit_samples: Literal["calibration", "validation"]
    budget: str
    schedule: tuple[str, ...]
    predicted_error: float
    predicted_latency: float
    measured_error: float | None
    loses_to: tuple[str, ...]
    pareto: tuple[ParetoPoint, ...]
    pareto_size: int
    validation: tuple[ValidationRow, ...]
    settings: CalibrationSettings | None = None
    refinement: RefinementRecord | None = None
    transfer: TransferRecord | None = None

    @classmethod
    def load(cls, path: Path) -> Sensitivity:
        """Reads a sensitivity document.

        Raises:
            TmpDiffError: the file is missing, malformed, altered, or of another version.
        """
        data = read_document(path, "sensitivity", SENSITIVITY_VERSION, TmpDiffError)
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise TmpDiffError(f"sensitivity {path} is malformed: {one_line(error)}") from error

    def save(self, path: Path) -> None:
        """Writes the document atomically."""
        write_document(path, self.model_dump(mode="json"))
