"""Reuse: a step whose model output is not computed but extrapolated from the last computed ones.

A *choice* is what a step of a schedule takes its model output from: an engine, by the name of its precision, or the
polynomial of order 0 (the last computed output itself), 1 (a line) or 2 (a parabola) through the last computed outputs,
at the step's own timestep. A reused step's output is not a computed one: no later step extrapolates from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from engines.errors import ScheduleError

Terms = tuple[tuple[int, float], ...]
"""Sparse coefficients: (step index j, coefficient) in ascending order of j."""

REUSES: Final = ("reuse0", "reuse1", "reuse2")
"""The choices that call no engine, by their order."""

MOST_COMPUTED: Final = len(REUSES)
"""Computed outputs that the highest order extrapolates through."""


def order_of(choice: str) -> int | None:
    """The order of a reuse, None for a precision."""
    return REUSES.index(choice) if choice in REUSES else None


def reused_steps(choices: Sequence[str]) -> tuple[int, ...]:
    """Step indices whose model output is not computed."""
    return tuple(step for step, choice in enumerate(choices) if order_of(choice) is not None)


def computed_choices(choices: Sequence[str]) -> tuple[str, ...]:
    """The choices of the computed steps, in order."""
    return tuple(choice for choice in choices if order_of(choice) is None)


def engines_of(choices: Sequence[str]) -> tuple[str, ...]:
    """Names of the engines that run, each once, in the order of their first step."""
    return tuple(dict.fromkeys(computed_choices(choices)))


def kept_outputs(choices: Sequence[str]) -> tuple[int, ...]:
    """How many computed outputs have to be kept after every step for the reuses behind it, one number per step."""
    most, kept = 0, []
    for choice in reversed(choices):
        kept.append(most)
        order = order_of(choice)
        most = max(most, 0 if order is None else order + 1)
    return tuple(reversed(kept))


def with_computed(computed: Sequence[int], step_index: int, timesteps: Sequence[float]) -> tuple[int, ...]:
    """Step indices of the last computed outputs at distinct timesteps, one step later.

    Args:
        computed: step indices before the step, ascending.
        step_index: of the step that was computed. One at the same timestep (Heun's and other second-order steps) gives way.
        timesteps: of every step.
    """
    return (*(j for j in computed if timesteps[j] != timesteps[step_index]), step_index)


def extrapolation(order: int, step_index: int, computed: Sequence[int], timesteps: Sequence[float]) -> Terms:
    """A reused step's model output as weights of computed ones: Lagrange's polynomial at the step's timestep.

    Args:
        order: 0, 1 or 2.
        step_index: of the reused step.
        computed: step indices of the outputs computed before it, at distinct timesteps, ascending.
        timesteps: of every step, in any units.

    Returns:
        The last order + 1 of them or, where the step has the timestep of one of these, that one alone with weight 1.

    Raises:
        ScheduleError: too few were computed.
    """
    if len(computed) <= order:
        raise ScheduleError(
            f"step index {step_index} is {REUSES[order]}, which needs {order + 1} model output{'s' if order else ''} computed "
            f"before it at distinct timesteps, and there {'is' if len(computed) == 1 else 'are'} {len(computed)}; compute "
            "more steps before it, or reuse at a lower order"
        )
    own, nodes = timesteps[step_index], computed[len(computed) - order - 1 :]
    terms = []
    for j in nodes:
        weight = lagrange_weight(nodes, j, own, timesteps)
        if weight:
            terms.append((j, float(weight)))
    return tuple(terms)


def lagrange_weight(nodes: Sequence[int], node: int, at: float, timesteps: Sequence[float]) -> float:
    """The weight of one of several step indices at distinct timesteps in the polynomial through all of them, at a timestep."""
    weight = 1.0
    for other in nodes:
        if other != node:
            weight *= (at - timesteps[other]) / (timesteps[node] - timesteps[other])
    return weight


def taken_whole(terms: Terms) -> bool:
    """Whether a reused output is one computed output as it is, which needs no sum."""
    return len(terms) == 1 and terms[0][1] == 1.0


def reuse_terms(timesteps: Sequence[float], choices: Sequence[str]) -> tuple[Terms | None, ...]:
    """What every step of a schedule takes its model output from.

    Args:
        timesteps: of every step, in any units.
        choices: of every step.

    Returns:
        One entry per step: None where it is computed, else its weights over the outputs of computed steps.

    Raises:
        ScheduleError: a reused step has too few computed outputs before it, or there are not as many choices as timesteps.
    """
    if len(timesteps) != len(choices):
        raise ScheduleError(f"schedule has {len(choices)} steps, the sampler table has {len(timesteps)}")
    computed: tuple[int, ...] = ()
    found: list[Terms | None] = []
    for k, choice in enumerate(choices):
        order = order_of(choice)
        found.append(None if order is None else extrapolation(order, k, computed, timesteps))
        if order is None:
            computed = with_computed(computed, k, timesteps)[-MOST_COMPUTED:]
    return tuple(found)
