"""The loop that takes measurements, of one sample or of several in one denoiser call.

Engines may cost the same for one picture as for many. A pool of this process, and what the workers of other pools hold.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from calibration.measure import sketch
from calibration.measure.evaluator import SampleSet, State
from calibration.measure.metrics import relative_error
from calibration.measure.requests import Outcome, Request, Run
from engines.errors import TmpDiffError
from engines.reuse import computed_choices, reused_steps

OVERFLOWED = 1e6
"""E of a run with reused steps whose latents are not finite: extrapolation can run away, and is then no choice."""


class SampleBatches:
    """`calibration.measure.requests.Pool` in this process: one run of several samples takes one engine call a step.

    A denoiser call of N samples counts as N calls, so that counts are those of samples measured one by one; values
    agree with theirs to the rounding that an engine owes to the size of its batch.
    """

    def __init__(self, sets: Mapping[str, SampleSet], at_once: int = 1, threads: int | None = None) -> None:
        """
        Args:
            sets: by name.
            at_once: samples in a call at most.
            threads: that compare pictures, None for one per core: SSIM of one takes longer than many denoiser calls,
                and leaves the interpreter free.

        Raises:
            ValueError: `at_once` is below 1.
        """
        if at_once < 1:
            raise ValueError(f"{at_once} samples at once were asked for, expected 1 or more")
        self._sets = {name: _KeptSet(name, samples, threads) for name, samples in sets.items()}
        self._at_once = at_once
        # runs in the order they were asked for: what others rest on was asked for before them
        self._queues: dict[str, dict[Run, list[Request]]] = {name: {} for name in sets}

    def submit(self, samples: str, request: Request) -> None:
        """See `Pool.submit`."""
        self._queues[samples].setdefault(request.of_run, []).append(request)

    def finished(self, samples: str) -> list[tuple[Request, Outcome]]:
        """Takes the run that was asked for first, for as many samples as go into a call; see `Pool.finished`."""
        queue = self._queues[samples]
        run, waiting = next(iter(queue.items()))
        taken = waiting[: self._at_once]
        outcomes = self.perform(samples, taken)
        if len(taken) == len(waiting):
            del queue[run]
        else:
            del waiting[: len(taken)]
        return list(zip(taken, outcomes, strict=True))

    def forget(self, samples: str, precision: str) -> None:
        """See `Samples.forget`."""
        self._sets[samples].forget(precision)

    def perform(self, samples: str, requests: Sequence[Request]) -> list[Outcome]:
        """See `Samples.perform`."""
        return self._sets[samples].perform(requests)


class _KeptSet:
    """A set of samples with the states of its uniform runs, so that a run that leaves one costs only what follows."""

    def __init__(self, name: str, samples: SampleSet, threads: int | None) -> None:
        self._name = name
        self._samples = samples
        self._evaluator = samples.evaluator
        self._reference = samples.evaluator.precisions[0]
        self._threads = threads or len(os.sched_getaffinity(0))
        # before every step and after the last one, T + 1, by precision and sample
        self._states: dict[tuple[str, int], tuple[State, ...]] = {}
        self._pictures: dict[int, np.ndarray] = {}  # the reference's

    def forget(self, precision: str) -> None:
        for key in [key for key in self._states if key[0] == precision]:
            del self._states[key]

    def perform(self, requests: Sequence[Request]) -> list[Outcome]:
        first, chosen = requests[0], [request.sample for request in requests]
        num_steps = self._evaluator.num_steps
        repeated = {sample: Counter[str]() for sample in chosen}
        evaluator = self._evaluator if first.shorter is None else self._evaluator.shorter(first.shorter)
        if first.rest:
            if first.nudged or first.shorter is not None:
                states = [evaluator.start(sample, nudged=first.nudged) for sample in chosen]
            else:
                self._restore(first.base, chosen, repeated)
                states = [self._states[first.base, sample][num_steps - len(first.rest)] for sample in chosen]
            for choice in first.rest:
                states = evaluator.steps(chosen, states, choice)
            calls = Counter(computed_choices(first.rest))
        else:
            self._run_uniform(first.base, chosen)
            states = [self._states[first.base, sample][-1] for sample in chosen]
            calls = Counter({first.base: num_steps})
        self._restore(self._reference, chosen, repeated)
        latents = [evaluator.latents(state) for state in states]
        values = [self._value(found, request) for found, request in zip(latents, requests, strict=True)]
        if first.pictures and self._samples.decode:
            for value, compared in zip(values, self._compared(chosen, latents), strict=True):
                value |= compared
        return [Outcome(value, calls, repeated[sample]) for value, sample in zip(values, chosen, strict=True)]

    def _restore(self, precision: str, samples: list[int], repeated: dict[int, Counter[str]]) -> None:
        """Sees to it that the states of uniform runs are there; an earlier process may have measured those."""
        missing = [sample for sample in samples if (precision, sample) not in self._states]
        if missing:
            self._run_uniform(precision, missing)
            for sample in missing:
                repeated[sample][precision] += self._evaluator.num_steps

    def _run_uniform(self, precision: str, samples: list[int]) -> None:
        columns = [[self._evaluator.start(sample) for sample in samples]]
        for _ in range(self._evaluator.num_steps):
            columns.append(self._evaluator.steps(samples, columns[-1], precision))
        for sample, states in zip(samples, zip(*columns, strict=True), strict=True):
            self._states[precision, sample] = states

    def _final(self, sample: int) -> np.ndarray:
        """Final latents of the reference run."""
        return self._evaluator.latents(self._states[self._reference, sample][-1])

    def _value(self, latents: np.ndarray, request: Request) -> dict[str, Any]:
        """E of a run's final latents and, where it is asked for, the direction of their error.

        Raises:
            TmpDiffError: they are not finite, and no step was reused.
        """
        final = self._final(request.sample)
        error = relative_error(latents, final)
        if not math.isfinite(error) and reused_steps(request.rest):
            error, latents = OVERFLOWED, final + 1.0
        if not math.isfinite(error):
            raise TmpDiffError(
                f"the {request.run} run of {self._name} sample {request.sample} gave latents that are not finite; "
                "build the bundle without that precision, or check its engine"
            )
        if not request.vector:
            return {"error": error}
        # a direction has no length, so that it does not matter what the error is relative to
        vector = np.asarray(latents, dtype=np.float64) - final
        return {"error": error, "direction": sketch.to_text(sketch.direction(vector, request.sample))}

    def _compared(self, samples: list[int], latents: list[np.ndarray]) -> list[dict[str, float]]:
        """Picture errors of every sample, where there is a decoder."""
        decode = self._samples.decode
        assert decode is not None
        missing = [sample for sample in samples if sample not in self._pictures]
        if missing:
            finals = np.stack([self._final(sample) for sample in missing])
            self._pictures.update(zip(missing, decode(finals), strict=True))
        pictures = decode(np.stack([np.nan_to_num(found, posinf=0.0, neginf=0.0) for found in latents]))
        with ThreadPoolExecutor(self._threads) as threads:
            return list(threads.map(self._samples.compare, pictures, [self._pictures[sample] for sample in samples]))
