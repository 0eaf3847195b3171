"""Change of the final latent error from single-step downcasts, per precision (figure 1 of the paper).

Measures every step of every sample. A downcast score is the error E of a reference run with one step at the low
precision. With `--upcasts` also by how much E of the uniform low-precision run falls with one step at the reference,
which doubles the calls.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from calibration.measure.metrics import departed, limited, typical_errors
from tools.experiments.command import Analysis, Experiment
from tools.experiments.curves import DIRECTIONS, Direction, curve, mean_scores
from tools.experiments.figures import colour, headline, label, marker, panels
from tools.experiments.statistics import bootstrap_interval, spearman
from tools.experiments.study import Study


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares which directions."""
    parser.add_argument("--upcasts", action="store_true", help="measures upcasts, too")


def measure(study: Study, args: argparse.Namespace) -> dict[str, Any]:
    """What `measure_steps` does, in the directions asked for."""
    return measure_steps(study, DIRECTIONS if args.upcasts else DIRECTIONS[:1])


def measure_steps(study: Study, directions: Sequence[Direction]) -> dict[str, Any]:
    """Per precision "uniform" [S] and every direction [S][T]."""
    data: dict[str, Any] = {}
    for precision in study.precisions:
        data[precision] = {"uniform": study.uniform(precision), **study.scores(precision, directions)}
        study.forget(precision)
    return data


def directions_of(measured: dict[str, Any]) -> list[Direction]:
    """Those that a precision was measured in."""
    return [direction for direction in DIRECTIONS if direction in measured]


def analyse(content: dict[str, Any]) -> Analysis:
    """Mean curves with confidence bands, how far they span, and whether steps add up."""
    findings = {}
    notes = []
    for precision, measured in content["data"].items():
        uniform = np.array(measured["uniform"])
        entry: dict[str, Any] = {}
        sums = {}
        for direction in directions_of(measured):
            scores = np.array(measured[direction])
            bands = [
                bootstrap_interval(
                    lambda rows, column=scores[:, step : step + 1], direction=direction, uniform=uniform: float(
                        mean_scores(direction, column[rows], uniform[rows])[0]
                    ),
                    len(scores),
                )
                for step in range(scores.shape[1])
            ]
            sums[direction] = curve(measured, direction)
            positive = sums[direction][sums[direction] > 0]
            total = bootstrap_interval(
                lambda rows, scores=scores, direction=direction, uniform=uniform: float(
                    mean_scores(direction, scores[rows], uniform[rows]).sum() / typical_errors(uniform[rows])
                ),
                len(scores),
            )
            entry[direction] = {
                "mean": sums[direction].tolist(),
                "low": [band.low for band in bands],
                "high": [band.high for band in bands],
                "decades": float(np.log10(positive.max() / positive.min())) if len(positive) else None,
                "sum_over_uniform": asdict(total),
                "highest_steps": np.argsort(-sums[direction], kind="stable")[:5].tolist(),
            }
        if "upcast" in sums:
            entry["rank_correlation"] = spearman(sums["downcast"], sums["upcast"])
        entry["uniform"] = asdict(
            bootstrap_interval(lambda rows, u=uniform: float(typical_errors(u[rows])), len(uniform))
        )
        findings[precision] = entry
        for sample in np.flatnonzero(departed(uniform)):
            words = f"{precision}: sample {sample} departs, E = {uniform[sample]:.3f} with all steps at {precision}"
            if "upcast" in measured:
                changed = uniform[sample] - np.array(measured["upcast"])[sample]
                undoing = np.flatnonzero(changed <= limited(uniform)[sample]).tolist()
                words += f"; the reference at one of these steps undoes it: {', '.join(map(str, undoing)) or 'none'}"
            notes.append(words)
    return Analysis(findings, (), tuple(notes))


def draw(content: dict[str, Any], findings: dict[str, Any]) -> Figure:
    """A row per direction, a column per precision; means of 0 or less are crosses on the lower edge."""
    directions = directions_of(next(iter(content["data"].values())))
    figure, rows = panels(len(directions), len(findings), width=3.1, height=2.7)
    setting = content["setting"]
    for row, direction in zip(rows, directions, strict=True):
        means = np.array([entry[direction]["mean"] for entry in findings.values()])
        positive = means[means > 0]
        floor, top = (positive.min() / 2, positive.max() * 3) if len(positive) else (1e-12, 1.0)
        for axes, (precision, entry) in zip(row, findings.items(), strict=True):
            mean, low, high = (np.array(entry[direction][name]) for name in ("mean", "low", "high"))
            steps = np.arange(len(mean))
            shade = colour(precision)
            band = np.maximum(low, floor), np.maximum(high, floor)
            axes.fill_between(steps, *band, color=shade, alpha=0.22, linewidth=0)
            axes.plot(steps, np.maximum(mean, floor), color=shade, linewidth=1.2)
            above = mean > 0
            axes.plot(steps[above], mean[above], marker(precision), color=shade, markersize=4)
            axes.plot(steps[~above], np.full((~above).sum(), floor), "x", color=shade, markersize=6)
            axes.set(yscale="log", xlabel="step index", ylim=(floor * 0.8, top))
            if direction == directions[0]:
                axes.set_title(label(precision, setting))
        row[0].set_ylabel(f"{direction} score")
    samples = len(setting["calibration_prompts"])
    headline(
        figure,
        f"Change of E by a single step: {setting['denoiser']}, T = {setting['num_steps']}, mean of {samples} samples, "
        "95 % confidence band, x: zero or less",
    )
    return figure


EXPERIMENT = Experiment("single_steps", __doc__.splitlines()[0], add_arguments, measure, analyse, draw)

if __name__ == "__main__":
    sys.exit(EXPERIMENT.main())
