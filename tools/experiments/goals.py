"""What the calibrator has to reach, and when a figure says so."""

from __future__ import annotations

from calibration.choose.guard import SIGNIFICANT as SIGNIFICANT
from tools.experiments.statistics import Interval

R2 = 0.98
"""Least R^2 of the Gram matrix on unseen prompts."""

OVER_RULE = 1.02
"""Largest typical error over that of the rule that was best on calibration prompts, in any cell."""

OVER_RULE_MEAN = 0.92
"""The same, as a geometric mean over the cells of a family."""

OVER_MIXED = 0.8
"""Largest typical error over that of uniform precision at the same latency, in any cell."""

MORE_DEPARTURES = 1.1
"""Most departures over those of the best rule, in sum."""

CALLS = 0.6
"""Largest share of the calls that the calibrator took before."""


def at_most(found: Interval, limit: float) -> str:
    """A verdict: "not distinguishable" where the figure is above, and its interval reaches the limit."""
    if found.value <= limit:
        return "met"
    return "not distinguishable" if found.low <= limit else "missed"
