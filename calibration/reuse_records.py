"""What a sensitivity document holds of steps that reuse model outputs, and of loops of fewer steps beside them."""

from __future__ import annotations

from pydantic import Field

from calibration.records import Count, Error, IntervalRecord, Record


class ReusePlanRecord(Record):
    """Which steps are reused, and how (`calibration.choose.joint.ReusePlan`).

    Attributes:
        choices: length T, the reference at computed steps.
        predicted: E, when the plan was picked.
        measured: typical error with the reference at computed steps, on the samples of the search.
        influence: length T, how much more each output counts than without reuse.
        rule: its name, where it is a rule of thumb.
    """

    choices: tuple[str, ...]
    predicted: Error
    measured: Error
    influence: tuple[float, ...]
    rule: str | None


class ReuseRecord(Record):
    """What was measured of steps that reuse model outputs.

    Attributes:
        most: reused steps that were allowed.
        step_ms: latency of a reused step.
        samples: calibration samples that the search ran on.
        scores: by reuse: E of each step alone, length T; None where it was not measured.
        plans: of rising numbers of reused steps.
        calls: denoiser calls of single reuses and plans, per precision.
        most_calls: what they could have been at most, as said before the search.
    """

    most: int = Field(ge=1)
    step_ms: float = Field(ge=1e-6, le=1e12)
    samples: tuple[Count, ...] = Field(min_length=1)
    scores: dict[str, tuple[Error | None, ...]]
    plans: tuple[ReusePlanRecord, ...]
    calls: dict[str, Count]
    most_calls: Count


class FewerStepsRecord(Record):
    """The scheduler with fewer steps, all at one precision, no slower than the schedule; on calibration samples.

    Attributes:
        num_steps: T of that loop; 0 where there is none.
        precision: of all its steps.
        latency: of the whole loop, relative to T steps at the reference.
        samples: how many calibration samples it ran on.
        typical: its error, None where it did not run.
        against: typical error of the schedule over its own on the same samples; None as `typical`, or where that is 0.
        reason: why it did not run, None where it did.
    """

    num_steps: Count
    precision: str
    latency: float = Field(ge=0)
    samples: Count
    typical: IntervalRecord | None
    against: IntervalRecord | None
    reason: str | None

    @property
    def name(self) -> str:
        """As rows of validation and sentences have it."""
        return f"fewer steps: {self.num_steps} ({self.precision})"

    @property
    def beats(self) -> bool:
        """Whether it errs less than the schedule, beyond the interval."""
        return self.against is not None and self.samples > 1 and self.against.low > 1
