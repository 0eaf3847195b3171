"""Downcast scores as local error times gain: does the gain need fewer full runs than the score itself?

The local error of a step is what one call at the low precision changes, from the reference run's state; all of them
together cost T denoiser calls. Weighted by how much the sampler table lets that output count in the final latents, it
leaves out only how the denoiser reacts to the error in later steps: the gain, score / weighted local error. If the gain
varies less from step to step than the score, a bisection over it needs fewer runs to the end, and T calls more.

Replays both searches on the mean curves of a full downcast sweep. Goal: for the calls of the plain bisection, local
errors included, the search over the gain has no larger error regret; compared on the same resampled prompts.
"""

from __future__ import annotations

import argparse
import sys
from bisect import bisect_right
from dataclasses import asdict
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from calibration.bisection import FLOOR, default_evaluations
from calibration.metrics import limited
from calibration.scores import sweep_calls
from calibration.statistics import Interval, bootstrap_interval, rank_deviation
from calibration.transfer import carried_weights
from tools.experiments.command import Analysis, Experiment, Goal
from tools.experiments.figures import INK, RANDOM, colour, headline, label, panels
from tools.experiments.rank_deviation import FEWEST, regret_in_range
from tools.experiments.replay import Curve, Found, Method, bisection, gain_bisection
from tools.experiments.study import Study

PLAIN, GAIN = "bisection", "bisection over the gain"
SEARCHES: dict[str, Method] = {PLAIN: bisection, GAIN: gain_bisection}
DRAWS = 200


def measure(study: Study, _: argparse.Namespace) -> dict[str, Any]:
    """Table weights, and per precision "downcast" and "local" [S][T]; local errors are not weighted yet."""
    data: dict[str, Any] = {"weights": carried_weights(study.runtime.table).tolist(), "precisions": {}}
    for precision in study.precisions:
        data["precisions"][precision] = {
            **study.scores(precision, ("downcast",)),
            "local": study.local_errors(precision),
        }
        study.forget(precision)
    return data


def curve_of(measured: dict[str, Any], weights: np.ndarray, rows: np.ndarray | None = None) -> Curve:
    """The mean curves over samples; over repeated ones where `rows` repeats them."""
    scores, local = np.array(measured["downcast"]), np.array(measured["local"])
    rows = np.arange(len(scores)) if rows is None else rows
    return Curve(limited(scores[rows]).mean(axis=0), local[rows].mean(axis=0) * weights**2)


def roughness(values: np.ndarray) -> float:
    """Root mean square of the second differences of the log of float64 [T], T >= 3; floored as in the bisection."""
    logs = np.log(np.maximum(values, FLOOR * values.max()))
    return float(np.sqrt(np.mean(np.diff(logs, 2) ** 2)))


def gain_of(curve: Curve) -> np.ndarray:
    """Score over weighted local error, float64 [T]; both floored as in the bisection."""
    if curve.local is None:
        raise ValueError("this curve has no local errors")
    scores, local = (np.maximum(values, FLOOR * values.max()) for values in (curve.scores, curve.local))
    return np.asarray(scores / local)


def within(curve: Curve, method: Method, calls: int) -> Found | None:
    """What a search finds with as many evaluations as keep it within a number of calls; None if none do."""
    # one more evaluation is one more run: calls rise with evaluations
    allowed = range(min(FEWEST, len(curve.scores)), len(curve.scores) + 1)
    affordable = bisect_right(allowed, calls, key=lambda evaluations: method(curve, evaluations).calls)
    return method(curve, allowed[affordable - 1]) if affordable else None


def analyse(content: dict[str, Any]) -> Analysis:
    """How rough scores and gains are, both searches at every cost, and the comparison at equal cost."""
    setting, data = content["setting"], content["data"]
    weights, num_steps = np.array(data["weights"]), setting["num_steps"]
    findings, goals = {}, []
    for precision, measured in data["precisions"].items():
        curve = curve_of(measured, weights)
        samples = len(measured["downcast"])
        calls = bisection(curve, default_evaluations(num_steps)).calls
        resampled = {
            name: bootstrap_interval(
                lambda rows, measured=measured, of=of: of(curve_of(measured, weights, rows)), samples, draws=DRAWS
            )
            for name, of in (
                ("roughness of the score", lambda resampled: roughness(resampled.scores)),
                ("roughness of the gain", lambda resampled: roughness(gain_of(resampled))),
                ("regret difference", lambda resampled: _difference(resampled, num_steps)),
            )
        }
        at_equal = {name: within(curve, method, calls) for name, method in SEARCHES.items()}
        findings[precision] = {
            "gain": gain_of(curve).tolist(),
            "points": {name: _points(curve, method) for name, method in SEARCHES.items()},
            "calls": calls,
            "at_equal_calls": {name: _figures(curve, found) for name, found in at_equal.items() if found},
            **{name: asdict(interval) for name, interval in resampled.items()},
        }
        goals.append(_goal(precision, findings[precision], resampled["regret difference"], setting))
    return Analysis(findings, tuple(goals))


def _goal(precision: str, found: dict[str, Any], difference: Interval, setting: dict[str, Any]) -> Goal:
    rough = [found[f"roughness of the {name}"]["value"] for name in ("score", "gain")]
    equal = found["at_equal_calls"]
    if GAIN not in equal:
        words, verdict = "local errors alone cost more than the plain bisection", "missed"
    else:
        words = " against ".join(
            f"deviation {equal[name]['deviation']:.2f}, regret {equal[name]['regret']:.1%} ({equal[name]['evaluations']} "
            "runs)"
            for name in (GAIN, PLAIN)
        )
        verdict = "met" if difference.high <= 0 else "missed" if difference.low > 0 else "not distinguishable"
    return Goal(
        label(precision, setting["backend"]),
        f"regret over the gain no larger, in {found['calls']} calls",
        f"{words}; regret differs by {100 * difference.value:+.1f} [{100 * difference.low:+.1f}, "
        f"{100 * difference.high:+.1f}] points; roughness {rough[1]:.2f} against {rough[0]:.2f}",
        verdict,
    )


def _difference(curve: Curve, num_steps: int) -> float:
    """By how much the regret over the gain is larger for the calls of the plain search; NaN where those are too few."""
    plain = bisection(curve, default_evaluations(num_steps))
    other = within(curve, gain_bisection, plain.calls)
    if other is None:
        return float("nan")
    return regret_in_range(curve.scores, other.scores) - regret_in_range(curve.scores, plain.scores)


def _points(curve: Curve, method: Method) -> list[dict[str, Any]]:
    num_steps = len(curve.scores)
    found = [method(curve, evaluations) for evaluations in range(min(FEWEST, num_steps), num_steps + 1)]
    return [_figures(curve, one) for one in {one.evaluations: one for one in found}.values()]


def _figures(curve: Curve, found: Found) -> dict[str, Any]:
    return {
        "evaluations": found.evaluations,
        "calls_share": found.calls / sweep_calls(len(curve.scores), 1),
        "deviation": rank_deviation(curve.scores, found.scores),
        "regret": regret_in_range(curve.scores, found.scores),
    }


def draw(content: dict[str, Any], findings: dict[str, Any]) -> Figure:
    """A column per precision: score, local error and gain; then rank deviation and regret of both searches over calls."""
    figure, rows = panels(3, len(findings), width=3.4, height=2.3)
    setting, data = content["setting"], content["data"]
    for column, (precision, found) in enumerate(findings.items()):
        curve = curve_of(data["precisions"][precision], np.array(data["weights"]))
        shade = colour(precision)
        gain = np.array(found["gain"])
        for values, style, tint, name in (
            (curve.scores, "-o", shade, "score"),
            (curve.scores / gain, "--", shade, "weighted local error"),
            (gain, ":s", INK, "gain"),
        ):
            rows[0][column].plot(values, style, color=tint, markersize=3, linewidth=1.1, label=name)
        rows[0][column].set(yscale="log", xlabel="step index", title=label(precision, setting["backend"]))
        for axes, key, factor in ((rows[1][column], "deviation", 1), (rows[2][column], "regret", 100)):
            for name, points in found["points"].items():
                look, tint = ("--o", INK) if name == GAIN else ("-o", shade)
                shares = [100 * point["calls_share"] for point in points]
                heights = [factor * point[key] for point in points]
                axes.plot(shares, heights, look, color=tint, markersize=3, label=name)
            axes.axvline(100 * found["calls"] / sweep_calls(setting["num_steps"], 1), color=RANDOM, linewidth=0.8)
            axes.set_ylim(bottom=0)
        rows[2][column].set_xlabel("denoiser calls, % of a sweep")
    rows[1][0].set_ylabel("rank deviation")
    rows[2][0].set_ylabel("regret, %")
    rows[0][0].set_ylabel("score, local error, gain")
    rows[0][0].legend(fontsize=8, loc="center left")
    figure.legend(*rows[1][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(SEARCHES))
    headline(
        figure,
        f"{setting['denoiser']}, T = {setting['num_steps']}, {len(setting['calibration_prompts'])} samples; regret: mean\n"
        "over K from T/5 to 4T/5; vertical: the calibrator's own cost",
    )
    return figure


def _no_arguments(_: argparse.ArgumentParser) -> None:
    """Nothing beyond what every experiment takes."""


EXPERIMENT = Experiment("local_gain", __doc__.splitlines()[0], _no_arguments, measure, analyse, draw)

if __name__ == "__main__":
    sys.exit(EXPERIMENT.main())
