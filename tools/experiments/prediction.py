"""Measured error of random schedules on unseen prompts against what downcasts predict (figures 2 and 5 of the paper).

Downcasts of the calibration prompts, of the steps that `calibrate` would measure, make the Gram matrix and the downcast
sum. Random schedules at every K asked for run on prompts that calibration does not use. Goal: R^2 of the Gram matrix of
at least 0.98 for every precision. Beside it: what fewer calibration prompts predict, and the Gram matrix that keeps the
floor of the reference's own rounding.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from calibration.measure.measurements import Measurements
from calibration.measure.metrics import typical_errors
from calibration.scores.gram import Gram, gram
from calibration.scores.measured_gram import MeasuredGram, measured_gram
from calibration.scores.single_step import Downcasts, measure_downcasts
from tools.experiments.command import Analysis, Experiment, Goal, verdict
from tools.experiments.figures import INK, headline, label, panels
from tools.experiments.goals import R2
from tools.experiments.schedules import HIGH, counts_between, precisions_of, random_patterns
from tools.experiments.statistics import bootstrap_interval, log_scatter, r_squared, spearman, spearman_within
from tools.experiments.study import Study

FEWER = (8, 24)
"""Calibration prompts, the first ones, that predict as well."""

DRAWN = {"gram": "Gram matrix", "downcast sum": "downcast sum"}
"""Predictors of the figure; by what result files call them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares which schedules."""
    parser.add_argument("--every", type=int, default=2, metavar="N", help="every Nth K from T/5 to 4T/5 (default 2)")
    parser.add_argument("--draws", type=int, default=3, metavar="N", help="random schedules per K (default 3)")


def measure(study: Study, args: argparse.Namespace) -> dict[str, Any]:
    """Per precision the schedules, E of them by unseen sample, and what is predicted of them in every way."""
    data: dict[str, Any] = {}
    patterns = [
        pattern
        for count in counts_between(study.num_steps, args.every)
        for pattern in random_patterns(study.num_steps, count, args.draws)
    ]
    for precision in study.precisions:
        if not study.in_time():
            break
        schedules = [precisions_of(pattern, study.reference, precision) for pattern in patterns]
        curve, found = _measured(study, study.calibration, precision)
        unfloored = gram({precision: curve.search.scores}, found.correlations, 0 * found.floor, study.reference)
        grams = {"gram": found.gram, "downcast sum": found.gram.downcast_sum(), "gram, floor left in": unfloored}
        for count in FEWER:
            if count < study.calibration.num_samples:
                # steps that the search takes with fewer prompts may be others, few of which are measured anew
                grams[f"gram of {count} prompts"] = _measured(study, study.recounted(count), precision)[1].gram
        runs = study.validation_errors("random schedules", schedules, pictures=False)
        data[precision] = {
            "patterns": patterns,
            "validation": [[values["error"] for values in rows] for rows in runs],
            "predicted": {name: _predicted(found, schedules) for name, found in grams.items()},
            "scores": curve.search.scores.tolist(),
            "measured_steps": list(curve.steps),
            "floor": found.floor.tolist(),
        }
        study.forget(precision)
    return data


def _measured(study: Study, measurements: Measurements, precision: str) -> tuple[Downcasts, MeasuredGram]:
    def report(done: int, total: int) -> None:
        study.report(f"downcast {precision}", done, total)

    curve = measure_downcasts(measurements, precision, on_evaluation=report)
    return curve, measured_gram(measurements, [curve])


def _predicted(found: Gram, schedules: list[tuple[str, ...]]) -> list[float]:
    return [found.error(schedule) for schedule in schedules]


def analyse(content: dict[str, Any]) -> Analysis:
    """How well every predictor does; intervals over unseen samples."""
    findings: dict[str, Any] = {}
    goals, notes = [], []
    for precision, measured in content["data"].items():
        name = label(precision, content["setting"])
        fits = {predictor: _fit(measured, predictor) for predictor in measured["predicted"]}
        findings[precision] = fits
        found = fits["gram"]
        goals.append(
            Goal(
                f"{name}, {len(measured['patterns'])} schedules",
                f"R^2 of the Gram >= {R2}",
                _words(found),
                verdict(found["r2"]["value"] >= R2),
            )
        )
        notes += [f"{name}: {predictor}: {_words(fit)}" for predictor, fit in fits.items() if predictor != "gram"]
    return Analysis(findings, tuple(goals), tuple(notes))


def _words(fit: dict[str, Any]) -> str:
    bounds = fit["r2"]
    return (
        f"R^2 {bounds['value']:.3f} [{bounds['low']:.3f}, {bounds['high']:.3f}], rms of log {fit['log_scatter']:.2f}, "
        f"Spearman {fit['spearman']:.2f}, within K {fit['spearman_within']:.2f}, level {fit['ratio']:.2f}"
    )


def _fit(measured: dict[str, Any], predictor: str) -> dict[str, Any]:
    predicted, errors = np.array(measured["predicted"][predictor]), np.array(measured["validation"])
    counts = np.array([pattern.count(HIGH) for pattern in measured["patterns"]])
    typical = typical_errors(errors)
    interval = bootstrap_interval(lambda rows: r_squared(predicted, typical_errors(errors[:, rows])), errors.shape[1])
    return {
        "r2": asdict(interval),
        "log_scatter": log_scatter(predicted, typical),
        "spearman": spearman(predicted, typical),
        "spearman_within": spearman_within(counts, predicted, typical),
        "ratio": float(predicted.sum() / typical.sum()) if typical.sum() > 0 else float("nan"),
    }


def draw(content: dict[str, Any], findings: dict[str, Any]) -> Figure:
    """A row per predictor, a column per precision."""
    figure, rows = panels(len(DRAWN), len(findings), width=3.3, height=2.9)
    setting, mappable = content["setting"], None
    for row, (predictor, words) in zip(rows, DRAWN.items(), strict=True):
        for axes, (precision, fits) in zip(row, findings.items(), strict=True):
            measured = content["data"][precision]
            counts = np.array([pattern.count(HIGH) for pattern in measured["patterns"]])
            predicted, errors = (
                np.array(measured["predicted"][predictor]),
                typical_errors(np.array(measured["validation"])),
            )
            mappable = axes.scatter(
                predicted, errors, c=counts, cmap="viridis", s=26, vmin=counts.min(), vmax=counts.max(), zorder=3
            )
            ends = np.array([min(predicted.min(), errors.min()), max(predicted.max(), errors.max())])
            axes.plot(ends, ends, ":", color=INK, linewidth=1, label="predicted = measured")
            r2 = fits[predictor]["r2"]
            axes.text(
                0.03, 0.97, f"R² {r2['value']:.3f} [{r2['low']:.3f}, {r2['high']:.3f}]",
                transform=axes.transAxes, va="top", fontsize=8,
            )  # fmt: skip
            axes.margins(0.08, 0.16)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter("{x:.2g}")
            axes.set_xlabel(f"predicted by the {words}")
            if row is rows[0]:
                axes.set_title(label(precision, setting))
        row[0].set_ylabel("measured E, unseen prompts")
    if mappable:
        figure.colorbar(mappable, ax=[axes for row in rows for axes in row], label="K", shrink=0.6)
    figure.legend(*rows[0][0].get_legend_handles_labels(), loc="outside lower center")
    headline(
        figure,
        f"Random schedules, {setting['denoiser']}, T = {setting['num_steps']}, typical error of "
        f"{len(setting['validation_prompts'])} unseen samples, predicted from {len(setting['calibration_prompts'])}",
    )
    return figure


EXPERIMENT = Experiment("prediction", __doc__.splitlines()[0], add_arguments, measure, analyse, draw)

if __name__ == "__main__":
    sys.exit(EXPERIMENT.main())
