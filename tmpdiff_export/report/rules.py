"""The figure of the fixed rules at every K, by what the calibration predicts for them."""

from __future__ import annotations

import numpy as np

from calibration import Sensitivity
from calibration.choose import baselines
from calibration.choose.stored import Prediction
from tmpdiff_export.report.figures import INK, MUTED, PAPER, floor_of, log_axis, svg_figure

DRAWS = 20
LOOKS = {
    "first K": ("-", ">"),
    "last K": ("-", "<"),
    "both ends": ("--", "^"),
    "evenly spread": ("--", "v"),
    "random": (":", "."),
}


def ruled_precision(found: Sensitivity) -> str | None:
    """The low precision that the rules are drawn for: most of the schedule's low steps, or the fastest that is scored."""
    scored = Prediction(found).precisions[1:]
    used = [name for name in scored if name in found.schedule]
    if used:
        return max(used, key=found.schedule.count)
    return min(scored, key=found.latencies_ms.__getitem__, default=None)


def rule_points(found: Sensitivity, precision: str) -> dict[str, list[tuple[float, float]]]:
    """(latency, predicted E) of every rule with K = 0..T steps at the reference; random: the mean of 20 draws."""
    prediction, generator = Prediction(found), np.random.default_rng(0)
    points: dict[str, list[tuple[float, float]]] = {name: [] for name in (*baselines.RULES, "random")}
    for count in range(found.num_steps + 1):
        pool = (found.precisions[0],) * count + (precision,) * (found.num_steps - count)
        schedules = {name: [rule(pool)] for name, rule in baselines.RULES.items()}
        schedules["random"] = [baselines.shuffled(pool, generator) for _ in range(DRAWS)]
        for name, drawn in schedules.items():
            errors = [error for schedule in drawn if (error := prediction.error(schedule)) is not None]
            latencies = [prediction.latency(schedule) for schedule in drawn]
            points[name].append((float(np.mean(latencies)), float(np.mean(errors))))
    return points


def rule_curves(found: Sensitivity, precision: str) -> str:
    """Predicted E over latency: a line per rule, the Pareto front, and the schedule. Errors of 0 are left out."""
    points = rule_points(found, precision)
    front = [(point.latency, point.error) for point in found.pareto if point.error > 0]
    errors = [error for line in points.values() for _, error in line] + [error for _, error in front]
    floor = floor_of(errors)
    with svg_figure("rules", height=4.8) as (figure, axes, svg):
        for name, (line, marker) in LOOKS.items():
            shown = [point for point in points[name] if point[1] > 0]
            if shown:
                axes.plot(
                    *zip(*shown, strict=True), line, marker=marker, color=INK, markerfacecolor=PAPER,
                    markersize=5, linewidth=1, label=name,
                )  # fmt: skip
        if front:
            axes.plot(*zip(*front, strict=True), color=MUTED, linewidth=3, label="front, all precisions")
        if found.predicted_error > 0:
            axes.plot(found.predicted_latency, found.predicted_error, "*", color=INK, markersize=15, label="schedule")
        if floor:
            log_axis(axes, floor)
        axes.set_xlabel(f"mean step latency / {found.precisions[0]}")
        axes.set_ylabel("predicted E")
        figure.legend(loc="outside lower center", ncols=2)
    return svg[0]
