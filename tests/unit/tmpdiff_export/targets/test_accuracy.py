"""SQNR of engines: calls count for as much as their loop step moves the latents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from helpers.tiny_pipeline import PROMPTS, tiny_options
from helpers.whole_pipeline import setting_of, whole_pipeline

from engines.engine import Engine
from engines.manifest import MODEL_OUTPUT
from engines.runtime import DenoiseRuntime
from tmpdiff_export.bundling.checked import with_larger_batch
from tmpdiff_export.bundling.observed import CHECK_BATCHES
from tmpdiff_export.pipelines.load import gather_batches
from tmpdiff_export.pipelines.scheduler_table import sampler_table
from tmpdiff_export.quantization.ranges import spread
from tmpdiff_export.targets.accuracy import AccuracyCheck, step_sizes
from tools.acceptance.checks import check_of

T = 20


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(prediction_type="v_prediction", clip_sample=False),
        DPMSolverMultistepScheduler(),
        EulerDiscreteScheduler(),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        UniPCMultistepScheduler(),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_a_step_size_is_what_an_error_of_the_output_does_to_the_latents(scheduler: object) -> None:
    """Each output of a run is changed on its own; the very next latents show by how much the loop takes it."""
    table = sampler_table(scheduler, T)
    sizes = step_sizes(table)
    assert sizes.shape == (T,)
    random = np.random.default_rng(0)
    state = table.initial(random.standard_normal((1, 4, 8, 8), np.float32))
    for k in range(T):
        output, error = (random.standard_normal((1, 4, 8, 8), np.float32) for _ in range(2))
        after, other = (table.advance(state, item).latents for item in (output, output + error))
        moved = np.linalg.norm(other - after) / np.linalg.norm(error)
        assert moved * table.input_scale[k] == pytest.approx(sizes[k], rel=1e-3, abs=1e-5)
        state = table.advance(state, output)


class FlowOfOnePicture(torch.nn.Module):
    """The exact denoiser of a data set of one picture x: flow (latents - x) / sigma."""

    def __init__(self) -> None:
        super().__init__()
        self.picture = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0))

    def forward(self, latents: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return (latents - self.picture) / sigma[:, None, None, None]


class Rounding(Engine):
    """That denoiser behind latents of fewer bits, and with a relative error of its own."""

    def __init__(self, dtype: torch.dtype, error: float = 0.0) -> None:
        self.module, self.dtype, self.error = FlowOfOnePicture(), dtype, error

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        latents, sigma = (torch.from_numpy(feeds[name]) for name in ("latents", "sigma"))
        output = self.module(latents.to(self.dtype).float(), sigma)
        return {MODEL_OUTPUT: (output * (1 + self.error)).numpy()}


def _flow_check(weighed: bool) -> AccuracyCheck:
    """Of a run of 20 steps that ends, as Stable Diffusion 3's does, with a sigma of 0.009."""
    table = sampler_table(FlowMatchEulerDiscreteScheduler(shift=3.0), T)
    assert table.sigmas is not None
    assert table.sigmas[T - 1] == pytest.approx(0.0089, abs=1e-4)
    module, random = FlowOfOnePicture(), torch.Generator().manual_seed(1)
    noise = torch.randn(1, 4, 8, 8, generator=random)
    batches = [
        ((1 - sigma) * module.picture[None] + sigma * noise, torch.full((1,), sigma))
        for sigma in map(float, table.sigmas[:T])
    ]
    rows = [(torch.full((1,), size),) for size in step_sizes(table)]
    return check_of(
        module,
        ["latents", "sigma"],
        MODEL_OUTPUT,
        with_larger_batch(batches),
        weights=[item.numpy() for (item,) in with_larger_batch(rows)] if weighed else None,
    )


def test_the_last_step_of_flow_matching_does_not_decide() -> None:
    """Rounded latents alone leave that call 19 dB, of an error that the step multiplies by its sigma of 0.009."""
    rounding = Rounding(torch.bfloat16)
    plain, weighed = (_flow_check(weighed).sqnr_db(rounding) for weighed in (False, True))
    assert plain < 35 < 40 < weighed


def test_an_error_of_every_call_counts_as_before() -> None:
    wrong = Rounding(torch.float32, error=0.1)
    for weighed in (True, False):
        assert _flow_check(weighed).sqnr_db(wrong) == pytest.approx(20.0, abs=0.1)


def test_rows_that_are_grouped_anew_keep_their_weights() -> None:
    """Plans take batches of one size: 22 rows in calls of 4, the last one filled up."""
    check, rounding = _flow_check(weighed=True), Rounding(torch.bfloat16)
    assert check.sqnr_db(rounding, batch_size=4) == pytest.approx(check.sqnr_db(rounding), abs=1e-3)


def test_a_build_weighs_its_check_by_the_bundle_s_own_sampler(built, tiny_pipeline: Path) -> None:
    """The manifest's SQNR, made again from the pipeline: the last prompt's run, some of its calls, all row by row."""
    runtime = DenoiseRuntime.load(built(tiny_options(num_steps=8)))
    manifest = runtime.bundle.manifest
    ranges, source = manifest.range_calibration, whole_pipeline(tiny_pipeline)
    seed = ranges.seed + ranges.num_prompts
    calls = gather_batches(source, setting_of(source, runtime.setting), PROMPTS[-1:], seed, lambda: None)
    checked = spread(range(len(calls)), CHECK_BATCHES)
    module = source.family.wrap(source.pipe).eval()
    batches = with_larger_batch([calls[index] for index in checked])
    sizes = step_sizes(runtime.table)
    weights = [np.full(len(calls[index][0]), sizes[index]) for index in checked]
    weights.append(np.concatenate([weights[0], weights[-1]]))  # the batch of twice the size
    alike = check_of(module, list(source.family.inputs), MODEL_OUTPUT, batches)
    for name, (entry,) in manifest.denoisers.items():
        engine = runtime.denoiser(name)
        measured = replace(alike, weights=tuple(weights)).sqnr_db(engine)
        assert measured == pytest.approx(entry.sqnr_db, abs=0.02)
        plain = alike.sqnr_db(engine)
        print(f"{name}: SQNR {measured:.1f} dB, with all calls alike {plain:.1f} dB")
        assert abs(plain - entry.sqnr_db) > 0.1  # so that a build without weights would fail here
