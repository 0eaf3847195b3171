"""Journalled measurements of one set of samples, with counted calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np

from calibration.measure import sketch
from calibration.measure.evaluator import SampleSet, ShorterLoop
from calibration.measure.journal import Entry, Journal, JournalError
from calibration.measure.requests import Pool, Request
from engines.files import sha256_bytes
from engines.reuse import computed_choices

MOST = 1e100
"""Largest E that a journal may hold; latents in float32 err by less."""


@dataclass(frozen=True, eq=False)
class ErrorVector:
    """By what the final latents of a run differ from those of the reference run of the same sample.

    Attributes:
        error: E.
        direction: sketch of its error vector over that vector's norm, float16 [K] (`calibration.measure.sketch`); read-only.
    """

    error: float
    direction: np.ndarray


class Measurements:
    """E of uniform runs, of downcasts, and of any schedule, sample by sample.

    A run that leaves a uniform one at step i costs T - i denoiser calls, as a pool keeps the states of those. Every
    sample of every measurement is one line of the journal.

    Measurements are asked of the pool and kept here. `expect` and its like say what will be asked for next, so that the pool
    can take it all at once; a measurement that was not announced is taken when it is asked for.

    Attributes:
        calls: denoiser calls per stage and precision of all measurements asked for so far, taken from the
            journal: the same whether a measurement was made now or by an earlier run.
        recomputed: denoiser calls that a resumed run, or another worker, repeated because states are kept in memory
            only.
    """

    def __init__(
        self,
        name: str,
        samples: SampleSet,
        journal: Journal,
        pool: Pool,
        num_samples: int | None = None,
        pictures: bool = True,
    ) -> None:
        """
        Args:
            name: of the set of samples, for the pool, the journal and messages.
            samples: the set; its evaluator is asked for no step.
            journal: where every measurement is looked for, and kept.
            pool: takes the measurements.
            num_samples: the first samples of the evaluator that are used; None for all.
            pictures: compare those of uniform runs, where there is a decoder.
        """
        self.name = name
        self.reference = samples.evaluator.precisions[0]
        self.num_steps = samples.evaluator.num_steps
        self.num_samples = samples.evaluator.num_samples if num_samples is None else num_samples
        self.calls: dict[str, dict[str, int]] = {}
        self.recomputed: Counter[str] = Counter()
        self._journal = journal
        self._decoded = pictures and samples.decode is not None
        self._used: set[str] = set()
        self._pool = pool
        self._pending: set[str] = set()
        self._size = 0  # of every direction, once there is one

    def expect(
        self, schedules: Iterable[Sequence[str]], *, pictures: bool, samples: Iterable[int] | None = None
    ) -> None:
        """Announces that the errors of schedules will be asked for on all samples, or on those given."""
        chosen = range(self.num_samples) if samples is None else list(samples)
        self._ask([self._scheduled(schedule, sample, pictures) for schedule in schedules for sample in chosen])

    def expect_downcasts(self, step_index: int, precision: str, *, samples: Iterable[int] | None = None) -> None:
        """Announces that `downcast` will be asked for on all samples, or on those given."""
        chosen = range(self.num_samples) if samples is None else samples
        self._ask([self._downcast(step_index, precision, sample) for sample in chosen])

    def expect_planned(self, schedules: Iterable[Sequence[str]], samples: Iterable[int]) -> None:
        """Announces that `planned` will be asked for on these samples."""
        chosen = list(samples)
        self._ask([self._planned(schedule, sample) for schedule in schedules for sample in chosen])

    def expect_shorter(
        self, runs: Iterable[tuple[ShorterLoop, str]], *, pictures: bool, samples: Iterable[int]
    ) -> None:
        """Announces that `shorter_error` will be asked for of these loops and precisions."""
        chosen = list(samples)
        self._ask([self._shorter(*run, sample, pictures) for run in runs for sample in chosen])

    def expect_nudged(self) -> None:
        """Announces that `nudged` will be asked for on all samples."""
        self._ask([self._nudged(sample) for sample in range(self.num_samples)])

    def uniform_error(self, precision: str, sample: int) -> dict[str, float]:
        """Errors of the run with every step at `precision`; the first request costs T calls.

        Returns:
            "error": E of the sample; with a decoder also what the set's `compare` says of its picture.

        Raises:
            TmpDiffError: the run gave latents that are not finite; so do all below.
        """
        if precision != self.reference:
            self.uniform_error(self.reference, sample)
        return self._value("uniform runs", self._uniform(precision, sample))

    def downcast(self, step_index: int, precision: str, sample: int) -> ErrorVector:
        """The reference run with one step at `precision` instead; T - step_index calls.

        Raises:
            JournalError: the journal has no error vector of it; so does `nudged`.
        """
        self.uniform_error(self.reference, sample)
        return self._with_direction(f"downcast {precision}", self._downcast(step_index, precision, sample))

    def nudged(self, sample: int) -> ErrorVector:
        """The reference run from a start that is nudged (`Evaluator.start`): how far rounding alone carries it; T calls."""
        self.uniform_error(self.reference, sample)
        return self._with_direction("rounding", self._nudged(sample))

    def planned(self, stage: str, schedule: Sequence[str], sample: int) -> ErrorVector:
        """The run of a whole schedule that reuses steps, with its error vector; calls as `schedule_calls` says.

        Raises:
            ScheduleError: a reused step has too few computed ones before it.
        """
        self.uniform_error(schedule[0], sample)
        return self._with_direction(stage, self._planned(schedule, sample))

    def shorter_error(
        self, stage: str, loop: ShorterLoop, precision: str, sample: int, *, pictures: bool
    ) -> dict[str, float]:
        """Errors of the run of a loop of fewer steps at one precision, beside this loop's reference; as many calls."""
        self.uniform_error(self.reference, sample)
        return self._value(stage, self._shorter(loop, precision, sample, pictures))

    def schedule_calls(self, precisions: Sequence[str]) -> int:
        """Denoiser calls that `schedule_error` and `planned` take per sample, if it was not measured before."""
        return len(computed_choices(precisions[self._shared(precisions) :]))

    def schedule_error(self, stage: str, precisions: Sequence[str], sample: int, *, pictures: bool) -> dict[str, float]:
        """Errors of the run of a whole schedule, as `uniform_error` returns them.

        Costs T calls less the leading steps it shares with a uniform run; nothing if it was run before.
        """
        if len(set(precisions)) == 1:
            return self.uniform_error(precisions[0], sample)
        self.uniform_error(precisions[0], sample)
        return self._value(stage, self._scheduled(precisions, sample, pictures))

    def forget(self, precision: str) -> None:
        """Frees the states of a precision that is no longer needed."""
        self._pool.forget(self.name, precision)

    @staticmethod
    def _shared(precisions: Sequence[str]) -> int:
        """Leading steps that a schedule shares with a uniform run."""
        return sum(1 for _ in takewhile(lambda name: name == precisions[0], precisions))

    def _uniform(self, precision: str, sample: int) -> Request:
        kind = "uniform-pictures" if self._decoded else "uniform"
        name = f"{self.name}/{kind}/{precision}/{sample}"
        return Request(name, sample, precision, (), self._decoded, f"uniform {precision}")

    def _downcast(self, step_index: int, precision: str, sample: int) -> Request:
        name = f"{self.name}/downcast/{step_index}/{precision}/{sample}"
        rest = (precision, *[self.reference] * (self.num_steps - step_index - 1))
        run = f"{self.reference} with step {step_index} at {precision}"
        return Request(name, sample, self.reference, rest, False, run, vector=True)

    def _nudged(self, sample: int) -> Request:
        name, rest = f"{self.name}/nudged/{sample}", (self.reference,) * self.num_steps
        return Request(name, sample, self.reference, rest, False, f"nudged {self.reference}", vector=True, nudged=True)

    def _scheduled(self, precisions: Sequence[str], sample: int, pictures: bool) -> Request:
        base, words = precisions[0], " ".join(precisions)
        shared = self._shared(precisions)
        if shared == len(precisions):
            return self._uniform(base, sample)
        kind = "pictures" if pictures and self._decoded else "schedule"
        name = f"{self.name}/{kind}/{words}/{sample}"
        return Request(name, sample, base, tuple(precisions[shared:]), pictures, f"schedule {words}")

    def _planned(self, schedule: Sequence[str], sample: int) -> Request:
        words = " ".join(schedule)
        rest = tuple(schedule[self._shared(schedule) :])
        name = f"{self.name}/reuse/{words}/{sample}"
        return Request(name, sample, schedule[0], rest, False, f"schedule {words}", vector=True)

    def _shorter(self, loop: ShorterLoop, precision: str, sample: int, pictures: bool) -> Request:
        decoded, run = pictures and self._decoded, f"uniform {precision} in {loop.num_steps} steps"
        kind = "shorter-pictures" if decoded else "shorter"
        name = f"{self.name}/{kind}/{sha256_bytes(loop.loop.encode())[:16]}/{precision}/{sample}"
        rest = (precision,) * loop.num_steps
        return Request(name, sample, self.reference, rest, decoded, run, shorter=loop.loop)

    def _with_direction(self, stage: str, request: Request) -> ErrorVector:
        value = self._value(stage, request)
        try:
            direction = sketch.from_text(value["direction"])
            self._size = self._size or len(direction)
            if len(direction) != self._size:
                raise ValueError(f"{len(direction)} numbers, expected {self._size}")
        except (KeyError, TypeError, ValueError) as error:
            raise JournalError(
                f"journal {self._journal.path or 'in memory'} has no usable error vector of {request.name} "
                f"({type(error).__name__}: {error}); delete it to start afresh"
            ) from error
        return ErrorVector(value["error"], direction)

    def _value(self, stage: str, request: Request) -> dict[str, Any]:
        """A measurement from the journal, taken if it is not there yet; its calls are counted for `stage` once."""
        entry = self._journal.get(request.name) or self._fetch(request)
        if request.name not in self._used:
            self._used.add(request.name)
            total = self.calls.setdefault(f"{self.name}: {stage}", {})
            for precision, count in entry.calls.items():
                total[precision] = total.get(precision, 0) + count
        value: dict[str, Any] = entry.value
        if not _are_errors(value):
            raise JournalError(
                f"journal {self._journal.path or 'in memory'} has no errors of {request.name}, but "
                f"{str(value)[:60]!r}; delete it to start afresh"
            )
        return value

    def _ask(self, requests: Sequence[Request]) -> None:
        """Hands the pool what has not been measured, and before it the uniform runs it rests on."""
        references = [self._uniform(self.reference, request.sample) for request in requests]
        bases = [self._uniform(request.base, request.sample) for request in requests]
        # runs of all samples one after the other: a sample that has its uniform runs must not bring the others' forward
        for needed in (*references, *bases, *requests):
            if needed.name not in self._pending and self._journal.get(needed.name) is None:
                self._pending.add(needed.name)
                self._pool.submit(self.name, needed)

    def _fetch(self, request: Request) -> Entry:
        """Waits for a measurement of the pool; whatever else arrives is written down as well."""
        self._ask([request])
        while (entry := self._journal.get(request.name)) is None:
            arrived = self._pool.finished(self.name)
            self._journal.record({done.name: Entry(outcome.value, outcome.calls) for done, outcome in arrived})
            for done, outcome in arrived:
                self._pending.discard(done.name)
                self.recomputed.update(outcome.recomputed)
        return entry


def _are_errors(value: Any) -> bool:
    """Whether a journal's value is E and other errors by name, the direction aside."""
    if not isinstance(value, dict):
        return False
    numbers = {name: number for name, number in value.items() if name != "direction"}
    return all(type(number) in (int, float) for number in numbers.values()) and 0 <= numbers.get("error", -1) <= MOST
