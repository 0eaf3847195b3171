"""The calibrator's schedule on prompts never seen, beside rules and uniform precision (figure 4 of the paper).

At every K a calibration under the budget "K steps at the reference" runs on the calibration prompts, guard included. Then
its schedule, the rule that was best on the calibration prompts, every rule, random schedules, and the uniform low
precision run on unseen prompts. Latency stands for K: where all have K steps at the reference it is the same, and uniform
pictures are mixed with those of the reference until it is.

Compared is the typical error, in pairs, and departures are counted (`calibration.measure.metrics`). Goals are those of
`tools.experiments.goals`. With `--lpips FILE` LPIPS is measured beside 1 - SSIM; its network comes from
`tools.experiments.fetch_lpips`.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np

from calibration.choose.allocation import HighSteps
from calibration.choose.costs import LatencyModel
from calibration.measure.metrics import psnr_db, typical_errors
from calibration.records import GuardRecord
from calibration.stages import DEFAULT_OPTIONS, Scored, choose, score_steps
from tools.experiments.calls import earlier_calls, spent
from tools.experiments.command import Experiment
from tools.experiments.quality_analysis import analyse
from tools.experiments.quality_figure import draw
from tools.experiments.schedules import LOW, counts_between, fixed_rules, pattern_of, precisions_of, random_patterns
from tools.experiments.study import Study, Values

DIGITS = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares which schedules."""
    parser.add_argument(
        "--every", type=int, metavar="N", help="every Nth K from T/5 to 4T/5 (default T/5: four of them)"
    )
    parser.add_argument("--draws", type=int, default=2, metavar="N", help="random schedules per K (default 2)")


def measure(study: Study, args: argparse.Namespace) -> dict[str, Any]:
    """Per precision what was chosen at every K, and what every schedule gave, by unseen sample."""
    counts = counts_between(study.num_steps, args.every or max(1, study.num_steps // 5))
    data: dict[str, Any] = {}
    for precision in study.precisions:
        if not study.in_time():
            break
        measurements = study.recounted()
        pair = (study.reference, precision)
        # which steps is a matter of predicted error alone; any low precision that is faster will do
        latency_model = LatencyModel(pair, {study.reference: 2.0, precision: 1.0})
        scored = score_steps(measurements, latency_model, DEFAULT_OPTIONS, study.report)
        calls = spent(measurements)
        entry: dict[str, Any] = {
            "counts": list(counts),
            "calls": calls,
            "earlier_calls": earlier_calls(
                calls[f"downcast {precision}"], pair, study.num_steps, study.validation.num_samples
            ),
            "predictor": scored.predictions.predictor,
            "fit": {record.predictor: [record.r2, record.scatter] for record in scored.fits},
            "fragile": len(scored.fragile),
            "runs": _runs(study, precision, [LOW * study.num_steps]),
            "cells": {},
        }
        data[precision] = entry
        for count in counts:
            if not study.in_time():
                break
            cell = _chosen(study, scored, count)
            cell["random"] = list(random_patterns(study.num_steps, count, args.draws))
            patterns = [cell["schedule"], *fixed_rules(study.num_steps, count).values(), *cell["random"]]
            entry["runs"] |= _runs(study, precision, [p for p in dict.fromkeys(patterns) if p not in entry["runs"]])
            entry["cells"][str(count)] = cell
            study.report(f"{precision}, K = {count}", 1, 1)
        study.forget(precision)
    return data


def _chosen(study: Study, scored: Scored, count: int) -> dict[str, Any]:
    """What calibration chooses with K steps at the reference, and how its guard came to it; and typical errors of all
    rules on all calibration samples, which the guard leaves off for most."""
    measurements = study.recounted()
    chosen, _, record = choose(measurements, scored, HighSteps(count), study.report)
    assert record is not None, "the fixed rules are several where 0 < K < T"
    precision = scored.predictions.latency_model.precisions[1]
    rules = fixed_rules(study.num_steps, count)
    schedules = [precisions_of(pattern, study.reference, precision) for pattern in rules.values()]
    errors = typical_errors(np.array(study.calibration_errors("rules", schedules)))
    return {
        "schedule": pattern_of(chosen.precisions, study.reference),
        "rules": dict(zip(rules, errors.tolist(), strict=True)),
        "calls": sum(spent(measurements).values()),
        "rounds": [list(found) for found in record.rounds],
        "candidates": _candidates(record, study.reference),
    }


def _candidates(record: GuardRecord, reference: str) -> list[dict[str, Any]]:
    """The winner first."""
    return [
        {
            "names": " = ".join(trial.names),
            "pattern": pattern_of(trial.precisions, reference),
            "typical": [trial.typical.value, trial.typical.low, trial.typical.high],
            "departures": trial.departures.count,
            "samples": len(trial.samples),
            "calls": trial.calls,
        }
        for trial in record.candidates
    ]


def _runs(study: Study, precision: str, patterns: list[str]) -> dict[str, Any]:
    """By schedule "error", "dissimilarity" (1 - SSIM) and, if measured, "lpips" of every sample, and "psnr_db" of all."""
    schedules = [precisions_of(pattern, study.reference, precision) for pattern in patterns]
    runs = study.validation_errors("schedules", schedules, pictures=True)
    return {pattern: _columns(rows) for pattern, rows in zip(patterns, runs, strict=True)}


def _columns(rows: list[Values]) -> dict[str, Any]:
    distances = [{"dissimilarity": 1 - values["ssim"], **values} for values in rows]
    columns: dict[str, Any] = {
        key: [float(f"{values[key]:.{DIGITS}g}") for values in distances]
        for key in ("error", "dissimilarity", "lpips")
        if key in distances[0]
    }
    return columns | {"psnr_db": psnr_db([values["mse"] for values in rows])}


EXPERIMENT = Experiment("quality", __doc__.splitlines()[0], add_arguments, measure, analyse, draw, version=4)

if __name__ == "__main__":
    sys.exit(EXPERIMENT.main())
