"""Rank deviation of the bisection against the steps it samples, beside even sampling and the full sweep (figure 3).

Measures downcasts of every step of every sample, as `single_steps` does, and replays the searches on the mean curves. Goal: with
its own number of evaluations the bisection spends at most half the denoiser calls of the sweep, with a mean rank
deviation of at most one step and an error regret of at most 2 %.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from calibration.scores.bisection import default_evaluations
from calibration.scores.single_step import sweep_calls
from tools.experiments import single_steps
from tools.experiments.command import Analysis, Experiment, Goal, verdict
from tools.experiments.curves import curve
from tools.experiments.figures import INK, RANDOM, colour, headline, label, panels
from tools.experiments.replay import METHODS, Method
from tools.experiments.schedules import counts_between
from tools.experiments.statistics import (
    Interval,
    bootstrap_interval,
    error_regret,
    error_regret_at,
    log_scatter,
    rank_deviation,
    rank_deviation_at,
)
from tools.experiments.study import Study

CALLS_SHARE, DEVIATION, REGRET = 0.5, 1.0, 0.02
FEWEST = 3
DRAWS = 200
STYLES = ("-o", "--s")


def analyse(content: dict[str, Any]) -> Analysis:
    """What every method finds with every number of evaluations, and the goals at the calibrator's own."""
    findings: dict[str, Any] = {}
    goals = []
    setting = content["setting"]
    for precision, measured in content["data"].items():
        found_by = {name: _at_default(measured, method) for name, method in METHODS.items()}
        truth = curve(measured, "downcast")
        findings[precision] = {
            "methods": {name: _points(truth, method) for name, method in METHODS.items()},
            "at_default": found_by,
            "split_halves": _split_halves(measured),
        }
        found = found_by["bisection"]
        deviation, regret = Interval(**found["deviation"]), Interval(**found["regret"])
        goals.append(
            Goal(
                label(precision, setting),
                f"calls <= {CALLS_SHARE:.0%}, deviation <= {DEVIATION:g}, regret <= {REGRET:.0%}",
                f"calls {found['calls_share']:.0%}, deviation {deviation.value:.2f} "
                f"[{deviation.low:.2f}, {deviation.high:.2f}], regret {regret.value:.1%} "
                f"[{regret.low:.1%}, {regret.high:.1%}] ({found['regret_in_range']['value']:.1%} from T/5 to 4T/5)",
                verdict(
                    found["calls_share"] <= CALLS_SHARE and deviation.value <= DEVIATION and regret.value <= REGRET
                ),
            )
        )
    return Analysis(findings, tuple(goals))


def _points(truth: np.ndarray, method: Method) -> list[dict[str, Any]]:
    """One entry per number of steps sampled; the sweep is the last one."""
    num_steps = len(truth)
    points: dict[int, dict[str, Any]] = {}
    for evaluations in range(min(FEWEST, num_steps), num_steps + 1):
        found = method(truth, evaluations)
        per_count = rank_deviation_at(truth, found.scores)
        points[found.evaluations] = {
            "evaluations": found.evaluations,
            "calls_share": found.calls / sweep_calls(num_steps, 1),
            "deviation": rank_deviation(truth, found.scores),
            "deviation_over_counts": [float(per_count.min()), float(per_count.max())],
            "regret": error_regret(truth, found.scores),
            "regret_in_range": regret_in_range(truth, found.scores),
        }
    return [points[count] for count in sorted(points)]


def _at_default(measured: dict[str, Any], method: Method) -> dict[str, Any]:
    """Figures with the calibrator's own number of evaluations; the curve is resampled over samples."""
    samples, num_steps = np.array(measured["downcast"]).shape

    def figure_of(of: Any) -> Interval:
        def statistic(rows: np.ndarray) -> float:
            truth = curve(measured, "downcast", rows)
            return float(of(truth, method(truth, default_evaluations(num_steps)).scores))

        return bootstrap_interval(statistic, samples, draws=DRAWS)

    truth = curve(measured, "downcast")
    found = method(truth, default_evaluations(num_steps))
    return {
        "evaluations": found.evaluations,
        "calls_share": found.calls / sweep_calls(num_steps, 1),
        "log_scatter": log_scatter(found.scores, truth),
        "deviation": asdict(figure_of(rank_deviation)),
        "deviation_at": rank_deviation_at(truth, found.scores).tolist(),
        "regret": asdict(figure_of(error_regret)),
        "regret_in_range": asdict(figure_of(regret_in_range)),
    }


def regret_in_range(truth: np.ndarray, found: np.ndarray) -> float:
    """Mean error regret over K from T/5 to 4T/5: at the largest K next to nothing is left to compare with."""
    return float(error_regret_at(truth, found)[list(counts_between(len(truth), 1))].mean())


def _split_halves(measured: dict[str, Any]) -> dict[str, float]:
    """A full sweep on one half of the samples, judged by a full sweep on the other; means over random splits.

    What the samples do not settle: where this is large, a search that follows the curve of these samples more closely
    gains nothing on others.
    """
    samples = len(measured["uniform"])
    generator = np.random.default_rng(0)
    half = samples // 2
    pairs = []
    for _ in range(DRAWS):
        order = generator.permutation(samples)
        pairs.append(tuple(curve(measured, "downcast", rows) for rows in (order[half:], order[:half])))
    return {
        "deviation": float(np.mean([rank_deviation(*pair) for pair in pairs])),
        "regret_in_range": float(np.mean([regret_in_range(*pair) for pair in pairs])),
    }


def draw(content: dict[str, Any], findings: dict[str, Any]) -> Figure:
    """A column per precision; rank deviation, error regret and calls against steps sampled."""
    figure, rows = panels(3, len(findings), width=3.3, height=1.9)
    setting = content["setting"]
    default = default_evaluations(setting["num_steps"])
    for column, (precision, found) in enumerate(findings.items()):
        deviation, regret, spent = (row[column] for row in rows)
        for (name, points), shade, style in zip(
            found["methods"].items(), (colour(precision), INK), STYLES, strict=True
        ):
            steps = [point["evaluations"] for point in points]
            line = {"color": shade, "markersize": 3, "linewidth": 1.1, "label": name}
            deviation.plot(steps, [point["deviation"] for point in points], style, **line)
            regret.plot(steps, [100 * point["regret_in_range"] for point in points], style, **line)
            spent.plot(steps, [100 * point["calls_share"] for point in points], style, **line)
            if name == "bisection":
                bounds = np.array([point["deviation_over_counts"] for point in points]).T
                deviation.fill_between(steps, *bounds, color=shade, alpha=0.15, linewidth=0)
        noise = found["split_halves"]
        deviation.axhline(noise["deviation"], color=RANDOM, linestyle=":")
        top = regret.get_ylim()[1]
        regret.axhline(100 * noise["regret_in_range"], color=RANDOM, linestyle=":")
        regret.set_ylim(top=1.6 * top)  # the dotted line may lie far above what is compared
        for axes, goal in ((deviation, DEVIATION), (regret, 100 * REGRET), (spent, 100 * CALLS_SHARE)):
            axes.axhline(goal, color=INK, linewidth=0.8, alpha=0.6)
            axes.axvline(default, color=RANDOM, linewidth=0.8, alpha=0.6)
            axes.set_ylim(bottom=0)
        deviation.set_title(label(precision, setting))
        spent.set_xlabel("steps sampled")
    for row, name in zip(rows, ("rank deviation", "regret, %", "calls,\n% of sweep"), strict=True):
        row[0].set_ylabel(name)
    handles, names = rows[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names))
    headline(
        figure,
        f"{setting['denoiser']}, T = {setting['num_steps']}, {len(setting['calibration_prompts'])} samples. Band: over K; "
        "regret: mean over K from T/5 to 4T/5; horizontal line: goal, vertical: the calibrator's own number; dotted, if on the "
        "scale: a full sweep on half of the samples, judged by the other half",
    )
    return figure


def _no_arguments(_: argparse.ArgumentParser) -> None:
    """Nothing beyond what every experiment takes."""


def measure(study: Study, _: argparse.Namespace) -> dict[str, Any]:
    """Downcasts of every step."""
    return single_steps.measure_steps(study, ("downcast",))


EXPERIMENT = Experiment(
    "rank_deviation", __doc__.splitlines()[0], _no_arguments, measure, analyse, draw, same_data="single_steps"
)

if __name__ == "__main__":
    sys.exit(EXPERIMENT.main())
