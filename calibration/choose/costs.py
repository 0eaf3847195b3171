"""What a schedule takes: its steps, changes of precision, and engines that stay in device memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from engines.reuse import computed_choices

NANOSECONDS_PER_MS = 1_000_000


@dataclass(frozen=True)
class AllocationCosts:
    """What changes of precision cost, and how many precisions a schedule may use.

    The limit is on distinct precisions, so that every engine of a schedule is resident before its loop and none is
    loaded inside. Latency is then a sum over steps and changes, which allocation minimizes exactly. A load
    inside the loop has no cost of its own to add up: it overlaps the steps before it, and how many there are follows
    from which engine gave way when. The one exception is a device that holds a single engine, where every change
    is a load that overlaps nothing: charge a change to `p` the load time of `p`, and set no limit.

    Attributes:
        swap_ms: added for every step whose precision differs from that of the step before. One number, or one for
            every ordered pair (precision before, precision after). The first step of a loop is not charged.
        max_engines: most distinct precisions in one schedule, at least 1; None for any number.
    """

    swap_ms: float | Mapping[tuple[str, str], float] = 0.0
    max_engines: int | None = None

    def __post_init__(self) -> None:
        named = dict(self.swap_ms) if isinstance(self.swap_ms, Mapping) else {"": self.swap_ms}
        for pair, cost_ms in named.items():
            of = f" from {pair[0]} to {pair[1]}" if pair else ""
            if pair and pair[0] == pair[1]:
                raise ValueError(f"a swap cost{of} is given, but staying is no swap; leave the pair out")
            if not (math.isfinite(cost_ms) and cost_ms >= 0):
                raise ValueError(f"the swap cost{of} is {cost_ms} ms, expected zero or a positive number")
        limit = self.max_engines
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
            raise ValueError(f"max_engines is {limit!r}, expected a whole number from 1, or None for no limit")

    def swap_ns(self, before: str, after: str) -> int:
        """What a step at `after` behind one at `before` costs on top, in whole nanoseconds.

        Raises:
            ValueError: costs are given per pair, and not for this one.
        """
        if before == after:
            return 0
        if not isinstance(self.swap_ms, Mapping):
            return round(self.swap_ms * NANOSECONDS_PER_MS)
        if (before, after) not in self.swap_ms:
            raise ValueError(f"swap_ms lacks {before} to {after}; give every ordered pair of precisions, or one number")
        return round(self.swap_ms[before, after] * NANOSECONDS_PER_MS)

    def by_pair(self, precisions: Sequence[str]) -> dict[str, float]:
        """ "before after" -> ms, of the ordered pairs of precisions whose change costs something."""
        pairs = {f"{a} {b}": self.swap_ns(a, b) / NANOSECONDS_PER_MS for a in precisions for b in precisions}
        return {pair: cost_ms for pair, cost_ms in pairs.items() if cost_ms > 0}


NO_COSTS = AllocationCosts()
"""Changes are free, and a schedule may use every precision."""


def step_ns(latency_ms: float) -> int:
    """A step latency in whole nanoseconds.

    Raises:
        ValueError: it is less than one, or not finite.
    """
    if not (math.isfinite(latency_ms) and latency_ms * NANOSECONDS_PER_MS >= 1):
        raise ValueError(f"step latency is {latency_ms} ms, expected a number of at least one nanosecond")
    return round(latency_ms * NANOSECONDS_PER_MS)


@dataclass(frozen=True)
class LatencyModel:
    """The precisions that schedules may be made of, and what those take.

    Attributes:
        precisions: the reference first.
        latencies_ms: step latency by precision.
        costs: of changes of precision, and the limit on precisions.
        reuse_ms: step latency of a reused step; None where none is reused.
    """

    precisions: tuple[str, ...]
    latencies_ms: Mapping[str, float]
    costs: AllocationCosts = NO_COSTS
    reuse_ms: float | None = None

    @property
    def reference(self) -> str:
        """What latencies and errors are relative to."""
        return self.precisions[0]

    @property
    def reuse_ns(self) -> int:
        """A reused step in whole nanoseconds.

        Raises:
            ValueError: its latency is not known, or less than one.
        """
        if self.reuse_ms is None:
            raise ValueError("a schedule reuses steps, but the latency of a reused step is not known; give reuse_ms")
        return step_ns(self.reuse_ms)

    def latency(self, schedule: Sequence[str]) -> float:
        """Mean step latency of a schedule, its changes of precision included, relative to the reference's.

        The engine before a reused step stays: only computed steps change precisions.
        """
        computed = computed_choices(schedule)
        total = sum(step_ns(self.latencies_ms[name]) for name in computed)
        total += sum(self.costs.swap_ns(before, after) for before, after in pairwise(computed))
        if len(computed) < len(schedule):
            total += (len(schedule) - len(computed)) * self.reuse_ns
        return total / (len(schedule) * step_ns(self.latencies_ms[self.reference]))
