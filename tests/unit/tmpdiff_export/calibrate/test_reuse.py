"""Bundles calibrated with reuse: schedules that run, loops of fewer steps, and the command."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from helpers.commands import EXPORT, assert_refused, called, save_prompts
from helpers.demo_build import linked_copy
from helpers.stored import schedule_path, sensitivity_path
from helpers.tiny_pipeline import PROMPTS, tiny_options

from calibration import CalibrationOptions, LatencyBudget, Sensitivity
from calibration.measure.bundle_evaluator import BundleSamples
from calibration.measure.latency import reuse_latency
from engines.bundle import Bundle
from engines.errors import TmpDiffError
from engines.reuse import reused_steps
from engines.runtime import DenoiseRuntime
from engines.sampler import SamplerTable
from engines.schedule import Schedule
from engines.setting_choice import SettingChoice
from engines.text import PromptFile
from tmpdiff_export.calibrate.bundle import RunOptions, calibrate_bundle
from tmpdiff_export.calibrate.settings import Wanted, open_setting, shorter_loop

CHOSEN = PromptFile(PROMPTS[:2], ("a small green ring",))


@pytest.fixture
def bundle(built, tmp_path: Path) -> Path:
    return linked_copy(built(tiny_options()), tmp_path / "bundle")


@pytest.mark.usefixtures("planted_latencies")
def test_a_bundle_gets_a_schedule_that_reuses_steps_and_runs(bundle: Path) -> None:
    options = CalibrationOptions(LatencyBudget(0.45), reuse=1)
    found = calibrate_bundle(bundle, CHOSEN, options)
    assert len(reused_steps(found.schedule)) == 1
    assert found.predicted_latency <= 0.45
    assert found.fewer_steps
    assert Sensitivity.load(sensitivity_path(bundle)) == found
    assert Schedule.load(schedule_path(bundle)).precisions == found.schedule
    with DenoiseRuntime.load(bundle) as runtime:
        schedule = runtime.schedule()
        latents = runtime.denoise(runtime.encode(PROMPTS[:1]), schedule, runtime.noise([0]))
        assert np.isfinite(latents).all()
        assert 0 < reuse_latency(runtime, runtime.encode(PROMPTS[:1]), 4.5, rounds=3).median_ms < 1000
    again = calibrate_bundle(bundle, CHOSEN, options, RunOptions(workers=1))
    assert again == found, "from its journal"


def test_fewer_steps_come_from_the_bundles_scheduler(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    entry = opened.setting()
    whole = SamplerTable.from_json(opened.read(entry.sampler))
    found = shorter_loop(opened, entry, entry.num_steps - 1)
    table = SamplerTable.from_json(found.loop)
    assert (table.scheduler, table.num_steps) == (whole.scheduler, entry.num_steps - 1)
    assert found.num_steps == table.num_steps
    with pytest.raises(TmpDiffError):
        shorter_loop(opened, entry, 0)
    with DenoiseRuntime.load(bundle) as runtime:
        evaluator = BundleSamples(CHOSEN, 0, 4.5, reuse=True).open(runtime).calibration.evaluator
        short = evaluator.shorter(found.loop)
        state = short.start(0)
        for _ in range(short.num_steps):
            state = short.steps([0], [state], "fp16")[0]
        assert np.isfinite(short.latents(state)).all()
        assert evaluator.num_steps == entry.num_steps
        assert evaluator.timesteps() == whole.timesteps.tolist()


@pytest.mark.usefixtures("planted_latencies")
def test_the_command_takes_auto_off_and_a_number(bundle: Path, tmp_path: Path) -> None:
    command = ("calibrate", bundle, "--prompts", save_prompts(tmp_path), "--samples", 1, "--validation-samples", 1)
    steps = Bundle.open(bundle).setting().num_steps
    for words, most in ((("--reuse", "off"), None), ((), steps // 2), (("--reuse", "1"), 1)):
        done = called(EXPORT, *command, *words, "--json")
        assert done.returncode == 0, done.stderr
        reuse = json.loads(done.stdout)["reuse"]
        assert (reuse and reuse["most"]) == most
    shown = called(EXPORT, *command)
    assert f"of {steps} steps reuse model outputs" in shown.stdout
    assert "Reuse of model outputs: plans, measured on 1 calibration prompts" in shown.stdout
    report = called(EXPORT, "report", bundle, "--out", tmp_path / "report.html")
    assert report.returncode == 0, report.stderr
    assert 'id="reuse"' in (tmp_path / "report.html").read_text()
    for wrong in ("many", "-1"):
        assert called(EXPORT, *command, "--reuse", wrong).returncode == 2


def test_more_reuse_than_a_loop_has_is_refused_before_anything_runs(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("tmpdiff_export.calibrate.bundle._latencies")
    command = ("calibrate", bundle, "--prompts", save_prompts(tmp_path))
    for steps in (1, 4):
        done = called(EXPORT, *command, "--steps", steps, "--reuse", steps)
        done.stderr = "\n".join(line for line in done.stderr.splitlines() if "was added to the bundle" not in line)
        assert_refused(done, f"of {steps} the first is computed, so allow at most {steps - 1}")


def test_errors_of_steps_that_feed_a_reuse_grow_as_the_table_says(bundle: Path) -> None:
    """INT8 at one step of a run of 12 with reused ones, beside INT8 there without."""
    entry, _ = open_setting(bundle, Wanted(SettingChoice(steps=12)))
    with DenoiseRuntime.load(bundle, setting=SettingChoice(named=entry.name)) as runtime:
        evaluator = BundleSamples(CHOSEN, 0, 4.5, reuse=True).open(runtime).calibration.evaluator

        def final(choices: Sequence[str]) -> np.ndarray:
            state = evaluator.start(0)
            for choice in choices:
                state = evaluator.steps([0], [state], choice)[0]
            return evaluator.latents(state).astype(np.float64)

        reference = ["fp16"] * 12
        plan = ["reuse1" if step in (5, 8) else "fp16" for step in range(12)]
        factors = evaluator.influence(plan) / evaluator.influence(reference)
        for step in (2, 4, 7):
            ends = []
            for base in (plan, reference):
                low = [*base[:step], "int8", *base[step + 1 :]]
                ends.append(np.linalg.norm(final(low) - final(base)))
            assert ends[0] / ends[1] == pytest.approx(abs(factors[step]), rel=0.2)
        assert abs(factors[4]) > 1.5


def test_a_schedule_with_reuse_is_shown_beside_a_calibration_without(tiny_bundle: Path, tmp_path: Path) -> None:
    """No reused step was timed, so its latency is as little known as its error."""
    opened = Bundle.open(tiny_bundle)
    choices = ("fp16", "reuse0", "int8", "reuse1")
    schedule = Schedule(
        bundle_id=opened.manifest.bundle_id, setting=opened.setting().name, precisions=choices, origin="by hand"
    )
    schedule.save(tmp_path / "schedule.json")
    shown = called(EXPORT, "schedule", tiny_bundle, "--schedule", tmp_path / "schedule.json")
    assert shown.returncode == 0, shown.stderr
    assert "predicted E -, latency - of the reference" in shown.stdout
