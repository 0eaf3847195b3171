"""The section of the report on error against latency: the front, the schedule, rules and uniform precisions."""

from __future__ import annotations

from html import escape
from typing import Any

import numpy as np
from matplotlib.lines import Line2D

from calibration.choose import baselines
from calibration.choose.stored_prediction import StoredPrediction
from calibration.document import Sensitivity
from tmpdiff_export.report.marks import legend, style, validated, whisker
from tmpdiff_export.report.pieces import picture
from tmpdiff_export.report.svg import INK, MUTED, PAPER, floor_of, label_beside, log_axis, places, svg_figure

DRAWS = 20
LOOKS = {
    "first K": ("-", ">"),
    "last K": ("-", "<"),
    "both ends": ("--", "^"),
    "evenly spread": ("--", "v"),
    "random": (":", "."),
}


def latency(found: Sensitivity) -> str:
    """Error against latency, and what the rules would do at every number of steps."""
    where = "validation prompts" if found.validation else "calibration prompts"
    figure = picture(
        trade_off(found),
        "typical error against latency: front, schedule, rules and uniform precisions",
        f"The front and the hollow star are predicted; every other mark is a typical error measured on {where}, the "
        "schedule's with its 95 % interval. Marks on the lower edge have E = 0.",
    )
    return (
        '<p class="lead">Further left is faster, further down is closer to the reference; a good schedule is near the '
        f'lower left.</p><div class="figures">{figure}{_rules(found)}</div>'
    )


def trade_off(found: Sensitivity) -> str:
    """Error over latency: the predicted front, and every schedule where it was measured, each with its name.

    Errors of 0, as the reference has, lie on the lower edge of the logarithmic axis.
    """
    place, marks = places(found.precisions), validated(found)
    measured = [mark.typical.value for mark in marks]
    floor = floor_of([*(point.error for point in found.pareto), *measured, found.predicted_error])
    with svg_figure("pareto", height=max(5.4, 1.9 + 0.22 * len(marks))) as (figure, axes, svg):
        front = [(point.latency, max(point.error, floor)) for point in found.pareto]
        if front:
            axes.plot(*zip(*front, strict=True), color=MUTED, linewidth=1.8, label="front, predicted")
        predicted: dict[str, Any] = {
            "marker": "*",
            "markersize": 15,
            "color": INK,
            "markerfacecolor": PAPER,
            "linestyle": "none",
        }
        axes.plot(found.predicted_latency, max(found.predicted_error, floor), **predicted, zorder=5)
        for mark in marks:
            height = max(mark.typical.value, floor)
            axes.plot(mark.latency, height, linestyle="none", clip_on=False, **style(mark, place))
            if mark.kind == "chosen":  # those of the others, at the same latency, would lie on each other
                whisker(axes, mark, mark.latency, floor, "y")
        if floor:
            log_axis(axes, floor)
        axes.set_xlabel(f"mean step latency / {found.precisions[0]}")
        axes.set_ylabel("E")
        handles = [
            *legend(marks, "schedule", place),
            Line2D([], [], label="schedule, predicted", **predicted),
            Line2D([], [], color=MUTED, linewidth=1.8, label="front, predicted"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=2)
        label_beside(figure, axes, [(mark.latency, max(mark.typical.value, floor), mark.name) for mark in marks])
    return svg[0]


def _rules(found: Sensitivity) -> str:
    precision = ruled_precision(found)
    if precision is None:
        return ""
    return picture(
        rule_curves(found, precision),
        "predicted E of the fixed rules at every K",
        f"The rules with every number K of {escape(found.precisions[0])} steps from 0 to {found.num_steps}, the others "
        f"{escape(precision)}, all predicted (random: mean of {DRAWS} draws). Points with E = 0 are left out.",
    )


def ruled_precision(found: Sensitivity) -> str | None:
    """The low precision that rules are drawn for: of most of the schedule's low steps, or the fastest scored one."""
    scored = StoredPrediction(found).precisions[1:]
    used = [name for name in scored if name in found.schedule]
    if used:
        return max(used, key=found.schedule.count)
    return min(scored, key=found.latencies_ms.__getitem__, default=None)


def rule_points(found: Sensitivity, precision: str) -> dict[str, list[tuple[float, float]]]:
    """(latency, predicted E) of every rule with K = 0..T steps at the reference; random: the mean of its draws."""
    prediction, generator = StoredPrediction(found), np.random.default_rng(0)
    points: dict[str, list[tuple[float, float]]] = {name: [] for name in (*baselines.RULES, "random")}
    for count in range(found.num_steps + 1):
        pool = (found.precisions[0],) * count + (precision,) * (found.num_steps - count)
        schedules = {name: [rule(pool)] for name, rule in baselines.RULES.items()}
        schedules["random"] = [baselines.shuffled(pool, generator) for _ in range(DRAWS)]
        for name, drawn in schedules.items():
            latencies = [prediction.latency(schedule) for schedule in drawn]
            errors = [prediction.error(schedule) for schedule in drawn]
            points[name].append((float(np.mean(latencies)), float(np.mean(errors))))
    return points


def rule_curves(found: Sensitivity, precision: str) -> str:
    """Predicted E over latency: a line per rule, the Pareto front, and the schedule. Errors of 0 are left out."""
    points = rule_points(found, precision)
    front = [(point.latency, point.error) for point in found.pareto if point.error > 0]
    errors = [error for line in points.values() for _, error in line] + [error for _, error in front]
    floor = floor_of(errors)
    with svg_figure("rules", height=5.4) as (figure, axes, svg):
        for name, (line, marker) in LOOKS.items():
            shown = [point for point in points[name] if point[1] > 0]
            if shown:
                axes.plot(
                    *zip(*shown, strict=True), line, marker=marker, color=INK, markerfacecolor=PAPER,
                    markersize=5, linewidth=1, label=name, markevery=max(1, found.num_steps // 12),
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
