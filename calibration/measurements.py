"""Journalled measurements of one set of samples, with cached trajectories and counted calls."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import takewhile

import numpy as np

from calibration.evaluator import CountingEvaluator, Evaluator, State
from calibration.journal import Journal
from calibration.metrics import picture_mse, picture_ssim, relative_error
from engines.errors import TmpDiffError

Decode = Callable[[np.ndarray], np.ndarray]
"""Final latents float32 [C, H, W] -> picture uint8 [H, W, 3]."""


class Measurements:
    """E of uniform runs, of runs with one step changed, and of any schedule, sample by sample.

    The states of every step of the reference and of each uniform run are kept, so that a run that
    departs from one of them at step i costs T - i denoiser calls. Every sample of every measurement is
    one line of the journal.

    Attributes:
        evaluator: counts the calls; `evaluator.recomputed` holds those that a resumed run repeats
            because states are kept in memory only.
        calls: denoiser calls per stage and precision of all measurements asked for so far, taken from the
            journal: the same whether a measurement was made now or by an earlier run.
    """

    def __init__(self, name: str, evaluator: Evaluator, journal: Journal, decode: Decode | None = None) -> None:
        self.name = name
        self.evaluator = CountingEvaluator(evaluator)
        self.reference = evaluator.precisions[0]
        self.num_steps = evaluator.num_steps
        self.num_samples = evaluator.num_samples
        self.calls: dict[str, dict[str, int]] = {}
        self._journal = journal
        self._decode = decode
        self._states: dict[tuple[str, int], tuple[State, ...]] = {}
        self._reference_pictures: dict[int, np.ndarray] = {}
        self._used: set[str] = set()

    def uniform_error(self, precision: str, sample: int) -> dict[str, float]:
        """Errors of the run with every step at `precision`; the first request costs T calls.

        Returns:
            "error": E of the sample; with a decoder also "ssim" and "mse" of its picture.
        """
        if precision != self.reference:
            self.uniform_error(self.reference, sample)

        def measure() -> dict[str, float]:
            self._states[precision, sample] = self._trajectory(precision, sample)
            return self._errors(self._final(precision, sample), sample, f"uniform {precision}", pictures=True)

        kind = "uniform-pictures" if self._decode else "uniform"
        return self._measured("uniform runs", f"{kind}/{precision}/{sample}", measure)

    def changed_error(self, base: str, step_index: int, precision: str, sample: int) -> float:
        """E of the uniform `base` run with one step at `precision` instead; T - step_index calls."""
        self.uniform_error(base, sample)

        def measure() -> dict[str, float]:
            state = self._uniform_states(base, sample)[step_index]
            rest = (precision, *[base] * (self.num_steps - step_index - 1))
            what = f"{base} with step {step_index} at {precision}"
            return self._errors(self._run(state, rest, sample), sample, what, pictures=False)

        direction = f"downcast {precision}" if base == self.reference else f"upcast {base}"
        return self._measured(direction, f"{base}/{step_index}/{precision}/{sample}", measure)["error"]

    def local_error(self, step_index: int, precision: str, sample: int) -> float:
        """||x_{i+1}(p) - x_{i+1}||^2 / ||x_T||^2 of step i = `step_index`, from the reference run's x_i; a single call.

        What `changed_error` of the reference run has before the rest of the loop carries it on; equal to it at the
        last step.
        """
        self.uniform_error(self.reference, sample)

        def measure() -> dict[str, float]:
            states = self._uniform_states(self.reference, sample)
            found = self._run(states[step_index], (precision,), sample)
            difference = found.astype(np.float64) - self.evaluator.latents(states[step_index + 1])
            final = self._final(self.reference, sample).astype(np.float64)
            return {"error": float(np.sum(difference**2) / np.sum(final**2))}

        return self._measured(f"local {precision}", f"local/{step_index}/{precision}/{sample}", measure)["error"]

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

        def measure() -> dict[str, float]:
            shared = self._shared(precisions)
            state = self._uniform_states(precisions[0], sample)[shared]
            latents = self._run(state, precisions[shared:], sample)
            return self._errors(latents, sample, f"schedule {' '.join(precisions)}", pictures=pictures)

        kind = "pictures" if pictures and self._decode else "schedule"
        return self._measured(stage, f"{kind}/{' '.join(precisions)}/{sample}", measure)

    @staticmethod
    def _shared(precisions: Sequence[str]) -> int:
        """Leading steps that a schedule shares with a uniform run."""
        return sum(1 for _ in takewhile(lambda name: name == precisions[0], precisions))

    def forget(self, precision: str) -> None:
        """Frees the states of a precision that is no longer needed."""
        for sample in range(self.num_samples):
            self._states.pop((precision, sample), None)

    def _measured(self, stage: str, name: str, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        name = f"{self.name}/{name}"
        entry = self._journal.get(name)
        if entry is None:
            before = self.evaluator.spent.copy()
            value = measure()
            entry = self._journal.record(name, value, self.evaluator.spent - before)
        if name not in self._used:
            self._used.add(name)
            total = self.calls.setdefault(f"{self.name}: {stage}", {})
            for precision, count in entry.calls.items():
                total[precision] = total.get(precision, 0) + count
        errors: dict[str, float] = entry.value
        return errors

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

    def _errors(self, latents: np.ndarray, sample: int, what: str, *, pictures: bool) -> dict[str, float]:
        reference = self._final(self.reference, sample)
        errors = {"error": relative_error(latents, reference)}
        if not math.isfinite(errors["error"]):
            raise TmpDiffError(
                f"the {what} run of {self.name} sample {sample} gave latents that are not finite; "
                "build the bundle without that precision, or check its engine"
            )
        if pictures and self._decode:
            if sample not in self._reference_pictures:
                self._reference_pictures[sample] = self._decode(reference)
            picture = self._decode(latents)
            errors["ssim"] = picture_ssim(picture, self._reference_pictures[sample])
            errors["mse"] = picture_mse(picture, self._reference_pictures[sample])
        return errors


def mean(values: Sequence[float]) -> float:
    """Mean of an exactly rounded sum: does not depend on the order of the values."""
    return math.fsum(values) / len(values)
