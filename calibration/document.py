"""The sensitivity document: what calibration measured and what it concluded, stored as `sensitivity.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engines.documents import one_line, read_document, read_json, write_document
from engines.errors import TmpDiffError

SENSITIVITY_VERSION: Final = 3
LATENCY_TOLERANCE = 1e-9


class OutdatedCalibrationError(TmpDiffError):
    """A sensitivity document of an earlier format, which holds no error vectors."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class IntervalRecord(_Record):
    """A figure and the bounds of its 95 % interval, which are the figure itself where there is a single sample."""

    value: float
    low: float
    high: float


class DepartureRecord(_Record):
    """How many of so many samples departed, and a 95 % interval of the share (Clopper and Pearson, Biometrika 26, 1934)."""

    count: int = Field(ge=0)
    samples: int = Field(ge=0)
    low: float
    high: float


class ScoreRecord(_Record):
    """Downcast scores of one precision.

    Attributes:
        scores: length T, a limited mean over the calibration samples; interpolated where not `measured`.
        measured: length T.
        order: the step indices measured, in order.
        settled: the search stopped because the ranking was settled, not because its budget ran out.
        calls: denoiser calls spent, per precision.
        sweep_calls: denoiser calls a full sweep takes.
    """

    precision: str
    scores: tuple[float, ...]
    measured: tuple[bool, ...]
    order: tuple[int, ...]
    settled: bool
    calls: dict[str, int]
    sweep_calls: int


class CorrelationRecord(_Record):
    """Correlations of the error vectors of two precisions' downcasts, a row per position of the first."""

    first: str
    second: str
    values: tuple[tuple[float, ...], ...]


class GramRecord(_Record):
    """What, beside the scores, makes the Gram matrix (`calibration.scores.gram`).

    Attributes:
        positions: by low precision: the step indices that correlations are of; fractions where they were carried.
        correlations: of every pair of low precisions, in order.
        floor: length T, the part of E that is the reference's own rounding, by the first low step of a schedule.
    """

    positions: dict[str, tuple[float, ...]]
    correlations: tuple[CorrelationRecord, ...]
    floor: tuple[float, ...]


class DroppedRecord(_Record):
    """A built precision that is left out: `by` is no slower, errs no more, and is no costlier to change to or from."""

    precision: str
    by: str
    reason: str


Predictor = Literal["gram", "downcast sum"]
"""What schedules are chosen by: all of the Gram matrix, or its diagonal."""

PREDICTORS: tuple[Predictor, ...] = ("gram", "downcast sum")


class FitRecord(_Record):
    """How well a predictor describes the measured E of random schedules on calibration samples.

    Attributes:
        r2: of the regression line of measured on predicted; None with fewer than three schedules or
            where either does not vary.
        spearman: rank correlation; None as `r2`.
        ratio: sum of predicted over sum of measured; None where nothing was measured.
        scatter: root mean square of log(predicted / measured); None where any is zero, or nothing was measured.
    """

    predictor: Predictor
    r2: float | None
    spearman: float | None
    ratio: float | None
    scatter: float | None


class FitPoint(_Record):
    """A random schedule, its measured typical error and what each predictor says."""

    precisions: tuple[str, ...]
    measured: float
    predicted: dict[Predictor, float]


class ParetoPoint(_Record):
    """A schedule that no other one beats in relative latency and predicted E."""

    precisions: tuple[str, ...]
    latency: float
    error: float


Standing = Literal["worse", "better", "not distinguishable"]
"""The chosen schedule beside another one, in typical error: the interval of their ratio holds 1 or does not."""


class ValidationRow(_Record):
    """A schedule run on prompts that calibration has not seen.

    Attributes:
        name: "schedule" for the chosen one, "uniform <precision>", a rule's name and number of steps at the reference,
            "best rule: ..." for the one that had the least typical error on calibration samples, "random <K>", or
            "uniform, mixed": pictures shared out among uniform precisions so that they take as long on average.
        schedules: the schedules run: one, every draw of "random", or those that are mixed.
        counts: steps per precision of the first.
        latency: mean step latency relative to the reference, from the measured step latencies.
        typical: typical error, a mean over draws or what is mixed.
        departures: of all runs; None for "uniform, mixed".
        against: typical error of the chosen schedule over this row's, of the same samples; None where this row's is zero,
            and for the schedule itself.
        error: plain mean of E.
        sample_errors: E of every validation sample, a mean over draws or what is mixed.
        ssim: mean structural similarity to the reference's pictures, None without a decoder.
        psnr_db: of the mean squared difference from the reference's pictures, None without a decoder or
            where all pictures are identical.
    """

    name: str
    schedules: tuple[tuple[str, ...], ...]
    counts: dict[str, int]
    latency: float
    typical: IntervalRecord
    departures: DepartureRecord | None
    against: IntervalRecord | None
    error: float
    sample_errors: tuple[float, ...]
    ssim: float | None = None
    psnr_db: float | None = None

    @property
    def standing(self) -> Standing | None:
        """The chosen schedule beside this one; None without `against`. One sample distinguishes nothing."""
        if self.against is None:
            return None
        if len(self.sample_errors) < 2 or self.against.low <= 1 <= self.against.high:
            return "not distinguishable"
        return "worse" if self.against.low > 1 else "better"


class TrialRecord(_Record):
    """A candidate of the guard.

    Attributes:
        names: where it comes from: "gram", "downcast sum", "gram, first N held", a rule and its pool as "last 8 (fp8)",
            "uniform <precision>".
        rule: the one of its names that is of a fixed rule or a uniform precision.
        latency: mean step latency relative to the reference.
        predicted_error: by the predictor that was used.
        samples: calibration samples it ran on, in order; a part of them for candidates that were left behind.
        errors: E of each.
        leading: how many of the first samples were drawn at random; those behind them are fragile ones.
        typical: over the leading samples.
        expected: the same, averaged with what is predicted where few samples leave it noisy; the least wins.
        departures: of all samples it ran on.
        calls: denoiser calls it took.
    """

    names: tuple[str, ...]
    rule: str | None
    precisions: tuple[str, ...]
    latency: float
    predicted_error: float
    samples: tuple[int, ...]
    errors: tuple[float, ...]
    leading: int
    typical: IntervalRecord
    expected: float
    departures: DepartureRecord
    calls: int


class GuardRecord(_Record):
    """The comparison on calibration samples that chose the schedule, see `calibration.choose.guard`.

    Attributes:
        trials: the winner first, then by how many samples they ran on and their typical error.
        rounds: how many leading samples each round had, and how many candidates.
        fragile: the samples that departures were looked for on, whichever round.
        best_rule: name of the rule that came out best among them, by what the winner is chosen by.
        calls: denoiser calls of all, per precision.
    """

    trials: tuple[TrialRecord, ...]
    rounds: tuple[tuple[int, int], ...]
    fragile: tuple[int, ...]
    best_rule: str | None
    calls: dict[str, int]


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
