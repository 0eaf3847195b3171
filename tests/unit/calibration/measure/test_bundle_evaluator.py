"""States of samples that go from step to step together, and of samples that part: the same numbers, bit for bit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers.small_plans import table

from calibration.measure.bundle_evaluator import BundleEvaluator
from calibration.measure.evaluator import SampleSet
from calibration.measure.journal import Journal
from calibration.measure.measurements import Measurements
from calibration.measure.sample_batches import SampleBatches
from engines.errors import ScheduleError
from engines.loop import guided_output
from engines.manifest import LATENTS, MODEL_OUTPUT
from engines.reuse import REUSES, order_of
from engines.runtime import Conditioning

STEPS, SHAPE = 6, (2, 5, 3)


class Denoiser:
    """Works number by number, so that a sample does not depend on the others of a call; keeps what it was given."""

    def __init__(self, precision: str) -> None:
        self.offset = {"fp16": 0.0, "int8": 0.01}[precision]
        self.seen: list[np.ndarray] = []

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        latents, text = inputs[LATENTS], inputs["text"]
        self.seen.append(latents)
        return {MODEL_OUTPUT: np.sin(latents + text[:, :, None, None]) + np.float32(self.offset) * latents**2}


class FakeRuntime:
    """What `BundleEvaluator` asks of a runtime, with denoisers that cost nothing."""

    num_steps, precisions = STEPS, ("fp16", "int8")
    manifest, setting = SimpleNamespace(bundle_id="x"), SimpleNamespace(name="default")

    def __init__(self, reach: int) -> None:
        self.table = table(STEPS, reach, past_samples=True)
        self.denoisers = {name: Denoiser(name) for name in self.precisions}

    def encode(self, prompts: Any) -> Conditioning:
        text = np.random.default_rng(9).normal(size=(2 * len(prompts), SHAPE[0])).astype(np.float32)
        return Conditioning({"text": text}, len(prompts))

    def noise(self, seeds: Any) -> np.ndarray:
        return np.stack([np.random.default_rng(seed).standard_normal(SHAPE, dtype=np.float32) for seed in seeds])

    def step(self, state: Any, choice: str, batch: Any, scale: float, keep: int) -> Any:
        if (order := order_of(choice)) is not None:
            return self.table.reuse(state, order, keep)
        output = guided_output(self.table, state, self.denoisers[choice], batch, scale)  # type: ignore[arg-type]
        return self.table.advance(state, output, keep)


def evaluator(reach: int = 3, scale: float = 3.0, *, reuse: bool = False) -> tuple[BundleEvaluator, FakeRuntime]:
    runtime: Any = FakeRuntime(reach)
    return BundleEvaluator(runtime, [f"prompt {index}" for index in range(5)], 7, scale, reuse=reuse), runtime


@pytest.mark.parametrize("reach", [1, 3, STEPS])
def test_samples_that_part_and_meet_again_end_as_each_by_itself(reach: int) -> None:
    found, _ = evaluator(reach, reuse=True)
    calls = ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [3, 1], [4, 0, 2], [2, 3], [1, 4, 0])
    together = {sample: found.start(sample) for sample in range(5)}
    alone = dict(together)
    kept = []
    for samples in calls * 2:
        samples = [sample for sample in samples if together[sample].together.step_index < STEPS]
        for step in {together[sample].together.step_index for sample in samples}:
            chosen = [sample for sample in samples if together[sample].together.step_index == step]
            states = found.steps(chosen, [together[sample] for sample in chosen], "int8" if step == 2 else "fp16")
            together |= dict(zip(chosen, states, strict=True))
            for sample in chosen:
                alone[sample] = found.steps([sample], [alone[sample]], "int8" if step == 2 else "fp16")[0]
                kept.append((together[sample], alone[sample]))
    for one, other in kept:
        assert found.latents(one).shape == SHAPE
        assert not found.latents(one).flags.writeable
        assert found.latents(one).tobytes() == found.latents(other).tobytes()


def test_samples_that_stay_together_are_never_copied_apart() -> None:
    found, runtime = evaluator(scale=1.0)
    runtime.table.input_scale.setflags(write=True)
    runtime.table.input_scale[:] = 1.0
    chosen = range(5)
    states = found.steps(chosen, [found.start(sample) for sample in chosen], "fp16")
    before = states[0].together.latents
    found.steps(chosen, states, "int8")
    assert runtime.denoisers["int8"].seen[0] is before
    found.steps(chosen, states[::-1], "int8")
    assert runtime.denoisers["int8"].seen[1] is not before, "another order is another batch"
    assert runtime.denoisers["int8"].seen[1].tobytes() == before[::-1].tobytes()
    with pytest.raises(ValueError, match="expected all at one step"):
        found.steps([0, 1], [states[0], found.start(1)], "fp16")


def test_measurements_in_batches_of_any_size_are_those_one_by_one() -> None:
    def measured(at_once: int) -> list[tuple[float, bytes]]:
        samples = SampleSet(evaluator()[0])
        pool = SampleBatches({"calibration": samples}, at_once)
        found = Measurements("calibration", samples, Journal.in_memory(""), pool)
        found.expect_nudged()
        runs = [found.nudged(sample) for sample in range(5)]
        for step in range(STEPS):
            found.expect_downcasts(step, "int8")
            runs += [found.downcast(step, "int8", sample) for sample in range(5)]
        return [(run.error, run.direction.tobytes()) for run in runs]

    expected = measured(1)
    assert all(error > 0 for error, _ in expected)
    assert measured(2) == measured(3) == measured(8) == expected


@pytest.mark.parametrize("choice", REUSES)
def test_any_step_can_reuse_computed_outputs_once_there_are_enough(choice: str) -> None:
    found, runtime = evaluator(reuse=True)
    chosen = range(5)
    states = [found.start(sample) for sample in chosen]
    for k in range(STEPS):
        if k <= REUSES.index(choice):
            with pytest.raises(ScheduleError, match=f"step index {k} is {choice}"):
                found.steps(chosen, states, choice)
        else:
            calls = len(runtime.denoisers["fp16"].seen)
            reused = found.steps(chosen, states, choice)
            for sample, state in zip(chosen, reused, strict=True):
                alone = found.steps([sample], [states[sample]], choice)[0]
                assert found.latents(state).tobytes() == found.latents(alone).tobytes()
            assert len(runtime.denoisers["fp16"].seen) == calls
            assert [j for j, _ in reused[0].together.computed] == list(range(max(0, k - 3), k))
        states = found.steps(chosen, states, "fp16")


def test_states_keep_no_computed_outputs_unless_steps_may_be_reused() -> None:
    for reuse, kept in ((False, [0, 0, 0, 0, 0]), (True, [0, 1, 2, 3, 3])):
        found, _ = evaluator(reuse=reuse)
        states = [found.start(0)]
        for _ in kept[1:]:
            states += found.steps([0], states[-1:], "fp16")
        assert [len(state.together.computed) for state in states] == kept
