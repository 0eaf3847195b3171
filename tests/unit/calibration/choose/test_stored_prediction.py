"""What a stored calibration predicts: by its Gram matrix, or by the diagonal of it."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import made_up

from calibration.choose.stored_prediction import StoredPrediction, stored_gram

PRECISIONS = ("fp16", "int8", "int4")


def test_errors_are_those_of_the_gram_matrix() -> None:
    found = made_up.calibration(8, PRECISIONS)
    prediction = StoredPrediction(found)
    whole = prediction.gram
    assert whole is not None
    assert prediction.precisions == whole.precisions == PRECISIONS
    schedule = ("fp16", "int8", "int8", "fp16", "int4", "fp16", "fp16", "fp16")
    low = [(1, 1), (2, 1), (4, 2)]
    expected = sum(whole.values[i, p, j, q] for i, p in low for j, q in low) + whole.floor[1]
    assert prediction.error(schedule) == pytest.approx(expected)
    assert prediction.error(("fp16",) * 8) == 0.0
    record = found.scores[0]
    single = ("fp16",) * 3 + ("int8",) + ("fp16",) * 4
    assert prediction.error(single) == pytest.approx(record.scores[3])


def test_the_downcast_sum_adds_scores_up() -> None:
    found = made_up.calibration(8, PRECISIONS, predictor="downcast sum")
    prediction = StoredPrediction(found)
    schedule = ("int8",) * 4 + ("int4",) * 4
    expected = sum(found.scores[0].scores[:4]) + sum(found.scores[1].scores[4:])
    assert prediction.error(schedule) == pytest.approx(expected)
    whole = stored_gram(found)
    assert whole is not None
    assert np.count_nonzero(whole.values) > np.count_nonzero(whole.diagonal)


def test_a_precision_without_scores_is_refused() -> None:
    found = made_up.calibration(8, PRECISIONS)
    without = found.model_copy(update={"scores": found.scores[:1]})
    prediction = StoredPrediction(without)
    assert prediction.precisions == ("fp16", "int8")
    with pytest.raises(ValueError, match="steps at int4; scores are of fp16, int8"):
        prediction.error(("int4",) * 8)
    assert prediction.latency(("int4",) * 8) == pytest.approx(0.5)


def test_all_dropped() -> None:
    prediction = StoredPrediction(made_up.calibration(8, ("fp16",)))
    assert (prediction.gram, prediction.precisions) == (None, ("fp16",))
    assert prediction.error(("fp16",) * 8) == 0.0


def test_changes_of_precision_cost_what_the_document_says() -> None:
    found = made_up.calibration(4, PRECISIONS, swap_ms={"fp16 int8": 1.0, "int8 fp16": 3.0})
    prediction = StoredPrediction(found)
    plain = (8 + 5 + 8 + 5) / (4 * 8)
    assert prediction.latency(("fp16", "int8", "fp16", "int8")) == pytest.approx(plain + (1 + 3 + 1) / (4 * 8))
