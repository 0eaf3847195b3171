"""The influence of model outputs on final latents: against finite differences, and against rounding noise."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.planted_reuse import ReuseLoop
from helpers.planted_reuse import table as planted_table
from helpers.small_plans import table as small_table

from calibration.measure.influence import output_influence
from calibration.scores.transfer import output_weights
from engines.reuse import order_of
from engines.sampler import SamplerTable

PLANS = (
    ("fp16",) * 8,
    ("fp16", "reuse0", "fp16", "reuse1", "reuse1", "fp16", "reuse2", "fp16"),
    ("fp16", "fp16", "fp16", "reuse2", "reuse2", "reuse2", "reuse0", "reuse2"),
)


def final(table: SamplerTable, choices: tuple[str, ...], outputs: np.ndarray) -> float:
    """x_T where computed steps have these outputs."""
    state = table.initial(np.zeros((1, 1, 1, 1)))
    for step, choice in enumerate(choices):
        order = order_of(choice)
        if order is None:
            state = table.advance(state, outputs[step].reshape(1, 1, 1, 1), 3)
        else:
            state = table.reuse(state, order, 3)
    return float(state.latents.item())


@pytest.mark.parametrize("choices", PLANS)
@pytest.mark.parametrize("table", [planted_table(8), planted_table(8, False), small_table(8, 3, past_samples=True)])
def test_influence_is_what_a_change_of_an_output_changes(table: SamplerTable, choices: tuple[str, ...]) -> None:
    found = output_influence(table, choices)
    for step, choice in enumerate(choices):
        unit = np.zeros(8)
        unit[step] = 1.0
        changed = final(table, choices, unit) if order_of(choice) is None else 0.0
        assert found[step] == pytest.approx(changed, abs=1e-5 * np.abs(found).max())


def test_without_reuse_it_is_the_weight_that_scores_are_carried_with() -> None:
    table = planted_table(12)
    assert np.array_equal(np.abs(output_influence(table)), output_weights(table))
    assert np.array_equal(output_influence(table), output_influence(table, ("int8",) * 12))


def test_errors_of_a_step_that_feeds_reuses_grow_as_predicted() -> None:
    """By int8 at each computed step of a plan, beside the plan with the reference there; outputs depend on time alone."""
    choices = ("fp16", "fp16", "reuse1", "fp16", "fp16", "fp16", "reuse2", "reuse2", "fp16", "fp16")
    loop = ReuseLoop(10, response=False, num_samples=1)
    ratios = loop.influence(choices) / loop.influence(("fp16",) * 10)

    def run(schedule: tuple[str, ...]) -> np.ndarray:
        state = loop.start(0)
        for choice in schedule:
            state = loop.step(0, state, choice)
        return loop.latents(state).astype(np.float64)

    for step in (k for k, choice in enumerate(choices) if order_of(choice) is None):
        low = (*choices[:step], "int8", *choices[step + 1 :])
        alone = ("fp16",) * step + ("int8",) + ("fp16",) * (9 - step)
        grown = np.linalg.norm(run(low) - run(choices)) / np.linalg.norm(run(alone) - run(("fp16",) * 10))
        assert grown == pytest.approx(abs(ratios[step]), rel=1e-3)
    assert max(abs(ratios)) > 3
