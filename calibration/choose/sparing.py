"""Schedules that spare the first steps, for where samples depart.

Which picture a run draws is decided in its first steps: an error there can make it depart, whatever the steps after it
do. `calibration.scores.divergence` predicts how many samples do, from the spread of single-step scores; a sample that has
departed shows beyond doubt. Where one has, the same budget is allocated again with the first steps held at the reference,
as few of them as it takes (`calibration.choose.race` measures it). Other steps pay: all other samples have somewhat more E,
which is little beside the E of a departure. The search is this project's own; docs/results.md, "Sparing the first steps",
has the evidence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from calibration.choose.allocation import HighSteps, LatencyBudget, allocate
from calibration.choose.costs import LatencyModel
from calibration.scores.predictors import Contributions

SHARES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4)
"""Shares of the loop that are spared, one after the other: steps 0 to 7 of 20 at most."""


def sparing(
    latency_model: LatencyModel, found: Contributions, budget: HighSteps | LatencyBudget
) -> Iterator[tuple[int, tuple[str, ...]]]:
    """The best schedules whose first steps are at the reference, more and more of them while the budget allows it.

    Args:
        latency_model: what schedules are made of.
        found: what schedules are chosen by.
        budget: which all of them meet.

    Yields:
        How many first steps are held, and the schedule.
    """
    num_steps = len(found.values)
    for first in sorted({math.ceil(share * num_steps) for share in SHARES}):
        values = found.values.copy()
        values[:first, 1:] += 1 + 10 * values.sum()  # so that no saving elsewhere makes up for one of these steps
        schedule = allocate(latency_model, replace(found, values=values), budget).precisions
        if set(schedule[:first]) != {latency_model.reference}:
            return
        yield first, schedule
