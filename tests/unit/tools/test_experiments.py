"""The experiments' commands on a small bundle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.demo_build import linked_copy
from helpers.experiments import command
from helpers.tiny_pipeline import PROMPTS, UNSEEN, tiny_options

from engines.runtime import DenoiseRuntime
from engines.text import read_prompts
from tmpdiff_export.demo.scenes import has_held_out_pair, is_held_out, parse_caption
from tools.experiments import prediction, study
from tools.experiments.statistics import r_squared

NUM_STEPS = 6


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory, built) -> tuple[Path, Path]:
    """A bundle of two precisions and a prompt file."""
    folder = tmp_path_factory.mktemp("experiments")
    linked_copy(built(tiny_options(num_steps=NUM_STEPS)), folder / "bundle")
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(["[calibration]", *PROMPTS, "[validation]", *UNSEEN]))
    return folder / "bundle", prompts


def run(name: str, studied: tuple[Path, Path], out: Path, *args: object) -> dict[str, Any]:
    bundle, prompts = studied
    samples = ("--samples", 2, "--validation-samples", 2, "--threads", 1)
    done = command(name, bundle, "--prompts", prompts, *samples, "--out", out, *args)
    assert done.returncode == 0, done.stderr
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    found: dict[str, Any] = json.loads(out.with_suffix(".json").read_text())
    return found


def test_other_numbers_of_steps_take_the_same_engines(studied: tuple[Path, Path], tiny_pipeline: Path, tmp_path: Path):
    bundle, _ = studied
    other = tmp_path / "other"
    done = command("steps", bundle, tiny_pipeline, "--steps", 9, "--out", other)
    assert done.returncode == 0, done.stderr
    with DenoiseRuntime.load(other) as longer, DenoiseRuntime.load(bundle) as shorter:
        assert (longer.num_steps, shorter.num_steps) == (9, NUM_STEPS)
        assert longer.manifest.denoisers == shorter.manifest.denoisers
        assert longer.manifest.bundle_id != shorter.manifest.bundle_id
        longer.bundle.verify(longer.manifest.files())
        assert longer.generate(["a red circle"], [1], longer.bundle.schedule("uniform:int8")).shape == (1, 64, 64, 3)
    done = command("steps", bundle, tiny_pipeline, "--steps", 9, "--out", other)
    assert done.returncode == 1
    assert "already exists" in done.stderr


def test_what_any_schedule_can_gain_over_the_fixed_rules():
    curve = np.array([1.0, 8.0, 1.0, 1.0, 8.0, 1.0, 1.0, 8.0])  # no fixed rule finds steps 1, 4 and 7
    rows = np.tile(curve, (4, 1))
    scores = prediction.SampleScores({"downcast": rows, "upcast": rows}, rows.sum(axis=1))
    share, rule = prediction.attainable(scores, "downcast", [3])[3]
    assert share == pytest.approx(1 - 5 / 12)
    assert rule in ("last K", "both ends", "evenly spread")
    rising = np.tile(np.arange(1.0, 9.0), (4, 1))
    scores = prediction.SampleScores({"downcast": rising, "upcast": rising}, rising.sum(axis=1))
    assert prediction.attainable(scores, "downcast", [2, 5]) == {2: (0.0, "last K"), 5: (0.0, "last K")}


def test_curves_of_samples_are_limited_means_in_both_directions():
    changed = np.array([[1.0, 4.0], [1.0, 4.0], [1.0, 4.0], [500.0, 4.0]])
    assert prediction.mean_scores("downcast", changed, changed.sum(axis=1)).tolist() == [13 / 4, 4.0]
    uniform = np.array([5.0, 5.0, 5.0, 900.0])
    upcast = uniform[:, None] - changed
    assert prediction.mean_scores("upcast", upcast, uniform).tolist() == [65 / 4 - 13 / 4, 65 / 4 - 4.0]


def test_two_measurements_of_the_same_curves_are_compared(tmp_path: Path):
    curve = np.geomspace(1e-5, 1e-2, 8)
    rng = np.random.default_rng(0)

    def write(name: str, downcast: np.ndarray, **setting: object) -> Path:
        samples = downcast * rng.uniform(0.99, 1.01, (5, 1))
        uniform = samples.sum(axis=1)
        data = {"int8": {"uniform": uniform.tolist(), "downcast": samples.tolist(), "upcast": samples.tolist()}}
        setting = {"num_steps": len(downcast), "calibration_prompts": ["x"] * 5, "machine": "one", **setting}
        path = tmp_path / name
        path.write_text(json.dumps({"experiment": "single_steps", "setting": setting, "data": data}))
        return path

    one, same = write("one.json", curve), write("same.json", 3 * curve)
    swapped = write("swapped.json", curve[[1, 0, *range(2, 8)]])
    done = command("agreement", one, same)
    assert done.returncode == 0, done.stderr
    assert "1.00" in done.stdout
    assert "0.0" in done.stdout
    done = command("agreement", swapped, one)
    assert "0.98" in done.stdout  # two neighbours of eight
    done = command("agreement", one, write("longer.json", np.geomspace(1, 2, 9)))
    assert done.returncode == 1
    assert "the first file has T = 8, the second T = 9" in done.stderr


def test_commands_go_on_share_what_they_measure_and_draw_again(studied: tuple[Path, Path], tmp_path: Path) -> None:
    steps = run("single_steps", studied, tmp_path / "single")
    curve = steps["data"]["int8"]["downcast"]
    assert np.shape(curve) == (2, NUM_STEPS)
    assert steps["findings"]["int8"]["downcast"]["mean"] == pytest.approx(np.mean(curve, axis=0), rel=1e-4)
    assert str(tmp_path) not in json.dumps(steps), "results name no paths of the machine"

    (journal,) = (studied[0] / "experiments").glob("*.journal")
    measured = journal.read_bytes()
    journal.write_bytes(measured[: len(measured) // 2])  # as if it had been interrupted
    ranks = run("rank_deviation", studied, tmp_path / "ranks")
    assert journal.read_bytes() == measured, "it goes on where the other one stopped"
    assert ranks["data"] == steps["data"]
    sweep = ranks["findings"]["int8"]["downcast"]["methods"]["evenly spaced"][-1]
    assert (sweep["evaluations"], sweep["calls_share"], sweep["deviation"], sweep["regret"]) == (NUM_STEPS, 1, 0, 0)

    drawn = tmp_path / "ranks.json"
    before = drawn.read_bytes()
    (tmp_path / "ranks.png").unlink()
    again = command("rank_deviation", "--redraw", drawn)
    assert again.returncode == 0, again.stderr
    assert drawn.read_bytes() == before
    assert (tmp_path / "ranks.png").exists()

    refused = command("rank_deviation", "--redraw", tmp_path / "single.json")
    assert refused.returncode == 1
    assert "is a file of single_steps; name the one to write with --out" in refused.stderr
    other = tmp_path / "other.json"
    assert command("rank_deviation", "--redraw", tmp_path / "single.json", "--out", tmp_path / "other").returncode == 0
    found = json.loads(other.read_text())
    assert found["findings"] == ranks["findings"]
    assert (found["experiment"], found["data_in"]) == ("rank_deviation", "single.json")
    assert "data" not in found, "measurements are kept once"
    refused = command("rank_deviation", "--redraw", other)
    assert refused.returncode == 1
    assert "has no measurements; redraw single.json" in refused.stderr
    assert command("quality", "--redraw", drawn).returncode == 1


def test_additivity_and_quality(studied: tuple[Path, Path], tmp_path: Path) -> None:
    fits = run("additivity", studied, tmp_path / "additivity", "--every", 1, "--draws", 2)
    data = fits["data"]["int8"]
    assert {pattern.count("H") for pattern in data["patterns"]} == {2, 3, 4}
    assert np.shape(data["calibration"]) == np.shape(data["validation"]) == (len(data["patterns"]), 2)
    found = fits["findings"]["int8"]["calibration"]["fits"]["downcast"]["r2"]["value"]
    low = np.array([[letter == "L" for letter in pattern] for pattern in data["patterns"]])
    predicted = low @ np.clip(np.mean(data["downcast"], axis=0), 0, None)
    assert found == pytest.approx(r_squared(predicted, np.mean(data["calibration"], axis=1)), rel=1e-4)
    assert len(fits["goals"]) == 2

    quality = run("quality", studied, tmp_path / "quality", "--every", 1, "--draws", 2)
    for count, rows in quality["data"]["precisions"]["int8"]["rows"].items():
        assert set(rows) == {"schedule", "scores alone", "first K", "last K", "both ends", "evenly spread", "random"}
        for row in rows.values():
            assert {pattern.count("H") for pattern in row["patterns"]} == {int(count)}
            assert np.shape(row["error"]) == np.shape(row["ssim"]) == (len(row["patterns"]), 2)
        first = rows["first K"]
        means = quality["findings"]["int8"]["counts"][count]["means"]["first K"]
        assert means["error"]["value"] == pytest.approx(np.mean(first["error"]), rel=1e-4)
        against = quality["findings"]["int8"]["counts"][count]["against"]["error"]["first K"]["value"]
        assert against == pytest.approx(np.mean(rows["schedule"]["error"]) / np.mean(first["error"]), rel=1e-4)
    assert quality["data"]["uniform"]["fp16"]["error"] == [[0.0, 0.0]]
    assert {goal["verdict"] for goal in quality["goals"]} <= {"met", "missed", "not distinguishable"}
    assert len(quality["goals"]) == 3 * 3 * 2  # K, metrics, two goals each
    redrawn = command("quality", "--redraw", tmp_path / "quality.json")
    for count, entry in quality["findings"]["int8"]["counts"].items():
        ratio = entry["search"]["error"]["scores alone"]["value"]
        assert f"int8, K = {count}: the search's schedule over that of scores alone: E x {ratio:.2f}" in redrawn.stdout

    done = command("risk", tmp_path / "additivity.json", tmp_path / "quality.json")
    assert done.returncode == 0, done.stderr
    ran = {*data["patterns"]} | {
        pattern
        for rows in quality["data"]["precisions"]["int8"]["rows"].values()
        for row in rows.values()
        for pattern in row["patterns"]
    }
    assert f"int8: {len(ran)} schedules" in done.stdout
    done = command("risk", tmp_path / "quality.json")
    assert done.returncode == 1
    assert "holds 'quality', expected a file of 'additivity'" in done.stderr


def test_samples_measured_together_give_the_same(
    studied: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def distance(weights: dict[str, Any], picture: np.ndarray, reference: np.ndarray) -> float:
        return float(abs(picture / 255 - reference / 255).mean())

    monkeypatch.setattr(study, "read_weights", lambda path: {})
    monkeypatch.setattr(study, "lpips", distance)
    found = []
    for at_once in (1, 2):
        bundle, out = tmp_path / str(at_once) / "bundle", tmp_path / str(at_once) / "quality"
        shutil.copytree(studied[0], bundle, ignore=shutil.ignore_patterns("experiments"))
        monkeypatch.setattr(study, "samples_per_call", lambda *_, count=at_once: count)
        words = (bundle, "--prompts", studied[1], "--samples=3", "--validation-samples=2", "--threads=1", "--every=2")
        done = command("quality", *words, "--draws=1", "--lpips=x", "--out", out)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(out.with_suffix(".json").read_text()))
    rows = [content["data"]["precisions"]["int8"]["rows"]["2"] for content in found]
    for name, row in rows[0].items():
        if name != "schedule":  # E of a few 1e-5: rounding may turn a choice
            assert np.array(rows[1][name]["error"]) == pytest.approx(np.array(row["error"]), rel=0.05)
            assert np.array(rows[1][name]["ssim"]) == pytest.approx(np.array(row["ssim"]), abs=1e-3)
            assert np.array(rows[1][name]["lpips"]) == pytest.approx(np.array(row["lpips"]), abs=1e-3)
            assert np.all(np.array(row["lpips"]) > 0)
    assert [content["setting"]["pictures_per_call"] for content in found] == [1, 2]
    assert "int8, K = 2, LPIPS" in {goal["subject"] for goal in found[0]["goals"]}


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        ((), 2, "prompts is missing"),
        (("--samples", "9"), 1, "expected 2 (a confidence interval needs two) to 3"),
        (("--samples", "2", "--precisions", "int3"), 1, "'int3' is not in the bundle; choose from int8"),
    ],
)
def test_what_cannot_be_run_is_refused(studied: tuple[Path, Path], tmp_path: Path, args, status, words) -> None:
    bundle, prompts = studied
    given = ("--prompts", prompts, "--validation-samples", 2, "--out", tmp_path / "x") if args else ()
    done = command("single_steps", bundle, *given, *args)
    assert done.returncode == status
    assert words in done.stderr
    assert not list(tmp_path.iterdir())


def test_prompts_are_drawn_in_turns_from_scenes_that_training_never_sees(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    words = ("--kinds", "plain,composed,unusual", "--calibration", 6, "--validation", 4)
    done = command("prompts", *words, "--out", path)
    assert done.returncode == 0, done.stderr
    found = read_prompts(path)
    assert (len(found.calibration), len(found.validation)) == (6, 4)
    scenes = [parse_caption(caption) for caption in (*found.calibration, *found.validation)]
    assert all(is_held_out(scene) for scene in scenes)
    assert len({tuple(sorted(scene.objects)) for scene in scenes}) == 10
    assert [len(scene.objects) for scene in scenes[:2]] == [1, 2]
    assert [has_held_out_pair(scene) for scene in scenes] == [k % 3 == 2 for k in range(10)]

    before = path.read_bytes()
    for args, message in (
        (("--kinds", "plain", "--calibration", 90), "only 91 held-out plain scenes"),
        (("--kinds", "composed,rare"), "prompt kind 'rare' is unknown"),
        (("--kinds", "plain,plain"), "expected different ones"),
        (("--validation", 0), "expected 1 or more of each"),
    ):
        done = command("prompts", *args, "--out", path)
        assert done.returncode == 1
        assert message in done.stderr
    assert path.read_bytes() == before


def test_a_search_on_chosen_samples(studied: tuple[Path, Path], tmp_path: Path) -> None:
    bundle, prompts = studied
    run("single_steps", studied, tmp_path / "scores")
    given = (
        bundle, "--scores", tmp_path / "scores.json", "--prompts", prompts, "--high-steps", 3, "--threads", 1,
    )  # fmt: skip
    found = []
    for samples in ("0,2", "2,0"):
        out = tmp_path / f"{samples}.json"
        done = command(
            "sparing", *given, "--precision", "int8", "--samples", samples,
            "--validation-samples", samples.replace("2", "1"), "--out", out,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found.append(json.loads(out.read_text())["counts"]["3"])
    for row, other in zip(found[0]["unseen"], found[1]["unseen"], strict=True):
        assert row["pattern"].count("H") == 3
        if row["origin"] != "found":
            assert row["errors"] == other["errors"][::-1], "samples keep their prompt and noise"
            assert len(set(row["errors"])) == 2
    first = found[0]["trials"][0]
    assert (first["origin"], first["pattern"]) == ("scores", found[0]["start"])
    assert found[0]["best"] in [trial["pattern"] for trial in found[0]["trials"]]
    for args, words in (
        (("--precision", "int4", "--samples", "0,1", "--validation-samples", "0,1"), "holds no scores of int4"),
        (("--precision", "int8", "--samples", "0,9", "--validation-samples", "0,1"), "calibration sample 9 is not in"),
    ):
        done = command("sparing", *given, *args, "--out", tmp_path / "refused.json")
        assert done.returncode == 1
        assert words in done.stderr
    assert not (tmp_path / "refused.json").exists()
