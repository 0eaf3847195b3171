"""The section of the report on scores: how much each step suffers, and how soon the ranking of steps settles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from scipy.stats import rankdata

from calibration.document import Sensitivity
from calibration.records import TransferRecord
from calibration.scores.bisection import adaptive_bisection
from tmpdiff_export.display import number
from tmpdiff_export.report.marks import MARKERS
from tmpdiff_export.report.pieces import picture, precision_name, table
from tmpdiff_export.report.svg import INK, PAPER, SHADES, floor_of, log_axis, places, svg_figure


def scores(found: Sensitivity) -> str:
    """Score curves and where they come from."""
    text = (
        '<p class="lead">The score of a step says how much the final latents change when only that step changes its '
        "precision.</p>"
    )
    if not found.scores:
        return f"{text}<p>No precision was left to score: each is dropped, see the table above.</p>"
    figure = picture(
        score_curves(found),
        "downcast scores per step index",
        f"Everything at {escape(found.precisions[0])}, one step at the low precision. Filled points were measured, hollow "
        "ones interpolated. Crosses on the lower edge are scores of 0.",
    )
    carried = _carried(found, found.transfer) if found.transfer else ""
    return f'{text}<div class="figures">{figure}{_rank_deviation(found)}</div>{carried}'


def score_curves(found: Sensitivity) -> str:
    """Scores over step indices, a curve per precision; filled where measured, hollow where interpolated.

    The axis is logarithmic; scores of 0 or less lie on its lower edge, as crosses.
    """
    place = places(found.precisions)
    floor = floor_of([score for record in found.scores for score in record.scores])
    with svg_figure("scores") as (figure, axes, svg):
        for record in found.scores:
            colour, marker = SHADES[place[record.precision]][0], MARKERS[place[record.precision]]
            steps = np.arange(len(record.scores))
            curve = np.array(record.scores)
            heights = np.maximum(curve, floor) if floor else curve
            axes.plot(steps, heights, color=colour, linewidth=1.4)
            below, measured = (curve <= 0) & (floor > 0), np.array(record.measured)
            for chosen, face in ((measured & ~below, colour), (~measured & ~below, PAPER)):
                axes.plot(
                    steps[chosen], heights[chosen], marker, color=colour, markerfacecolor=face, markersize=6, zorder=3
                )
            if below.any():
                axes.plot(steps[below], heights[below], "x", color=colour, markersize=7, zorder=3, clip_on=False)
        if floor:
            log_axis(axes, floor)
        axes.set_xlabel("step index")
        axes.set_ylabel("score (E of one downcast)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        handles = [
            Line2D([], [], color=SHADES[place[r.precision]][0], marker=MARKERS[place[r.precision]], label=r.precision)
            for r in found.scores
        ]
        handles += [
            Line2D([], [], color=INK, marker="o", linestyle="none", label="measured"),
            Line2D([], [], color=INK, marker="o", linestyle="none", markerfacecolor=PAPER, label="interpolated"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=3)
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
                marker=MARKERS[place[record.precision]],
                color=SHADES[place[record.precision]][0],
                label=record.precision,
            )
        axes.set(xlabel="steps measured", ylabel="mean rank deviation")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        figure.legend(loc="outside lower center", ncols=3)
    return svg[0]


def _deviation(truth: Sequence[float], found: np.ndarray) -> float:
    ranks = [rankdata(np.maximum(curve, 0)) for curve in (np.array(truth), found)]  # below 0 counts as 0, as in use
    return float(np.abs(ranks[0] - ranks[1]).mean())


def _rank_deviation(found: Sensitivity) -> str:
    if not all(all(record.measured) for record in found.scores):
        return (
            '<p class="note">How far the steps stand from their true rank is known only where every step was measured: '
            "<code>calibrate --method sweep</code> shows it here.</p>"
        )
    return picture(
        rank_deviation(found),
        "mean rank deviation over the number of steps measured",
        "Rank deviation. Every step was measured, so the bisection can be replayed on these scores: the mean distance of a "
        "step from its true rank, over the number of steps measured. A line ends where the search takes the ranking as "
        "settled.",
    )


def _carried(found: Sensitivity, record: TransferRecord) -> str:
    """Where carried scores come from, and how they compare with what was measured here."""
    rows = [
        f"<tr><td>{precision_name(found, check.precision)}</td><td class=left>{', '.join(map(str, check.steps))}</td>"
        f"<td>{check.level:.2f}</td><td>&times; {math.exp(check.scatter):.2f}</td>"
        f"<td>{number(check.spearman, '.2f')}</td></tr>"
        for check in record.checks
    ]
    head = ("precision", "checked steps", "measured / carried", "scatter", "Spearman")
    return (
        f"<h3>Carried scores</h3><p>These scores were measured on {escape(record.setting or 'the setting')} of bundle "
        f"{escape(record.bundle_id[:12])} with T = "
        f"{record.num_steps} and guidance scale {record.guidance_scale:g}, and carried over through noise level. They were "
        f"measured again at the checked steps and brought to the level found there.</p>{table(head, rows, 'carried scores')}"
    )
