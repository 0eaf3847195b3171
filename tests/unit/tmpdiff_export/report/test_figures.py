"""Figures of a report: marks stand where the documents have them."""

from __future__ import annotations

import base64
import io
import itertools

import numpy as np
import pytest
from helpers import made_up
from helpers.report_page import Parsed, figures, marks, page_of
from PIL import Image

from calibration.choose.stored_prediction import StoredPrediction, stored_gram
from calibration.document import Sensitivity
from calibration.records import CandidateRecord
from tmpdiff_export.report.gram import ALIKE, OPPOSED, colours, correlations
from tmpdiff_export.report.latency import rule_points, ruled_precision
from tmpdiff_export.report.marks import shortened
from tmpdiff_export.report.svg import spread


def test_score_curves_stand_where_the_scores_are(text: str, found: Sensitivity) -> None:
    drawn = marks(figures(text)["scores"], "scores")
    assert len(drawn) == found.num_steps * len(found.scores)
    for record in found.scores:
        place = {"fp8": 1, "int8": 2, "int4": 3}[record.precision]
        curve = sorted(mark for mark in drawn if f"stroke: var(--p{place})" in mark[2])
        heights = [-y for _, y, _ in curve]
        hollow = [k for k, (*_, style) in enumerate(curve) if "fill: var(--paper)" in style]
        assert hollow == [k for k in range(found.num_steps) if not record.measured[k]]
        logs = np.log(record.scores)
        slope, start = np.polyfit(logs, heights, 1)
        assert slope > 0
        np.testing.assert_allclose(heights, slope * logs + start, atol=0.01)


def test_scores_of_zero_lie_on_the_lower_edge() -> None:
    found = made_up.calibration(8)
    (record,) = found.scores
    none = record.model_copy(update={"scores": (0.0, -1e-9, *record.scores[2:])})
    text = page_of(found.model_copy(update={"scores": (none,)}))
    drawn = sorted(marks(figures(text)["scores"], "scores"))
    assert drawn[0][1] == drawn[1][1] == max(y for _, y, _ in drawn)


def test_the_gram_matrix_is_drawn_cell_by_cell(text: str, found: Sensitivity) -> None:
    whole = stored_gram(found)
    assert whole is not None
    for index, name in enumerate(found.precisions[1:], start=1):
        svg = figures(text)[f"gram-{index}"]
        (image,) = svg.iter("image")
        cells = np.asarray(Image.open(io.BytesIO(base64.b64decode(image.get("href", "").partition(",")[2]))))
        values = correlations(whole, name)
        # matplotlib writes images upside down and turns them in the page, or not.
        assert any(np.array_equal(cells, way) for way in (colours(values), colours(values)[::-1]))
        grown = whole.values[3, index, 4, index] / np.sqrt(whole.diagonal[3, index] * whole.diagonal[4, index])
        assert values[3, 4] == pytest.approx(grown)
        np.testing.assert_allclose(np.diag(values), 1.0)
        measured = next(record.measured for record in found.scores if record.precision == name)
        (axis,) = [group for group in svg.iter("g") if group.get("id") == f"gram-{index}-matplotlib.axis_1"]
        numbers = list(axis.iter("text"))
        ticks = [group for group in axis if "tick" in str(group.get("id"))]
        without_number = len(ticks) - (len(numbers) - 1)  # the last text names the axis
        assert without_number == sum(measured)
        assert {element.text for element in numbers} >= {"0", "5", "10", "15", "step index"}


def test_colours_of_correlations() -> None:
    found = colours(np.array([[1.0, -0.5], [0.0, np.nan]]))
    assert found[0, 0].tolist() == [*ALIKE, 255]
    assert found[0, 1].tolist() == [*OPPOSED, 128]
    assert (found[1, :, 3] == 0).all()  # the page shows


def test_a_step_without_an_error_has_no_correlation() -> None:
    found = made_up.calibration(8)
    (record,) = found.scores
    without = found.model_copy(update={"scores": (record.model_copy(update={"scores": (0.0, *record.scores[1:])}),)})
    whole = stored_gram(without)
    assert whole is not None
    values = correlations(whole, "int8")
    assert np.isnan(values[0]).all()
    assert np.isfinite(values[1:, 1:]).all()
    text = Parsed(page_of(without)).text["gram"]
    assert "nan" not in text


def test_fit_figure_has_every_random_schedule(text: str, found: Sensitivity) -> None:
    drawn = [(x, -y) for x, y, _ in marks(figures(text)["fit"], "fit")]
    points = [
        (point.predicted[name], point.measured) for name in ("gram", "downcast sum") for point in found.fit_points
    ]
    assert len(drawn) == len(points) == 2 * len(found.fit_points)
    for axis in (0, 1):
        values, places = np.log(np.array(points)[:, axis]), np.array(drawn)[:, axis]
        slope, start = np.polyfit(values, places, 1)
        assert slope > 0
        np.testing.assert_allclose(places, slope * values + start, atol=0.01)


def test_pareto_figure_has_the_schedule_and_every_baseline(text: str, found: Sensitivity) -> None:
    svg = figures(text)["pareto"]
    labels = [element.text for element in svg.iter("text")]
    best = found.best_rule
    assert best is not None
    names = {shortened(row.name.removeprefix("best rule: ")) for row in found.validation}
    assert names | {"best rule", "schedule, predicted", "front, predicted"} <= set(labels)
    assert labels.count(shortened(best.name.removeprefix("best rule: "))) == 1
    rows = [mark for mark in marks(svg, "pareto") if "--muted" not in mark[2]]
    expected = {round(row.latency, 6) for row in found.validation}
    assert len({round(x, 2) for x, *_ in rows}) == len(expected)


@pytest.mark.parametrize("name", ["guard", "rows"])
def test_rows_are_in_order_and_have_their_intervals(text: str, found: Sensitivity, name: str) -> None:
    assert found.guard is not None
    svg = figures(text)[name]
    rows = found.guard.candidates if name == "guard" else found.validation
    typical = {
        shortened(
            row.names[0] if isinstance(row, CandidateRecord) else row.name.removeprefix("best rule: ")
        ): row.typical
        for row in rows
    }
    labels = [element.text for element in svg.iter("text") if element.text in typical]
    values = [typical[str(label)].value for label in labels if label != "schedule"]  # which the legend names, too
    assert sorted(values, reverse=True) == values
    assert len(values) == len(set(typical) - {"schedule"})


def test_rank_deviation_of_a_swept_calibration(text: str) -> None:
    swept = made_up.calibration(16, method="sweep")
    rough = tuple(np.random.default_rng(0).lognormal(0.0, 2.0, 16).tolist())
    records = tuple(record.model_copy(update={"scores": rough}) for record in swept.scores)
    swept = swept.model_copy(update={"scores": records})
    drawn = sorted(marks(figures(page_of(swept))["ranks"], "ranks"))
    bottom = max(y for _, y, _ in drawn)
    assert drawn[-1][1] == pytest.approx(bottom)  # all steps measured: no deviation
    assert min(y for x, y, _ in drawn if x == drawn[0][0]) < bottom - 20  # three steps: a visible one
    assert "ranks" not in figures(text)


def test_rules_are_drawn_at_every_count() -> None:
    found = made_up.calibration(10)
    precision = ruled_precision(found)
    assert precision in found.schedule
    points = rule_points(found, precision)
    prediction = StoredPrediction(found)
    count = 3
    for name, schedule in (
        ("first K", ("fp16",) * count + (precision,) * 7),
        ("last K", (precision,) * 7 + ("fp16",) * count),
    ):
        assert points[name][count] == pytest.approx((prediction.latency(schedule), prediction.error(schedule)))
    for line in points.values():
        assert len(line) == found.num_steps + 1
        assert line[0] == pytest.approx(points["first K"][0])
        assert line[-1] == pytest.approx((1.0, 0.0))
    drawn = marks(figures(page_of(found))["rules"], "rules")
    assert len(drawn) == len(points) * found.num_steps + 1  # without E = 0, and with the schedule
    dropped = made_up.calibration(10, ("fp16",))
    assert ruled_precision(dropped) is None
    assert "rules" not in figures(page_of(dropped))


def test_labels_keep_their_distance_and_their_order() -> None:
    wanted = [0.5, 0.1, 0.52, 0.51, 0.98, 0.99]
    found = spread(wanted, 0.1, 0.0, 1.0)
    ordered = sorted(found)
    assert all(b - a >= 0.1 - 1e-9 for a, b in itertools.pairwise(ordered))
    assert np.argsort(found, kind="stable").tolist() == np.argsort(wanted, kind="stable").tolist()
    assert found[1] == pytest.approx(0.1)
    assert sum(found[k] for k in (0, 2, 3)) / 3 == pytest.approx(0.51)
    assert ordered[0] >= 0
    assert ordered[-1] <= 1 + 1e-9
    assert spread([0.5], 0.1, 0.0, 1.0) == [0.5]
    assert spread([], 0.1, 0.0, 1.0) == []


def test_long_names_are_shortened_in_figures() -> None:
    assert shortened("evenly spread 10 (int8)") == "evenly spread 10 (int8)"
    assert shortened("evenly spread 10 (12 fp8, 8 int8)") == "evenly spread 10 (mixed)"
    assert shortened("x" * 40) == "x" * 23 + "..."
