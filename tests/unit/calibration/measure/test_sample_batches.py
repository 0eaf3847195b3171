"""Measurements of several samples in one call: the same result as one by one."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers.tiny_pipeline import PROMPTS
from helpers.worker_samples import STEPS, calibrated, loop, picture

from calibration import open_journal
from calibration.measure.bundle_evaluator import BundleEvaluator, samples_per_call
from calibration.measure.journal import Journal
from calibration.measure.measurements import Measurements
from calibration.measure.sample_batches import SampleBatches, SampleSet
from engines.errors import TmpDiffError
from engines.runtime import DenoiseRuntime


class Together:
    """A planted loop that takes a step of several samples at once; counts calls and the samples in them."""

    def __init__(self, inner, sizes: Counter[int], *, overflows: bool = False):
        self.inner, self.sizes, self.overflows = inner, sizes, overflows
        self.num_steps, self.precisions, self.num_samples = inner.num_steps, inner.precisions, inner.num_samples
        self.start, self.key = inner.start, inner.key

    def step(self, sample, state, precision):
        raise AssertionError("a pool takes all steps")

    def steps(self, samples, states, precision):
        self.sizes[len(samples)] += 1
        assert len({index for index, _ in states}) == 1
        return [self.inner.step(sample, state, precision) for sample, state in zip(samples, states, strict=True)]

    def latents(self, state):
        return self.inner.latents(state) * (np.nan if self.overflows else 1)


def pictures(latents):
    return np.stack([picture(item) for item in latents])


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

    journal = Journal.in_memory("")
    first = Measurements("calibration", loop(), journal, pool=batches(3, Counter()))
    error = first.changed_error("int8", 4, "fp16", 0)
    second = Measurements("calibration", loop(), journal, pool=batches(3, Counter()))
    assert second.changed_error("int8", 4, "fp16", 0) == error
    second.changed_error("int8", 6, "fp16", 0)
    assert second.evaluator.spent == {"fp16": 1, "int8": STEPS - 7}
    assert second.evaluator.recomputed == {"fp16": STEPS, "int8": STEPS}


@pytest.mark.parametrize("share", [0.0, 0.1, 0.35, 0.6, 0.9, 1.0])
def test_one_by_one_gives_what_no_pool_gives_bit_for_bit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, share: float
) -> None:
    """Sensitivity, progress, journal and recomputed calls, also of a run that goes on from a share of the journal."""

    def run(name: str, lines: list[bytes], pool: SampleBatches | None):
        path, seen = tmp_path / name, []
        path.write_bytes(b"".join(lines))
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="calibration.run"):
            journal = open_journal(path, loop(), loop(seed=1))
            found = calibrated(journal, pool, progress=lambda *step: seen.append(step))
        recomputed = [(*record.args[:-1], Counter(record.args[-1])) for record in caplog.records]
        return found, seen, path.read_bytes(), recomputed

    _, _, whole, recomputed = run("whole", [], None)
    assert recomputed == []
    lines = whole.splitlines(keepends=True)
    kept = lines[: round(share * len(lines))]
    alone, pooled = run("alone", kept, None), run("pooled", kept, batches(1, Counter()))
    assert pooled == alone
    assert alone[2] == whole
    assert bool(alone[3]) == (0 < share < 1)


def test_latents_that_overflow_are_named():
    measurements = Measurements(
        "calibration", loop(), Journal.in_memory(""), pool=batches(3, Counter(), overflows=True)
    )
    with pytest.raises(TmpDiffError, match="uniform fp16 run of calibration sample 0 gave latents that are not finite"):
        measurements.uniform_error("fp16", 0)


def test_no_sample_at_once_is_refused():
    with pytest.raises(ValueError, match="expected 1 or more"):
        SampleBatches({}, 0)


def test_a_bundle_steps_several_samples_as_it_steps_each(tiny_pipeline: Path, tmp_path: Path):
    from engines.precision import Precision
    from tmpdiff_export.bundling.bundle import build
    from tmpdiff_export.bundling.options import BuildOptions

    options = BuildOptions(precisions=(Precision.FP16,), prompts=PROMPTS, num_steps=4, backend="onnxruntime")
    build(tiny_pipeline, tmp_path / "bundle", options)
    with DenoiseRuntime.load(tmp_path / "bundle", threads=1) as runtime:
        evaluator = BundleEvaluator(runtime, PROMPTS, seed=3, guidance_scale=4.0)
        order = [2, 0]
        states = [evaluator.start(sample) for sample in order]
        alone = {sample: evaluator.start(sample) for sample in order}
        for _ in range(4):  # a multistep scheduler: what it keeps of earlier steps is split as well
            states = evaluator.steps(order, states, "fp16")
            alone = {sample: evaluator.step(sample, state, "fp16") for sample, state in alone.items()}
        for sample, state in zip(order, states, strict=True):
            np.testing.assert_allclose(evaluator.latents(state), evaluator.latents(alone[sample]), rtol=1e-3, atol=1e-4)
        assert np.abs(evaluator.latents(states[0]) - evaluator.latents(states[1])).max() > 0.1
        with pytest.raises(ValueError, match="expected all at one step"):
            evaluator.steps(order, [states[0], evaluator.start(0)], "fp16")


@pytest.mark.parametrize(
    ("batch", "scale", "embeds_guidance", "expected"),
    [(16, 4.5, False, 8), (16, 1.0, False, 16), (16, 4.5, True, 16), (1, 4.5, False, 1), (None, 4.5, False, 1)],
)
def test_a_call_takes_as_many_samples_as_the_reference_is_compiled_for(
    batch: int | None, scale: float, embeds_guidance: bool, expected: int
) -> None:
    entries = {"fp16": SimpleNamespace(package=batch and SimpleNamespace(batch=batch)), "int8": None}
    manifest = SimpleNamespace(denoisers=entries, embeds_guidance=embeds_guidance)
    runtime: Any = SimpleNamespace(precisions=("fp16", "int8"), manifest=manifest)
    assert samples_per_call(runtime, scale) == expected
