"""Steps that reuse computed model outputs: which ones, with which weights, and what a state keeps for them."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from helpers.small_plans import table

from engines.errors import ScheduleError
from engines.loop import Loop, host_loop
from engines.manifest import MODEL_OUTPUT
from engines.reuse import REUSES, engines_of, kept_outputs, order_of, reuse_terms
from engines.sampler import SamplerRow, SamplerTable
from engines.sampler_state import SamplerState, row_of, stacked

C = "fp16"
SHAPE = (2, 3, 4, 4)


def with_timesteps(timesteps: list[float]) -> SamplerTable:
    """Euler's rows at any timesteps."""
    rows = tuple(SamplerRow(((k, 1.0),), ((k, 0.1),)) for k in range(len(timesteps)))
    return SamplerTable("Euler", len(timesteps), np.array(timesteps), None, 1.0, np.ones(len(timesteps)), rows)


def arrays(count: int, seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.standard_normal(SHAPE, dtype=np.float32) for _ in range(count)]


def run(sampler: SamplerTable, choices: list[str], outputs: list[np.ndarray], keep: int = 3) -> list[SamplerState]:
    """States before every step and after the last; `outputs` of computed steps are taken by step index."""
    states = [sampler.initial(np.ones(SHAPE, np.float32))]
    for k, choice in enumerate(choices):
        order = order_of(choice)
        states.append(
            sampler.advance(states[-1], outputs[k], keep) if order is None else sampler.reuse(states[-1], order, keep)
        )
    return states


def test_a_choice_is_a_precision_or_an_order() -> None:
    assert [order_of(name) for name in (*REUSES, "fp16", "reuse3", "reuse")] == [0, 1, 2, None, None, None]


def test_weights_are_those_of_lagrange_at_the_steps_own_timestep() -> None:
    timesteps = [999.0, 950.5, 800.25, 640.0, 500.0, 1.0]
    terms = reuse_terms(timesteps, [C, C, C, "reuse0", "reuse1", "reuse2"])
    assert terms[:4] == (None, None, None, ((2, 1.0),))
    for reused, nodes in ((4, (1, 2)), (5, (0, 1, 2))):
        found = terms[reused]
        assert found is not None
        assert [j for j, _ in found] == list(nodes), "a reused step is not computed: nothing extrapolates from it"
        for j, weight in found:
            exact = Fraction(1)
            for i in set(nodes) - {j}:
                exact *= (Fraction(timesteps[reused]) - Fraction(timesteps[i])) / (
                    Fraction(timesteps[j]) - Fraction(timesteps[i])
                )
            assert weight == pytest.approx(float(exact), rel=1e-14)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_polynomial_of_the_order_is_met_exactly(order: int) -> None:
    timesteps = np.array([10.0, 7.0, 6.0, 3.0, 2.5])
    values = np.polyval([2.0, -3.0, 5.0][2 - order :], timesteps)
    terms = reuse_terms(timesteps.tolist(), [C, C, C, C, REUSES[order]])[-1]
    assert terms is not None
    assert sum(weight * values[j] for j, weight in terms) == pytest.approx(values[4], rel=1e-12)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1000.0])
def test_units_of_time_do_not_matter(scale: float) -> None:
    timesteps, choices = [1.0, 0.75, 0.5, 0.25, 0.125], [C, C, C, "reuse2", "reuse1"]
    for one, other in zip(
        reuse_terms(timesteps, choices), reuse_terms([scale * t for t in timesteps], choices), strict=True
    ):
        assert (one is None) == (other is None)
        for (i, a), (j, b) in zip(one or (), other or (), strict=True):
            assert (i, a) == (j, pytest.approx(b, rel=1e-12))


def test_of_two_outputs_at_one_timestep_the_later_one_counts() -> None:
    heun = [9.0, 6.0, 6.0, 3.0, 3.0, 1.0]
    terms = reuse_terms(heun, [C, C, C, C, "reuse0", "reuse2"])
    assert terms[4] == ((3, 1.0),)
    assert terms[5] is not None
    assert [j for j, _ in terms[5]] == [0, 2, 3]


@pytest.mark.parametrize("choice", REUSES)
def test_at_the_last_computed_timestep_every_order_gives_that_output(choice: str) -> None:
    assert reuse_terms([9.0, 8.0, 7.0, 6.0, 6.0], [C, C, C, C, choice])[-1] == ((3, 1.0),)


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        (["reuse0", C, C, C], "step index 0 is reuse0, which needs 1 model output computed before it.*there are 0"),
        ([C, "reuse1", C, C], "step index 1 is reuse1, which needs 2 model outputs computed.*there is 1"),
        ([C, C, C, "reuse2"], "step index 3 is reuse2, which needs 3 .* at distinct timesteps, and there are 2"),
        ([C, C, "reuse0", "reuse2"], "step index 3 is reuse2"),
        ([C, C], "schedule has 2 steps, the sampler table has 4"),
    ],
)
def test_too_few_computed_outputs_are_named_with_the_step_index(choices: list[str], words: str) -> None:
    with pytest.raises(ScheduleError, match=words):
        reuse_terms([9.0, 6.0, 6.0, 1.0], choices)


def test_what_is_kept_is_what_later_steps_need() -> None:
    assert kept_outputs([C] * 4) == (0, 0, 0, 0)
    assert kept_outputs([C, C, C, "reuse2", "reuse0", C, "reuse1", C]) == (3, 3, 3, 2, 2, 2, 0, 0)


def test_a_state_keeps_as_many_computed_outputs_as_it_is_asked_to_and_no_reused_one() -> None:
    sampler, outputs = table(6, 2), arrays(6)
    for keep in range(4):
        states = run(sampler, [C] * 6, outputs, keep)
        for k, state in enumerate(states):
            assert [j for j, _ in state.computed] == list(range(max(0, k - keep), k))
            assert all(values.tobytes() == outputs[j].tobytes() for j, values in state.computed)
            assert not any(values.flags.writeable for _, values in state.computed)
    states = run(sampler, [C, C, "reuse1", C, "reuse0", C], outputs)
    assert [[j for j, _ in state.computed] for state in states] == [
        [],
        [0],
        [0, 1],
        [0, 1],
        [0, 1, 3],
        [0, 1, 3],
        [1, 3, 5],
    ]


def test_kept_outputs_are_the_history_s_own_arrays() -> None:
    state = run(table(4, 3), [C] * 2, arrays(2))[-1]
    assert dict(state.computed)[1] is dict(state.past_outputs)[1]


def test_the_output_of_a_reused_step_is_the_weighted_sum_rounded_once() -> None:
    sampler, outputs = with_timesteps([9.0, 7.0, 6.0, 4.0]), arrays(3)
    state = run(sampler, [C] * 3, outputs)[-1]
    assert sampler.reused_output(state, 0) is dict(state.computed)[2]
    for order in (1, 2):
        terms = reuse_terms([9.0, 7.0, 6.0, 4.0], [C, C, C, REUSES[order]])[-1]
        assert terms is not None
        total = np.zeros(SHAPE)
        for j, weight in terms:
            total = total + outputs[j].astype(np.float64) * weight
        expected = total.astype(np.float32)
        found = sampler.reused_output(state, order)
        assert found.tobytes() == expected.tobytes()
        assert not found.flags.writeable
        after = sampler.reuse(state, order, 3)
        assert after.latents.tobytes() == sampler.advance(state, expected).latents.tobytes()


@pytest.mark.parametrize("reach", [1, 3])
def test_a_multistep_sampler_takes_a_reused_output_like_any_other(reach: int) -> None:
    sampler, outputs = table(8, reach, past_samples=True), arrays(8)
    choices = [C, C, "reuse1", "reuse1", C, "reuse0", C, "reuse2"]
    states = run(sampler, choices, outputs)
    plain = sampler.initial(np.ones(SHAPE, np.float32))
    for k, choice in enumerate(choices):
        order = order_of(choice)
        output = outputs[k] if order is None else sampler.reused_output(states[k], order)
        plain = sampler.advance(plain, output)
        assert plain.latents.tobytes() == states[k + 1].latents.tobytes()
        assert plain.computed == ()


def test_states_are_stacked_and_taken_apart_with_what_they_keep() -> None:
    sampler = with_timesteps([9.0, 7.0, 6.0, 4.0, 2.0])
    one, other = (run(sampler, [C] * 3, arrays(3, seed))[-1] for seed in (1, 2))
    together = stacked([one, other])
    for order in range(3):
        both = sampler.reuse(together, order, 3)
        for index, alone in enumerate((one, other)):
            expected = sampler.reuse(alone, order, 3)
            rows = [row_of(both, 2 * index + row) for row in range(2)]
            assert b"".join(row.latents.tobytes() for row in rows) == expected.latents.tobytes()
            for row in rows:
                assert [j for j, _ in row.computed] == [0, 1, 2]
    apart = run(sampler, [C, "reuse0", C], arrays(3))[-1]
    with pytest.raises(ValueError, match=r"computed outputs of steps \[\[0, 1, 2\], \[0, 2\]\]"):
        stacked([one, apart])


class Counting:
    """A denoiser that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.calls += 1
        return {MODEL_OUTPUT: np.sin(inputs["latents"] + inputs["timestep"][:, None, None, None] / 1000)}


@pytest.mark.parametrize("scale", [1.0, 4.5])
def test_the_host_loop_computes_what_the_schedule_does_not_reuse(scale: float) -> None:
    sampler = table(8, 3)
    choices = ("int8", C, "reuse1", C, "reuse2", "reuse0", "int8", "reuse1")
    engines: dict[str, Any] = {C: Counting(), "int8": Counting()}
    seen: list[tuple[int, str]] = []
    loop = Loop(sampler, choices, {}, arrays(1)[0], scale, lambda k, name, _: seen.append((k, name)))
    latents = host_loop(loop, engines.__getitem__)
    assert (engines[C].calls, engines["int8"].calls) == (2, 2)
    assert seen == list(enumerate(choices))
    assert engines_of(choices) == ("int8", C)
    state, computed = sampler.initial(loop.noise), {}
    for k, terms in enumerate(reuse_terms(sampler.timesteps.tolist(), choices)):
        if terms is None:
            inputs = {
                "latents": sampler.model_input(state),
                "timestep": np.full(len(loop.noise), sampler.timesteps[k], np.float32),
            }
            output = computed[k] = Counting().run(inputs)[MODEL_OUTPUT]
            if scale > 1:
                output = computed[k] = output + np.float32(scale) * (output - output)
        else:
            output = sum(computed[j].astype(np.float64) * weight for j, weight in terms).astype(np.float32)  # type: ignore[union-attr]
        state = sampler.advance(state, output)
    assert latents.tobytes() == state.latents.tobytes()


def test_the_host_loop_refuses_too_few_computed_outputs_before_it_loads_anything() -> None:
    loop = Loop(table(3, 1), (C, "reuse1", C), {}, arrays(1)[0], 1.0)
    with pytest.raises(ScheduleError, match="step index 1 is reuse1"):
        host_loop(loop, lambda name: pytest.fail(name))
