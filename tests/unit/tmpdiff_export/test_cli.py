"""`tmpdiff-export`: help, usage, and what it says of a bundle and of damage."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from helpers.commands import EXPORT, assert_refused, called, save_prompts, started
from helpers.stored import schedule_path

from engines.documents import read_document, write_document
from engines.errors import ScheduleError
from engines.schedule import SCHEDULE_VERSION


def refused(*args: object, says: str) -> None:
    assert_refused(called(EXPORT, *args), says)


@pytest.mark.parametrize("name", ["build", "calibrate", "run", "bench", "report", "inspect", "verify", "demo"])
def test_every_subcommand_has_help(name: str) -> None:
    result = called(EXPORT, name, "--help")
    assert result.returncode == 0
    assert "usage: tmpdiff-export " + name in result.stdout
    if name != "verify":
        assert "--json" in result.stdout


def test_usage_errors_leave_with_2() -> None:
    for words in (
        (),
        ("nonsense",),
        ("build",),
        ("calibrate", "x", "--prompts", "y", "--high-steps", "1", "--budget-error", "1"),
        ("calibrate", "x", "--prompts", "y", "--seed", "-1"),
        ("build", "x", "--out", "y", "--prompts", "z", "--guidance-scale", "nan"),
    ):
        assert called(EXPORT, *words).returncode == 2, words


def test_help_is_quick() -> None:
    """In seconds of CPU time, which other work does not lengthen: a quarter of one, or five with torch."""
    before = os.times()
    assert started(EXPORT, "--version").returncode == 0
    after = os.times()
    assert after.children_user + after.children_system - before.children_user - before.children_system < 2.0


def test_run_writes_the_same_picture_as_the_runtime(tiny_bundle: Path, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "a.png", tmp_path / "b.png"
    arguments = ("run", tiny_bundle, "--prompt", "a large red circle in the center", "--seed", "3")
    for module, out in ((EXPORT, ours), ("engines", theirs)):
        result = started(module, *arguments, "--out", out)
        assert result.returncode == 0, result.stderr
    assert ours.read_bytes() == theirs.read_bytes()


def test_inspect_shows_engines_and_schedule(demo_bundle: Path) -> None:
    result = called(EXPORT, "inspect", demo_bundle)
    assert result.returncode == 0
    for word in ("denoiser fp8", "SQNR dB", "Pareto front", "schedule:", "bundle id"):
        assert word in result.stdout
    data = json.loads(called(EXPORT, "inspect", demo_bundle, "--json").stdout)
    (setting,) = data["settings"].values()
    assert setting["schedule"]["precisions"] == setting["sensitivity"]["schedule"]
    assert data["manifest"]["bundle_id"] == setting["schedule"]["bundle_id"]
    assert list(data["settings"]) == [setting["schedule"]["setting"]] == [data["manifest"]["settings"][0]["name"]]


def test_a_schedule_must_fit_the_bundle(tiny_bundle: Path, tmp_path: Path) -> None:
    stored = read_document(schedule_path(tiny_bundle), "schedule", SCHEDULE_VERSION, ScheduleError)
    run = ("run", tiny_bundle, "--prompt", "a red circle", "--seed", "0", "--out", tmp_path / "a.png", "--schedule")
    other = tmp_path / "other.json"
    write_document(other, {**stored, "precisions": stored["precisions"][:-1]})
    refused(*run, other, says=f"schedule has {len(stored['precisions']) - 1} steps")
    write_document(other, {**stored, "bundle_id": "0" * 64})
    refused(*run, other, says="schedule was made for bundle 000000000000")
    write_document(other, {**stored, "precisions": ["fp4"] * len(stored["precisions"])})
    refused(*run, other, says="schedule asks for precision 'fp4'; the bundle holds fp16, int8")
    write_document(other, {**stored, "setting": "other"})
    refused(*run, other, says="schedule was made for setting other, the one that runs is ")
    write_document(other, {**stored, "version": SCHEDULE_VERSION + 1})
    refused(*run, other, says=f"has format version {SCHEDULE_VERSION + 1}, this release reads up to {SCHEDULE_VERSION}")
    refused(*run, "uniform:fp7", says="precision 'fp7'")
    other.write_text(other.read_text().replace(f'"version": {SCHEDULE_VERSION + 1}', '"version": 1'))
    refused(*run, other, says="was altered")
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "truncated or altered"),
        (lambda path: path.write_bytes(b"\0" + path.read_bytes()[1:]), "was altered"),
    ],
)
@pytest.mark.parametrize(
    "name", ["engines/int8.onnx", "engines/vae_decoder.onnx", "settings/*/sampler.json", "tokenizer.json"]
)
def test_damage_is_found_by_verify_and_calibrate(
    name: str, damage, says: str, tiny_bundle: Path, copy_of, tmp_path: Path
) -> None:
    bundle = copy_of(tiny_bundle)
    (path,) = bundle.glob(name)
    damage(path)
    if path.name == "sampler.json":
        assert_refused(started(EXPORT, "verify", bundle), says)
        return
    refused("verify", bundle, says=says)
    if name == "engines/int8.onnx":
        refused("calibrate", bundle, "--prompts", save_prompts(tmp_path), says=says)


def test_a_newer_or_altered_manifest_is_refused(tiny_bundle: Path, copy_of) -> None:
    bundle = copy_of(tiny_bundle)
    path = bundle / "manifest.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "version": 99}))
    refused("inspect", bundle, says="has format version 99, this release reads up to 6; upgrade tmpdiff-export")
    data["settings"][0]["guidance_scale"] = 9.0
    path.write_text(json.dumps(data))
    refused("inspect", bundle, says="the manifest was altered")
    path.write_text("{")
    refused("inspect", bundle, says="is not valid JSON")
    path.unlink()
    refused("inspect", bundle, says="is not a bundle: it holds no manifest.json")


def test_a_report_overwrites_pages_only(tiny_bundle: Path, copy_of) -> None:
    bundle = copy_of(tiny_bundle)
    refused("report", bundle, "--out", bundle / "manifest.json", says="does not end in .html")
    assert called(EXPORT, "verify", bundle).returncode == 0
