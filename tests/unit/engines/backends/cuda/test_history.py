"""Slots of the history: what a table still needs is kept, and no more."""

from __future__ import annotations

import pytest
from fakes.install import Fakes
from helpers.small_loops import schedule
from helpers.small_plans import table

from engines.reuse import reuse_terms, taken_whole
from engines.sampler import SamplerTable

PATTERNS = ("hhhhhhhh", "hhhahbhc", "haaaaaaa", "hhhcbahh", "hhbhbhcc", "hhhhabca")


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("past_samples", [False, True])
@pytest.mark.parametrize("reach", [1, 2, 3, 8])
def test_nothing_that_is_still_needed_is_overwritten(
    fakes: Fakes, reach: int, past_samples: bool, pattern: str
) -> None:
    from engines.backends.cuda.history import HistoryLayout

    sampler = table(8, reach, past_samples=past_samples)
    reused = reuse_terms(sampler.timesteps.tolist(), schedule(pattern))
    layout = HistoryLayout.of(sampler, reused)
    holds: dict[int, tuple[str, int]] = {layout.samples[0]: ("x", 0)}
    same = list(range(8))  # m_k that are another m_j as it is
    for k, (row, terms) in enumerate(zip(sampler.rows, reused, strict=True)):
        assert holds[layout.samples[k]] == ("x", k)
        assert all(holds[layout.outputs[j]] == ("m", j) for j, _ in terms or ())
        if terms is not None and taken_whole(terms):
            same[k] = terms[0][0]
        else:
            assert layout.outputs[k] not in {layout.outputs[j] for j, _ in terms or ()}
            holds[layout.outputs[k]] = ("m", k)
        operands = [(layout.samples[j], ("x", j)) for j, _ in row.samples]
        operands += [(layout.outputs[j], ("m", same[j])) for j, _ in row.outputs]
        assert all(holds[slot] == value for slot, value in operands)
        assert layout.samples[k + 1] not in {slot for slot, _ in operands}
        holds[layout.samples[k + 1]] = ("x", k + 1)
    assert holds[layout.samples[-1]] == ("x", 8)
    assert max(holds) + 1 == layout.num_slots


def test_the_history_is_as_small_as_the_table_allows(fakes: Fakes) -> None:
    from engines.backends.cuda.history import HistoryLayout

    def slots(sampler: SamplerTable, pattern: str) -> int:
        return HistoryLayout.of(sampler, reuse_terms(sampler.timesteps.tolist(), schedule(pattern))).num_slots

    assert slots(table(50, 1), "h" * 50) == 2 + 1
    assert slots(table(50, 3), "h" * 50) == 2 + 3
    assert slots(table(50, 4, past_samples=True), "h" * 50) == 5 + 4
    assert slots(table(8, 1), "haaahaaa") == 2 + 1
    assert slots(table(8, 1), "hhbhhhhh") == 2 + 3
    assert slots(table(8, 3), "haaahaaa") == 2 + 2
