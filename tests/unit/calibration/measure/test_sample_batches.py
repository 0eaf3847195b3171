"""Measurements of several samples in one call: the same result as one by one."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers.planted import measurements
from helpers.tiny_pipeline import PROMPTS
from helpers.worker_samples import STEPS, calibrated, loop, pictures

from calibration import open_journal
from calibration.measure.bundle_evaluator import BundleEvaluator, samples_per_call
from calibration.measure.evaluator import SampleSet
from calibration.measure.journal import Journal
from calibration.measure.measurements import Measurements
from calibration.measure.sample_batches import SampleBatches
from engines.errors import TmpDiffError
from engines.runtime import DenoiseRuntime


class Together:
    """A planted loop that takes a step of several samples at once; counts calls and the samples in them."""

    def __init__(self, inner, sizes: Counter[int], *, overflows: bool = False):
        self.inner, self.sizes, self.overflows = inner, sizes, overflows
        self.num_steps, self.precisions, self.num_samples = inner.num_steps, inner.precisions, inner.num_samples
        self.start, self.key = inner.start, inner.key

    def steps(self, samples, states, precision):
        self.sizes[len(samples)] += 1
        assert len({index for index, _ in states}) == 1
        return self.inner.steps(samples, states, precision)

    def latents(self, state):
        return self.inner.latents(state) * (np.nan if self.overflows else 1)


def batches(at_once: int, sizes: Counter[int], **options) -> SampleBatches:
    sets = {
        "calibration": SampleSet(Together(loop(), sizes, **options)),
        "validation": SampleSet(Together(loop(seed=1), sizes), pictures),
    }
    return SampleBatches(sets, at_once)


@pytest.mark.parametrize("at_once", [1, 3, 8])
def test_equal_result_and_counts_for_fewer_calls(tmp_path: Path, at_once: int):
    sizes: Counter[int] = Counter()
    expected = calibrated(open_journal(tmp_path / "alone", loop(), loop(seed=1)))
    found = calibrated(open_journal(tmp_path / "together", loop(), loop(seed=1)), batches(at_once, sizes))
    assert found == expected, "values and counted calls, bit for bit"
    largest = min(at_once, loop().num_samples)
    assert max(sizes) == largest
    samples = sum(size * calls for size, calls in sizes.items())
    counted = sum(sum(calls.values()) for calls in expected.calls.values())
    assert samples == counted, "nothing is computed twice"
    assert sizes.total() < 1.7 * counted / largest  # 5 samples are 3 + 2


def test_a_resumed_run_computes_lost_states_again_and_says_so(tmp_path: Path):
    path = tmp_path / "journal"
    expected = calibrated(open_journal(path, loop(), loop(seed=1)))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[: len(lines) // 2]))
    assert calibrated(open_journal(path, loop(), loop(seed=1)), batches(3, Counter())) == expected

    journal, sizes = Journal.in_memory(""), Counter[int]()
    first = Measurements("calibration", SampleSet(loop()), journal, batches(3, Counter()))
    late, later = (tuple("fp16" if index == step else "int8" for index in range(STEPS)) for step in (4, 6))
    error = first.schedule_error("some", late, 0, pictures=False)
    second = Measurements("calibration", SampleSet(loop()), journal, batches(3, sizes))
    assert second.schedule_error("some", late, 0, pictures=False) == error
    assert not sizes
    second.schedule_error("some", later, 0, pictures=False)
    assert second.calls["calibration: some"] == {"fp16": 2, "int8": STEPS - 5 + STEPS - 7}
    assert second.recomputed == {"fp16": STEPS, "int8": STEPS}
    assert sizes == {1: 2 * STEPS + STEPS - 6}


@pytest.mark.parametrize("at_once", [1, 3])
@pytest.mark.parametrize("share", [0.1, 0.35, 0.6, 0.9, 1.0])
def test_a_run_that_goes_on_ends_as_the_whole_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, share: float, at_once: int
) -> None:
    """Sensitivity, progress and, sample by sample, the journal bit for bit; what is computed again is said."""

    def run(name: str, lines: list[bytes], pool: SampleBatches | None):
        path, seen = tmp_path / name, []
        path.write_bytes(b"".join(lines))
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="calibration.run"):
            journal = open_journal(path, loop(), loop(seed=1))
            found = calibrated(journal, pool, progress=lambda *step: seen.append(step))
        recomputed = {record.args[0]: sum(record.args[1].values()) for record in caplog.records}
        return found, seen, path.read_bytes(), recomputed

    found, seen, whole, recomputed = run("whole", [], None)
    assert recomputed == {}
    lines = whole.splitlines(keepends=True)
    sizes: Counter[int] = Counter()
    again = run("again", lines[: round(share * len(lines))], batches(at_once, sizes))
    assert again[:2] == (found, seen)
    assert again[2] == whole if at_once == 1 else sorted(again[2].splitlines(keepends=True)) == sorted(lines)
    measured = sum(sum(json.loads(line)["calls"].values()) for line in lines[round(share * len(lines)) :])
    assert sum(size * calls for size, calls in sizes.items()) == measured + sum(again[3].values())


def vectors(found: Measurements) -> dict[Any, tuple[float, bytes]]:
    """E and direction of all downcasts to int8, and of the nudged runs, announced first."""
    samples = range(found.num_samples)
    found.expect_nudged()
    for step in range(STEPS):
        found.expect_downcasts(step, "int8")
    runs = {("nudged", sample): found.nudged(sample) for sample in samples}
    runs |= {(step, sample): found.downcast(step, "int8", sample) for step in range(STEPS) for sample in samples}
    return {key: (run.error, run.direction.tobytes()) for key, run in runs.items()}


@pytest.mark.parametrize("at_once", [1, 3, 8])
def test_directions_are_the_same_however_they_are_measured(tmp_path: Path, at_once: int):
    expected = vectors(measurements(loop()))
    path, samples = tmp_path / "journal", SampleSet(loop())
    sizes: Counter[int] = Counter()
    whole = Measurements("calibration", samples, open_journal(path, loop()), batches(at_once, sizes))
    assert vectors(whole) == expected
    assert max(sizes) == min(at_once, loop().num_samples)
    lines = path.read_bytes().splitlines(keepends=True)
    for share in (0.3, 0.8):
        path.write_bytes(b"".join(lines[: round(share * len(lines))]))
        again = Measurements("calibration", samples, open_journal(path, loop()), batches(at_once, Counter()))
        assert vectors(again) == expected
        assert again.calls == whole.calls
        assert sorted(path.read_bytes().splitlines(keepends=True)) == sorted(lines)


def test_directions_and_errors_are_those_of_the_planted_loop():
    planted = loop()
    found = measurements(planted)
    for step in (0, 4, 9):
        schedule = ["fp16"] * STEPS
        schedule[step] = "int8"
        runs = [found.downcast(step, "int8", sample) for sample in range(planted.num_samples)]
        assert np.mean([run.error for run in runs]) == pytest.approx(planted.true_error(schedule), rel=1e-3)
        for run in runs:
            assert run.direction.dtype == np.float16
            truth = np.zeros(192)
            truth[[0, step + 1]] = np.sqrt(0.3), np.sqrt(0.7)  # the part all errors share, and the step's own
            np.testing.assert_allclose(run.direction, truth, atol=2e-3)
    assert found.calls["calibration: downcast int8"] == {"int8": 3 * 5, "fp16": 5 * (9 + 5 + 0)}


def test_a_nudged_run_is_a_whole_reference_run_of_its_own():
    sizes: Counter[int] = Counter()
    found = Measurements("calibration", SampleSet(loop()), Journal.in_memory(""), batches(5, sizes))
    found.expect_nudged()
    runs = [found.nudged(sample) for sample in range(found.num_samples)]
    assert all(0 < run.error < 2.0**-30 for run in runs)
    assert found.calls["calibration: rounding"] == {"fp16": 5 * STEPS}
    assert sizes == {5: 2 * STEPS}
    assert found.uniform_error("fp16", 0)["error"] == 0, "the reference is what it was"
    assert found.downcast(0, "fp8", 0).error > 1e-6
    assert not found.recomputed


def test_latents_that_overflow_are_named():
    found = measurements(Together(loop(), Counter(), overflows=True))
    with pytest.raises(TmpDiffError, match="uniform fp16 run of calibration sample 0 gave latents that are not finite"):
        found.uniform_error("fp16", 0)


def test_no_sample_at_once_is_refused():
    with pytest.raises(ValueError, match="expected 1 or more"):
        SampleBatches({}, 0)


def test_a_bundle_steps_several_samples_as_it_steps_each(tiny_pipeline: Path, tmp_path: Path):
    from engines.precision import Precision
    from tmpdiff_export.bundling.bundle import build
    from tmpdiff_export.bundling.options import BuildOptions

    options = BuildOptions(precisions=(Precision.FP16,), prompts=PROMPTS, steps=(4,), backend="onnxruntime")
    build(tiny_pipeline, tmp_path / "bundle", options)
    with DenoiseRuntime.load(tmp_path / "bundle", threads=1) as runtime:
        evaluator = BundleEvaluator(runtime, PROMPTS, seed=3, guidance_scale=4.0)
        order = [2, 0]
        states = [evaluator.start(sample) for sample in order]
        alone = {sample: evaluator.start(sample) for sample in order}
        for _ in range(4):  # a multistep scheduler: what it keeps of earlier steps is split as well
            states = evaluator.steps(order, states, "fp16")
            alone = {sample: evaluator.steps([sample], [state], "fp16")[0] for sample, state in alone.items()}
        for sample, state in zip(order, states, strict=True):
            np.testing.assert_allclose(evaluator.latents(state), evaluator.latents(alone[sample]), rtol=1e-3, atol=1e-4)
        assert np.abs(evaluator.latents(states[0]) - evaluator.latents(states[1])).max() > 0.1
        assert_nudged_slightly(evaluator, BundleEvaluator(runtime, PROMPTS, seed=4, guidance_scale=4.0))
        with pytest.raises(ValueError, match="expected all at one step"):
            evaluator.steps(order, [states[0], evaluator.start(0)], "fp16")


def assert_nudged_slightly(evaluator: BundleEvaluator, later: BundleEvaluator) -> None:
    """`later` has the seeds of `evaluator`, one sample on."""
    for sample in range(evaluator.num_samples):
        start = evaluator.latents(evaluator.start(sample)).astype(np.float64)
        added = evaluator.latents(evaluator.start(sample, nudged=True)) - start
        rms = np.sqrt(np.mean(start**2))
        assert 0.9 < np.sqrt(np.mean(added**2)) / (2.0**-16 * rms) < 1.1
        assert abs(np.mean(added * start)) < 2.0**-16 * rms**2 * 0.3, "noise of its own"
        again = evaluator.start(sample, nudged=True)
        assert evaluator.latents(again).dtype == np.float32
        np.testing.assert_array_equal(evaluator.latents(again) - start, added)
    same_seed = later.latents(later.start(0, nudged=True))
    np.testing.assert_array_equal(same_seed, evaluator.latents(evaluator.start(1, nudged=True)))


@pytest.mark.parametrize(
    ("batch", "scale", "embeds_guidance", "expected"),
    [(16, 4.5, False, 8), (16, 1.0, False, 16), (16, 4.5, True, 16), (1, 4.5, False, 1), (None, 4.5, False, 1)],
)
def test_a_call_takes_as_many_samples_as_the_reference_is_compiled_for(
    batch: int | None, scale: float, embeds_guidance: bool, expected: int
) -> None:
    reference = SimpleNamespace(package=batch and SimpleNamespace(batch=batch))
    manifest = SimpleNamespace(reference=reference, embeds_guidance=embeds_guidance)
    runtime: Any = SimpleNamespace(precisions=("fp16", "int8"), manifest=manifest)
    assert samples_per_call(runtime, scale) == expected
