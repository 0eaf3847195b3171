"""The section of the report on how the errors of steps add up: the Gram matrix as a picture."""

from __future__ import annotations

import numpy as np
from matplotlib.ticker import FixedLocator, MaxNLocator

from calibration.choose.stored_prediction import stored_gram
from calibration.document import Sensitivity
from calibration.scores.gram import Gram
from tmpdiff_export.report.pieces import picture, precision_name
from tmpdiff_export.report.svg import INK, svg_figure

ALIKE, OPPOSED = (217, 95, 2), (47, 126, 216)
"""Colours of correlations of 1 and -1. Those between are as much more transparent, so that 0 shows the page, light or dark."""

SIDE = 3.5  # inches; a small figure fits beside others of its kind, and alone on a phone


def gram_section(found: Sensitivity) -> str:
    """A picture of the correlations of every scored precision."""
    lead = (
        '<p class="lead">Errors of steps add up as arrows do: two that point the same way weigh more together than '
        "apart.</p>"
    )
    whole = stored_gram(found)
    if whole is None:
        return f"{lead}<p>No precision was left to score: each is dropped, see the table above.</p>"
    matrices = "".join(_matrix(found, whole, name) for name in whole.precisions[1:])
    use = (
        "Schedules were chosen by all of it."
        if found.predictor == "gram"
        else "Here schedules were chosen by the diagonal alone, the downcast sum, which described random schedules better."
    )
    return (
        f"{lead}<p>How to read it: where a cell is orange, the errors of its two steps point the same way, and low steps there "
        "are cheaper apart than side by side; where it is blue, they partly cancel; where it is blank, they have nothing to do "
        f'with each other.</p><p class="signed">Correlation: -1 <span class="ramp correlation" role="img" '
        f'aria-label="from blue, -1, over blank, 0, to orange, 1"></span> 1</p><div class="matrices">{matrices}</div>'
        '<p class="note">Signed correlation of the error vectors of single downcasts, the reference\'s own rounding taken '
        f"off. Ticks on the axes mark measured steps; between them the correlations are interpolated. {use}</p>"
    )


def correlations(whole: Gram, precision: str) -> np.ndarray:
    """Signed correlations of the steps at one low precision, float64 [T, T], NaN where a step has no error."""
    index = whole.precisions.index(precision)
    block = whole.values[:, index, :, index]
    norms = np.sqrt(np.diag(block))
    outer = np.outer(norms, norms)
    found: np.ndarray = np.divide(block, outer, out=np.full_like(block, np.nan), where=outer > 0)
    return np.clip(found, -1.0, 1.0)


def colours(values: np.ndarray) -> np.ndarray:
    """Correlations [T, T] as a picture, uint8 [T, T, 4]; NaN is blank."""
    known = np.nan_to_num(values)
    picture = np.empty((*known.shape, 4), np.uint8)
    picture[..., :3] = np.where((known > 0)[..., None], ALIKE, OPPOSED)
    picture[..., 3] = np.rint(255 * np.abs(known))
    return picture


def gradient() -> str:
    """The legend's colours as the stops of a CSS gradient."""
    low, high = (f"rgb({','.join(map(str, colour))})" for colour in (OPPOSED, ALIKE))
    return f"{low},transparent,{high}"


def matrix(found: Sensitivity, whole: Gram, precision: str) -> str:
    """The correlations of one precision, step by step, with ticks at measured steps."""
    with svg_figure(f"gram-{whole.precisions.index(precision)}", SIDE, SIDE) as (_, axes, svg):
        axes.imshow(colours(correlations(whole, precision)), interpolation="none")
        axes.grid(False)
        axes.spines[["top", "right"]].set_visible(True)
        axes.set(xlabel="step index", ylabel="step index")
        positions = found.gram.positions[precision] if found.gram else ()
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
            axis.set_minor_locator(FixedLocator(positions))
            axis.remove_overlapping_locs = False  # a measured step may have a number, too
            axis.set_tick_params(which="major", length=0, pad=8)
            axis.set_tick_params(which="minor", length=5, width=1.2, color=INK)
    return svg[0]


def _matrix(found: Sensitivity, whole: Gram, precision: str) -> str:
    values = correlations(whole, precision)
    beside, pairs = np.diag(values, 1), values[np.triu_indices(len(values), 1)]
    record = next(record for record in found.scores if record.precision == precision)
    counted = f"{sum(record.measured)} of {found.num_steps} steps measured"
    words = ", ".join(
        f"{what} {np.nanmean(cells):+.2f}"
        for what, cells in (("neighbours", beside), ("all pairs", pairs))
        if np.isfinite(cells).any()
    )
    remark = ", in the schedule" if precision in found.schedule else ""
    caption = f"<b>{precision_name(found, precision)}</b>{remark}<br>mean correlation: {words or '-'}; {counted}"
    label = (
        f"signed correlation of the error vectors of {precision}, step by step; mean correlation: {words}; {counted}"
    )
    return picture(matrix(found, whole, precision), label, caption)
