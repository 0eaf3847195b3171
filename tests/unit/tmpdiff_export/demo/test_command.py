"""What `make demo` shows and leaves behind, and what an installed wheel carries."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from helpers import made_up
from helpers.stored import sensitivity_path
from PIL import Image

from calibration.document import Sensitivity
from calibration.records import DroppedRecord, IntervalRecord
from engines.bundle import Bundle
from engines.text import PromptFile
from tmpdiff_export.calibrate.bundle import calibrate_bundle
from tmpdiff_export.cli import main
from tmpdiff_export.commands.demo import conclusions, summarise
from tmpdiff_export.demo.gallery import SHEET_NAME, Gallery

PROMPTS = ("a large cyan square in the top right",)


@dataclass(frozen=True)
class Output:
    """What a run of the command wrote."""

    status: int
    stdout: str
    stderr: str


def demo(out: Path, *words: str) -> Output:
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        status = main(["demo", "--out", str(out), "--samples", "2", "--pictures", "1", *words])
    return Output(status, stdout.getvalue(), stderr.getvalue())


@dataclass(frozen=True)
class Demo:
    """A finished demo.

    Attributes:
        out: its folder.
        output: what it printed.
        early: pictures that were there, and what had been printed on stderr, when calibration began.
    """

    out: Path
    output: Output
    early: tuple[list[str], str]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_pipeline: Path) -> Demo:
    """The whole command, with a pipeline that builds in seconds in place of the embedded one, and INT8 twice as fast."""
    out = tmp_path_factory.mktemp("demo") / "out"
    early: list[tuple[list[str], str]] = []

    def noted(*arguments, **options) -> Sensitivity:
        early.append((sorted(path.name for path in (out / "pictures").iterdir()), sys.stderr.getvalue()))
        return calibrate_bundle(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tmpdiff_export.demo.pipeline_folder", lambda: tiny_pipeline)
        patch.setattr("tmpdiff_export.calibrate.bundle._latencies", lambda *arguments: {"fp16": 2.0, "int8": 1.0})
        patch.setattr("tmpdiff_export.calibrate.bundle.calibrate_bundle", noted)
        output = demo(out)
    assert output.status == 0, output.stderr
    return Demo(out, output, early[0])


def test_a_first_picture_is_there_before_calibration(finished: Demo) -> None:
    names, told = finished.early
    assert names == ["0-fp16.png", "0-int8.png"]
    assert str(finished.out / "pictures" / "0-fp16.png") in told


def test_one_table_of_at_most_ten_rows(finished: Demo) -> None:
    rows = [line for line in finished.output.stdout.splitlines() if line.startswith("│")]
    names = {row.split("│")[1].strip() for row in rows}
    found = Sensitivity.load(sensitivity_path(finished.out / "bundle"))
    high = found.schedule.count("fp16")
    assert len(rows) <= 10
    assert {
        "schedule",
        "uniform fp16",
        "uniform int8",
        f"first {high} (int8)",
        f"last {high} (int8)",
        f"both ends {high} (int8)",
    } <= names
    assert finished.output.stdout.count("┏") == 1
    for line in conclusions(found):
        assert line in finished.output.stdout


def test_files_that_it_names_exist(finished: Demo) -> None:
    named = dict(line.split(": ", 1) for line in finished.output.stdout.splitlines() if str(finished.out) in line)
    assert set(named) == {"report", "pictures", "bundle", "summary"}
    for path in named.values():
        assert Path(path).exists()
    page = Path(named["report"]).read_text()
    assert (
        page.count("data:image/png") == 2 * 3 + 1
    )  # fp16, int8 and the schedule, each with its heat map, and the Gram matrix
    names = json.loads(Path(named["summary"]).read_text())["pictures"]
    assert names == ["0-fp16.png", "0-int8.png", "0-schedule.png", SHEET_NAME]
    assert sorted(path.name for path in Path(named["pictures"]).parent.iterdir()) == sorted(names)


def test_json_is_the_summary_and_nothing_else(finished: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    built = Bundle.open(finished.out / "bundle").manifest
    monkeypatch.setattr("tmpdiff_export.bundling.bundle.build", lambda *arguments: built)
    output = demo(finished.out, "--json")  # measured already
    assert json.loads(output.stdout) == json.loads((finished.out / "summary.json").read_text())
    assert "first picture" in output.stderr


def test_an_interrupted_demo_says_that_it_starts_over(
    finished: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments, **options) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tmpdiff_export.bundling.bundle.build", interrupted)
    output = demo(tmp_path / "out")
    assert (output.status, output.stdout) == (130, "")
    assert "the demo starts over when it is run again" in output.stderr
    assert not (tmp_path / "out").exists()


def test_the_last_lines_compare_with_the_best_rule() -> None:
    found = made_up.calibration(20)
    chosen, best, *others = found.validation
    for low, lost in ((1.1, True), (0.9, False)):
        against = IntervalRecord(value=1.2, low=low, high=1.4)
        rows = (chosen, best.model_copy(update={"against": against}), *others)
        *_, own, rule, ratio, verdict, last = conclusions(found.model_copy(update={"validation": rows}))
        assert own.startswith("on 24 validation prompts: typical error ")
        assert "departures 0 of 24 [" in own
        assert rule.startswith(f"{best.name}: typical error ")
        assert "departures 2 of 24 [" in rule
        assert f"1.20 [{low:.2f}, 1.40] of the best rule's typical error" in ratio
        assert (f"LOSES on validation to: {best.name} " in verdict) == lost
        assert "nothing was chosen on these prompts" in last


def test_a_schedule_without_error_says_why() -> None:
    reason = DroppedRecord(precision="int8", by="fp16", reason="it is no faster than fp16")
    found = made_up.calibration(20, ("fp16",), dropped=(reason,))
    assert list(conclusions(found)) == ["schedule: fp16 at every step", "int8: it is no faster than fp16"]


def test_pictures_side_by_side(demo_bundle: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    columns = ("fp16", "int8", "int4", "schedule")
    gallery = Gallery(demo_bundle, tmp_path / "pictures", PROMPTS, 0)
    gallery.draw(columns, 1, lambda *state: seen.append(state))
    gallery.write_sheet(columns)
    assert gallery.files() == [*(f"0-{name}.png" for name in columns), SHEET_NAME]
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == sorted(gallery.files())
    assert seen[-1] == ("pictures", 4, 4)
    pictures = {name: np.asarray(Image.open(tmp_path / "pictures" / name)) for name in gallery.files()}
    assert pictures["0-fp16.png"].shape == (256, 256, 3)
    reference = pictures["0-fp16.png"].astype(int)
    distance = {name: np.abs(pictures[f"0-{name}.png"] - reference).mean() for name in columns[1:]}
    assert all(0 < value < 20 for value in distance.values()), distance
    assert pictures[SHEET_NAME].shape[1] > 3 * pictures[SHEET_NAME].shape[0]  # one row, four columns


def test_summary_has_the_rows_of_the_table() -> None:
    found = made_up.calibration(20)
    prompts = PromptFile(("a",), ("b",))
    summary = summarise("plain", prompts, made_up.manifest(found), found, ["0-fp16.png"], 1.0)
    rows = {row["name"]: row for row in summary["rows"]}
    high = found.schedule.count("fp16")
    assert {
        "schedule",
        "uniform fp16",
        "uniform int8",
        f"first {high} (int8)",
        f"last {high} (int8)",
        f"random {high}",
    } <= set(rows)
    for row, record in zip(summary["rows"], found.validation, strict=True):
        assert sum(row["steps"].values()) == found.num_steps
        assert set(row) >= {"name", "steps", "latency", "error", "ssim", "psnr_db", "prompts"}
        assert row["typical"] == record.typical.model_dump()
        assert row["departures"] == (record.departures.model_dump() if record.departures else None)
        assert row["against"] == (record.against.model_dump() if record.against else None)
    assert rows["uniform fp16"]["latency"] == 1.0
    assert rows["uniform fp16"]["typical"]["value"] == 0.0
    assert rows["uniform int8"]["latency"] < rows["schedule"]["latency"] < 1.0
    assert rows["uniform int8"]["typical"]["value"] > 0
    assert summary["loses_to"] == [row.name for row in found.losses]
    assert 0 < summary["search_calls"] <= summary["sweep_calls"]
    assert summary["validation_prompts"] == ["b"]
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_a_wheel_carries_weights_and_prompts(tmp_path: Path, demo_pipeline: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    result = subprocess.run([*command, str(tmp_path), "."], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    wheel = next(tmp_path.glob("*.whl"))
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in demo_pipeline.rglob("*"):
        if path.is_file():
            assert f"tmpdiff_export/demo/pipeline/{path.relative_to(demo_pipeline).as_posix()}" in names
    assert {f"calibration/prompts/{kind}.txt" for kind in ("plain", "composed", "unusual")} <= names
    assert not any(name.startswith(("tests/", "tools/")) for name in names)


@pytest.mark.parametrize("kind", ["plain", "composed", "unusual"])
def test_prompt_sets_are_found_where_they_are_installed(kind: str) -> None:
    from importlib.resources import files

    assert files("calibration").joinpath(f"prompts/{kind}.txt").is_file()
