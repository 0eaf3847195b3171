"""Calibrations and manifests made up without a run, to be shown: documents of any size in no time."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from helpers.made_up_manifest import manifest as manifest
from scipy.stats import beta

from calibration.choose import baselines
from calibration.choose.stored_prediction import StoredPrediction
from calibration.document import Sensitivity
from calibration.records import (
    CalibrationSettings,
    CandidateRecord,
    CorrelationRecord,
    DepartureRecord,
    FitPoint,
    FitRecord,
    GramRecord,
    GuardRecord,
    IntervalRecord,
    ParetoPoint,
    ScoreRecord,
    ValidationRow,
)
from calibration.statistics import ratio_interval, typical_interval

SIZES = {"fp16": 0.0, "fp8": 1e-4, "int8": 4e-4, "int4": 4e-3, "nvfp4": 8e-3}
"""Largest score by precision."""
LATENCIES_MS = {"fp16": 8.0, "fp8": 6.0, "int8": 5.0, "int4": 4.0, "nvfp4": 3.5}
SAMPLES = 24
FRAGILE = (3, 17)
"""Samples that depart where the first step errs much."""

Schedule = tuple[str, ...]


def calibration(
    num_steps: int = 20,
    precisions: Sequence[str] = ("fp16", "int8"),
    *,
    samples: int = SAMPLES,
    method: str = "bisection",
    chosen: Schedule | None = None,
    **changes: Any,
) -> Sensitivity:
    """A calibration that hangs together: scores, Gram matrix, front, guard, and validation with departures.

    Args:
        num_steps: T.
        precisions: of `SIZES`, the reference first.
        samples: calibration and validation samples each.
        method: "sweep" measures every step.
        chosen: the schedule; by default low precisions in turn, but for the first step and the last two.
        changes: fields that differ.
    """
    reference, *low = precisions
    measured = _measured(num_steps, low, method) if low else {"gram": None, "scores": ()}
    found = Sensitivity.model_validate(_base(num_steps, tuple(precisions)) | {"method": method} | measured)
    if chosen is None:
        inner = range(1, num_steps - 2) if low else ()
        chosen = tuple(low[k % len(low)] if k in inner else reference for k in range(num_steps))
    return found.model_copy(update=_Maker(found, samples).concluded(chosen) | {"num_samples": samples} | changes)


def typical(errors: Sequence[float]) -> IntervalRecord:
    """Typical error and its interval."""
    return typical_interval(np.array(errors))


def departures(errors: Sequence[float]) -> DepartureRecord:
    """Departures and the interval of their share."""
    values = np.array(errors)
    count, total = int(((values > 0.05) & (values > 10 * np.median(values))).sum()), len(values)
    low = beta.ppf(0.025, count, total - count + 1) if count else 0.0
    high = beta.ppf(0.975, count + 1, total - count) if count < total else 1.0
    return DepartureRecord(count=count, samples=total, low=low, high=high)


class _Maker:
    """Runs of schedules as a calibration predicts them, with noise; some samples depart at low first steps."""

    def __init__(self, found: Sensitivity, count: int) -> None:
        self.found = found
        self.prediction = StoredPrediction(found)
        self.count = count
        self.samples = np.random.default_rng(1).lognormal(0.0, 0.5, count)

    def errors(self, schedule: Schedule) -> tuple[float, ...]:
        noise = np.random.default_rng(zlib.crc32(" ".join(schedule).encode())).lognormal(0.0, 0.1, self.count)
        values = self.prediction.error(schedule) * self.samples * noise
        if schedule[0] not in ("fp16", "fp8") and values.any() and self.count > max(FRAGILE):
            values[list(FRAGILE)] = 0.4, 0.2
        return tuple(values.tolist())

    def concluded(self, chosen: Schedule) -> dict[str, Any]:
        found, prediction = self.found, self.prediction
        reference, *low = found.precisions
        uniform = {name: self.errors((name,) * found.num_steps) for name in found.precisions}
        front = [
            (name,) * (found.num_steps - count) + (reference,) * count
            for name in reversed(low)
            for count in range(found.num_steps + (name == low[0]))
        ]
        points = [
            ParetoPoint(precisions=s, latency=prediction.latency(s), error=prediction.error(s))
            for s in dict.fromkeys(front)
        ]
        kept: list[ParetoPoint] = []
        for point in sorted(points, key=lambda point: point.latency):
            if not kept or (point.error < kept[-1].error and point.latency > kept[-1].latency):
                kept.append(point)
        return {
            "uniform": {name: typical(errors) for name, errors in uniform.items()},
            "uniform_departures": {name: departures(errors) for name, errors in uniform.items()},
            "schedule": chosen,
            "predicted_error": prediction.error(chosen),
            "predicted_latency": prediction.latency(chosen),
            "pareto": tuple(kept),
            "fit": self._fits() if low else (),
            "fit_points": self._points() if low else (),
            "guard": self._guard(chosen) if low else None,
            "validation": self._rows(chosen),
        }

    def _points(self) -> tuple[FitPoint, ...]:
        generator = np.random.default_rng(2)
        points = []
        for _ in range(8):
            schedule = tuple(
                self.found.precisions[k]
                for k in generator.integers(len(self.found.precisions), size=self.found.num_steps)
            )
            error = self.prediction.error(schedule)
            predicted = {"gram": error, "downcast sum": 0.6 * error * generator.lognormal(0, 0.3)}
            points.append(
                FitPoint(precisions=schedule, measured=error * generator.lognormal(0, 0.05), predicted=predicted)
            )
        return tuple(points)

    def _fits(self) -> tuple[FitRecord, ...]:
        return (
            FitRecord(predictor="gram", r2=0.991, spearman=0.976, ratio=1.03, scatter=0.05),
            FitRecord(predictor="downcast sum", r2=0.84, spearman=0.881, ratio=0.61, scatter=0.33),
        )

    def _guard(self, chosen: Schedule) -> GuardRecord:
        rules = self._rules(chosen)
        names: dict[Schedule, list[str]] = {chosen: ["gram", "downcast sum"]}
        for name, schedule in rules.items():
            names.setdefault(schedule, []).append(name)
        for held in range(1, min(4, len(chosen))):
            moved = (chosen[0],) * held + chosen[held:]
            names.setdefault(moved, []).append(f"gram, first {held} held")
        trials = []
        for index, (schedule, why) in enumerate(names.items()):
            leading = self.count if index < 3 else -(-self.count // 2)
            fragile = [] if index < 3 else [sample for sample in FRAGILE if leading <= sample < self.count]
            samples = (*range(leading), *fragile)
            own = self.errors(schedule)
            errors = tuple(own[sample] for sample in samples)
            trials.append(
                CandidateRecord(
                    names=tuple(why), rule=next((name for name in why if name in rules), None), leading=leading,
                    precisions=schedule, latency=self.prediction.latency(schedule),
                    predicted_error=self.prediction.error(schedule), samples=samples, errors=errors,
                    typical=typical(errors[:leading]), expected=typical(errors[:leading]).value,
                    departures=departures(errors), calls=len(errors) * len(schedule),
                )
            )  # fmt: skip
        best = self._best(rules)
        rounds = ((-(-self.count // 2), len(trials)), (self.count, min(3, len(trials))))
        return GuardRecord(
            candidates=tuple(trials), rounds=rounds, best_rule=best,
            fragile=tuple(sample for sample in FRAGILE if sample < self.count),
            calls={chosen[-1]: sum(trial.calls for trial in trials)},
        )  # fmt: skip

    def _rules(self, chosen: Schedule) -> dict[str, Schedule]:
        return baselines.fixed_rules(chosen, self.found.precisions)

    def _best(self, rules: Mapping[str, Schedule]) -> str | None:
        return min(rules, key=lambda name: self.prediction.error(rules[name]), default=None)

    def _rows(self, chosen: Schedule) -> tuple[ValidationRow, ...]:
        found = self.found
        rules = self._rules(chosen)
        best = self._best(rules)
        count = chosen.count(found.precisions[0])
        generator = np.random.default_rng(0)
        draws = tuple(baselines.shuffled(chosen, generator) for _ in range(3))
        uniforms = {f"uniform {name}": ((name,) * found.num_steps,) for name in found.precisions}
        named: dict[str, tuple[Schedule, ...]] = {
            "schedule": (chosen,),
            **({f"best rule: {best}": (rules[best],)} if best else {}),
            **uniforms,
            **{name: (schedule,) for name, schedule in rules.items()},
            f"random {count}": draws,
            "uniform, mixed": (
                uniforms[f"uniform {found.precisions[0]}"][0],
                uniforms[f"uniform {found.precisions[-1]}"][0],
            ),
        }
        own = np.array(self.errors(chosen))
        return tuple(self._row(name, schedules, own) for name, schedules in named.items())

    def _row(self, name: str, schedules: tuple[Schedule, ...], own: np.ndarray) -> ValidationRow:
        runs = np.array([self.errors(schedule) for schedule in schedules])
        errors = runs.mean(axis=0)
        return ValidationRow(
            name=name,
            schedules=schedules,
            counts=dict(Counter(schedules[0])),
            latency=float(np.mean([self.prediction.latency(schedule) for schedule in schedules])),
            typical=typical(errors.tolist()),
            departures=None if name == "uniform, mixed" else departures(runs.reshape(-1).tolist()),
            against=None if name == "schedule" else ratio_interval(own, errors[None]),
            error=float(errors.mean()),
            sample_errors=tuple(errors.tolist()),
            ssim=1 - float(errors.mean()),
            psnr_db=float(-10 * np.log10(errors.mean())) if errors.any() else None,
        )


def _measured(num_steps: int, low: Sequence[str], method: str) -> dict[str, Any]:
    """Scores, U-shaped, measured at every other step; neighbours' errors alike, far ones a little opposed."""
    steps = np.arange(num_steps)
    shape = np.exp(2.5 * (np.linspace(-0.8, 1.0, num_steps) ** 2 - 1))
    every = sorted({*steps[:: 1 if method == "sweep" else max(2, num_steps // 12)].tolist(), num_steps - 1})
    apart = np.abs(np.subtract.outer(every, every)) / num_steps
    values = np.round(np.exp(-8 * apart) - 0.5 * apart * np.exp(-apart), 4)
    scores = tuple(
        ScoreRecord(
            precision=name,
            scores=tuple((SIZES[name] * shape).tolist()),
            measured=tuple(bool(step in every) for step in range(num_steps)),
            order=tuple(every),
            settled=True,
            calls={"fp16": 40 * num_steps, name: 8 * len(every)},
            sweep_calls=SAMPLES * num_steps * (num_steps + 1) // 2,
        )
        for name in low
    )
    pairs = [(a, b) for k, a in enumerate(low) for b in low[k:]]
    records = tuple(
        CorrelationRecord(first=a, second=b, values=tuple(map(tuple, (values if a == b else 0.4 * values).tolist())))
        for a, b in pairs
    )
    positions = {name: tuple(map(float, every)) for name in low}
    return {
        "scores": scores,
        "gram": GramRecord(positions=positions, correlations=records, floor=(1e-7,) * (num_steps - 1) + (0.0,)),
    }


def _base(num_steps: int, precisions: Schedule) -> dict[str, Any]:
    exact = IntervalRecord(value=0.0, low=0.0, high=0.0)
    return {
        "evaluator_key": "e" * 64,
        "validation_key": "f" * 64,
        "method": "bisection",
        "num_steps": num_steps,
        "num_samples": SAMPLES,
        "precisions": precisions,
        "latencies_ms": {name: LATENCIES_MS[name] for name in precisions},
        "uniform": dict.fromkeys(precisions, exact),
        "uniform_departures": dict.fromkeys(precisions, departures((0.0,) * SAMPLES)),
        "dropped": (),
        "calls": {"uniform": dict.fromkeys(precisions, num_steps * SAMPLES), "downcasts": {precisions[0]: 812}},
        "search_calls": 2345,
        "sweep_calls": 9876,
        "predictor": "gram",
        "fit": (),
        "fit_points": (),
        "budget": "latency at most 0.7 of fp16",
        "schedule": precisions[:1] * num_steps,
        "predicted_error": 0.0,
        "predicted_latency": 1.0,
        "pareto": (),
        "guard": None,
        "validation": (),
        "settings": CalibrationSettings(
            bundle_id="a" * 64, machine="a CPU of two cores", guidance_scale=4.5, seed=0,
            calibration_prompts=("a",), validation_prompts=("b",),
        ),
    }  # fmt: skip
