"""Scores carried to another number of steps through noise level: planted densities, and refusals."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.planted import Counted, PlantedEvaluator, PoolHere, calibrate_loops, rank_deviation, regret

from calibration import HighSteps, Sensitivity, open_journal
from calibration.choose.fit import fit
from calibration.choose.stored_prediction import stored_gram
from calibration.records import CalibrationSettings, CorrelationRecord, GramRecord, TransferRecord
from calibration.scores.carried import CarriedScores, carried_scores
from calibration.scores.gram import Correlations
from calibration.scores.measured_gram import stored_correlations
from calibration.scores.transfer import (
    CHECKED_STEPS,
    MAX_SCATTER,
    TransferError,
    carry,
    carry_positions,
    check_steps,
    compare,
    output_weights,
    step_axes,
)
from engines.sampler import SamplerRow, SamplerTable
from tmpdiff_export.calibrate.bundle import scores_from

LATENCIES_MS = {"fp16": 8.0, "int8": 4.0, "int4": 3.0}


def euler(num_steps, *, shift=3.0, scheduler="FlowMatchEulerDiscreteScheduler"):
    """Flow matching with a shifted schedule: x_{k+1} = x_k + (sigma_{k+1} - sigma_k) m_k."""
    line = np.linspace(1, 0, num_steps + 1)
    sigmas = shift * line / (1 + (shift - 1) * line)
    rows = tuple(SamplerRow(((k, 1.0),), ((k, float(sigmas[k + 1] - sigmas[k])),)) for k in range(num_steps))
    return SamplerTable(scheduler, num_steps, 1000 * sigmas[:-1], sigmas, 1.0, np.ones(num_steps), rows)


def multistep(num_steps):
    """As `euler`, with the second-order coefficients of Adams and Bashforth after the first step."""
    table = euler(num_steps)
    rows = [table.rows[0]]
    for k in range(1, num_steps):
        step = table.rows[k].outputs[0][1]
        rows.append(SamplerRow(((k, 1.0),), ((k - 1, -0.5 * step), (k, 1.5 * step))))
    return replace(table, rows=tuple(rows))


def density(sigmas):
    """A U over noise level, a decade deep."""
    return np.exp(2.3 * ((sigmas - 0.6) / 0.4) ** 2)


def planted(table, *, last=8.0):
    scores = density(table.sigmas[:-1]) * output_weights(table) ** 2
    scores[-1] *= last
    return scores


def test_weights_are_how_much_an_output_moves_the_final_latents():
    table = multistep(7)
    rng = np.random.default_rng(0)
    noise, outputs = rng.normal(size=(2, 3)), rng.normal(size=(7, 2, 3))

    def final(changed=None):
        state = table.initial(noise)
        for k in range(7):
            state = table.advance(state, outputs[k] + (changed == k))
        return state.latents

    moved = [np.abs(final(k) - final()).mean() for k in range(7)]
    assert output_weights(table) == pytest.approx(moved, rel=1e-4)
    assert output_weights(euler(7)) == pytest.approx(-np.diff(euler(7).sigmas))


@pytest.mark.parametrize("make", [euler, multistep])
@pytest.mark.parametrize("num_steps", [10, 12, 30, 40])
def test_a_density_over_noise_level_is_found_at_another_number_of_steps(make, num_steps):
    source, target = make(20), make(num_steps)
    carried = carry(planted(source), *step_axes(source, target))
    truth = planted(target)
    # below the last level measured but one, the density is not known and held constant
    known = target.sigmas[:-2] >= source.sigmas[-3]
    assert known.sum() >= num_steps - 4
    assert np.abs(np.log(carried / truth))[:-1][known].max() < 0.15
    assert rank_deviation(truth, carried) <= 0.1 * num_steps
    assert regret(truth, carried) < 0.02


def test_weights_make_the_difference_between_schedules_of_other_spacing():
    source, target = euler(20, shift=1.0), euler(20, shift=6.0)
    carried = carry(planted(source), *step_axes(source, target))
    by_level_alone = np.interp(-target.sigmas[:-1], -source.sigmas[:-1], planted(source))
    assert regret(planted(target), carried) < 0.02 < regret(planted(target), by_level_alone)


def test_equal_tables_give_back_the_scores():
    scores = np.array([3.0, 1.0, 0.5, 7.0])
    assert carry(scores, *step_axes(euler(4), euler(4))) == pytest.approx(scores)


def test_the_last_step_is_carried_to_the_last_step_only():
    source, target = euler(20), euler(40)
    with_spike, without = (carry(planted(source, last=x), *step_axes(source, target)) for x in (50.0, 1.0))
    assert with_spike[:-1] == pytest.approx(without[:-1])
    assert with_spike[-1] == pytest.approx(50 * without[-1])


def test_scores_that_are_not_positive_stay_harmless():
    source, target = euler(6), euler(9)
    scores = np.array([1.0, -0.2, 0.0, 0.5, 0.5, 2.0])
    carried = carry(scores, *step_axes(source, target))
    assert np.isfinite(carried).all()
    assert (carried > 0).all()
    assert not carry(-np.abs(scores), *step_axes(source, target)).any()


def test_a_pair_of_steps_at_one_noise_level_counts_once():
    """Heun calls the denoiser twice at a level; the order within the pair must not decide."""
    source = replace(euler(4), sigmas=np.array([1.0, 0.5, 0.5, 0.2, 0.0]))
    axes = step_axes(source, euler(7))
    weights = axes[0].weights ** 2
    either = [carry(weights * np.array(densities), *axes) for densities in ([1, 2, 3, 4], [1, 3, 2, 4])]
    assert either[0] == pytest.approx(either[1])


def test_tables_that_cannot_be_put_side_by_side_are_refused():
    with pytest.raises(TransferError, match=r"DDIMScheduler.*calibrate it by itself"):
        step_axes(euler(5), euler(5, scheduler="DDIMScheduler"))
    rising = replace(euler(4), sigmas=np.array([1.0, 0.5, 0.7, 0.2, 0.0]))
    with pytest.raises(TransferError, match="rises"):
        step_axes(euler(5), rising)
    with pytest.raises(TransferError, match="one step cannot stand for 4"):
        carry(np.ones(1), *step_axes(euler(1), euler(4)))


def test_timesteps_stand_in_where_a_table_states_no_sigmas():
    source, target = euler(20), euler(30)
    bare = replace(target, sigmas=None)
    assert carry(planted(source), *step_axes(source, bare)) == pytest.approx(
        carry(planted(source), *step_axes(source, target))
    )


@pytest.mark.parametrize("num_steps", [1, 2, 3, 6, 7, 12, 50])
def test_checked_steps_include_both_ends(num_steps):
    steps = check_steps(num_steps)
    assert (steps[0], steps[-1]) == (0, num_steps - 1)
    assert list(steps) == sorted(set(steps))
    assert len(steps) == min(CHECKED_STEPS, num_steps)


def test_the_check_tells_noise_from_another_curve():
    """Noise of 40 % on both sides passes, an unrelated curve of the same spread does not."""
    rng = np.random.default_rng(0)
    agree, differ = 0, 0
    for _ in range(200):
        truth = np.exp(1.2 * rng.normal(size=CHECKED_STEPS))
        noisy = truth * np.exp(0.4 * np.sqrt(2) * rng.normal(size=CHECKED_STEPS))
        other = np.exp(1.2 * rng.normal(size=CHECKED_STEPS))
        agree += compare(truth, 5 * noisy).holds
        differ += compare(truth, other).holds
    assert agree > 180
    assert differ < 20


def test_level_and_scatter_are_reported_apart():
    found = compare(np.array([1.0, 2.0, 4.0]), np.array([3.0, 6.0, 12.0]))
    assert found.level == pytest.approx(3.0)
    assert found.scatter == pytest.approx(0.0, abs=1e-12)
    assert found.spearman == pytest.approx(1.0)
    assert not compare(np.array([1.0, 1.1, 1.2]), np.array([1.2, 1.1, 1.0])).holds
    assert compare(np.ones(3), np.ones(3)).holds


# positions of correlations ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "others"), [(20, 40), (20, 9), (50, 6), (7, 50), (4, 2)])
def test_positions_keep_their_noise_level_and_the_last_step_is_the_last(steps, others):
    source, target = step_axes(euler(steps), euler(others, shift=5.0))
    positions = [*np.linspace(0, steps - 2, 9), steps - 1]
    found = carry_positions(positions, source, target)
    assert (np.diff(found) >= 0).all()
    assert (found[0], found[-1]) == (0, others - 1)
    level = np.interp(positions, np.arange(steps), source.levels)
    reached = np.interp(found, np.arange(others), target.levels)
    inside = level[:-1] >= target.levels[-1]
    np.testing.assert_allclose(reached[:-1][inside], level[:-1][inside])
    assert (found[:-1][~inside] == others - 1).all()


def test_equal_tables_give_back_the_positions():
    for table in (euler(9), multistep(9), heun()):
        axes = step_axes(table, table)
        positions = [0.0, 1.0, 2.0, 2.5, table.num_steps - 1.5, table.num_steps - 1.0]
        np.testing.assert_array_equal(carry_positions(positions, *axes), positions)
    np.testing.assert_array_equal(carry_positions([0, 3, 5], *step_axes(euler(6), euler(1))), 0)


def heun():
    """Two calls at every noise level but the first and the last."""
    return replace(euler(6), sigmas=np.array([1.0, 0.6, 0.6, 0.3, 0.3, 0.1, 0.0]))


def test_steps_at_one_noise_level_have_one_position():
    axes = step_axes(heun(), euler(30))
    found = carry_positions(range(6), *axes)
    assert found[1] == found[2] < found[3] == found[4] < found[5] == 29
    values = np.round(np.random.default_rng(0).uniform(0, 0.5, size=(6, 6)), 4)
    values = (values + values.T) / 2 + 0.5 * np.eye(6)
    stored = stored_document({"int8": tuple(range(6))}, {("int8", "int8"): values}, num_steps=6)
    result = carried_scores(stored, *axes).correlations
    assert result.positions["int8"] == pytest.approx(found[[0, 1, 3, 5]])
    kept = [0, 2, 4, 5]
    np.testing.assert_array_equal(result.values["int8", "int8"], values[np.ix_(kept, kept)])


def test_of_all_that_lie_beyond_the_last_step_the_last_one_stands_for_it():
    axes = step_axes(euler(20, shift=1.0), euler(6, shift=5.0))
    grid = np.eye(20)
    grid[-1, :-1] = grid[:-1, -1] = np.linspace(0.1, 0.2, 19)
    stored = stored_document({"int8": tuple(range(20))}, {("int8", "int8"): grid}, num_steps=20)
    result = carried_scores(stored, *axes).correlations
    count = len(result.positions["int8"])
    assert count < 20
    assert result.positions["int8"][-1] == 5
    np.testing.assert_array_equal(result.values["int8", "int8"][-1], [*grid[-1, : count - 1], 1])


# in a calibration -------------------------------------------------------------------------------------------------

STEPS = 14
SIZES = np.sqrt(planted(euler(STEPS)))
ORIGIN = TransferRecord(bundle_id="a" * 64, num_steps=20, guidance_scale=4.5, checks=())
SETTINGS = CalibrationSettings(
    bundle_id="b" * 64,
    machine="none",
    guidance_scale=3.0,
    seed=0,
    calibration_prompts=("a",),
    validation_prompts=("b",),
)


def loop(seed=0):
    errors = {"int8": 0.05 * SIZES, "int4": 0.2 * SIZES}
    return PlantedEvaluator(errors, gains=[1.0] * STEPS, correlation=0.0, seed=seed)


@functools.cache
def swept():
    options = {"method": "sweep", "budget": HighSteps(4), "validation": loop(1)}
    return calibrate_loops(loop(), LATENCIES_MS, **options).sensitivity.model_copy(update={"settings": SETTINGS})


def stored_document(positions, values, num_steps):
    """A calibration of "int8" alone, with these correlations."""
    plain = PlantedEvaluator({"int8": [0.1] * num_steps}, gains=[1.0] * num_steps)
    found = calibrate_loops(plain, {"fp16": 2.0, "int8": 1.0}, method="sweep").sensitivity
    records = tuple(
        CorrelationRecord(first=a, second=b, values=tuple(map(tuple, grid.tolist()))) for (a, b), grid in values.items()
    )
    gram = GramRecord(positions=positions, correlations=records, floor=(0.0,) * num_steps)
    return found.model_copy(update={"gram": gram, "settings": SETTINGS})


def carried(**changes):
    """Right in shape, wrong in level, as from a loop of another length."""
    names = ("int8", "int4")
    curves = dict.fromkeys(names, 7.0 * SIZES**2)
    positions = {name: tuple(np.arange(STEPS) + 0.0) for name in names}
    values = {pair: np.eye(STEPS) for pair in (("int8", "int8"), ("int8", "int4"), ("int4", "int4"))}
    return CarriedScores(curves | changes, Correlations(positions, values), ORIGIN)


def test_carried_scores_give_the_schedule_of_a_full_sweep_for_a_few_calls():
    counted = Counted(loop())
    found = calibrate_loops(
        counted, LATENCIES_MS, budget=HighSteps(4), validation=loop(1), carried=carried()
    ).sensitivity
    assert found.schedule == swept().schedule
    assert found.method == "transfer"
    assert found.predicted_error == pytest.approx(swept().predicted_error, rel=0.02)
    expected = 2 * 2 * sum(STEPS - step for step in check_steps(STEPS))
    assert found.search_calls == expected < 0.6 * swept().search_calls
    assert sum(sum(calls.values()) for stage, calls in found.calls.items() if stage.startswith("cal")) == (
        counted.calls.total()
    )
    checks = {check.precision: check for check in found.transfer.checks}
    assert checks["int4"].scatter < 0.01
    assert checks["int4"].steps == check_steps(STEPS)
    assert checks["int4"].level == pytest.approx(found.scores[1].scores[3] / (7.0 * SIZES[3] ** 2), rel=0.01)
    record = next(record for record in found.scores if record.precision == "int4")
    assert [step for step, known in enumerate(record.measured) if known] == list(check_steps(STEPS))
    assert found.gram.positions == {name: tuple(range(STEPS)) for name in ("int8", "int4")}


def test_a_pool_is_asked_for_all_checks_of_a_precision_at_once_and_changes_nothing():
    options = {"budget": HighSteps(4), "validation": loop(1), "carried": carried()}
    alone = calibrate_loops(loop(), LATENCIES_MS, **options).sensitivity
    pool = PoolHere(calibration=loop(), validation=loop(1))
    assert calibrate_loops(loop(), LATENCIES_MS, pool=pool, **options).sensitivity == alone
    samples = loop().num_samples
    # the uniform runs come first
    assert pool.together[:3] == [3 * samples, CHECKED_STEPS * samples, CHECKED_STEPS * samples]


def test_scores_that_do_not_hold_are_refused_with_figures_and_cost_the_next_run_nothing(tmp_path):
    wrong = carried(int4=SIZES[::-1] ** 4)
    path = tmp_path / "run.journal"
    with pytest.raises(TransferError, match=r"int4 scores do not hold here: measured at steps 0, .*factor of \d+\.\d"):
        calibrate_loops(loop(), LATENCIES_MS, carried=wrong, journal=open_journal(path, loop()))
    counted = Counted(loop())
    sweep = calibrate_loops(counted, LATENCIES_MS, method="sweep", journal=open_journal(path, counted)).sensitivity
    alone = calibrate_loops(loop(), LATENCIES_MS, method="sweep").sensitivity
    assert sweep == alone
    checked = 2 * sum(STEPS - step for step in check_steps(STEPS))
    assert counted.calls["int8"] < sum(stage.get("int8", 0) for stage in alone.calls.values())
    assert counted.calls.total() <= sum(sum(stage.values()) for stage in alone.calls.values()) - checked


def test_a_precision_without_carried_scores_is_refused():
    known = carried()
    only = CarriedScores({"int8": known.curves["int8"]}, known.correlations, ORIGIN)
    with pytest.raises(TransferError, match="none for int4, only for int8; calibrate this bundle without --from"):
        calibrate_loops(loop(), LATENCIES_MS, carried=only)


def test_a_precision_more_is_left_out():
    errors = {"int4": 0.2 * SIZES}
    fewer = PlantedEvaluator(errors, gains=[1.0] * STEPS, correlation=0.0)
    found = calibrate_loops(fewer, {"fp16": 8.0, "int4": 3.0}, budget=HighSteps(4), carried=carried()).sensitivity
    assert set(found.gram.positions) == {"int4"}
    assert [record.precision for record in found.scores] == ["int4"]
    assert found.schedule == swept().schedule


def test_a_stored_calibration_is_carried_whole(tmp_path):
    with pytest.raises(ValueError, match="settings"):
        carried_scores(swept().model_copy(update={"settings": None}), *step_axes(euler(STEPS), euler(30)))
    swept().save(tmp_path / "sensitivity.json")
    stored = Sensitivity.load(tmp_path / "sensitivity.json")
    axes = step_axes(euler(STEPS), euler(30))
    result = carried_scores(stored, *axes)
    assert (result.origin.bundle_id, result.origin.num_steps, result.origin.guidance_scale) == ("b" * 64, STEPS, 3.0)
    assert list(result.curves) == ["int8", "int4"]
    for record in stored.scores:
        np.testing.assert_array_equal(result.curves[record.precision], carry(np.array(record.scores), *axes))
        assert result.correlations.positions[record.precision] == pytest.approx(
            carry_positions(stored.gram.positions[record.precision], *axes)
        )
    assert list(result.correlations.values) == [("int8", "int8"), ("int8", "int4"), ("int4", "int4")]
    nothing = stored.model_copy(update={"gram": None, "scores": ()})
    with pytest.raises(TransferError, match="has none, as it dropped every low precision"):
        carried_scores(nothing, *axes)


@dataclass(frozen=True)
class ByLevel(PlantedEvaluator):
    """Errors that point alike at like noise levels: a correlation of 0.8 that falls with their distance."""

    levels: tuple[float, ...] = ()

    def _direction(self, index):
        own, common = np.zeros(self._size), np.zeros(self._size)
        frequencies = np.random.default_rng(0).normal(size=60) / 0.25
        common[:60], common[60:120] = np.cos(frequencies * self.levels[index]), np.sin(frequencies * self.levels[index])
        own[121 + index] = 1.0
        return np.sqrt(0.8 / 60) * common + np.sqrt(0.2) * own


def test_correlations_follow_the_noise_level_to_another_sampler_table():
    tables = {"source": euler(30, shift=4.0), "target": euler(8, shift=1.0)}  # their last levels agree
    loops = {
        name: ByLevel(
            {"int8": 0.5 * (sizes := output_weights(table) * (1 + table.sigmas[:-1])), "int4": 2.0 * sizes},
            gains=[1.0] * table.num_steps,
            levels=tuple(table.sigmas[:-1]),
        )
        for name, table in tables.items()
    }
    source = calibrate_loops(loops["source"], LATENCIES_MS, method="sweep").sensitivity
    axes = step_axes(tables["source"], tables["target"])
    scores = carried_scores(source.model_copy(update={"settings": SETTINGS}), *axes)
    stored = stored_correlations(source.gram)
    by_index = {name: tuple(np.array(steps) * 7 / 29) for name, steps in stored.positions.items()}
    worse = replace(scores, correlations=replace(stored, positions=by_index))
    generator = np.random.default_rng(0)
    schedules = [tuple(row) for row in generator.choice(["fp16", "int8", "int4"], size=(60, 8), p=[0.3, 0.2, 0.5])]
    truth = [loops["target"].true_error(schedule) for schedule in schedules]
    figures = []
    for carried_ones in (scores, worse):
        found = calibrate_loops(loops["target"], LATENCIES_MS, carried=carried_ones, budget=HighSteps(3)).sensitivity
        gram = stored_gram(found)
        figures.append(fit("gram", [gram.error(schedule) for schedule in schedules], truth))
    by_level, otherwise = figures
    assert by_level.r2 > 0.99
    assert by_level.ratio == pytest.approx(1, abs=0.05)
    assert by_level.scatter < 0.1
    assert otherwise.scatter > 2 * by_level.scatter
    assert abs(otherwise.ratio - 1) > 2 * abs(by_level.ratio - 1)


def test_another_denoiser_is_refused():
    def bundle(digest):
        return SimpleNamespace(folder=digest, manifest=SimpleNamespace(model=SimpleNamespace(denoiser_sha256=digest)))

    with pytest.raises(TransferError, match="bundle one was built from another denoiser than two"):
        scores_from(bundle("one"), None, None, SimpleNamespace(bundle=bundle("two"), manifest=bundle("two").manifest))


def test_the_limit_is_a_factor_of_two_and_a_half():
    assert np.exp(MAX_SCATTER) == pytest.approx(2.5, abs=0.05)
