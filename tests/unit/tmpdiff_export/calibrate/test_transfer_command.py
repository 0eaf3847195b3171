"""`calibrate --from` and the transfer experiment, on small bundles of two step counts."""

from __future__ import annotations

import fcntl
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.demo_build import linked_copy
from helpers.experiments import command
from helpers.stored import sensitivity_path
from helpers.tiny_pipeline import PROMPTS, UNSEEN, tiny_options

from calibration.document import Sensitivity
from calibration.scores.transfer import carry, check_steps, step_axes
from engines.documents import canonical_json
from engines.files import sha256_bytes
from engines.runtime import DenoiseRuntime
from tmpdiff_export import cli

SHORT, LONG = 8, 11


@dataclass(frozen=True)
class Bundles:
    """The same denoiser at 8 and 11 steps; the shorter one is calibrated by a full sweep."""

    short: Path
    long: Path
    prompts: Path


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory, made_once, built, planted_latencies: None) -> Bundles:
    def within(folder: Path) -> Bundles:
        return Bundles(folder / str(SHORT), folder / str(LONG), folder / "prompts.txt")

    def make(folder: Path) -> None:
        found = within(folder)
        found.prompts.write_text("\n".join(["[calibration]", *PROMPTS, "[validation]", *UNSEEN]))
        for steps in (SHORT, LONG):
            linked_copy(built(tiny_options(num_steps=steps)), folder / str(steps))
        assert cli.main(["calibrate", str(found.short), *arguments(found), "--method", "sweep"]) == 0

    folder = tmp_path_factory.mktemp("transfer") / "own"  # it is calibrated further
    shutil.copytree(made_once("transfer", make), folder)
    return within(folder)


def arguments(bundles: Bundles) -> tuple[str, ...]:
    return ("--prompts", str(bundles.prompts), "--high-steps", "3", "--samples", "2", "--threads", "1")


def calibrated(capsys: pytest.CaptureFixture[str], *args: object) -> dict[str, Any]:
    assert cli.main(["calibrate", *map(str, args), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refusal(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    assert cli.main(["calibrate", *map(str, args)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.strip().splitlines()) == 1
    return captured.err


def test_scores_carried_to_the_same_bundle_are_confirmed_and_cost_nothing(
    bundles: Bundles, capsys: pytest.CaptureFixture[str]
) -> None:
    before = Sensitivity.load(sensitivity_path(bundles.short))
    capsys.readouterr()
    found = calibrated(capsys, bundles.short, *arguments(bundles), "--from", bundles.short)
    assert found["method"] == "transfer"
    (check,) = found["transfer"]["checks"]
    assert check["steps"] == list(check_steps(SHORT))
    assert check["measured"] == pytest.approx(check["carried"])
    assert (check["level"], check["scatter"]) == (pytest.approx(1.0), pytest.approx(0.0, abs=1e-9))
    scores, carried = before.scores[0].scores, found["scores"][0]["scores"]
    assert carried == pytest.approx(np.maximum(scores, 1e-4 * max(scores)))
    assert found["schedule"] == list(before.schedule)
    assert cli.main(["inspect", str(bundles.short)]) == 0
    assert f"Scores carried from bundle {before.settings.bundle_id[:12]}, T = {SHORT}" in capsys.readouterr().out
    before.save(sensitivity_path(bundles.short))


def test_a_source_that_cannot_be_used_is_refused(
    bundles: Bundles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "is not calibrated: there is no sensitivity.json" in refusal(
        capsys, bundles.short, *arguments(bundles), "--from", bundles.long
    )
    with pytest.raises(SystemExit):
        cli.main(
            ["calibrate", str(bundles.short), *arguments(bundles), "--from", str(bundles.long), "--method", "sweep"]
        )
    assert "not allowed with argument" in capsys.readouterr().err


def test_a_second_calibration_of_the_same_prompts_at_once_is_refused(
    bundles: Bundles, capsys: pytest.CaptureFixture[str]
) -> None:
    (journal,) = (bundles.short / "calibration").iterdir()
    before = journal.read_bytes()
    with open(journal, "ab") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        said = refusal(capsys, bundles.short, *arguments(bundles))
    assert f"journal {journal} is being written by another calibration of these prompts; wait until it is done" in said
    assert journal.read_bytes() == before
    assert calibrated(capsys, bundles.short, *arguments(bundles))["method"] == "bisection"


def test_latencies_that_a_journal_garbles_are_refused(bundles: Bundles, capsys: pytest.CaptureFixture[str]) -> None:
    (journal,) = (bundles.short / "calibration").iterdir()
    before = journal.read_bytes()
    record = next(found for found in map(json.loads, before.splitlines()) if "latencies" in found.get("name", ""))
    old = json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
    del record["sha256"]
    record["value"] = {"fp16": "soon"}
    line = canonical_json({**record, "sha256": sha256_bytes(canonical_json(record))})
    try:
        journal.write_bytes(before.replace(old, line))
        assert "has no step latencies in ms, " in refusal(capsys, bundles.short, *arguments(bundles))
    finally:
        journal.write_bytes(before)


def test_the_experiment_compares_fresh_and_carried_scores(bundles: Bundles, tmp_path: Path) -> None:
    out = tmp_path / "transfer.json"
    given = ("--prompts", bundles.prompts, "--samples", 2, "--validation-samples", 2, "--threads", 1, "--out", out)
    done = command("transfer", bundles.short, bundles.long, *given)
    assert done.returncode == 0, done.stderr
    (entry,) = json.loads(out.read_text())
    assert (entry["source"]["num_steps"], entry["target"]["num_steps"]) == (SHORT, LONG)
    found = entry["precisions"]["int8"]
    with DenoiseRuntime.load(bundles.short) as source, DenoiseRuntime.load(bundles.long) as target:
        expected = carry(np.array(found["source_scores"]), *step_axes(source.table, target.table))
    assert found["carried_scores"] == pytest.approx(expected)
    assert found["rankings"]["fresh"]["rank_deviation"] == 0
    steps = found["check"]["steps"]
    assert steps == list(check_steps(LONG))
    ratios = np.log(np.array(found["fresh_scores"])[steps] / expected[steps])
    assert found["check"]["level"] == pytest.approx(np.exp(ratios.mean()), rel=1e-3)
    assert {row["name"] for row in found["schedules"]} == {
        "fresh", "carried", "carried, checked", "both ends", "evenly spread",
    }  # fmt: skip
    for row in found["schedules"]:
        assert row["pattern"].count("H") == row["high_steps"]
        if row["name"] == "fresh":
            assert row["over_fresh"]["value"] == 1.0
    again = command("transfer", bundles.short, bundles.long, *given)
    assert again.returncode == 0, again.stderr
    assert len(json.loads(out.read_text())) == 1  # a pair measured again replaces its entry
