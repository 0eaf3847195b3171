"""Journalled measurements of one set of samples, with cached trajectories and counted calls."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile

import numpy as np

from calibration.measure.evaluator import CountingEvaluator, Evaluator, State
from calibration.measure.journal import Entry, Journal
from calibration.measure.metrics import limited, picture_mse, picture_ssim, relative_error
from calibration.measure.requests import Outcome, Pool, Request
from engines.errors import TmpDiffError

Decode = Callable[[np.ndarray], np.ndarray]
"""Final latents float32 [C, H, W] -> picture uint8 [H, W, 3]."""

Compare = Callable[[np.ndarray, np.ndarray], dict[str, float]]
"""Errors by name of a picture and the reference's, uint8 [H, W, 3]."""


def picture_errors(picture: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """ "ssim" and "mse" of two pictures, uint8 [H, W, 3]."""
    return {"ssim": picture_ssim(picture, reference), "mse": picture_mse(picture, reference)}


class Measurements:
    """E of uniform runs, of runs with one step changed, and of any schedule, sample by sample.

    The states of every step of the reference and of each uniform run are kept, so that a run that
    departs from one of them at step i costs T - i denoiser calls. Every sample of every measurement is
    one line of the journal.

    With a pool, measurements are taken by its workers, and only the journal is written here. `expect` and
    `expect_changed` say what will be asked for next, so that the workers can take it all at once; a measurement that
    was not announced is taken when it is asked for. Values and calls are the same without a pool.

    Attributes:
        evaluator: counts the calls, those of the pool's workers included; `evaluator.recomputed` holds those that
            a resumed run, or another worker, repeats because states are kept in memory only.
        calls: denoiser calls per stage and precision of all measurements asked for so far, taken from the
            journal: the same whether a measurement was made now or by an earlier run.
    """

    def __init__(
        self,
        name: str,
        evaluator: Evaluator,
        journal: Journal,
        decode: Decode | None = None,
        pool: Pool | None = None,
        num_samples: int | None = None,
        compare: Compare = picture_errors,
    ) -> None:
        """
        Args:
            name: of the set of samples, for the journal and messages.
            evaluator: their loop.
            journal: where every measurement is looked for, and kept.
            decode: of final latents; None where no pictures are compared.
            pool: takes the measurements; None: this process does.
            num_samples: the first samples of the evaluator that are used; None for all.
            compare: decoded pictures; a journal holds the errors of one way to compare only.
        """
        self.name = name
        self.evaluator = CountingEvaluator(evaluator)
        self.reference = evaluator.precisions[0]
        self.num_steps = evaluator.num_steps
        self.num_samples = evaluator.num_samples if num_samples is None else num_samples
        self.calls: dict[str, dict[str, int]] = {}
        self._journal = journal
        self._decode = decode
        self._compare = compare
        self._states: dict[tuple[str, int], tuple[State, ...]] = {}
        self._reference_pictures: dict[int, np.ndarray] = {}
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

    def perform(self, request: Request) -> Outcome:
        """Takes a measurement here and now, whatever the journal holds.

        Raises:
            TmpDiffError: the run gave latents that are not finite.
        """
        spent, recomputed = self.evaluator.spent.copy(), self.evaluator.recomputed.copy()
        if request.rest:
            state = self._uniform_states(request.base, request.sample)[self.num_steps - len(request.rest)]
            latents = self._run(state, request.rest, request.sample)
        else:
            self._states[request.base, request.sample] = self._trajectory(request.base, request.sample)
            latents = self._final(request.base, request.sample)
        value = self._errors(latents, request)
        return Outcome(value, self.evaluator.spent - spent, self.evaluator.recomputed - recomputed)

    def uniform_error(self, precision: str, sample: int) -> dict[str, float]:
        """Errors of the run with every step at `precision`; the first request costs T calls.

        Returns:
            "error": E of the sample; with a decoder also what `compare` says of its picture.
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

    @staticmethod
    def _shared(precisions: Sequence[str]) -> int:
        """Leading steps that a schedule shares with a uniform run."""
        return sum(1 for _ in takewhile(lambda name: name == precisions[0], precisions))

    def forget(self, precision: str) -> None:
        """Frees the states of a precision that is no longer needed."""
        for sample in range(self.num_samples):
            self._states.pop((precision, sample), None)
        if self._pool is not None:
            self._pool.forget(self.name, precision)

    def _uniform(self, precision: str, sample: int) -> Request:
        kind = "uniform-pictures" if self._decode else "uniform"
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
        kind = "pictures" if pictures and self._decode else "schedule"
        name = f"{self.name}/{kind}/{words}/{sample}"
        return Request(name, sample, base, tuple(precisions[shared:]), pictures, f"schedule {words}")

    def _value(self, stage: str, request: Request) -> dict[str, float]:
        """A measurement from the journal, taken if it is not there yet; its calls are counted for `stage` once."""
        entry = self._journal.get(request.name)
        if entry is None and self._pool is not None:
            entry = self._fetch(self._pool, request)
        elif entry is None:
            outcome = self.perform(request)
            entry = self._journal.record(request.name, outcome.value, outcome.calls)
        return self._counted(stage, request.name, entry)

    def _counted(self, stage: str, name: str, entry: Entry) -> dict[str, float]:
        if name not in self._used:
            self._used.add(name)
            total = self.calls.setdefault(f"{self.name}: {stage}", {})
            for precision, count in entry.calls.items():
                total[precision] = total.get(precision, 0) + count
        errors: dict[str, float] = entry.value
        return errors

    def _ask(self, requests: Iterable[Request]) -> None:
        """Hands the pool what has not been measured, and before it the uniform runs it rests on."""
        if self._pool is None:
            return
        for request in requests:
            sample = request.sample
            for needed in (self._uniform(self.reference, sample), self._uniform(request.base, sample), request):
                if needed.name not in self._pending and self._journal.get(needed.name) is None:
                    self._pending.add(needed.name)
                    self._pool.submit(self.name, needed)

    def _fetch(self, pool: Pool, request: Request) -> Entry:
        """Waits for a measurement of the pool; whatever else arrives is written down as well."""
        self._ask([request])
        while (entry := self._journal.get(request.name)) is None:
            arrived = pool.finished(self.name)
            self._journal.record_all({done.name: Entry(outcome.value, outcome.calls) for done, outcome in arrived})
            for done, outcome in arrived:
                self._pending.discard(done.name)
                self.evaluator.spent.update(outcome.calls)
                self.evaluator.recomputed.update(outcome.recomputed)
        return entry

    def _uniform_states(self, precision: str, sample: int) -> tuple[State, ...]:
        """States before every step and after the last one, T + 1; recomputed if an earlier run had them."""
        if (precision, sample) not in self._states:
            with self.evaluator.aside():
                self._states[precision, sample] = self._trajectory(precision, sample)
        return self._states[precision, sample]

    def _trajectory(self, precision: str, sample: int) -> tuple[State, ...]:
        states = [self.evaluator.start(sample)]
        for _ in range(self.num_steps):
            states.append(self.evaluator.step(sample, states[-1], precision))
        return tuple(states)

    def _run(self, state: State, precisions: Sequence[str], sample: int) -> np.ndarray:
        for precision in precisions:
            state = self.evaluator.step(sample, state, precision)
        return self.evaluator.latents(state)

    def _final(self, precision: str, sample: int) -> np.ndarray:
        return self.evaluator.latents(self._uniform_states(precision, sample)[-1])

    def _errors(self, latents: np.ndarray, request: Request) -> dict[str, float]:
        sample = request.sample
        reference = self._final(self.reference, sample)
        errors = {"error": finite_error(latents, reference, request, self.name)}
        if request.pictures and self._decode:
            if sample not in self._reference_pictures:
                self._reference_pictures[sample] = self._decode(reference)
            errors |= self._compare(self._decode(latents), self._reference_pictures[sample])
        return errors


def finite_error(latents: np.ndarray, reference: np.ndarray, request: Request, samples: str) -> float:
    """E of a run's final latents.

    Raises:
        TmpDiffError: they are not finite.
    """
    error = relative_error(latents, reference)
    if not math.isfinite(error):
        raise TmpDiffError(
            f"the {request.run} run of {samples} sample {request.sample} gave latents that are not finite; "
            "build the bundle without that precision, or check its engine"
        )
    return error


def mean(values: Sequence[float]) -> float:
    """Mean of an exactly rounded sum: does not depend on the order of the values."""
    return math.fsum(values) / len(values)


def level(errors: Sequence[float]) -> float:
    """Mean of E over samples, `calibration.measure.metrics.limited`: what scores and predictions are made of."""
    return mean(limited(np.array(errors)).tolist())
