"""Measurements of several samples in one denoiser call, for engines that cost the same for one picture as for many.

Here as a pool of this process, and what the workers of other pools hold.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from calibration.measure.evaluator import Evaluator, State
from calibration.measure.measurements import Compare, finite_error, picture_errors
from calibration.measure.requests import Outcome, Request, Run

DecodeAll = Callable[[np.ndarray], np.ndarray]
"""Final latents float32 [N, C, H, W] -> pictures uint8 [N, H, W, 3]."""


class BatchEvaluator(Evaluator, Protocol):
    """An evaluator that can take a step of several samples at once, as `calibration.measure.bundle_evaluator` can."""

    def steps(self, samples: Sequence[int], states: Sequence[State], precision: str) -> list[State]:
        """The state of every sample after one more step; all stand at the same one."""
        ...


@dataclass(frozen=True)
class SampleSet:
    """Samples to measure on, and what is kept of them.

    Attributes:
        evaluator: their loop.
        decode: of their final latents; None where no pictures are compared.
        compare: decoded pictures.
    """

    evaluator: BatchEvaluator
    decode: DecodeAll | None = None
    compare: Compare = picture_errors
    states: dict[tuple[str, int], tuple[State, ...]] = field(default_factory=dict)
    pictures: dict[int, np.ndarray] = field(default_factory=dict)


class SampleBatches:
    """`calibration.measure.requests.Pool` in this process: one run of several samples takes one engine call a step.

    A denoiser call of N samples counts as N calls, so that counts are those of samples measured one by one; values
    agree with theirs to the rounding that an engine owes to the size of its batch.
    """

    def __init__(self, sets: Mapping[str, SampleSet], at_once: int, threads: int | None = None) -> None:
        """
        Args:
            sets: by name.
            at_once: samples in a call at most.
            threads: that compare pictures, None for one per core: SSIM of one takes longer than many denoiser calls, and
                leaves the interpreter free.

        Raises:
            ValueError: `at_once` is below 1.
        """
        if at_once < 1:
            raise ValueError(f"{at_once} samples at once were asked for, expected 1 or more")
        self._sets = dict(sets)
        self._at_once = at_once
        self._threads = threads or len(os.sched_getaffinity(0))
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
        states = self._sets[samples].states
        for key in [key for key in states if key[0] == precision]:
            del states[key]

    def perform(self, samples: str, requests: Sequence[Request]) -> list[Outcome]:
        """See `Samples.perform`."""
        own, first = self._sets[samples], requests[0]
        chosen = [request.sample for request in requests]
        reference, num_steps = own.evaluator.precisions[0], own.evaluator.num_steps
        repeated = {sample: Counter[str]() for sample in chosen}
        if first.rest:
            self._states(own, first.base, chosen, repeated)
            states = [own.states[first.base, sample][num_steps - len(first.rest)] for sample in chosen]
            for precision in first.rest:
                states = own.evaluator.steps(chosen, states, precision)
            calls = Counter(first.rest)
        else:
            self._run_uniform(own, first.base, chosen)
            states = [own.states[first.base, sample][-1] for sample in chosen]
            calls = Counter({first.base: num_steps})
        self._states(own, reference, chosen, repeated)
        latents = [own.evaluator.latents(state) for state in states]
        values = [
            {"error": finite_error(found, self._final(own, request.sample), request, samples)}
            for found, request in zip(latents, requests, strict=True)
        ]
        if first.pictures and own.decode:
            for value, compared in zip(values, self._compare(own, own.decode, chosen, latents), strict=True):
                value |= compared
        return [Outcome(value, calls, repeated[sample]) for value, sample in zip(values, chosen, strict=True)]

    def _states(self, own: SampleSet, precision: str, samples: list[int], repeated: dict[int, Counter[str]]) -> None:
        """Sees to it that the states of uniform runs are there; an earlier process may have measured those."""
        missing = [sample for sample in samples if (precision, sample) not in own.states]
        if missing:
            self._run_uniform(own, precision, missing)
            for sample in missing:
                repeated[sample][precision] += own.evaluator.num_steps

    @staticmethod
    def _run_uniform(own: SampleSet, precision: str, samples: list[int]) -> None:
        """Keeps the states before every step and after the last one, T + 1."""
        columns = [[own.evaluator.start(sample) for sample in samples]]
        for _ in range(own.evaluator.num_steps):
            columns.append(own.evaluator.steps(samples, columns[-1], precision))
        for sample, states in zip(samples, zip(*columns, strict=True), strict=True):
            own.states[precision, sample] = states

    @staticmethod
    def _final(own: SampleSet, sample: int) -> np.ndarray:
        return own.evaluator.latents(own.states[own.evaluator.precisions[0], sample][-1])

    def _compare(
        self, own: SampleSet, decode: DecodeAll, samples: list[int], latents: list[np.ndarray]
    ) -> list[dict[str, float]]:
        """Picture errors of every sample."""
        missing = [sample for sample in samples if sample not in own.pictures]
        if missing:
            finals = np.stack([self._final(own, sample) for sample in missing])
            own.pictures.update(zip(missing, decode(finals), strict=True))
        pictures = decode(np.stack(latents))
        with ThreadPoolExecutor(self._threads) as threads:
            return list(threads.map(own.compare, pictures, [own.pictures[sample] for sample in samples]))
