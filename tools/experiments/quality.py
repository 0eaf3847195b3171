"""Quality against latency on prompts never seen: our schedule beside the baselines (figure 4 of the paper).

At every K the calibration's schedule (what full score curves and the risk of departures choose, after the local search
that `calibrate` makes on the calibration samples), that schedule before the search ("scores alone"), the fixed rules and
random schedules have K steps at the reference, so that their latency is the same; uniform precisions are baselines
where they are no slower.
Differences are paired: all run on the same samples. Goal, for K from T/5 to 4T/5: E and 1 - SSIM at least 20 % below the
best baseline, and never above any; also for E in which no sample counts for more than ten medians ("limited E"). Where a
95 % confidence interval does not settle it, the result is "not distinguishable".

With `--lpips FILE` LPIPS is measured like 1 - SSIM; its network comes from `tools.experiments.fetch_lpips`.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from calibration.choose.baselines import RULES
from calibration.measure.metrics import limited, psnr_db
from calibration.statistics import bootstrap_interval
from tools.experiments.additivity import random_schedules
from tools.experiments.command import Analysis, Experiment, Goal
from tools.experiments.figures import label
from tools.experiments.prediction import SampleScores, better, fit_predictors
from tools.experiments.quality_figure import OURS, RANDOM_NAME, draw
from tools.experiments.schedules import (
    counts_between,
    fixed_rules,
    pattern_of,
    precisions_of,
    random_patterns,
)
from tools.experiments.search import search
from tools.experiments.study import Study

BY_SCORES = "scores alone"
BELOW = 0.2
METRICS = {"error": "E", "limited": "limited E", "dissimilarity": "1 - SSIM", "lpips": "LPIPS"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares which schedules."""
    parser.add_argument("--every", type=int, default=2, metavar="N", help="every Nth K from T/5 to 4T/5 (default 2)")
    parser.add_argument("--draws", type=int, default=3, metavar="N", help="random schedules per K (default 3)")


def measure(study: Study, args: argparse.Namespace) -> dict[str, Any]:
    """Latencies, and per precision the predictor chosen and every row's values by schedule and unseen sample."""
    data: dict[str, Any] = {"latencies_ms": study.latencies_ms(), "uniform": {}, "precisions": {}}
    for precision in study.runtime.precisions:
        runs = study.validation_errors("uniform runs", [(precision,) * study.num_steps], pictures=True)
        data["uniform"][precision] = _columns(runs)
    for precision in study.precisions:
        predictor, patterns = _choose(study, precision, args)
        rows = {}
        for count in counts_between(study.num_steps, args.every):
            named = {
                **{name: [patterns_at[count]] for name, patterns_at in patterns.items()},
                **{name: [pattern] for name, pattern in fixed_rules(study.num_steps, count).items()},
                RANDOM_NAME: list(random_patterns(study.num_steps, count, args.draws)),
            }
            rows[str(count)] = {name: _row(study, precision, row_patterns) for name, row_patterns in named.items()}
        data["precisions"][precision] = {"predictor": predictor, "rows": rows}
        study.forget(precision)
    return data


def _choose(study: Study, precision: str, args: argparse.Namespace) -> tuple[str, dict[str, dict[int, str]]]:
    """The predictor that fits random schedules best on the calibration samples, and its schedule at every K.

    Unseen samples have no part in it. The local search may spend a sweep's calls at every K.
    """
    scores = SampleScores.of({"uniform": study.uniform(precision), **study.scores(precision)})
    drawn = random_schedules(study.num_steps, args.every, args.draws)
    schedules = [precisions_of(pattern, study.reference, precision) for pattern in drawn]
    measured = np.array(study.calibration_errors("random schedules", schedules))
    predictor = better(fit_predictors(scores, drawn, measured, held_out=False)).predictor
    chosen: dict[str, dict[int, str]] = {OURS: {}, BY_SCORES: {}}
    for count in counts_between(study.num_steps, args.every):
        on_run = partial(study.report, f"local search {precision}, K = {count}")
        start, best, _ = search(study.calibration, scores, predictor, precision, count, on_run)
        chosen[OURS][count] = pattern_of(best.precisions, study.reference)
        chosen[BY_SCORES][count] = pattern_of(start.precisions, study.reference)
    return predictor, chosen


def _row(study: Study, precision: str, patterns: list[str]) -> dict[str, Any]:
    schedules = [precisions_of(pattern, study.reference, precision) for pattern in patterns]
    return {"patterns": patterns, **_columns(study.validation_errors("schedules", schedules, pictures=True))}


def _columns(runs: list[list[dict[str, float]]]) -> dict[str, list[list[float]]]:
    """ "error", "ssim", "mse" and, if measured, "lpips" by schedule and sample."""
    return {key: [[values[key] for values in rows] for rows in runs] for key in runs[0][0]}


def analyse(content: dict[str, Any]) -> Analysis:
    """Per precision and K every row's means, our ratios to every baseline, and the goals."""
    setting, data = content["setting"], content["data"]
    latencies, reference = data["latencies_ms"], setting["reference"]
    findings: dict[str, Any] = {}
    goals, notes = [], []
    samples = len(setting["validation_prompts"])
    for precision, measured in data["precisions"].items():
        ratio = latencies[precision] / latencies[reference]
        metrics = _metrics(measured)
        findings[precision] = {"faster": ratio < 1, "counts": {}}
        for count, rows in measured["rows"].items():
            share = int(count) / setting["num_steps"]
            latency = share + (1 - share) * ratio
            baselines = {name: row for name, row in rows.items() if name in (*RULES, RANDOM_NAME)}
            for name, row in data["uniform"].items():
                # without a speed-up there is no latency to be equal in: then only the precision itself is compared
                if name == precision or (ratio < 1 and latencies[name] / latencies[reference] <= latency):
                    baselines[f"uniform {name}"] = row
            departed = {name: _departed(row) for name, row in (rows | baselines).items()}
            notes.append(
                f"{label(precision, setting['backend'])}, K = {count}: departures, of {samples} samples: "
                + (", ".join(f"{name} {number:g}" for name, number in departed.items() if number) or "none")
            )
            entry = {
                "latency": latency,
                "departed": departed,
                "means": {name: _means(row) for name, row in (rows | baselines).items()},
                "against": {metric: _against(rows[OURS], baselines, metric) for metric in metrics},
                "search": {metric: _against(rows[OURS], {BY_SCORES: rows[BY_SCORES]}, metric) for metric in metrics},
            }
            findings[precision]["counts"][count] = entry
            search = {metric: found[BY_SCORES]["value"] for metric, found in entry["search"].items() if found}
            notes.append(
                f"{label(precision, setting['backend'])}, K = {count}: the search's schedule over that of scores alone: "
                + ", ".join(f"{metrics[metric]} x {value:.2f}" for metric, value in search.items())
            )
            for metric, symbol in metrics.items():
                goals += _goals(
                    f"{label(precision, setting['backend'])}, K = {count}, {symbol}", entry["against"][metric]
                )
    return Analysis(findings, tuple(goals), tuple(notes))


def _departed(row: dict[str, Any]) -> float:
    """Samples beyond what a limited mean counts (`calibration.measure.metrics.limited`); the mean over schedules."""
    error = np.array(row["error"])
    return float(np.mean([(errors > limited(errors)).sum() for errors in error]))


def _metrics(measured: dict[str, Any]) -> dict[str, str]:
    """Those of `METRICS` that were measured."""
    row = next(iter(measured["rows"].values()))[OURS]
    return {name: symbol for name, symbol in METRICS.items() if name != "lpips" or name in row}


def _values(row: dict[str, Any], metric: str) -> np.ndarray:
    """Of every sample, float64 [S]; the mean over schedules where a row has several."""
    key = "lpips" if metric == "lpips" else "error"
    values = 1 - np.array(row["ssim"]) if metric == "dissimilarity" else np.array(row[key])
    means = np.asarray(values.mean(axis=0))
    return limited(means) if metric == "limited" else means


def _means(row: dict[str, Any]) -> dict[str, Any]:
    error = np.array(row["error"])
    spread = float(error.mean(axis=1).std(ddof=1)) if len(error) > 1 else None
    interval = bootstrap_interval(lambda rows: float(error[:, rows].mean()), error.shape[1])
    kept = _values(row, "limited")
    return {
        "error": asdict(interval),
        "limited": asdict(bootstrap_interval(lambda rows: float(kept[rows].mean()), len(kept))),
        "error_spread": spread,
        "ssim": float(np.mean(row["ssim"])),
        "psnr_db": psnr_db([value for values in row["mse"] for value in values]),
        **({"lpips": float(np.mean(row["lpips"]))} if "lpips" in row else {}),
    }


def _against(ours: dict[str, Any], baselines: dict[str, Any], metric: str) -> dict[str, Any]:
    """Mean of ours over mean of each baseline, paired by sample."""
    own = _values(ours, metric)
    ratios = {}
    for name, row in baselines.items():
        others = _values(row, metric)
        if ours.get("patterns") == row.get("patterns"):
            ratios[name] = {"value": 1.0, "low": 1.0, "high": 1.0}
        elif others.mean() > 0:
            ratios[name] = asdict(
                bootstrap_interval(lambda rows, o=others: float(own[rows].mean() / o[rows].mean()), len(own))
            )
    return ratios


def _goals(subject: str, ratios: dict[str, dict[str, float]]) -> list[Goal]:
    """Two goals: below the best baseline by a fifth, and above none."""
    if not ratios:
        return []
    best = max(ratios, key=lambda name: ratios[name]["value"])
    ratio = ratios[best]
    unsettled = "not distinguishable" if ratio["low"] <= 1 - BELOW else "missed"
    below = "met" if ratio["value"] <= 1 - BELOW else unsettled
    above = [name for name, found in ratios.items() if found["value"] > 1]
    surely = [name for name in above if ratios[name]["low"] > 1]
    return [
        Goal(
            subject,
            f">= {BELOW:.0%} below the best baseline",
            f"{1 - ratio['value']:+.0%} [{1 - ratio['high']:+.0%}, {1 - ratio['low']:+.0%}] below {best}",
            below,
        ),
        Goal(
            subject,
            "above no baseline",
            ", ".join(f"above {name} by {_excess(ratios[name])}" for name in surely or above) or "above none",
            "missed" if surely else "not distinguishable" if above else "met",
        ),
    ]


def _excess(ratio: dict[str, float]) -> str:
    return f"{ratio['value'] - 1:+.0%} [{ratio['low'] - 1:+.0%}, {ratio['high'] - 1:+.0%}]"


EXPERIMENT = Experiment("quality", __doc__.splitlines()[0], add_arguments, measure, analyse, draw, version=2)

if __name__ == "__main__":
    sys.exit(EXPERIMENT.main())
