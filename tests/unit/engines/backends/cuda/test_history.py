"""Slots of the history: what a table still needs is kept, and no more."""

from __future__ import annotations

import pytest
from fakes.install import Fakes
from helpers.small_plans import table


@pytest.mark.parametrize("past_samples", [False, True])
@pytest.mark.parametrize("reach", [1, 2, 3, 8])
def test_nothing_that_is_still_needed_is_overwritten(fakes: Fakes, reach: int, past_samples: bool) -> None:
    from engines.backends.cuda.history import HistoryLayout

    sampler = table(8, reach, past_samples=past_samples)
    layout = HistoryLayout.of(sampler)
    holds: dict[int, tuple[str, int]] = {layout.samples[0]: ("x", 0)}
    for k, row in enumerate(sampler.rows):
        assert holds[layout.samples[k]] == ("x", k)
        holds[layout.outputs[k]] = ("m", k)
        operands = {layout.samples[j]: ("x", j) for j, _ in row.samples} | {
            layout.outputs[j]: ("m", j) for j, _ in row.outputs
        }
        assert all(holds[slot] == value for slot, value in operands.items())
        assert layout.samples[k + 1] not in operands
        holds[layout.samples[k + 1]] = ("x", k + 1)
    assert holds[layout.samples[-1]] == ("x", 8)
    assert max(holds) + 1 == layout.num_slots


def test_the_history_is_as_small_as_the_table_allows(fakes: Fakes) -> None:
    from engines.backends.cuda.history import HistoryLayout

    assert HistoryLayout.of(table(50, 1)).num_slots == 2 + 1
    assert HistoryLayout.of(table(50, 3)).num_slots == 2 + 3
    assert HistoryLayout.of(table(50, 4, past_samples=True)).num_slots == 5 + 4
