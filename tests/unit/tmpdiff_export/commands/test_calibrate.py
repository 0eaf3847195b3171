"""`tmpdiff-export calibrate`: what it refuses, and that it goes on where it was interrupted or killed."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.children import start, wait_for
from helpers.commands import EXPORT, assert_refused, called, save_prompts
from helpers.demo_build import linked_copy
from helpers.paths import ROOT
from helpers.stored import schedule_path, sensitivity_path
from helpers.tiny_pipeline import tiny_options

from calibration import Sensitivity
from engines.bundle import Bundle


def refused(*args: object, says: str) -> None:
    assert_refused(called(EXPORT, *args), says)


@pytest.mark.usefixtures("planted_latencies")
def test_calibrate_refuses_bad_input(tiny_bundle: Path, copy_of, tmp_path: Path) -> None:
    bundle, prompts = copy_of(tiny_bundle), save_prompts(tmp_path)
    before = schedule_path(bundle).read_bytes()
    calibrate = ("calibrate", bundle, "--prompts", prompts)
    refused(*calibrate, "--budget-latency", "0.01", says="the fastest takes 0.")
    refused(*calibrate, "--high-steps", "99", says="ask for at most that")
    refused(*calibrate, "--budget-latency", "nan", says="expected a positive number")
    refused(*calibrate, "--high-steps", "-1", says="expected a whole number from 0")
    refused(*calibrate, "--samples", "0", says="--samples is 0")
    refused(*calibrate, "--size", "64x65", says="height 65 does not fit this pipeline; give a positive multiple of 8")
    refused(*calibrate, "--scheduler", "NoScheduler", says="scheduler 'NoScheduler' is no scheduler of diffusers")
    prompts.write_text("one\none\n")
    refused(*calibrate, says="repeats 'one'")
    prompts.write_text("a red circle\na blue square\n")
    refused(
        *calibrate,
        says="has 'a red circle' before its first section; head the prompts to calibrate with by a line [cal",
    )
    save_prompts(tmp_path)
    refused("calibrate", tmp_path, "--prompts", prompts, says="it holds no manifest.json")
    assert schedule_path(bundle).read_bytes() == before
    assert Bundle.open(bundle).verify() > 0
    assert len(Bundle.open(bundle).manifest.settings) == 1


@pytest.mark.usefixtures("planted_latencies")
def test_prompts_that_are_too_long_are_cut_as_in_a_build(built, tmp_path: Path) -> None:
    bundle, prompts = linked_copy(built(tiny_options()), tmp_path / "bundle"), save_prompts(tmp_path)
    prompts.write_text("[calibration]\n" + "word " * 400 + "\n[validation]\nc\n")
    done = called(EXPORT, "calibrate", bundle, "--prompts", prompts, "--high-steps", 2)
    assert done.returncode == 0, done.stderr
    assert schedule_path(bundle).exists()


def test_latencies_that_a_budget_was_refused_for_or_that_are_asked_for_are_measured_anew(
    built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = linked_copy(built(tiny_options()), tmp_path / "bundle")
    int8_ms = [1.9, 1.0, 0.8]
    measured: list[float] = []

    def latencies(*_: object) -> dict[str, float]:
        measured.append(int8_ms[len(measured)])
        return {"fp16": 2.0, "int8": measured[-1]}

    monkeypatch.setattr("tmpdiff_export.calibrate.bundle._latencies", latencies)
    command = ["calibrate", bundle, "--prompts", save_prompts(tmp_path), "--samples", 1, "--validation-samples", 1]
    command += ["--reuse", "off"]

    def latency(*budget: object) -> float:
        done = called(EXPORT, *command, *budget)
        assert done.returncode == 0, done.stderr
        return Sensitivity.load(sensitivity_path(bundle)).latencies_ms["int8"]

    refused(*command, "--budget-latency", "0.6", says="the fastest takes 0.95")
    assert measured == [1.9], "a busy machine"
    assert latency("--budget-latency", "0.6") == 1.0
    assert latency("--budget-latency", "0.7") == 1.0
    assert latency("--high-steps", 1) == 1.0
    assert measured == [1.9, 1.0], "kept"
    assert latency("--budget-latency", "0.7", "--fresh-latencies") == 0.8
    assert latency("--budget-latency", "0.7") == 0.8
    assert measured == int8_ms


SLOWED = """
import sys, time
from engines.runtime import DenoiseRuntime
from tmpdiff_export.calibrate import bundle
from tmpdiff_export.cli import main

bundle._latencies = lambda *arguments: {"fp16": 2.0, "int8": 1.0}  # as measured of so small engines, chance decides

step = DenoiseRuntime.step

def slowed(*arguments, **options):
    time.sleep(0.05)
    return step(*arguments, **options)

DenoiseRuntime.step = slowed
sys.exit(main(sys.argv[1:]))
"""


def test_a_killed_calibration_goes_on_and_ends_the_same(built, tmp_path: Path) -> None:
    prompts = save_prompts(tmp_path)
    interrupted, straight = (
        linked_copy(built(tiny_options()), tmp_path / name) for name in ("interrupted", "straight")
    )
    arguments = ("--prompts", prompts, "--samples", "1", "--validation-samples", "1", "--high-steps", "2")
    for measured, how in ((4, signal.SIGINT), (8, signal.SIGKILL)):
        with start(
            [sys.executable, "-c", SLOWED, "calibrate", interrupted, *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        ) as process:
            wait_for(lambda lines=measured: lines_of_journal(interrupted) >= lines, process)
            process.send_signal(how)
            _, errors = process.communicate()
        if how == signal.SIGINT:
            assert process.returncode == 130
            assert errors.endswith(
                "interrupted; finished measurements are kept, and the same command goes on from them\n"
            )
        assert not schedule_path(interrupted).exists()
    # The other starts from the same measured latencies, a reused step's among them: its header and first lines.
    journal = next(interrupted.glob("calibration/*.journal"))
    (straight / "calibration").mkdir()
    (straight / "calibration" / journal.name).write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:3]))
    for bundle in (interrupted, straight):
        result = called(EXPORT, "calibrate", bundle, *arguments)
        assert result.returncode == 0, result.stderr
        assert "schedule:" in result.stdout
    for path_of in (schedule_path, sensitivity_path):
        assert path_of(interrupted).read_bytes() == path_of(straight).read_bytes()


def lines_of_journal(bundle: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in bundle.glob("calibration/*.journal"))
