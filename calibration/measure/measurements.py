"""Journalled measurements of one set of samples, with counted calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import takewhile

from calibration.measure.evaluator import SampleSet
from calibration.measure.journal import Entry, Journal
from calibration.measure.requests import Pool, Request


class Measurements:
    """E of uniform runs, of runs with one step changed, and of any schedule, sample by sample.

    A run that leaves a uniform one at step i costs T - i denoiser calls, as a pool keeps the states of those. Every
    sample of every measurement is one line of the journal.

    Measurements are asked of the pool and kept here. `expect` and `expect_changed` say what will be asked for next, so
    that the pool can take it all at once; a measurement that was not announced is taken when it is asked for.

    Attributes:
        calls: denoiser calls per stage and precision of all measurements asked for so far, taken from the
            journal: the same whether a measurement was made now or by an earlier run.
        recomputed: denoiser calls that a resumed run, or another worker, repeated because states are kept in memory
            only.
    """

    def __init__(
        self, name: str, samples: SampleSet, journal: Journal, pool: Pool, num_samples: int | None = None
    ) -> None:
        """
        Args:
            name: of the set of samples, for the pool, the journal and messages.
            samples: the set; its evaluator is asked for no step.
            journal: where every measurement is looked for, and kept.
            pool: takes the measurements.
            num_samples: the first samples of the evaluator that are used; None for all.
        """
        self.name = name
        self.reference = samples.evaluator.precisions[0]
        self.num_steps = samples.evaluator.num_steps
        self.num_samples = samples.evaluator.num_samples if num_samples is None else num_samples
        self.calls: dict[str, dict[str, int]] = {}
        self.recomputed: Counter[str] = Counter()
        self._journal = journal
        self._decoded = samples.decode is not None
        self._used: set[str] = set()
        self._pool = pool
        self._pending: set[str] = set()

    def expect(
        self, schedules: Iterable[Sequence[str]], *, pictures: bool, samples: Iterable[int] | None = None
    ) -> None:
        """Announces that the errors of schedules will be asked for on all samples, or on those given."""
        chosen = range(self.num_samples) if samples is None else list(samples)
        self._ask([self._scheduled(schedule, sample, pictures) for schedule in schedules for sample in chosen])

    def expect_changed(
        self, base: str, step_index: int, precision: str, *, samples: Iterable[int] | None = None
    ) -> None:
        """Announces that `changed_error` will be asked for on all samples, or on those given."""
        chosen = range(self.num_samples) if samples is None else samples
        self._ask([self._changed(base, step_index, precision, sample) for sample in chosen])

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

    def changed_error(self, base: str, step_index: int, precision: str, sample: int) -> float:
        """E of the uniform `base` run with one step at `precision` instead; T - step_index calls."""
        self.uniform_error(base, sample)
        direction = f"downcast {precision}" if base == self.reference else f"upcast {base}"
        return self._value(direction, self._changed(base, step_index, precision, sample))["error"]

    def schedule_calls(self, precisions: Sequence[str]) -> int:
        """Denoiser calls that `schedule_error` takes per sample, if it was not measured before."""
        return self.num_steps - self._shared(precisions)

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
        return Request(name, sample, precision, (), True, f"uniform {precision}")

    def _changed(self, base: str, step_index: int, precision: str, sample: int) -> Request:
        name = f"{self.name}/{base}/{step_index}/{precision}/{sample}"
        rest = (precision, *[base] * (self.num_steps - step_index - 1))
        return Request(name, sample, base, rest, False, f"{base} with step {step_index} at {precision}")

    def _scheduled(self, precisions: Sequence[str], sample: int, pictures: bool) -> Request:
        base, words = precisions[0], " ".join(precisions)
        shared = self._shared(precisions)
        if shared == len(precisions):
            return self._uniform(base, sample)
        kind = "pictures" if pictures and self._decoded else "schedule"
        name = f"{self.name}/{kind}/{words}/{sample}"
        return Request(name, sample, base, tuple(precisions[shared:]), pictures, f"schedule {words}")

    def _value(self, stage: str, request: Request) -> dict[str, float]:
        """A measurement from the journal, taken if it is not there yet; its calls are counted for `stage` once."""
        entry = self._journal.get(request.name) or self._fetch(request)
        if request.name not in self._used:
            self._used.add(request.name)
            total = self.calls.setdefault(f"{self.name}: {stage}", {})
            for precision, count in entry.calls.items():
                total[precision] = total.get(precision, 0) + count
        errors: dict[str, float] = entry.value
        return errors

    def _ask(self, requests: Iterable[Request]) -> None:
        """Hands the pool what has not been measured, and before it the uniform runs it rests on."""
        for request in requests:
            sample = request.sample
            for needed in (self._uniform(self.reference, sample), self._uniform(request.base, sample), request):
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
