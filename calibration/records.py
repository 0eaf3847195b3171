"""What a sensitivity document is made of (`calibration.document`): one record for each thing measured or concluded."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=0, le=2**53)]
"""Of samples, steps or denoiser calls."""

Error = Annotated[float, Field(ge=0, le=1e100)]
"""E, of one sample or many; latents in float32 err by less."""

Correlation = Annotated[float, Field(ge=-1, le=1)]


class Record(BaseModel):
    """Immutable, of finite numbers, and without fields of other names."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class IntervalRecord(Record):
    """A figure and the bounds of its 95 % interval, which are the figure itself where there is a single sample."""

    value: float = Field(ge=0)
    low: float = Field(ge=0)
    high: float = Field(ge=0)


class DepartureRecord(Record):
    """How many of so many samples departed, and a 95 % interval of the share (Clopper and Pearson, Biometrika 26, 1934)."""

    count: Count
    samples: Count
    low: float = Field(ge=0, le=1)
    high: float = Field(ge=0, le=1)


class ScoreRecord(Record):
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
    scores: tuple[Error, ...]
    measured: tuple[bool, ...]
    order: tuple[int, ...]
    settled: bool
    calls: dict[str, Count]
    sweep_calls: Count

    @model_validator(mode="after")
    def _of_the_same_steps(self) -> ScoreRecord:
        steps = [step for step, known in enumerate(self.measured) if known]
        if len(self.measured) != len(self.scores) or not steps or sorted(self.order) != steps:
            raise ValueError(f"scores, measured and order of {self.precision} are not of the same steps")
        return self


class CorrelationRecord(Record):
    """Correlations of the error vectors of two precisions' downcasts, a row per position of the first."""

    first: str
    second: str
    values: tuple[tuple[Correlation, ...], ...]


class GramRecord(Record):
    """What, beside the scores, makes the Gram matrix (`calibration.scores.gram`).

    Attributes:
        positions: by low precision: the step indices that correlations are of; fractions where they were carried.
        correlations: of every pair of low precisions, in order.
        floor: length T, the part of E that is the reference's own rounding, by the first low step of a schedule.
    """

    positions: dict[str, tuple[float, ...]]
    correlations: tuple[CorrelationRecord, ...]
    floor: tuple[Error, ...]


class DroppedRecord(Record):
    """A built precision that is left out: `by` is no slower, errs no more, and is no costlier to change to or from."""

    precision: str
    by: str
    reason: str


Predictor = Literal["gram", "downcast sum"]
"""What schedules are chosen by: all of the Gram matrix, or its diagonal."""

PREDICTORS: tuple[Predictor, ...] = ("gram", "downcast sum")


class FitRecord(Record):
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
    ratio: float | None = Field(ge=0)
    scatter: float | None = Field(ge=0, le=700)


class FitPoint(Record):
    """A random schedule, its measured typical error and what each predictor says."""

    precisions: tuple[str, ...]
    measured: Error
    predicted: dict[Predictor, Error] = Field(min_length=len(PREDICTORS))


class ParetoPoint(Record):
    """A schedule that no other one beats in relative latency and predicted E."""

    precisions: tuple[str, ...]
    latency: float = Field(gt=0)
    error: float = Field(ge=0)


Standing = Literal["worse", "better", "not distinguishable"]
"""The chosen schedule beside another one, in typical error: the interval of their ratio holds 1 or does not."""


class ValidationRow(Record):
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
    schedules: tuple[tuple[str, ...], ...] = Field(min_length=1)
    counts: dict[str, Count]
    latency: float = Field(gt=0)
    typical: IntervalRecord
    departures: DepartureRecord | None
    against: IntervalRecord | None
    error: Error
    sample_errors: tuple[Error, ...] = Field(min_length=1)
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


class CandidateRecord(Record):
    """A candidate of the guard.

    Attributes:
        names: where it comes from: "gram", "downcast sum", "gram, first N held", "gram, no reuse", a rule and its pool as
            "last 8 (fp8)", "uniform <precision>", "every 2nd step reuse0".
        rule: the one of its names that is of a rule or a uniform precision.
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

    names: tuple[str, ...] = Field(min_length=1)
    rule: str | None
    precisions: tuple[str, ...]
    latency: float = Field(gt=0)
    predicted_error: float = Field(ge=0)
    samples: tuple[Count, ...]
    errors: tuple[Error, ...]
    leading: int = Field(ge=1)
    typical: IntervalRecord
    expected: float = Field(ge=0)
    departures: DepartureRecord
    calls: Count

    @model_validator(mode="after")
    def _of_the_same_samples(self) -> CandidateRecord:
        if not self.leading <= len(self.samples) == len(self.errors) == len(set(self.samples)):
            raise ValueError(
                f"{self.names[0]} has {len(self.errors)} errors of {len(self.samples)} samples, {self.leading} of them leading"
            )
        return self


class GuardRecord(Record):
    """The comparison on calibration samples that chose the schedule, see `calibration.choose.guard`.

    Attributes:
        candidates: the winner first, then by how many samples they ran on and their typical error.
        rounds: how many leading samples each round had, and how many candidates.
        fragile: the samples that departures were looked for on, whichever round.
        best_rule: name of the rule that came out best among them, by what the winner is chosen by.
        calls: denoiser calls of all, per precision.
    """

    candidates: tuple[CandidateRecord, ...] = Field(min_length=1)
    rounds: tuple[tuple[Count, Count], ...]
    fragile: tuple[Count, ...]
    best_rule: str | None
    calls: dict[str, Count]


class QualityRecord(Record):
    """The budget in picture quality that was asked for, in SSIM or in dB of PSNR."""

    metric: Literal["ssim", "psnr"]
    target: float = Field(gt=0)


class CheckRecord(Record):
    """Carried downcast scores of one precision against measured ones, see `calibration.scores.transfer.Comparison`."""

    precision: str
    steps: tuple[Count, ...] = Field(min_length=1)
    carried: tuple[Error, ...]
    measured: tuple[Error, ...]
    level: float = Field(gt=0)
    scatter: float = Field(ge=0, le=700)
    spearman: float | None

    @model_validator(mode="after")
    def _of_the_same_steps(self) -> CheckRecord:
        if not len(self.steps) == len(self.carried) == len(self.measured):
            raise ValueError(f"carried and measured scores of {self.precision} are not of the same steps")
        return self


class TransferRecord(Record):
    """Where carried scores come from.

    Attributes:
        bundle_id: of the bundle that was calibrated.
        setting: name of the setting that was; None in documents of earlier releases.
        num_steps: its T.
        guidance_scale: of its calibration.
        checks: one for every precision scored.
    """

    bundle_id: str
    setting: str | None = None
    num_steps: int
    guidance_scale: float
    checks: tuple[CheckRecord, ...]


class CalibrationSettings(Record):
    """What a bundle was calibrated with.

    Attributes:
        bundle_id: of the bundle.
        setting: name of the setting in it; None in documents of earlier releases, whose bundles have one.
        machine: what the step latencies were measured on.
        batch: pictures at once that they were measured with.
        guidance_scale: of every run.
        seed: of the first calibration sample's noise.
        calibration_prompts: one sample each.
        validation_prompts: one sample each.
    """

    bundle_id: str
    setting: str | None = None
    machine: str
    batch: int = 1
    guidance_scale: float
    seed: int
    calibration_prompts: tuple[str, ...]
    validation_prompts: tuple[str, ...]
