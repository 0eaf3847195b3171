"""Figures of a report: marks stand where the documents have them."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.report_page import Parsed, figures, marks, planted

from calibration import HighSteps, Sensitivity
from calibration.choose.stored_prediction import StoredPrediction
from engines.bundle import Bundle
from tmpdiff_export.report.figures import rule_points, ruled_precision
from tmpdiff_export.report.page import page


@pytest.mark.parametrize("direction", ["downcast", "upcast"])
def test_score_curves_stand_where_the_scores_are(text: str, found: Sensitivity, direction: str) -> None:
    drawn = marks(figures(text)[f"scores-{direction}"], f"scores-{direction}")
    records = [record for record in found.scores if record.direction == direction]
    assert len(drawn) == found.num_steps * len(records)
    for record in records:
        place = {"fp8": 1, "int8": 2, "int4": 3}[record.precision]
        curve = sorted(mark for mark in drawn if f"stroke: var(--p{place})" in mark[2])
        heights = [-y for _, y, _ in curve]
        positive = [k for k, score in enumerate(record.scores) if score > 0]
        hollow = [k for k, (*_, style) in enumerate(curve) if "fill: var(--paper)" in style]
        assert hollow == [k for k in positive if not record.measured[k]]
        logs = np.log([record.scores[k] for k in positive])
        slope, start = np.polyfit(logs, [heights[k] for k in positive], 1)
        assert slope > 0
        np.testing.assert_allclose([heights[k] for k in positive], slope * logs + start, atol=0.01)


def test_fit_figure_has_every_random_schedule(text: str, found: Sensitivity) -> None:
    drawn = sorted((x, -y) for x, y, _ in marks(figures(text)["fit"], "fit"))
    points = sorted((point.predicted[found.predictor], point.measured) for point in found.fit_points)
    assert len(drawn) == len(points)
    for axis in (0, 1):
        values, places = np.array(points)[:, axis], np.array(drawn)[:, axis]
        slope, start = np.polyfit(values, places, 1)
        assert slope > 0
        np.testing.assert_allclose(places, slope * values + start, atol=0.01)


def test_pareto_figure_has_the_schedule_and_every_baseline(text: str, found: Sensitivity) -> None:
    svg = figures(text)["pareto"]
    rows = [mark for mark in marks(svg, "pareto") if "--muted" not in mark[2]]
    legend = {element.text for element in svg.iter("text")}
    assert {row.name for row in found.validation} | {"schedule, predicted", "front, predicted"} <= legend
    expected = {round(row.latency, 6) for row in found.validation}
    assert len({round(x, 2) for x, *_ in rows}) == len(expected)


def test_rank_deviation_of_a_swept_calibration(bundle: Bundle) -> None:
    swept = page(bundle.manifest, planted(num_steps=16, method="sweep"))
    drawn = sorted(marks(figures(swept)["ranks"], "ranks"))
    bottom = max(y for _, y, _ in drawn)
    assert drawn[-1][1] == pytest.approx(bottom)  # all steps measured: no deviation
    assert min(y for x, y, _ in drawn if x == drawn[0][0]) < bottom - 20  # three steps: a visible one
    assert "ranks" not in figures(page(bundle.manifest, planted(num_steps=16)))


def test_risk_is_drawn_said_and_part_of_predictions(bundle: Bundle) -> None:
    found = planted(budget=HighSteps(4))
    words = "the risk of a departure"
    assert words not in Parsed(page(bundle.manifest, found)).text["scores"]
    records = tuple(
        record.model_copy(update={"risk": tuple(max(score, 0.0) / 2 for score in record.scores)})
        if record.direction == "downcast"
        else record
        for record in found.scores
    )
    risky = found.model_copy(update={"scores": records})
    text = page(bundle.manifest, risky)
    assert words in Parsed(text).text["scores"]
    before, after = (figures(page(bundle.manifest, one))["scores-downcast"] for one in (found, risky))
    drawn = [
        len([path for path in svg.iter() if "stroke-dasharray" in path.get("style", "")]) for svg in (before, after)
    ]
    assert drawn[1] > drawn[0], "dotted"
    low = next(record for record in records if record.risk)
    schedule = (found.precisions[0],) * (found.num_steps - 1) + (low.precision,)
    assert (StoredPrediction(risky).error(schedule) or 0) > (StoredPrediction(found).error(schedule) or 0) > 0


def test_rules_are_drawn_at_every_count(bundle: Bundle) -> None:
    found = planted(method="sweep", budget=HighSteps(4))
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
    drawn = marks(figures(page(bundle.manifest, found))["rules"], "rules")
    assert len(drawn) == len(points) * found.num_steps + 1  # without E = 0, and with the schedule
    dropped = planted(latencies=dict.fromkeys(("fp16", "fp8", "int8", "int4"), 8.0))
    assert ruled_precision(dropped) is None
    assert "rules" not in figures(page(bundle.manifest, dropped))
