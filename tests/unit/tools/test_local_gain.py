"""Local error times gain: planted loops whose gains are known, weights read off a table, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from planted import Counted, PlantedEvaluator
from test_experiments import NUM_STEPS, command, run, studied  # noqa: F401  (a fixture)
from test_transfer import euler, multistep

from calibration.bisection import adaptive_bisection
from calibration.journal import Journal
from calibration.measurements import Measurements
from calibration.statistics import error_regret, rank_deviation
from calibration.transfer import TransferError, carried_weights
from engines.sampler import SamplerRow

STEPS = 20


def rough_sizes(seed: int, spread: float = 0.5) -> np.ndarray:
    """Errors of single steps that differ by chance from step to step."""
    return 0.05 * np.exp(spread * np.random.default_rng(seed).normal(size=STEPS))


def loop(seed: int, gain: float = 0.97) -> PlantedEvaluator:
    return PlantedEvaluator({"int8": rough_sizes(seed)}, gains=[gain] * STEPS, num_samples=2, seed=seed)


def measured(evaluator: PlantedEvaluator | Counted) -> tuple[Measurements, dict[str, list[list[float]]]]:
    found = Measurements("calibration", evaluator, Journal.in_memory("key"))
    samples = range(evaluator.num_samples)
    downcast = [[found.changed_error("fp16", k, "int8", s) for k in range(STEPS)] for s in samples]
    local = [[found.local_error(k, "int8", s) for k in range(STEPS)] for s in samples]
    return found, {"downcast": downcast, "local": local}


def test_a_local_error_is_a_single_call_and_what_the_loop_has_not_stretched_yet():
    counted = Counted(loop(0))
    found, values = measured(counted)
    stretched = 0.97 ** (2 * np.arange(STEPS)[::-1])
    for downcast, local in zip(values["downcast"], values["local"], strict=True):
        assert np.array(downcast) == pytest.approx(np.array(local) * stretched, rel=1e-3)
        assert local[-1] == pytest.approx(downcast[-1], rel=1e-12)
    assert found.calls["calibration: local int8"] == {"int8": 2 * STEPS}
    assert sum(sum(stage.values()) for stage in found.calls.values()) == counted.calls.total()


def test_local_errors_are_kept_for_the_next_run(tmp_path):
    def journal():
        return Journal.open(tmp_path / "journal", "key", {})

    first = Measurements("calibration", loop(0), journal()).local_error(3, "int8", 1)
    counted = Counted(loop(0), limit=0)
    assert Measurements("calibration", counted, journal()).local_error(3, "int8", 1) == first


def test_fewer_calls_rank_better_where_the_gain_is_smooth():
    """Both on the same loop: the calls of the local errors are paid for by fewer runs to the end."""
    for seed in range(5):
        _, values = measured(loop(seed))
        scores, local = (np.mean(values[name], axis=0) for name in ("downcast", "local"))
        plain = adaptive_bisection(scores.__getitem__, STEPS)
        over_gain = adaptive_bisection(scores.__getitem__, STEPS, max_evaluations=4, shape=local)
        assert calls_of(over_gain) + STEPS < 0.75 * calls_of(plain)
        assert rank_deviation(scores, over_gain.scores) < 0.2 < rank_deviation(scores, plain.scores)
        assert error_regret(scores, over_gain.scores) < 0.01 < error_regret(scores, plain.scores)


def test_a_shape_that_says_nothing_does_harm():
    """The other way round: a smooth score, and local errors that have nothing to do with it."""
    smooth = np.exp(np.linspace(0, 4, STEPS))
    plain = adaptive_bisection(smooth.__getitem__, STEPS, max_evaluations=6)
    misled = adaptive_bisection(smooth.__getitem__, STEPS, max_evaluations=6, shape=rough_sizes(0))
    assert rank_deviation(smooth, misled.scores) > rank_deviation(smooth, plain.scores)


def calls_of(search):
    return sum(STEPS - step for step in search.order)


@pytest.mark.parametrize("make", [euler, multistep])
def test_weights_carry_a_changed_latent_to_the_end(make):
    """A step's own output changed by d: x_{i+1} moves by the own coefficient, x_T by the weight times that."""
    table = make(7)
    rng = np.random.default_rng(0)
    noise, outputs = rng.normal(size=(2, 3)), rng.normal(size=(7, 2, 3))

    def states(changed=None):
        found = [table.initial(noise)]
        for k in range(7):
            found.append(table.advance(found[-1], outputs[k] + (changed == k)))
        return [state.latents for state in found]

    plain = states()
    for k, weight in enumerate(carried_weights(table)):
        moved = [np.abs(a - b).mean() for a, b in zip(states(k), plain, strict=True)]
        assert moved[-1] == pytest.approx(weight * moved[k + 1], rel=1e-3)


def test_a_step_that_does_not_use_its_own_output_is_refused():
    table = euler(4)
    rows = (*table.rows[:2], SamplerRow(((2, 1.0),), ((1, -0.2),)), table.rows[3])
    with pytest.raises(TransferError, match=r"step 2 of FlowMatchEuler.* does not use its own model output"):
        carried_weights(replace(table, rows=rows))


def test_a_known_shape_is_found_from_three_evaluations():
    shape = rough_sizes(1)
    search = adaptive_bisection((3.0 * shape).__getitem__, STEPS, max_evaluations=3, shape=shape)
    assert search.scores == pytest.approx(3.0 * shape)
    for wrong in (np.zeros(STEPS), np.ones(STEPS - 1), np.full(STEPS, np.nan)):
        with pytest.raises(ValueError, match="numbers, expected 20 positive ones, one per step"):
            adaptive_bisection(shape.__getitem__, STEPS, shape=wrong)


@pytest.mark.parametrize(("exact", "expected"), [(True, "met"), (False, "missed")])
def test_the_command_judges_planted_curves(tmp_path, exact, expected):
    """Ten samples: rough scores with a smooth gain, or smooth scores with local errors that are noise."""
    rng = np.random.default_rng(0)
    level = np.exp(0.1 * rng.normal(size=(10, 1)))
    stretched = np.exp(np.linspace(-1, 0, STEPS))
    local = rough_sizes(2) if exact else np.exp(3 * rng.normal(size=STEPS))
    downcast = local * stretched if exact else np.exp(np.linspace(0, 4, STEPS))
    content = {
        "experiment": "local_gain",
        "version": 1,
        "setting": {
            "num_steps": STEPS, "backend": "onnxruntime", "denoiser": "planted", "calibration_prompts": ["a"] * 10,
        },
        "data": {
            "weights": (2 * stretched).tolist(),
            "precisions": {
                "int8": {
                    "downcast": (level * downcast).tolist(),
                    "local": (level * local / (4 * stretched**2)).tolist(),
                }
            },
        },
    }  # fmt: skip
    path = tmp_path / "gain.json"
    path.write_text(json.dumps(content))
    done = command("local_gain", "--redraw", path)
    assert done.returncode == 0, done.stderr
    written = json.loads(path.read_text())
    found, (goal,) = written["findings"]["int8"], written["goals"]
    assert goal["verdict"] == expected
    assert (found["regret difference"]["value"] < 0) == exact
    assert (found["roughness of the gain"]["value"] < found["roughness of the score"]["value"]) == exact
    if exact:
        assert found["gain"] == pytest.approx(stretched, rel=1e-4)  # weighted by the table: local / (2 s)^2 * (2 s)^2
    searches = found["points"]
    for plain in searches["bisection"]:
        assert 0 < plain["calls_share"] <= 1
    over_gain = searches["bisection over the gain"]
    assert all(point["calls_share"] > STEPS / 210 for point in over_gain)  # the local errors themselves
    assert (over_gain[-1]["deviation"] == 0) == exact
    assert found["at_equal_calls"]["bisection over the gain"]["calls_share"] <= found["calls"] / 210
    assert (tmp_path / "gain.png").read_bytes().startswith(b"\x89PNG")


def test_the_command(studied: tuple[Path, Path], tmp_path: Path) -> None:  # noqa: F811
    found = run("local_gain", studied, tmp_path / "gain")
    data = found["data"]["precisions"]["int8"]
    assert np.shape(data["downcast"]) == np.shape(data["local"]) == (2, NUM_STEPS)
    for downcast, local in zip(data["downcast"], data["local"], strict=True):
        assert local[-1] == pytest.approx(downcast[-1], rel=1e-4)
    assert found["data"]["weights"][-1] == pytest.approx(1.0)
    assert found["findings"]["int8"]["points"]["bisection over the gain"][-1]["deviation"] == 0
    (goal,) = found["goals"]
    assert goal["subject"] == "int8"
    assert str(tmp_path) not in json.dumps(found)
