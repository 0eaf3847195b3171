"""What `quality` makes of its measurements: figures of every cell (a precision at a K), and the goals."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from calibration.measure.metrics import departed
from calibration.records import IntervalRecord
from calibration.statistics import departure_record, ratio_interval, sign_test, typical_interval
from tools.experiments import goals
from tools.experiments.command import Analysis, Goal, verdict, wording
from tools.experiments.figures import label
from tools.experiments.schedules import LOW, fixed_rules
from tools.experiments.statistics import Interval, bootstrap_interval

SCHEDULE, RANDOM, MIXED, UNIFORM = "schedule", "random", "uniform, mixed", "uniform"
PICTURES = {"dissimilarity": "1 - SSIM", "lpips": "LPIPS"}
"""How far pictures are from the reference's, by their names in result files."""


def analyse(content: dict[str, Any]) -> Analysis:
    """Figures of every cell, goals of every cell, and those over all."""
    setting = content["setting"]
    precisions: dict[str, Any] = {}
    found_goals: list[Goal] = []
    notes: list[str] = []
    for precision, measured in content["data"].items():
        name = label(precision, setting)
        cells = {count: _cell(measured, int(count)) for count in measured["cells"]}
        precisions[precision] = {"cells": cells, "predictor": measured["predictor"], "fit": measured["fit"]}
        for count, cell in cells.items():
            found_goals += _goals(f"{name}, K = {count}", cell)
            notes.append(f"{name}, K = {count}: {_words(cell, measured['cells'][count])}")
        left = [str(count) for count in measured["counts"] if str(count) not in cells]
        if left:
            notes.append(f"{name}: not measured, as time was up: K = {', '.join(left)}")
    left = [name for name in setting["precisions"] if name not in content["data"]]
    if left:
        notes.append(f"not measured, as time was up: {', '.join(left)}")
    every = [cell for found in precisions.values() for cell in found["cells"].values()]
    findings = {"precisions": precisions, "all": over_all(every)}
    return Analysis(findings, (*found_goals, *_goals_over_all(findings["all"])), tuple(notes))


def over_all(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Of any number of cells: geometric means of ratios, the worst ones, sums of departures, the share of calls."""
    ratios = {
        name: [cell["ratios"][name]["value"] for cell in cells if cell["ratios"].get(name)]
        for name in ("best rule", MIXED)
    }
    verdicts = [cell["verdict"] for cell in cells]
    return {
        "cells": len(cells),
        "over_best_rule": _geometric_mean(ratios["best rule"]),
        "over_best_rule_worst": max(ratios["best rule"], default=None),
        "not_met": {word: verdicts.count(word) for word in ("missed", "not distinguishable")},
        "over_mixed": _geometric_mean(ratios[MIXED]),
        "over_mixed_worst": max(ratios[MIXED], default=None),
        "departures": {name: sum(cell["departures"][name] for cell in cells) for name in (SCHEDULE, "best rule")},
        "significantly_more_departures": sum(cell["departures"]["p"] <= goals.SIGNIFICANT for cell in cells),
        "calls": sum(sum(cell["calls"]["now"].values()) for cell in cells),
        "earlier_calls": sum(sum(cell["calls"]["earlier"].values()) for cell in cells),
        "calls_share_worst": max((cell["calls"]["share"] for cell in cells), default=None),
    }


def _geometric_mean(values: list[float]) -> float | None:
    return float(np.exp(np.mean(np.log(values)))) if values and min(values) > 0 else None


def _cell(measured: dict[str, Any], count: int) -> dict[str, Any]:
    cell, runs = measured["cells"][str(count)], measured["runs"]
    num_steps = len(cell["schedule"])
    uniform = LOW * num_steps
    rules = fixed_rules(num_steps, count)
    patterns = {SCHEDULE: [cell["schedule"]], **{name: [rule] for name, rule in rules.items()}, RANDOM: cell["random"]}
    errors = {name: np.array([runs[pattern]["error"] for pattern in found]) for name, found in patterns.items()}
    # pictures of the reference are exact
    share = np.array([1 - count / num_steps, count / num_steps])
    weights: dict[str, np.ndarray] = {MIXED: share}
    errors[UNIFORM] = np.array([runs[uniform]["error"]])
    errors[MIXED] = np.concatenate([errors[UNIFORM], 0 * errors[UNIFORM]])
    pictures = {key: name for key, name in PICTURES.items() if key in runs[uniform]}
    distances = {
        name: {key: _distances([runs[pattern] for pattern in found], key) for key in pictures}
        for name, found in patterns.items()
    }
    distances[UNIFORM] = {key: _distances([runs[uniform]], key) for key in pictures}
    distances[MIXED] = {key: share[0] * values for key, values in distances[UNIFORM].items()}
    best = min(cell["rules"], key=cell["rules"].__getitem__)
    own = errors[SCHEDULE][0]
    ratios = {
        name: _equal() if found == patterns[SCHEDULE] else _interval(ratio_interval(own, errors[name]))
        for name, found in {"best rule": patterns[best], **patterns}.items()
        if name not in (SCHEDULE, "best rule")
    }
    ratios |= {"best rule": ratios[best], MIXED: _interval(ratio_interval(own, errors[MIXED], share))}
    lost = {name: set(np.flatnonzero(departed(errors[name][0])).tolist()) for name in (SCHEDULE, best)}
    more, fewer = len(lost[SCHEDULE] - lost[best]), len(lost[best] - lost[SCHEDULE])
    guard = cell["calls"]
    now = {"scores": sum(calls for stage, calls in measured["calls"].items() if stage != "fit")}
    now |= {"fit": measured["calls"]["fit"], "guard": guard}
    earlier = measured["earlier_calls"]
    ratio = ratios["best rule"]
    return {
        "best_rule": best,
        "typical": {name: typical_interval(values, weights.get(name)).model_dump() for name, values in errors.items()},
        "ratios": ratios,
        "verdict": goals.at_most(Interval(**ratio), goals.OVER_RULE) if ratio else "met",
        "pictures": {key: {name: float(found[key].mean()) for name, found in distances.items()} for key in pictures},
        "picture_ratios": {
            key: {
                name: _means_ratio(distances[SCHEDULE][key], distances[source][key])
                for name, source in (("best rule", best), (MIXED, MIXED))
            }
            for key in pictures
        },
        "psnr_db": {name: runs[found[0]]["psnr_db"] for name, found in patterns.items() if len(found) == 1},
        "departures": {
            SCHEDULE: len(lost[SCHEDULE]),
            "best rule": len(lost[best]),
            "only_schedule": more,
            "only_best_rule": fewer,
            "p": sign_test(more, fewer),
            "samples": len(own),
            "all": {
                name: departure_record(values).count / len(values) for name, values in errors.items() if name != MIXED
            },
        },
        "calls": {"now": now, "earlier": earlier, "share": sum(now.values()) / sum(earlier.values())},
    }


def _distances(runs: list[dict[str, Any]], key: str) -> np.ndarray:
    """How far pictures are from the reference's, a mean over schedules, float64 [S]."""
    return np.asarray(np.array([run[key] for run in runs]).mean(axis=0))


def _interval(found: IntervalRecord | None) -> dict[str, float] | None:
    return None if found is None else found.model_dump()


def _equal() -> dict[str, float]:
    return {"value": 1.0, "low": 1.0, "high": 1.0}


def _means_ratio(mine: np.ndarray, others: np.ndarray) -> dict[str, float] | None:
    if not others.mean() > 0:
        return None
    return asdict(bootstrap_interval(lambda rows: float(mine[rows].mean() / others[rows].mean()), len(mine)))


def _goals(subject: str, cell: dict[str, Any]) -> list[Goal]:
    found = []
    for name, source, limit in (("best rule", cell["best_rule"], goals.OVER_RULE), (MIXED, MIXED, goals.OVER_MIXED)):
        ratio = cell["ratios"][name]
        if ratio:
            interval = Interval(**ratio)
            target = f"typical error <= {limit} of {source}"
            found.append(Goal(subject, target, wording(interval), goals.at_most(interval, limit)))
    departures, calls = cell["departures"], cell["calls"]
    return [
        *found,
        Goal(
            subject,
            f"departures not significantly more than {cell['best_rule']}'s",
            f"{departures[SCHEDULE]} against {departures['best rule']} of {departures['samples']}, p = {departures['p']:.2f}",
            verdict(departures["p"] > goals.SIGNIFICANT),
        ),
        Goal(
            subject,
            f"denoiser calls <= {goals.CALLS:.0%} of before",
            f"{sum(calls['now'].values())} of {sum(calls['earlier'].values())}, {calls['share']:.0%}",
            verdict(calls["share"] <= goals.CALLS),
        ),
    ]


def _goals_over_all(found: dict[str, Any]) -> list[Goal]:
    mean, departures = found["over_best_rule"], found["departures"]
    if mean is None:
        return []
    return [
        Goal(
            f"all {found['cells']} cells",
            f"typical error <= {goals.OVER_RULE_MEAN} of the best rule's, geometric mean",
            f"{mean:.3f}, worst {found['over_best_rule_worst']:.3f}",
            verdict(mean <= goals.OVER_RULE_MEAN),
        ),
        Goal(
            f"all {found['cells']} cells",
            f"departures in sum <= {goals.MORE_DEPARTURES} of the best rules'",
            f"{departures[SCHEDULE]} against {departures['best rule']}",
            verdict(departures[SCHEDULE] <= goals.MORE_DEPARTURES * departures["best rule"]),
        ),
    ]


def _words(cell: dict[str, Any], measured: dict[str, Any]) -> str:
    """Which candidate won, and how it does against every rule and in pictures."""
    over = [f"{name} {found['value']:.2f}" for name, found in cell["ratios"].items() if found and name != "best rule"]
    pictures = [
        f"{PICTURES[key]} {found['best rule']['value']:.2f}"
        for key, found in cell["picture_ratios"].items()
        if found["best rule"]
    ]
    words = f"{measured['candidates'][0]['names']} won among {len(measured['candidates'])}; typical error over {', '.join(over)}"
    return f"{words}; over {cell['best_rule']}: {', '.join(pictures)}" if pictures else words
