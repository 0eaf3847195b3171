"""The figures of the report, each from the stored documents to SVG."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator
from scipy.stats import rankdata

from calibration import Sensitivity
from calibration.choose import baselines
from calibration.choose.stored_prediction import StoredPrediction
from calibration.document import ValidationRow
from calibration.scores.bisection import adaptive_bisection
from tmpdiff_export.report.svg import INK, MUTED, PAPER, SHADES, error_tick, floor_of, log_axis, places, svg_figure

MARKERS = "osD^vP"
BASELINE_MARKERS = "v^<>Pd"
DRAWS = 20
LOOKS = {
    "first K": ("-", ">"),
    "last K": ("-", "<"),
    "both ends": ("--", "^"),
    "evenly spread": ("--", "v"),
    "random": (":", "."),
}


def score_curves(found: Sensitivity, direction: str) -> str:
    """Scores over step indices, a curve per precision; filled where measured, hollow where interpolated.

    The axis is logarithmic; scores of 0 or less lie on its lower edge, as crosses. Dotted: risks, where they are large
    enough to show.
    """
    records = [record for record in found.scores if record.direction == direction]
    place = places(found.precisions)
    floor = floor_of([score for record in records for score in record.scores])
    risky = False
    with svg_figure(f"scores-{direction}") as (figure, axes, svg):
        for record in records:
            colour, marker = SHADES[place[record.precision]][0], MARKERS[place[record.precision]]
            steps = np.arange(len(record.scores))
            scores = np.array(record.scores)
            heights = np.maximum(scores, floor) if floor else scores
            axes.plot(steps, heights, color=colour, linewidth=1.4)
            below, measured = (scores <= 0) & (floor > 0), np.array(record.measured)
            for chosen, face in ((measured & ~below, colour), (~measured & ~below, PAPER)):
                axes.plot(
                    steps[chosen], heights[chosen], marker, color=colour, markerfacecolor=face, markersize=6, zorder=3
                )
            if below.any():
                axes.plot(steps[below], heights[below], "x", color=colour, markersize=7, zorder=3, clip_on=False)
            risk = np.array(record.risk)
            if (risk > floor).any():
                axes.plot(steps, np.where(risk > floor, risk, np.nan), ":", color=colour, linewidth=1.6)
                risky = True
        if floor:
            log_axis(axes, floor)
        axes.set_xlabel("step index")
        axes.set_ylabel("score (change of E)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        handles = [
            Line2D([], [], color=SHADES[place[r.precision]][0], marker=MARKERS[place[r.precision]], label=r.precision)
            for r in records
        ]
        handles += [
            Line2D([], [], color=INK, marker="o", linestyle="none", label="measured"),
            Line2D([], [], color=INK, marker="o", linestyle="none", markerfacecolor=PAPER, label="interpolated"),
        ]
        if risky:
            handles.append(Line2D([], [], color=INK, linestyle=":", label="risk of a departure"))
        figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return svg[0]


def fit_scatter(found: Sensitivity) -> str:
    """Predicted against measured E of the random schedules, by the predictor in use; needs a fit point."""
    predicted = np.array([point.predicted[found.predictor] for point in found.fit_points])
    measured = np.array([point.measured for point in found.fit_points])
    with svg_figure("fit") as (figure, axes, svg):
        top = 1.08 * max(predicted.max(), measured.max()) or 1.0
        axes.plot([0, top], [0, top], "--", color=INK, linewidth=1, label="predicted = measured")
        if len(set(predicted)) > 2:
            slope, intercept = np.polyfit(predicted, measured, 1)
            ends = np.array([predicted.min(), predicted.max()])
            axes.plot(ends, slope * ends + intercept, color=INK, linewidth=1.6, label="regression line")
        axes.plot(predicted, measured, "o", color=INK, markersize=7, label="random schedule")
        axes.set(xlim=(0, top), ylim=(0, top), xlabel="predicted E", ylabel="measured E")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(4))
            axis.set_major_formatter(FuncFormatter(error_tick))
        figure.legend(loc="outside lower center", ncols=2)
    return svg[0]


def trade_off(found: Sensitivity) -> str:
    """E against latency: the predicted Pareto front, and every validation row where it was measured.

    Rows with E = 0, as the reference, lie on the lower edge of the logarithmic axis.
    """
    place = places(found.precisions)
    errors = [point.error for point in found.pareto] + [row.error for row in found.validation]
    floor = floor_of([*errors, found.predicted_error])
    with svg_figure("pareto", height=5.2) as (figure, axes, svg):

        def height(error: float) -> float:
            return max(error, floor) if floor else error

        front = [(point.latency, height(point.error)) for point in found.pareto]
        axes.plot(*zip(*front, strict=True), color=MUTED, linewidth=1.8, label="front, predicted")
        others = iter(BASELINE_MARKERS * (1 + len(found.validation)))
        for row in found.validation[::-1]:  # the schedule last, on top
            style = _row_style(row, place, others)
            axes.plot(row.latency, height(row.error), linestyle="none", label=row.name, **style)
            if row.error_spread is not None:
                axes.errorbar(row.latency, height(row.error), row.error_spread, color=INK, linewidth=1, capsize=3)
        axes.plot(
            found.predicted_latency,
            height(found.predicted_error),
            marker="*",
            markersize=15,
            linestyle="none",
            color=INK,
            markerfacecolor=PAPER,
            label="schedule, predicted",
        )
        if floor:
            log_axis(axes, floor)
        axes.set_xlabel(f"mean step latency / {found.precisions[0]}")
        axes.set_ylabel("E")
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=2)
    return svg[0]


def error_rows(found: Sensitivity) -> str:
    """Measured E of every validation row, smallest on top; one of 0 lies on the left edge."""
    place = places(found.precisions)
    rows = sorted(found.validation, key=lambda row: -row.error)
    floor = floor_of([row.error for row in rows])
    with svg_figure("rows", height=1.2 + 0.33 * len(rows)) as (_, axes, svg):
        for index, row in enumerate(rows):
            style = _row_style(row, place, iter("o"))
            if row.name in found.loses_to and "markerfacecolor" in style:
                style["markerfacecolor"] = INK
            axes.plot(max(row.error, floor), index, linestyle="none", **style | {"clip_on": False})
            if row.error_spread is not None:
                axes.errorbar(row.error, index, xerr=row.error_spread, color=INK, linewidth=1, capsize=3)
        axes.axvline(max(found.validation[0].error, floor), color=INK, linestyle=":", linewidth=1)
        axes.set_yticks(range(len(rows)), [row.name for row in rows])
        axes.grid(axis="x")
        axes.set_xlabel("measured E")
        if floor:
            log_axis(axes, floor, "x")
    return svg[0]


def rank_deviation(found: Sensitivity) -> str:
    """Mean rank deviation of a replayed bisection over its evaluations; needs curves measured at every step."""
    place = places(found.precisions)
    with svg_figure("ranks") as (figure, axes, svg):
        for record in found.scores:
            replays = [
                adaptive_bisection(record.scores.__getitem__, found.num_steps, max_evaluations=count)
                for count in range(min(3, found.num_steps), found.num_steps + 1)
            ]
            points = {len(replay.order): _deviation(record.scores, replay.scores) for replay in replays}
            axes.plot(
                *zip(*sorted(points.items()), strict=True),
                "-" if record.direction == "downcast" else "--",
                marker=MARKERS[place[record.precision]],
                color=SHADES[place[record.precision]][0],
                label=f"{record.direction} {record.precision}",
            )
        axes.set(xlabel="steps measured", ylabel="mean rank deviation")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        figure.legend(loc="outside lower center", ncols=2)
    return svg[0]


def _deviation(truth: Sequence[float], found: np.ndarray) -> float:
    ranks = [rankdata(np.maximum(scores, 0)) for scores in (np.array(truth), found)]  # below 0 counts as 0, as in use
    return float(np.abs(ranks[0] - ranks[1]).mean())


def _row_style(row: ValidationRow, place: dict[str, int], others: Iterator[str]) -> dict[str, Any]:
    if row.name == "schedule":
        return {"marker": "*", "color": INK, "markersize": 16, "zorder": 5}
    if row.name.startswith("uniform ") and len(row.counts) == 1:
        (precision,) = row.counts
        index = place.get(precision, 0)
        return {"marker": MARKERS[index], "color": SHADES[index][0], "markersize": 9, "zorder": 4, "clip_on": False}
    return {"marker": next(others), "color": INK, "markerfacecolor": PAPER, "markersize": 8, "zorder": 3}


def ruled_precision(found: Sensitivity) -> str | None:
    """The low precision that rules are drawn for: of most of the schedule's low steps, or the fastest scored one."""
    scored = StoredPrediction(found).precisions[1:]
    used = [name for name in scored if name in found.schedule]
    if used:
        return max(used, key=found.schedule.count)
    return min(scored, key=found.latencies_ms.__getitem__, default=None)


def rule_points(found: Sensitivity, precision: str) -> dict[str, list[tuple[float, float]]]:
    """(latency, predicted E) of every rule with K = 0..T steps at the reference; random: the mean of 20 draws."""
    prediction, generator = StoredPrediction(found), np.random.default_rng(0)
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
