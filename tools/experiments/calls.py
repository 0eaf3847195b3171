"""What a calibration for one budget costs in denoiser calls, and what it cost before.

Uniform runs and validation are in neither: both calibrators take the same ones.
"""

from __future__ import annotations

from itertools import takewhile

from calibration.choose.fit import random_schedules
from calibration.measure.measurements import Measurements

UNIFORM_RUNS = "uniform runs"


def spent(measurements: Measurements) -> dict[str, int]:
    """Denoiser calls by stage of all that was asked of `measurements`, without uniform runs."""
    named = {stage.removeprefix(f"{measurements.name}: "): calls for stage, calls in measurements.calls.items()}
    return {stage: sum(calls.values()) for stage, calls in named.items() if stage != UNIFORM_RUNS}


def earlier_calls(downcasts: int, pair: tuple[str, str], num_steps: int, validation_samples: int) -> dict[str, int]:
    """What the calibrator of version 1 took for a budget, by stage; computed by its rules, not measured.

    - It measured upcasts as well, by the same search: as many evaluations are assumed, at the same steps, which cost the
      same.
    - Its predictor was chosen by the same eight random schedules, on all validation prompts.
    - Its races and its local search could spend as many calls as the scores had taken; all of them are counted.

    Args:
        downcasts: calls that the downcasts took.
        pair: the reference and the low precision.
        num_steps: T.
        validation_samples: how many there are.
    """
    schedules = random_schedules(pair, num_steps)
    runs = sum(num_steps - sum(1 for _ in takewhile(lambda name, s=s: name == s[0], s)) for s in schedules)  # type: ignore[misc]
    scores = 2 * downcasts
    return {"scores": scores, "fit": validation_samples * runs, "race": scores}
