"""The section of the report on predicted against measured error of random schedules."""

from __future__ import annotations

import math
from html import escape
from typing import Any

import numpy as np
from matplotlib.lines import Line2D

from calibration.document import Sensitivity
from calibration.records import PREDICTORS, FitRecord, Predictor
from tmpdiff_export.display import number
from tmpdiff_export.report.pieces import picture, table
from tmpdiff_export.report.svg import INK, MUTED, PAPER, floor_of, log_axis, svg_figure

LOOKS: dict[Predictor, dict[str, Any]] = {
    "gram": {"marker": "o", "color": INK},
    "downcast sum": {"marker": "D", "color": MUTED, "markerfacecolor": PAPER},
}


def fit(found: Sensitivity) -> str:
    """How well the predictors foretell random schedules."""
    used = next((record for record in found.fit if record.predictor == found.predictor), None)
    figure = "<p>No random schedules were run.</p>"
    if found.fit_points:
        figure = picture(
            fit_scatter(found),
            "predicted against measured E of random schedules, both predictors",
            f"{len(found.fit_points)} random schedules on calibration prompts; on the dashed line the prediction is right.",
        )
    level = ""
    if used and used.ratio is not None and not 0.5 <= used.ratio <= 2:
        level = (
            f'<div class="loss" role="note">On these schedules the predicted E is {used.ratio:.2f} times the measured '
            "one: read predictions as a ranking, not as a level.</div>"
        )
    head = ("predictor", "R²", "Spearman", "predicted / measured", "scatter")
    return (
        '<p class="lead">From single downcasts the error of any schedule is predicted; random schedules were run to '
        f'check.</p>{level}<div class="figures">{figure}<div>{table(head, [_row(found, r) for r in found.fit], "fit of the predictors")}'
        '<p class="note">gram: error vectors of all steps, with their correlations; downcast sum: scores added up. R² of the '
        "regression line and Spearman's rank correlation: 1 is perfect. Predicted / measured: sums over the schedules, 1 is "
        "the right level. Scatter: the factor that predictions are typically off by. A dash: too few schedules for the "
        "figure.</p></div></div>"
    )


def fit_scatter(found: Sensitivity) -> str:
    """Predicted against measured E of the random schedules by each predictor; needs a fit point. Zeros lie on the edges."""
    errors = [error for point in found.fit_points for error in (point.measured, *point.predicted.values())]
    floor, top = floor_of(errors), 1.6 * max(errors) or 1.0
    with svg_figure("fit", height=4.6) as (figure, axes, svg):
        axes.plot([floor, top], [floor, top], "--", color=INK, linewidth=1)
        for predictor in PREDICTORS:
            drawn = [
                (point.predicted[predictor], point.measured)
                for point in found.fit_points
                if predictor in point.predicted
            ]
            if drawn:
                places = np.maximum(np.array(drawn), floor).T
                axes.plot(*places, linestyle="none", markersize=7, clip_on=False, **LOOKS[predictor])
        axes.set(xlabel="predicted E", ylabel="measured E")
        for which in ("x", "y"):
            if floor:
                log_axis(axes, floor, which)
        axes.set(xlim=(floor, top), ylim=(floor, top))
        handles = [Line2D([], [], linestyle="none", label=predictor, **LOOKS[predictor]) for predictor in PREDICTORS]
        handles.append(Line2D([], [], linestyle="--", color=INK, linewidth=1, label="predicted = measured"))
        figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return svg[0]


def _row(found: Sensitivity, record: FitRecord) -> str:
    used = record.predictor == found.predictor
    scatter = "-" if record.scatter is None else f"&times; {math.exp(record.scatter):.2f}"
    return (
        f"<tr{' class=chosen' if used else ''}><td>{escape(record.predictor)}{' (used)' if used else ''}</td>"
        f"<td>{number(record.r2, '.3f')}</td><td>{number(record.spearman, '.3f')}</td><td>{number(record.ratio, '.2f')}</td>"
        f"<td>{scatter}</td></tr>"
    )
