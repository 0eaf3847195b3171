"""Which steps to reuse, for a ladder of numbers of them: a search by prediction that is anchored at measured runs.

Predictions add error vectors of single reuses (`calibration.scores.reuse`). They are right where reused steps are far apart,
and much too low where computed steps answer to a reuse and the next one is extrapolated from the answer: at T = 20, E of a
line at every fourth step was 1e-2, predicted 1e-4. So every plan of the ladder is measured as a whole, and predictions are of
what changes from a measured plan, the *anchor*, whose error vector is known:

    v(plan) = v(anchor) + p(plan) - p(anchor) + what was learned of the steps that differ

From one rung to the next steps are added by prediction. At a rung the most promising plan is measured; by what its vector
differs from the predicted one, what is said of its last change in these surroundings (choices of three steps on either
side) is corrected, and the next most promising one is measured, until none promises less than the best that was measured.
Changes are additions to the anchor, and, once the rung has a plan, exchanges of one reused step for another. Rules of thumb
are measured as well, and are anchors where they are better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from calibration.choose.joint import ReusePlan, influence_ratios
from calibration.measure.measurements import Measurements
from calibration.measure.metrics import DEPARTED
from calibration.scores.reuse import Reuses, errors_of, vector_of
from engines.errors import ScheduleError
from engines.reuse import REUSES, order_of, reuse_terms, reused_steps

STAGE = "reuse plans"

RUNGS = 10
"""Numbers of reused steps for which plans are looked for, at most."""

TRIED = 5
"""Plans that are measured at a rung, at most."""

WORTH = 0.95
"""A change is measured if it promises at most this fraction of the E that is there."""

LEFT_OUT = 4
"""Steps of a plan, the best to leave out, that exchanges are looked for with."""

REACH = 3
"""Steps on either side that a reuse has to do with: orders reach three computed steps back."""

RULE_EVERY = (2, 3, 4)
RULE_ORDERS = (0, 1)
RULE_START = 0.1
"""Rules reuse every n-th step, from this fraction of the loop on, but for the last step."""

Choices = tuple[str, ...]


@dataclass(frozen=True, eq=False)
class _Run:
    """A measured plan: its error vectors float64 [S, K], E, and E as predicted."""

    choices: Choices
    vectors: np.ndarray
    error: float
    predicted: float
    rule: str | None = None


def rungs(most: int) -> tuple[int, ...]:
    """The numbers of reused steps of a ladder."""
    return tuple(sorted({math.ceil(most * k / RUNGS) for k in range(1, RUNGS + 1)} - {0}))


def reuse_rules(reference: str, timesteps: Sequence[float], most: int) -> dict[str, Choices]:
    """Rules of thumb by name: every n-th step reused, as far as that are `most` steps at most."""
    num_steps, found = len(timesteps), {}
    for every in RULE_EVERY:
        for order in RULE_ORDERS:
            start = math.ceil(RULE_START * num_steps) + every - 1
            choices = [reference] * num_steps
            for step in range(max(start, order + 1), num_steps - 1, every):
                choices[step] = REUSES[order]
            if 0 < len(reused_steps(choices)) <= most and _valid(timesteps, choices):
                ordinal = {2: "2nd", 3: "3rd"}.get(every, f"{every}th")
                found[f"every {ordinal} step {REUSES[order]}"] = tuple(choices)
    return found


def most_calls(num_steps: int, most: int, samples: int) -> int:
    """Denoiser calls of a search and of the single reuses before it, at most."""
    singles = len(REUSES) * num_steps * (num_steps - 1) // 2
    rules = len(RULE_EVERY) * len(RULE_ORDERS) * num_steps
    return samples * (singles + rules + TRIED * sum(num_steps - 1 - count for count in rungs(most)))


def search_plans(
    measurements: Measurements,
    reuses: Reuses,
    influence: Callable[[Sequence[str]], np.ndarray],
    most: int,
    samples: Sequence[int],
    on_run: Callable[[int, int], None],
) -> tuple[ReusePlan, ...]:
    """Measured plans: the rules, and those that were tried for every rung of a ladder of numbers of reused steps.

    The ladder ends early where even the best plan errs as much as runs that end elsewhere.

    Args:
        measurements: of the calibration samples.
        reuses: single reuses, on `samples`.
        influence: `Evaluator.influence`.
        most: reused steps, at most.
        samples: those that plans are run on.
        on_run: called after every run of a plan with (done, at most).

    Returns:
        Plans of rising numbers of reused steps, of equal numbers the best first; no two alike.
    """
    search = _Search(measurements, reuses, samples, on_run)
    rules = reuse_rules(measurements.reference, reuses.timesteps, most)
    ladder = rungs(most)
    search.total = len(rules) + TRIED * len(ladder)
    for rule, choices in rules.items():
        search.measure(choices, None, rule)
    below = 0
    for count in ladder:
        best = search.climb(search.anchors(below, count), count)
        if best is None or best.error > DEPARTED:
            break
        below = count
    return tuple(
        ReusePlan(run.choices, run.error, run.predicted, influence_ratios(influence, run.choices), run.rule)
        for run in sorted(search.runs.values(), key=lambda run: (len(reused_steps(run.choices)), run.error))
    )


@dataclass
class _Search:
    """What was measured so far, and what was learned from it.

    Attributes:
        total: plans that may be measured, for progress.
        learned: by step and the choices around it, what its error vectors are beyond predicted ones.
    """

    measurements: Measurements
    reuses: Reuses
    samples: Sequence[int]
    on_run: Callable[[int, int], None]
    total: int = 0
    learned: dict[tuple[int, Choices], np.ndarray] = field(default_factory=dict)
    runs: dict[Choices, _Run] = field(default_factory=dict)

    def nothing(self) -> _Run:
        """The reference run: no step reused, no error."""
        size = self.reuses.vectors.shape[2:]
        return _Run((self.measurements.reference,) * len(self.reuses.timesteps), np.zeros(size), 0.0, 0.0)

    def anchors(self, below: int, count: int) -> list[_Run]:
        """The best measured plan of `below` reused steps, and those of more, which are rules, up to a rung's.

        No others: predictions from plans that are worse or further away promise more than they hold, and would be tried first.
        """
        runs = [*self.runs.values(), self.nothing()]
        counts = {run.choices: len(reused_steps(run.choices)) for run in runs}
        best = min((run for run in runs if counts[run.choices] == below), key=lambda run: run.error)
        return [best, *(run for run in runs if below < counts[run.choices] < count)]

    def measure(self, choices: Choices, anchor: _Run | None, rule: str | None = None) -> _Run:
        """Runs a plan; `anchor` is what it was predicted from, None for nothing."""
        anchor = anchor or self.nothing()
        expected = self.vectors([choices], anchor)[0]
        if choices not in self.runs:
            self.measurements.expect_planned([choices], self.samples)
            vectors = vector_of([self.measurements.planned(STAGE, choices, sample) for sample in self.samples])
            error, predicted = (float(errors_of(found[None])[0]) for found in (vectors, expected))
            self.runs[choices] = _Run(choices, vectors, error, predicted, rule)
            self.on_run(len(self.runs), max(self.total, len(self.runs)))
            added = [step for step in reused_steps(choices) if anchor.choices[step] != choices[step]]
            if anchor.error > 0 and len(added) == 1:
                key = _surroundings(choices, added[0])
                self.learned[key] = self.learned.get(key, 0.0) + vectors - expected
        return self.runs[choices]

    def vectors(self, plans: Sequence[Choices], anchor: _Run) -> np.ndarray:
        """Predicted error vectors of plans, float64 [N, S, K], from a measured one."""
        found = self.reuses.predicted([*plans, anchor.choices])
        found = found[:-1] + (anchor.vectors - found[-1])
        for row, plan in enumerate(plans):
            for step in reused_steps(plan):
                if plan[step] != anchor.choices[step]:
                    found[row] += self.learned.get(_surroundings(plan, step), 0.0)
            for step in reused_steps(anchor.choices):
                if order_of(plan[step]) is None:
                    found[row] -= self.learned.get(_surroundings(anchor.choices, step), 0.0)
        return found

    def climb(self, anchors: Sequence[_Run], count: int) -> _Run | None:
        """The best measured plan of so many reused steps, from measured plans of fewer; None if there is none."""
        exact = [run for run in self.runs.values() if len(reused_steps(run.choices)) == count]
        best = min(exact, key=lambda run: run.error, default=None)
        grown = [(self._grown(anchor, count - 1), anchor) for anchor in anchors]
        for _ in range(TRIED):
            options: list[tuple[float, Choices, _Run]] = []
            for start, anchor in grown:
                options += self._valued(list(self._additions(start)), anchor) if start is not None else []
            if best is not None:
                options += self._valued(list(self._exchanges(best)), best)
            options = [option for option in options if option[1] not in self.runs]
            if not options:
                break
            promised, choices, anchor = min(options, key=lambda option: option[0])
            if best is not None and promised > WORTH * best.error:
                break
            run = self.measure(choices, anchor)
            if best is None or run.error < best.error:
                best = run
        return best

    def _valued(self, plans: list[Choices], anchor: _Run) -> list[tuple[float, Choices, _Run]]:
        if not plans:
            return []
        errors = errors_of(self.vectors(plans, anchor)).tolist()
        return [(error, plan, anchor) for error, plan in zip(errors, plans, strict=True)]

    def _grown(self, anchor: _Run, count: int) -> Choices | None:
        """An anchor with additions, each the best by prediction, to so many reused steps; None where there are none left."""
        choices = anchor.choices
        while len(reused_steps(choices)) < count:
            options = self._valued(list(self._additions(choices)), anchor)
            if not options:
                return None
            choices = min(options, key=lambda option: option[0])[1]
        return choices

    def _additions(self, choices: Choices) -> Iterator[Choices]:
        for step, choice in enumerate(choices):
            if order_of(choice) is None:
                yield from self._with(choices, step)

    def _exchanges(self, run: _Run) -> Iterator[Choices]:
        """Plans with another step in place of one of those that are best left out, by prediction."""
        reference = self.measurements.reference
        without = [(*run.choices[:k], reference, *run.choices[k + 1 :]) for k in reused_steps(run.choices)]
        for _, choices, _ in sorted(self._valued(without, run), key=lambda option: option[0])[:LEFT_OUT]:
            yield from (plan for plan in self._additions(choices) if plan != run.choices)

    def _with(self, choices: Choices, step: int) -> Iterator[Choices]:
        for order in self.reuses.orders:
            plan = (*choices[:step], REUSES[order], *choices[step + 1 :])
            if np.isfinite(self.reuses.errors[step, order]) and _valid(self.reuses.timesteps, plan):
                yield plan


def _surroundings(choices: Choices, step: int) -> tuple[int, Choices]:
    return step, choices[max(step - REACH, 0) : step + REACH + 1]


def _valid(timesteps: Sequence[float], choices: Sequence[str]) -> bool:
    try:
        reuse_terms(timesteps, choices)
    except ScheduleError:
        return False
    return True
