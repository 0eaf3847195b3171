"""Schedules of one low precision beside the reference, written as a string of H (reference) and L per step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from calibration.choose import baselines

HIGH, LOW = "H", "L"


def precisions_of(pattern: str, reference: str, precision: str) -> tuple[str, ...]:
    """The precision of every step."""
    return tuple(reference if letter == HIGH else precision for letter in pattern)


def pattern_of(schedule: Sequence[str], reference: str) -> str:
    """The pattern of a schedule."""
    return "".join(HIGH if name == reference else LOW for name in schedule)


def high_steps(patterns: Sequence[str]) -> np.ndarray:
    """bool [N, T], whether a step runs at the reference."""
    return np.array([[letter == HIGH for letter in pattern] for pattern in patterns])


def fixed_rules(num_steps: int, count: int) -> dict[str, str]:
    """The baselines with `count` steps at the reference, by name."""
    pool = HIGH * count + LOW * (num_steps - count)
    return {name: "".join(rule(pool)) for name, rule in baselines.RULES.items()}


def random_patterns(num_steps: int, count: int, draws: int) -> tuple[str, ...]:
    """At most `draws` distinct patterns with `count` steps at the reference.

    A draw depends on T, K and its number only: experiments that ask for the same ones share what was measured.
    """
    pool = HIGH * count + LOW * (num_steps - count)
    drawn = ("".join(baselines.shuffled(pool, np.random.default_rng((count, k)))) for k in range(draws))
    return tuple(dict.fromkeys(drawn))


def counts_between(num_steps: int, every: int) -> tuple[int, ...]:
    """Every `every`-th K from T/5 to 4T/5, both rounded inwards; T/5 always among them.

    Raises:
        ValueError: `every` below 1.
    """
    if every < 1:
        raise ValueError(f"every {every}th number of steps was asked for, expected 1 or more")
    first = max(1, -(-num_steps // 5))
    return tuple(range(first, max(4 * num_steps // 5, first) + 1, every))
