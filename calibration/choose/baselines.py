"""Schedules that need no measuring, to compare with at equal latency.

Each arranges the same number of steps per precision as the schedule under test, so that its latency is
the same. With one low precision and K reference steps these are first-K, last-K, both ends, evenly
spread K and random K; with more, the precisions fill the favoured positions from the most precise down.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from engines.reuse import computed_choices, order_of


def first(pool: Sequence[str]) -> tuple[str, ...]:
    """The most precise steps first. `pool`: one name per step, most precise first."""
    return tuple(pool)


def last(pool: Sequence[str]) -> tuple[str, ...]:
    """The most precise steps last."""
    return tuple(reversed(pool))


def both_ends(pool: Sequence[str]) -> tuple[str, ...]:
    """The most precise steps at both ends, the first end favoured; shipped as a fixed rule elsewhere."""
    count = len(pool)
    positions = [index // 2 if index % 2 == 0 else count - 1 - index // 2 for index in range(count)]
    return _place(pool, positions)


def evenly_spread(pool: Sequence[str]) -> tuple[str, ...]:
    """Each precision in turn spread evenly over the positions still free, both ends included."""
    free = list(range(len(pool)))
    positions: list[int] = []
    for name in dict.fromkeys(pool):
        count = pool.count(name)
        picked = [free[round(k)] for k in np.linspace(0, len(free) - 1, count)] if count > 1 else [free[len(free) // 2]]
        positions += picked
        free = [position for position in free if position not in picked]
    return _place(pool, positions)


def shuffled(pool: Sequence[str], generator: np.random.Generator) -> tuple[str, ...]:
    """Any order, each as likely."""
    return tuple(pool[index] for index in generator.permutation(len(pool)))


RULES: dict[str, Callable[[Sequence[str]], tuple[str, ...]]] = {
    "first K": first,
    "last K": last,
    "both ends": both_ends,
    "evenly spread": evenly_spread,
}
"""The fixed rules by name; each takes a pool."""


def rule_name(rule: str, schedule: Sequence[str], precisions: Sequence[str]) -> str:
    """A rule and the pool it was given, as "last 8 (fp8)", or "last 2 (5 int8, 3 int4)" where it mixes low precisions.

    A uniform schedule is called so, as every rule gives it.

    Args:
        rule: a name of `RULES`.
        schedule: what it made of the pool.
        precisions: in order of precision, the reference first.
    """
    computed = computed_choices(schedule)
    reuse = ", reuse as chosen" if len(computed) < len(schedule) else ""
    if len(set(computed)) == 1:
        return f"uniform {computed[0]}{reuse}"
    low = [name for name in precisions[1:] if name in schedule]
    counts = low if len(low) == 1 else [f"{schedule.count(name)} {name}" for name in low]
    high = schedule.count(precisions[0])
    return f"{rule.removesuffix(' K')}{f' {high}' if high else ''} ({', '.join(counts)}){reuse}"


def fixed_rules(schedule: Sequence[str], precisions: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The fixed rules with the step counts of a schedule, by `rule_name`; none for a uniform one.

    Steps that are reused stay so: the rules arrange the precisions of the others.

    Args:
        schedule: one name per step.
        precisions: in order of precision, the reference first.
    """
    computed = computed_choices(schedule)
    if len(set(computed)) == 1:
        return {}
    pool = sorted(computed, key=list(precisions).index)
    arranged = {name: arrange(schedule, rule(pool)) for name, rule in RULES.items()}
    return {rule_name(name, found, precisions): found for name, found in arranged.items()}


def arrange(schedule: Sequence[str], precisions: Sequence[str]) -> tuple[str, ...]:
    """A schedule with other precisions at its computed steps, in order."""
    names = iter(precisions)
    return tuple(next(names) if order_of(choice) is None else choice for choice in schedule)


def _place(pool: Sequence[str], positions: Sequence[int]) -> tuple[str, ...]:
    schedule = dict(zip(positions, pool, strict=True))
    return tuple(schedule[step] for step in range(len(pool)))
