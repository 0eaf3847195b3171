"""Planted truth for calibration: score curves of known shape, and a loop whose errors are known exactly."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import rankdata

from calibration import CalibrationOptions, CalibrationResult, calibrate
from calibration.measure.evaluator import Evaluator, SampleSet, SampleSets
from calibration.measure.journal import Journal
from calibration.measure.measurements import Measurements
from calibration.measure.requests import Outcome, Request
from calibration.measure.sample_batches import SampleBatches
from engines.reuse import order_of

DECADE = float(np.log(10))
NUDGE = 2.0**-16
Curve = Callable[[np.random.Generator, int], np.ndarray]


def _positions(num_steps: int) -> np.ndarray:
    return np.linspace(0.0, 1.0, num_steps) if num_steps > 1 else np.zeros(1)


def monotone(rng: np.random.Generator, num_steps: int) -> np.ndarray:
    """1 to 3 decades up or down."""
    logs = rng.uniform(1, 3) * DECADE * _positions(num_steps) ** rng.uniform(0.5, 2)
    return np.exp(logs if rng.random() < 0.5 else -logs)


def u_shaped(rng: np.random.Generator, num_steps: int) -> np.ndarray:
    """A lopsided U, 1 to 2.5 decades deep."""
    x, centre = _positions(num_steps), rng.uniform(0.25, 0.75)
    decades = rng.uniform(1, 2.5)
    left = (np.clip(centre - x, 0, None) / centre) ** rng.uniform(1.3, 2.5) * rng.uniform(0.5, 1)
    right = (np.clip(x - centre, 0, None) / (1 - centre)) ** rng.uniform(1.3, 2.5) * rng.uniform(0.5, 1)
    return np.exp(decades * DECADE * (left + right))


def spiked_end(rng: np.random.Generator, num_steps: int) -> np.ndarray:
    """A U or a monotone curve whose last (sometimes first) step alone is 0.5 to 2 decades higher."""
    curve = u_shaped(rng, num_steps) if rng.random() < 0.5 else monotone(rng, num_steps)
    curve[-1 if rng.random() < 0.7 else 0] *= 10 ** rng.uniform(0.5, 2)
    return curve


def short_last_step(rng: np.random.Generator, num_steps: int) -> np.ndarray:
    """A rise to a spike at the step before the last, whose successor is 0.5 to 2 decades below it: flow matching."""
    curve = np.exp(rng.uniform(0.3, 1.5) * DECADE * _positions(num_steps) ** rng.uniform(1, 4))
    if num_steps > 2:
        curve[-2] *= 10 ** rng.uniform(0.3, 1)
        curve[-1] = curve[-2] / 10 ** rng.uniform(0.5, 2)
    return curve


def bump(rng: np.random.Generator, num_steps: int) -> np.ndarray:
    """A slope with a wide bump somewhere in the interior."""
    x, logs = _positions(num_steps), np.log(monotone(rng, num_steps)) / 2
    shape = np.exp(-0.5 * ((x - rng.uniform(0.2, 0.8)) / rng.uniform(0.08, 0.2)) ** 2)
    return np.exp(logs + rng.uniform(0.7, 1.5) * DECADE * shape)


def smooth(rng: np.random.Generator, num_steps: int) -> np.ndarray:
    """A draw from a smooth Gaussian process: several turns."""
    x, scale = _positions(num_steps), rng.uniform(0.25, 0.5)
    covariance = np.exp(-0.5 * ((x[:, None] - x) / scale) ** 2) + 1e-8 * np.eye(num_steps)
    return np.exp(rng.uniform(0.8, 2) * np.linalg.cholesky(covariance) @ rng.normal(size=num_steps))


def flat(rng: np.random.Generator, num_steps: int) -> np.ndarray:
    return np.full(num_steps, rng.uniform(0.1, 10))


def noisy(rng: np.random.Generator, num_steps: int) -> np.ndarray:
    """A U with 5 to 25 % of noise on every step."""
    return u_shaped(rng, num_steps) * np.exp(rng.uniform(0.05, 0.25) * rng.normal(size=num_steps))


def plateau(rng: np.random.Generator, num_steps: int) -> np.ndarray:
    """Two to four levels with sharp edges."""
    edges = np.sort(rng.uniform(size=rng.integers(1, 4)))
    levels = rng.uniform(-3, 3, size=len(edges) + 1)
    return np.exp(levels[np.searchsorted(edges, _positions(num_steps))])


def interior_spike(rng: np.random.Generator, num_steps: int) -> np.ndarray:
    """A U with one step of the interior 0.5 to 2 decades above its neighbours."""
    curve = u_shaped(rng, num_steps)
    curve[rng.integers(1, max(num_steps - 1, 2)) if num_steps > 1 else 0] *= 10 ** rng.uniform(0.5, 2)
    return curve


SMOOTH_CURVES: dict[str, Curve] = {
    curve.__name__: curve for curve in (monotone, u_shaped, spiked_end, short_last_step, bump, smooth, flat)
}
ROUGH_CURVES: dict[str, Curve] = {curve.__name__: curve for curve in (noisy, plateau, interior_spike)}


def rank_deviation(truth: np.ndarray, found: np.ndarray) -> float:
    """Mean over steps of the distance between true and found rank; equal scores share a rank."""
    ranks = [rankdata(np.round(np.log(np.maximum(scores, 1e-12)), 9)) for scores in (truth, found)]
    return float(np.mean(np.abs(ranks[0] - ranks[1])))


def regret(truth: np.ndarray, found: np.ndarray) -> float:
    """Excess error of upcasting the K steps that look worst over the K that are, mean over K = 0..T-1."""
    order = np.argsort(-found, kind="stable")
    kept = truth.sum() - np.concatenate(([0.0], np.cumsum(truth[order])[:-1]))
    best = truth.sum() - np.concatenate(([0.0], np.cumsum(np.sort(truth)[::-1])[:-1]))
    return float(np.mean(kept / best - 1))


class OneByOne:
    """An evaluator whose `steps` are a `step` of each sample."""

    def steps(self, samples, states, precision):
        return [self.step(sample, state, precision) for sample, state in zip(samples, states, strict=True)]


@dataclass(frozen=True)
class PlantedEvaluator(OneByOne):
    """A linear loop x <- gain[i] * x + drift, where step i at precision p adds a known error vector.

    The reference adds none. With `correlation` 0 the errors of different steps are orthogonal, so that E is
    exactly additive; with 1 they all point the same way, so that E goes with the square of their sum.

    Attributes:
        errors: per low precision the size of the error of each step, [T].
        gains: how each step stretches what it is given, [T].
    """

    errors: Mapping[str, Sequence[float] | np.ndarray]
    gains: Sequence[float] | np.ndarray
    correlation: float = 0.0
    num_samples: int = 2
    seed: int = 0
    shape: tuple[int, ...] = (3, 8, 8)
    precisions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "precisions", self.precisions or ("fp16", *self.errors))

    @property
    def num_steps(self) -> int:
        return len(self.gains)

    def start(self, sample: int, nudged: bool = False) -> tuple[int, np.ndarray]:
        x = self._base(sample)[0]
        return 0, x + NUDGE * self._base(sample)[1] if nudged else x

    def step(self, sample: int, state: tuple[int, np.ndarray], precision: str) -> tuple[int, np.ndarray]:
        index, x = state
        x = self.gains[index] * x + self._base(sample)[1]
        if precision in self.errors:
            x = x + self.errors[precision][index] * self._direction(index)
        return index + 1, x

    def latents(self, state: tuple[int, np.ndarray]) -> np.ndarray:
        return state[1].reshape(self.shape).astype(np.float32)

    def key(self) -> str:
        parts = (
            {name: tuple(map(float, sizes)) for name, sizes in self.errors.items()},
            tuple(map(float, self.gains)),
            self.correlation,
            self.num_samples,
            self.seed,
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def true_error(self, schedule: Sequence[str]) -> float:
        """E of a schedule, worked out on paper."""
        errors = []
        for sample in range(self.num_samples):
            x, deviation = self._base(sample)[0], np.zeros(self._size)
            for index, precision in enumerate(schedule):
                x = self.gains[index] * x + self._base(sample)[1]
                size = self.errors[precision][index] if precision in self.errors else 0.0
                deviation = self.gains[index] * deviation + size * self._direction(index)
            errors.append(float(deviation @ deviation / (x @ x)))
        return float(np.mean(errors))

    @property
    def _size(self) -> int:
        return int(np.prod(self.shape))

    def _base(self, sample: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng((self.seed, sample))
        return rng.normal(size=self._size), 0.3 * rng.normal(size=self._size)

    def _direction(self, index: int) -> np.ndarray:
        own, common = np.zeros(self._size), np.zeros(self._size)
        own[index + 1], common[0] = 1.0, 1.0
        return np.sqrt(1 - self.correlation) * own + np.sqrt(self.correlation) * common


class Interrupted(Exception):
    """What `Counted` raises when its calls are used up."""


class Counted(OneByOne):
    """Another evaluator, its calls counted independently of the calibrator, and cut off after `limit`."""

    def __init__(self, inner: Any, limit: int | None = None) -> None:
        self.inner = inner
        self.limit = limit
        self.calls: Counter[str] = Counter()
        self.num_steps = inner.num_steps
        self.precisions = inner.precisions
        self.num_samples = inner.num_samples
        self.start = inner.start
        self.latents = inner.latents
        self.key = inner.key

    def __getattr__(self, name: str) -> Any:
        """What only reuse asks for."""
        return getattr(self.inner, name)

    def shorter(self, loop: str) -> Counted:
        found = Counted(self.inner.shorter(loop), self.limit)
        found.calls = self.calls
        return found

    def step(self, sample: int, state: tuple[int, np.ndarray], precision: str) -> tuple[int, np.ndarray]:
        if order_of(precision) is not None:
            return self.inner.step(sample, state, precision)
        if self.limit is not None and self.calls.total() >= self.limit:
            raise Interrupted
        self.calls[precision] += 1
        return self.inner.step(sample, state, precision)


class PoolHere:
    """A `calibration.measure.requests.Pool` in this process; `together` says how many measurements each wait found."""

    def __init__(self, **evaluators):
        self._samples = SampleBatches({name: SampleSet(one) for name, one in evaluators.items()})
        self._waiting: dict[str, list[Request]] = {name: [] for name in evaluators}
        self.together: list[int] = []

    def submit(self, samples: str, request: Request) -> None:
        self._waiting[samples].append(request)

    def finished(self, samples: str) -> list[tuple[Request, Outcome]]:
        requests, self._waiting[samples] = self._waiting[samples], []
        self.together.append(len(requests))
        return [(request, self._samples.perform(samples, [request])[0]) for request in requests]

    def forget(self, samples: str, precision: str) -> None:
        self._samples.forget(samples, precision)


def measurements(evaluator: Evaluator, name: str = "calibration") -> Measurements:
    """Of an evaluator in this process, kept in memory."""
    samples = SampleSet(evaluator)
    return Measurements(name, samples, Journal.in_memory("key"), SampleBatches({name: samples}))


def calibrate_loops(evaluator, latencies_ms, *, validation=None, decode=None, **options) -> CalibrationResult:
    """`calibrate` of planted loops, both with the decoder; `options` are its own, and those of `CalibrationOptions`."""
    own = {name: options.pop(name) for name in ("journal", "pool", "progress") if name in options}
    shorter = options.pop("shorter", None)
    sets = SampleSets(SampleSet(evaluator, decode), SampleSet(validation, decode) if validation else None, shorter)
    return calibrate(sets, latencies_ms, CalibrationOptions(**options), **own)
