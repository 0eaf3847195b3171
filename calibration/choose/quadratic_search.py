"""The local search of `calibration.choose.quadratic`, and where it starts.

A move gives at most two steps another precision. What it changes in a sum over pairs of steps splits into what each step
changes alone and a term of both, kept for all pairs at once: a move touches only the rows of its own steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

TOLERANCE = 1e-12
"""Differences of E within this fraction of the sum of all contributions are rounding."""

PERTURBED = 21
"""Readings that are perturbed, see `readings`."""

SPREADS = (0.3, 1.0, 3.0)
"""Standard deviations of the logarithm of what perturbs them, in turn."""

PRICES = 48
"""Prices of latency at which additive optima are looked for."""


@dataclass(frozen=True)
class Form:
    """What a search minimizes, over the precisions that it may use; Q of them.

    Attributes:
        values: float64 [T, Q, T, Q], symmetric.
        floor: float64 [T], what the first low step adds.
        low: bool [Q], which precisions are low.
        steps_ns: int64 [Q].
        swaps_ns: int64 [Q, Q], by precision before and after; zero on the diagonal.
        held: the first steps that stay at the reference, which is then the first of the Q.
        high_steps: the number of steps at the reference is part of the budget: a move keeps it.
    """

    values: np.ndarray
    floor: np.ndarray
    low: np.ndarray
    steps_ns: np.ndarray
    swaps_ns: np.ndarray
    held: int = 0
    high_steps: bool = False

    @cached_property
    def tolerance(self) -> float:
        """What E may differ by and be equal."""
        return TOLERANCE * float(np.abs(np.einsum("ipip->ip", self.values)).sum() + self.floor.sum())

    def errors(self, choices: np.ndarray) -> np.ndarray:
        """E of schedules, int [N, T] -> float64 [N]; as `Gram.errors` has it, not clipped at 0."""
        steps, width = self.values.shape[:2]
        flat = self.values.reshape(steps * width, -1)
        cells = np.arange(steps) * width + choices
        sums = np.array([flat[np.ix_(row, row)].sum() for row in cells])
        low = self.low[choices]
        found: np.ndarray = sums + np.where(low.any(axis=1), self.floor[low.argmax(axis=1)], 0.0)
        return found

    def total_ns(self, choices: np.ndarray) -> np.ndarray:
        """Latency of schedules, changes included, int [N, T] -> int64 [N]."""
        changes = self.swaps_ns[choices[:, :-1], choices[:, 1:]].sum(axis=1)
        found: np.ndarray = self.steps_ns[choices].sum(axis=1) + changes
        return found


class LocalSearch:
    """A schedule, and all moves from it.

    Attributes:
        choices: int64 [T], indices into the precisions of the form.
        error: E, not clipped at 0.
        total_ns: latency, changes included.
    """

    def __init__(self, form: Form, choices: np.ndarray) -> None:
        self.choices = choices.astype(np.int64)
        self.error = float(form.errors(choices[None])[0])
        self.total_ns = int(form.total_ns(choices[None])[0])
        self._form = form
        self._steps, self._width = form.values.shape[:2]
        self._flat = form.values.reshape(self._steps * self._width, -1)
        self._index = np.arange(self._steps)
        self._pull = self._flat[:, self._cells].sum(axis=1)
        both = self._flat - np.repeat(self._flat[:, self._cells], self._width, axis=1)
        both = 2 * (both - np.repeat(both[self._cells], self._width, axis=0))
        both.reshape(form.values.shape)[self._index, :, self._index, :] = np.inf  # a step changes once
        self._both = both  # twice the term of both steps, [TQ, TQ]
        self._gains, self._extra_ns = np.empty_like(both), np.empty(both.shape, dtype=np.int64)

    def moves(self) -> tuple[np.ndarray, np.ndarray]:
        """What every move changes: E, float64 [TQ, TQ], infinite where it is none, and latency, int64 [TQ, TQ].

        Rows and columns are steps and their new precisions. The next call writes over both.
        """
        form, index, z = self._form, self._index, self.choices
        pull = self._pull.reshape(self._steps, self._width)
        alone = 2 * (pull - form.values[index, :, index, z]) + np.einsum("ipip->ip", form.values)
        alone -= alone[index, z][:, None]
        alone[: form.held, 1:] = np.inf
        gains = np.add(self._both, alone.reshape(-1, 1), out=self._gains)
        gains += alone.reshape(1, -1)
        if form.floor.any():
            self._add_floors(gains)
        if form.high_steps:
            lows = (form.low[None, :].astype(np.int64) - form.low[z][:, None]).reshape(-1)
            gains[np.add.outer(lows, lows) != 0] = np.inf
        return gains, self._latencies()

    def put(self, move: int) -> None:
        """Makes a move, given as an index into what `moves` returns, flattened."""
        for cell in divmod(move, len(self._flat)):
            step, choice = divmod(cell, self._width)
            if choice != self.choices[step]:
                self._pull += self._flat[:, cell] - self._flat[:, self._cells[step]]
                self.choices[step] = choice
                self._refresh(step)
        self.error = float(self._form.errors(self.choices[None])[0])
        self.total_ns = int(self._form.total_ns(self.choices[None])[0])

    def descend(self, limit_ns: int) -> None:
        """Lowers E within a latency until no move does; then latency as long as E stays equal."""
        self._lower_error(limit_ns)
        while True:
            gains, extra_ns = self.moves()
            costs_ns = np.where(gains <= self._form.tolerance, extra_ns, 0)
            best = int(costs_ns.argmin())
            if costs_ns.flat[best] >= 0:
                return
            self.put(best)

    def tighten(self, within: float) -> None:
        """Lowers latency as long as E stays within a bound, where it is now; makes room for it by lowering E."""
        while True:
            self._lower_error(self.total_ns)
            before = self.choices.copy(), self.error, self.total_ns
            gains, extra_ns = self.moves()
            costs_ns = np.where(self.error + gains <= within, extra_ns, 0)
            best = int(costs_ns.argmin())
            if costs_ns.flat[best] >= 0:
                return
            self.put(best)
            if self.error > within:  # by rounding
                self.choices, self.error, self.total_ns = before
                return

    def _lower_error(self, limit_ns: int) -> None:
        while True:
            gains, extra_ns = self.moves()
            gains[extra_ns > limit_ns - self.total_ns] = np.inf
            best = int(gains.argmin())
            if not gains.flat[best] < -self._form.tolerance:
                return
            self.put(best)

    @property
    def _cells(self) -> np.ndarray:
        found: np.ndarray = self._index * self._width + self.choices
        return found

    def _refresh(self, step: int) -> None:
        rows = slice(step * self._width, (step + 1) * self._width)
        block = self._flat[rows] - np.repeat(self._flat[rows][:, self._cells], self._width, axis=1)
        block = 2 * (block - block[self.choices[step]])
        block[:, rows] = np.inf
        self._both[rows] = block
        self._both[:, rows] = block.T

    def _add_floors(self, gains: np.ndarray) -> None:
        """Adds what moves change in the floor, the first low step's."""
        form, steps = self._form, self._steps
        floor = np.append(form.floor, 0.0)
        first, second, third = (*np.flatnonzero(form.low[self.choices])[:3], steps, steps, steps)[:3]
        others = np.full((steps + 1, steps + 1), first)  # the first low step without those of a move
        others[first], others[:, first] = second, second
        others[first, second] = others[second, first] = third
        others = others[:steps, :steps]
        cells = gains.reshape(steps, self._width, steps, self._width)
        index = self._index
        high = int(np.count_nonzero(~form.low))  # of the columns, the first one or none
        for mine, rows in ((False, slice(0, high)), (True, slice(high, None))):
            for other, columns in ((False, slice(0, high)), (True, slice(high, None))):
                found = np.minimum(others, index[:, None]) if mine else others
                found = np.minimum(found, index) if other else found
                cells[:, rows, :, columns] += (floor[found] - floor[first])[:, None, :, None]

    def _latencies(self) -> np.ndarray:
        form, z, swaps = self._form, self.choices, self._form.swaps_ns
        alone = form.steps_ns[None, :] - form.steps_ns[z][:, None]
        if not swaps.any():
            return np.add(alone.reshape(-1, 1), alone.reshape(1, -1), out=self._extra_ns)
        before, after = z[:-1], z[1:]
        now = swaps[before, after][:, None]
        alone[1:] += swaps[before] - now
        alone[:-1] += swaps[:, after].T - now
        found = np.add(alone.reshape(-1, 1), alone.reshape(1, -1), out=self._extra_ns)
        both = swaps[None] - swaps[:, after].T[:, :, None] - swaps[before][:, None, :] + now[:, :, None]
        cells = found.reshape(self._steps, self._width, self._steps, self._width)
        index = self._index
        cells[index[:-1], :, index[1:], :] += both
        cells[index[1:], :, index[:-1], :] += both.transpose(0, 2, 1)
        return found


def readings(form: Form) -> np.ndarray:
    """Additive readings of a form, float64 [R, T, Q], non-negative; infinite for what held steps must not be.

    Its diagonal; all of a row among steps at one precision; what lies between; and these perturbed.
    """
    own = np.einsum("ipip->ip", form.values)
    rows = np.einsum("ipjp->ip", form.values)
    plain = [own, rows, (own + rows) / 2]
    generator = np.random.default_rng(0)
    noise = generator.standard_normal((PERTURBED, *own.shape))
    bases = [(plain[k % len(plain)], SPREADS[k // len(plain) % len(SPREADS)]) for k in range(PERTURBED)]
    perturbed = [base * np.exp(spread * drawn) for (base, spread), drawn in zip(bases, noise, strict=True)]
    found = np.maximum([*plain, *perturbed], 0.0)
    found[:, : form.held, 1:] = np.inf
    return found


def additive_optima(form: Form, values: np.ndarray) -> np.ndarray:
    """Schedules of least sum of a reading and the price of their latency, at many prices.

    Args:
        form: what changes cost.
        values: float64 [R, T, Q].

    Returns:
        int64 [R, N, T], in order of rising price.
    """
    saved = np.subtract.outer(form.steps_ns, form.steps_ns)  # by precision before and after
    prices = np.zeros((len(values), PRICES + 2))
    for k, reading in enumerate(values):
        added = reading[form.held :, None, :] - reading[form.held :, :, None]
        slopes = (added / np.where(saved > 0, saved, 1))[np.broadcast_to((saved > 0) & (added > 0), added.shape)]
        if slopes.size:
            prices[k, 1:-1] = np.quantile(slopes, np.linspace(0, 1, PRICES))
        prices[k, -1] = 2 * prices[k, -2] if slopes.size else 1.0
    steps_cost = prices[..., None] * form.steps_ns
    swaps_cost = prices[..., None, None] * form.swaps_ns
    follow = np.zeros(steps_cost.shape)
    trail = []
    for step in reversed(range(values.shape[1])):
        follow = follow + values[:, None, step, :] + steps_cost
        options = swaps_cost + follow[:, :, None, :]  # by precision before and of this step
        trail.append(options.argmin(axis=3))
        first = follow.argmin(axis=2)
        follow = options.min(axis=3)
    found = np.empty((*prices.shape, values.shape[1]), dtype=np.int64)
    found[..., 0] = first
    for step, best in enumerate(reversed(trail[:-1]), start=1):
        found[..., step] = np.take_along_axis(best, found[..., step - 1, None], axis=2)[..., 0]
    return found
