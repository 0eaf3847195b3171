"""Step policies of other runtimes: read, written, and what is not one."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
from helpers.planted import PlantedEvaluator, calibrate_loops
from helpers.small_plans import table

from calibration import HighSteps
from calibration.choose.costs import AllocationCosts
from calibration.choose.stored_prediction import StoredPrediction
from calibration.records import CalibrationSettings
from engines.bundle import Bundle
from engines.documents import FileEntry
from engines.errors import ScheduleError
from engines.schedule import Schedule
from engines.setting_entry import SettingEntry
from tmpdiff_export import cli
from tmpdiff_export.commands import schedule as command
from tmpdiff_export.drop_in.step_policy import (
    StepPolicy,
    calls_of_steps,
    exact_policy,
    nearest_policy,
    read_policy,
    write_policy,
)
from tmpdiff_export.pipelines.scheduler_table import sampler_table

# The form in which NVIDIA publishes Cosmos3 FP8 checkpoints (transformer/config.json).
PUBLISHED = {
    "_class_name": "Cosmos3OmniTransformer",
    "quantization_config": {
        "quant_method": "modelopt",
        "quant_algo": "FP8",
        "runtime": {
            "diffusion_step_policy": {
                "schema_version": 1,
                "type": "first_last_n",
                "index_space": "denoising_loop_iteration",
                "scope": ["transformer"],
                "default_mode": "native",
                "first_steps": {"count": 3, "mode": "a16"},
                "last_steps": {"count": 2, "mode": "a16"},
                "overlap": "a16",
                "reasoner": "a16",
            }
        },
    },
}


def config(tmp_path, **changes):
    data = copy.deepcopy(PUBLISHED)
    policy = data["quantization_config"]["runtime"]["diffusion_step_policy"]
    for field, value in changes.items():
        if value is None:
            del policy[field]
        else:
            policy[field] = value
    path = tmp_path / "config.json"
    path.write_text(json.dumps(data))
    return path


def single(steps):
    """A scheduler that calls the denoiser once a step."""
    return (1,) * steps


def strip(text):
    return tuple({"H": "fp16", "8": "fp8", "i": "int8", "4": "nvfp4"}[letter] for letter in text)


def test_the_published_form_is_read(tmp_path):
    policy, native = read_policy(config(tmp_path))
    assert (policy, native) == (StepPolicy(3, 2), "fp8")
    assert policy.precisions(single(10), "fp16", "fp8") == strip("HHH88888HH")
    assert policy.precisions(single(5), "fp16", "fp8") == strip("HHHHH")
    assert policy.precisions(single(4), "fp16", "fp8") == strip("HHHH")
    assert policy.precisions(single(1), "fp16", "fp8") == strip("8")


def test_the_origin_says_what_a_single_step_runs_at():
    policy = StepPolicy(3, 3)
    assert policy.described(single(9), "fp16", "fp8") == "step policy: first 3 and last 3 at fp16"
    assert policy.described(single(1), "fp16", "fp8") == (
        "step policy: first 3 and last 3 at fp16; the only step is at fp8, as readers of policies have it"
    )


def table_of(name, steps, **config):
    return sampler_table(getattr(diffusers, f"{name}Scheduler")(**config), steps)


@pytest.mark.parametrize(
    ("name", "config", "calls"),
    [
        ("HeunDiscrete", {}, (2, 2, 2, 2, 1)),
        ("HeunDiscrete", {"prediction_type": "v_prediction"}, (2, 2, 2, 2, 1)),
        ("KDPM2Discrete", {}, (2, 2, 2, 2, 1)),
        ("FlowMatchHeunDiscrete", {}, (2, 2, 2, 2, 1)),
        ("KDPM2Discrete", {"prediction_type": "v_prediction"}, (2, 2, 2, 2, 1)),
        ("PNDM", {"skip_prk_steps": True}, (2, 1, 1, 1, 1)),
        ("PNDM", {}, (4, 4, 4, 1, 1)),
        ("UniPCMultistep", {}, (1, 1, 1, 1, 1)),
        ("EulerDiscrete", {}, (1, 1, 1, 1, 1)),
        ("DPMSolverSinglestep", {}, (1, 1, 1, 1, 1)),
    ],
)
def test_calls_of_one_step_stay_together(name, config, calls):
    table = table_of(name, 5, **config)
    assert calls_of_steps(table) == calls
    assert sum(calls) == table.num_steps
    for policy in (StepPolicy(first, last) for first in range(5) for last in range(5 - first)):
        schedule = policy.precisions(calls, "fp16", "fp8")
        assert len(schedule) == table.num_steps
        steps = [schedule[sum(calls[:k]) : sum(calls[: k + 1])] for k in range(5)]
        assert [set(step) for step in steps] == [
            {"fp16"} if k < policy.first_steps or k >= 5 - policy.last_steps else {"fp8"} for k in range(5)
        ]
        assert exact_policy(schedule, "fp16", calls) == (policy, "fp8")


def test_a_schedule_that_splits_a_step_is_no_policy_and_none_is_offered_that_does():
    calls = calls_of_steps(table_of("HeunDiscrete", 5))
    assert exact_policy(strip("H88888888"), "fp16", calls) is None
    assert exact_policy(strip("HH8888888"), "fp16", calls) == (StepPolicy(1, 0), "fp8")
    assert StepPolicy(1, 1).described(calls, "fp16", "fp8").endswith("at fp16, in steps of up to 2 calls")
    pairs = (2, 2, 1, 1)  # of six calls
    nearest = nearest_policy(StoredPrediction(calibrated()), strip("H44H4H"), pairs)
    every = {
        StepPolicy(first, last).precisions(pairs, "fp16", nearest.native): (first, last)
        for first, last in product(range(4), range(4))
    }
    found = nearest.policy.precisions(pairs, "fp16", nearest.native)
    assert found in every
    assert found[0] == found[1]
    assert found[2] == found[3]
    assert StoredPrediction(calibrated()).error(found) == nearest.predicted_error


def test_calls_that_fall_into_no_steps_are_refused():
    table = replace(table_of("HeunDiscrete", 5), num_inference_steps=4)
    with pytest.raises(
        ScheduleError, match="HeunDiscreteScheduler calls the denoiser 9 times for 4 steps, and which call"
    ):
        calls_of_steps(table)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("schema_version", 2),
        ("schema_version", True),
        ("type", "every_n"),
        ("index_space", "sigma"),
        ("default_mode", "a16"),
        ("overlap", "native"),
        ("reasoner", "fp8"),
        ("reasoner", None),
        ("scope", ["vae"]),
        ("scope", "transformer"),
        ("first_steps", {"count": -1, "mode": "a16"}),
        ("first_steps", {"count": True, "mode": "a16"}),
        ("last_steps", {"count": 3, "mode": "native"}),
        ("last_steps", {"count": 3}),
        ("every", 4),
    ],
)
def test_a_policy_of_another_meaning_is_refused_by_field(tmp_path, field, value):
    with pytest.raises(ScheduleError, match=field):
        read_policy(config(tmp_path, **{field: value}))


def test_a_config_without_policy_says_what_is_missing(tmp_path):
    path = tmp_path / "config.json"
    for data, missing in (
        ({}, "quantization_config"),
        ({"quantization_config": {"runtime": {}}}, "diffusion_step_policy"),
    ):
        path.write_text(json.dumps(data))
        with pytest.raises(ScheduleError, match=f"{missing} is missing"):
            read_policy(path)


@pytest.mark.parametrize("native", ["fp8", "nvfp4"])
def test_what_is_written_is_read_back_and_has_the_published_fields(tmp_path, native):
    path = tmp_path / "policy.json"
    write_policy(path, StepPolicy(4, 0), native)
    assert read_policy(path) == (StepPolicy(4, 0), native)
    written = json.loads(path.read_text())["quantization_config"]
    published = PUBLISHED["quantization_config"]["runtime"]["diffusion_step_policy"]
    assert set(written["runtime"]["diffusion_step_policy"]) == set(published)
    write_policy(path, StepPolicy(3, 2), "fp8")
    assert json.loads(path.read_text())["quantization_config"]["runtime"]["diffusion_step_policy"] == published


def test_a_precision_no_reader_runs_is_refused(tmp_path):
    with pytest.raises(ScheduleError, match=r"fp8 and nvfp4.*low precision is int8"):
        write_policy(tmp_path / "policy.json", StepPolicy(1, 1), "int8")
    assert not (tmp_path / "policy.json").exists()


@pytest.mark.parametrize("text", ["HH888H", "888888", "H88888", "88888H", "HHHHH8", "8"])
def test_a_schedule_of_that_form_is_one_policy_exactly(text):
    policy, native = exact_policy(strip(text), "fp16", single(len(text)))
    assert native == "fp8"
    assert policy.precisions(single(len(text)), "fp16", native) == strip(text)


@pytest.mark.parametrize("text", ["H8H8HH", "H88i8H", "HHHHHH", "H", "8i"])
def test_other_schedules_are_none(text):
    assert exact_policy(strip(text), "fp16", single(len(text))) is None


# with a calibration -----------------------------------------------------------------------------------------------

STEPS = 6
SIZES = np.array([3.0, 0.5, 0.6, 2.0, 0.7, 2.5])


def calibrated(**options):
    errors = {"fp8": 0.15 * SIZES, "int8": 0.16 * SIZES, "nvfp4": 0.2 * SIZES}
    loop = PlantedEvaluator(errors, gains=[1.0] * STEPS, correlation=0.3)
    latencies = {"fp16": 8.0, "fp8": 5.0, "int8": 4.0, "nvfp4": 3.0}
    options = {"method": "sweep", "budget": HighSteps(3)} | options
    return calibrate_loops(loop, latencies, **options).sensitivity


@pytest.mark.parametrize(
    "costs",
    [
        AllocationCosts(),
        AllocationCosts(0.4),
        AllocationCosts(
            {("fp16", "fp8"): 0.2}
            | {
                pair: 0.0
                for pair in product(("fp16", "fp8", "int8", "nvfp4"), repeat=2)
                if pair[0] != pair[1] and pair != ("fp16", "fp8")
            }
        ),
    ],
)
def test_a_stored_calibration_predicts_what_it_predicted(costs):
    found = calibrated(costs=costs)
    prediction = StoredPrediction(found)
    assert prediction.error(found.schedule) == pytest.approx(found.predicted_error)
    assert prediction.latency(found.schedule) == pytest.approx(found.predicted_latency)
    for point in found.pareto:
        assert prediction.error(point.precisions) == pytest.approx(point.error)
        assert prediction.latency(point.precisions) == pytest.approx(point.latency)
    for name in found.precisions:
        assert prediction.latency((name,) * STEPS) == pytest.approx(found.latencies_ms[name] / 8.0)
    with pytest.raises(ValueError, match="steps at int4"):
        prediction.error(("int4",) * STEPS)


def test_the_nearest_policy_is_the_best_of_all_that_are_no_slower():
    prediction = StoredPrediction(calibrated())
    schedule = strip("H44H4H")
    nearest = nearest_policy(prediction, schedule, single(STEPS))
    assert nearest.predicted_latency <= prediction.latency(schedule)
    everything = []
    for first, last, native in product(range(STEPS), range(STEPS), ("fp8", "nvfp4")):
        precisions = StepPolicy(first, last).precisions(single(STEPS), "fp16", native)
        if native in precisions and prediction.latency(precisions) <= prediction.latency(schedule) + 1e-9:
            everything.append(prediction.error(precisions))
    assert nearest.predicted_error == min(everything)
    assert nearest.predicted_error > prediction.error(schedule)


def test_a_schedule_faster_than_any_policy_has_no_nearest():
    found = calibrated()
    without = found.model_copy(update={"scores": tuple(r for r in found.scores if r.precision == "int8")})
    assert nearest_policy(StoredPrediction(without), strip("iiiiii"), single(STEPS)) is None
    assert nearest_policy(StoredPrediction(found), strip("444444"), single(STEPS)) is not None


# the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def bundle(tmp_path, monkeypatch):
    """A calibrated bundle as the command sees it."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    bundle_id = "c" * 64
    settings = CalibrationSettings(
        bundle_id=bundle_id,
        machine="none",
        guidance_scale=3.0,
        seed=0,
        calibration_prompts=("a",),
        validation_prompts=("b",),
    )
    found = calibrated().model_copy(update={"settings": settings})
    setting = SettingEntry(
        scheduler="DDIMScheduler", num_inference_steps=STEPS, num_steps=STEPS, guidance_scale=3.0,
        latents_shape=(4, 8, 8), height=64, width=64, sampler=FileEntry(path="sampler.json", sha256="a" * 64, bytes=1),
    )  # fmt: skip
    opened = Bundle(folder, SimpleNamespace(bundle_id=bundle_id, precisions=found.precisions, settings=(setting,)))
    found.save(opened.sensitivity_path(setting))
    Schedule(bundle_id=bundle_id, precisions=found.schedule, origin="test").save(opened.schedule_path(setting))
    monkeypatch.setattr(command.Bundle, "open", lambda path: opened)
    return opened


def run(capsys, *arguments):
    status = cli.main(["schedule", *map(str, arguments)])
    return status, capsys.readouterr()


def test_an_imported_policy_becomes_a_schedule_of_the_bundle(bundle, tmp_path, capsys):
    out = tmp_path / "schedule.json"
    status, shown = run(capsys, bundle.folder, "--import-policy", config(tmp_path), "--out", out, "--json")
    assert status == 0
    loaded = bundle.schedule(bundle.setting(), out)
    assert loaded.precisions == strip("HHH8HH")
    assert "first 3 and last 2" in loaded.origin
    assert json.loads(shown.out)["schedule"]["predicted_error"] == loaded.predicted_error > 0
    status, _ = run(capsys, bundle.folder, "--import-policy", config(tmp_path), "--precision", "int8", "--out", out)
    assert status == 0
    assert bundle.schedule(bundle.setting(), out).precisions == strip("HHHiHH")


def test_an_import_needs_a_precision_the_bundle_holds(bundle, tmp_path, capsys):
    path = config(tmp_path)
    status, shown = run(capsys, bundle.folder, "--import-policy", path, "--precision", "int4")
    assert status == 1
    assert "run at int4; the bundle's low precisions are fp8, int8, nvfp4" in shown.err
    path.write_text(path.read_text().replace('"FP8"', '"INT8"'))
    status, shown = run(capsys, bundle.folder, "--import-policy", path)
    assert status == 1
    assert "names no quant_algo of FP8, NVFP4; say with --precision" in shown.err


def test_an_exact_schedule_is_exported_and_comes_back(bundle, tmp_path, capsys):
    out, again = tmp_path / "policy.json", tmp_path / "again.json"
    schedule = Schedule(bundle_id="c" * 64, precisions=strip("HH888H"), origin="mine")
    schedule.save(tmp_path / "mine.json")
    status, shown = run(capsys, bundle.folder, "--schedule", tmp_path / "mine.json", "--export-policy", out)
    assert status == 0
    assert "exactly: first 2 and last 1 steps" in " ".join(shown.out.split())
    assert run(capsys, bundle.folder, "--import-policy", out, "--out", again)[0] == 0
    assert bundle.schedule(bundle.setting(), again).precisions == schedule.precisions


def test_another_schedule_is_refused_with_the_nearest_policy_and_its_error(bundle, tmp_path, capsys):
    out = tmp_path / "policy.json"
    assert exact_policy(bundle.schedule(bundle.setting()).precisions, "fp16", single(STEPS)) is None
    status, shown = run(capsys, bundle.folder, "--export-policy", out)
    assert status == 1
    assert "is no step policy" in shown.err
    assert "pass --nearest to export that" in shown.err
    assert not out.exists()
    status, shown = run(capsys, bundle.folder, "--export-policy", out, "--nearest", "--json")
    assert status == 0
    exported = json.loads(shown.out)["exported"]
    assert not exported["exact"]
    assert exported["predicted_error"] > json.loads(shown.out)["schedule"]["predicted_error"]
    policy, native = read_policy(out)
    assert (policy.first_steps, policy.last_steps, native) == (
        exported["first_steps"],
        exported["last_steps"],
        exported["native"],
    )


@pytest.mark.parametrize("more", [(), ("--nearest",)])
def test_reused_steps_are_refused_by_name(bundle, tmp_path, capsys, more):
    out = tmp_path / "policy.json"
    choices = ("fp16", "fp8", "fp8", "reuse1", "reuse0", "fp16")
    Schedule(bundle_id="c" * 64, precisions=choices, origin="mine").save(tmp_path / "mine.json")
    bundle.read = lambda entry: table(STEPS, 1).to_json().encode()
    status, shown = run(capsys, bundle.folder, "--schedule", tmp_path / "mine.json", "--export-policy", out, *more)
    assert status == 1
    assert shown.err.count("\n") == 1
    assert (
        "the schedule reuses model outputs at step index 3, 4, which a diffusion_step_policy cannot carry: its readers "
        "compute every step; export a schedule without reused steps" in shown.err
    )
    assert not out.exists()


def test_options_that_need_another_are_refused(bundle, capsys):
    assert "add --import-policy" in run(capsys, bundle.folder, "--precision", "fp8")[1].err
    assert "add --export-policy" in run(capsys, bundle.folder, "--nearest")[1].err


def test_help_names_the_policy(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["schedule", "--help"])
    assert left.value.code == 0
    assert "diffusion_step_policy" in capsys.readouterr().out
