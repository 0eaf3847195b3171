"""Validation: how the chosen schedule compares with rules and uniform precisions on samples calibration has not seen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from calibration.choose import baselines
from calibration.choose.costs import LatencyModel
from calibration.measure.measurements import Measurements
from calibration.measure.metrics import mean, psnr_db, typical_errors
from calibration.records import ValidationRow
from calibration.statistics import departure_record, ratio_interval, typical_interval
from engines.reuse import computed_choices

RANDOM_DRAWS = 3
SEED = 0
STAGE = "schedules"

MIXED = "uniform, mixed"
"""Name of the row whose pictures are shared out among two uniform precisions."""

Schedule = tuple[str, ...]
NOTHING: Mapping[str, Schedule] = {}
OnRun = Callable[[int, int], None]
"""Called after every run of a schedule on a sample with (done, total)."""


@dataclass(frozen=True)
class _Runs:
    """Schedules on S samples: float64 [N, S] each; pictures only where there is a decoder."""

    schedules: tuple[Schedule, ...]
    weights: np.ndarray
    error: np.ndarray
    ssim: np.ndarray | None
    mse: np.ndarray | None

    def over_draws(self, values: np.ndarray) -> list[float]:
        """Mean by sample, over draws or what is mixed."""
        found: list[float] = np.tensordot(self.weights, values, axes=1).tolist()
        return found


def validation_rows(
    measurements: Measurements,
    chosen: Schedule,
    latency_model: LatencyModel,
    best_rule: tuple[str, Schedule] | None = None,
    on_run: OnRun | None = None,
    also: Mapping[str, Schedule] = NOTHING,
) -> tuple[ValidationRow, ...]:
    """Runs the chosen schedule and what it has to compare with on the validation samples, which only judge.

    Args:
        measurements: of the validation samples.
        chosen: the schedule under test.
        latency_model: of all built precisions, in order of precision.
        best_rule: name and schedule of the rule that was best on the calibration samples.
        on_run: see `OnRun`.
        also: further schedules by the name of their row.

    Returns:
        The chosen schedule first, then the best rule, `also`, uniform schedules, those of them that are mixed to the same
        latency, the rules with the same number of steps per precision, and random orders of these. A schedule that
        several names stand for is run once.
    """
    precisions = latency_model.precisions
    computed = computed_choices(chosen)
    pool = sorted(computed, key=list(precisions).index)
    generator = np.random.default_rng(SEED)
    named: dict[str, tuple[Schedule, ...]] = {
        "schedule": (chosen,),
        **({f"best rule: {best_rule[0]}": (best_rule[1],)} if best_rule else {}),
        **{name: (schedule,) for name, schedule in also.items()},
        **{f"uniform {name}": ((name,) * len(chosen),) for name in precisions},
        **{name: (schedule,) for name, schedule in baselines.fixed_rules(chosen, precisions).items()},
    }
    if len(set(computed)) > 1:
        draws = tuple(baselines.arrange(chosen, baselines.shuffled(pool, generator)) for _ in range(RANDOM_DRAWS))
        named[f"random {chosen.count(precisions[0])}"] = draws
    runs = _measured(measurements, named, on_run)
    uniform = {name: runs[f"uniform {name}"] for name in precisions}
    mixed = _mixed(uniform, latency_model, latency_model.latency(chosen))
    ordered = {}
    for name, found in runs.items():
        ordered[name] = found
        if name == f"uniform {precisions[-1]}" and mixed:
            ordered[MIXED] = mixed
    return tuple(_row(name, found, runs["schedule"], latency_model) for name, found in ordered.items())


def _measured(
    measurements: Measurements, named: Mapping[str, tuple[Schedule, ...]], on_run: OnRun | None
) -> dict[str, _Runs]:
    # uniform runs first: the others share their prefixes
    order = sorted(named, key=lambda name: not name.startswith("uniform"))
    total = sum(len(schedules) for schedules in named.values()) * measurements.num_samples
    done = 0
    measurements.expect([schedule for name in order for schedule in named[name]], pictures=True)
    found = {}
    for name in order:
        values: list[list[dict[str, float]]] = []
        for schedule in named[name]:
            values.append([])
            for sample in range(measurements.num_samples):
                values[-1].append(measurements.schedule_error(STAGE, schedule, sample, pictures=True))
                done += 1
                if on_run:
                    on_run(done, total)
        pictures = "ssim" in values[0][0]
        found[name] = _Runs(
            named[name],
            np.full(len(values), 1 / len(values)),
            _column(values, "error"),
            _column(values, "ssim") if pictures else None,
            _column(values, "mse") if pictures else None,
        )
    return {name: found[name] for name in named}


def _column(values: list[list[dict[str, float]]], key: str) -> np.ndarray:
    return np.array([[value[key] for value in row] for row in values])


def _mixed(uniform: Mapping[str, _Runs], latency_model: LatencyModel, latency: float) -> _Runs | None:
    """Pictures shared out among two uniform precisions so that they take `latency` on average, with the least error.

    None where even the fastest precision is slower, or none is.
    """
    points = {name: (latency_model.latency(runs.schedules[0]), runs) for name, runs in uniform.items()}
    best: tuple[float, _Runs] | None = None
    for (fast, quick), (slow, exact) in combinations(sorted(points.values(), key=lambda point: point[0]), 2):
        if not fast <= latency <= slow or fast == slow:
            continue
        share = (slow - latency) / (slow - fast)
        pair = (quick, exact)
        weights = np.array([share, 1 - share])
        level = float(weights @ [typical_errors(runs.error[0]) for runs in pair])
        if best is None or level < best[0]:
            best = (
                level,
                _Runs(
                    quick.schedules + exact.schedules,
                    weights,
                    np.concatenate([quick.error, exact.error]),
                    _joined(quick.ssim, exact.ssim),
                    _joined(quick.mse, exact.mse),
                ),
            )
    return best[1] if best else None


def _joined(first: np.ndarray | None, second: np.ndarray | None) -> np.ndarray | None:
    return None if first is None or second is None else np.concatenate([first, second])


def _row(name: str, runs: _Runs, chosen: _Runs, latency_model: LatencyModel) -> ValidationRow:
    latencies = [latency_model.latency(schedule) for schedule in runs.schedules]
    errors = runs.over_draws(runs.error)
    return ValidationRow(
        name=name,
        schedules=runs.schedules,
        counts=dict(Counter(runs.schedules[0])),
        latency=float(runs.weights @ latencies),
        typical=typical_interval(runs.error, runs.weights),
        departures=None if name == MIXED else departure_record(runs.error),
        against=None if name == "schedule" else ratio_interval(chosen.error[0], runs.error, runs.weights),
        error=mean(errors),
        sample_errors=tuple(errors),
        ssim=None if runs.ssim is None else mean(runs.over_draws(runs.ssim)),
        psnr_db=None if runs.mse is None else psnr_db(runs.over_draws(runs.mse)),
    )
