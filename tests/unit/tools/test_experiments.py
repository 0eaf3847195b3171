"""The experiments' commands on a small bundle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.commands import started
from helpers.demo_build import linked_copy
from helpers.experiments import command
from helpers.tiny_pipeline import PROMPTS, UNSEEN, tiny_options

from calibration.measure.metrics import typical_errors
from engines.text import read_prompts
from tmpdiff_export.demo.scenes import has_held_out_pair, is_held_out, parse_caption
from tools.experiments import study
from tools.experiments.curves import mean_scores
from tools.experiments.schedules import fixed_rules
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


def test_curves_of_samples_are_limited_means_in_both_directions():
    changed = np.array([[1.0, 4.0], [1.0, 4.0], [1.0, 4.0], [500.0, 4.0]])
    assert mean_scores("downcast", changed, changed.sum(axis=1)).tolist() == [13 / 4, 4.0]
    uniform = np.array([5.0, 5.0, 5.0, 900.0])
    upcast = uniform[:, None] - changed
    assert mean_scores("upcast", upcast, uniform).tolist() == [65 / 4 - 13 / 4, 65 / 4 - 4.0]


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
    assert "upcast" not in steps["data"]["int8"], "calibration has no use for them"
    assert str(tmp_path) not in json.dumps(steps), "results name no paths of the machine"

    (journal,) = (studied[0] / "experiments").glob("*.journal")
    measured = journal.read_bytes()
    journal.write_bytes(measured[: len(measured) // 2])  # as if it had been interrupted
    ranks = run("rank_deviation", studied, tmp_path / "ranks")
    assert journal.read_bytes() == measured, "it goes on where the other one stopped"
    assert ranks["data"] == steps["data"]
    sweep = ranks["findings"]["int8"]["methods"]["evenly spaced"][-1]
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

    both = run("single_steps", studied, tmp_path / "both", "--upcasts")
    assert both["data"]["int8"]["downcast"] == curve
    assert np.shape(both["data"]["int8"]["upcast"]) == (2, NUM_STEPS)
    assert both["command"].endswith("--threads 1 --upcasts --out both")


def test_predictions_of_unseen_prompts(studied: tuple[Path, Path], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("tools.experiments.prediction.FEWER", (2, 3), raising=True)
    found = run("prediction", studied, tmp_path / "prediction", "--every", 1, "--draws", 2)
    data, fits = found["data"]["int8"], found["findings"]["int8"]
    assert {pattern.count("H") for pattern in data["patterns"]} == {2, 3, 4}
    assert np.shape(data["validation"]) == (len(data["patterns"]), 2)
    low = np.array([[letter == "L" for letter in pattern] for pattern in data["patterns"]])
    assert data["predicted"]["downcast sum"] == pytest.approx(low @ np.array(data["scores"]), rel=1e-3)
    assert set(fits) == set(data["predicted"]) == {"gram", "downcast sum", "gram, floor left in"}
    for predictor, fit in fits.items():
        typical = typical_errors(np.array(data["validation"]))
        assert fit["r2"]["value"] == pytest.approx(r_squared(np.array(data["predicted"][predictor]), typical), rel=1e-3)
        assert 0 <= fit["r2"]["low"] <= fit["r2"]["high"] <= 1
    assert [goal["target"] for goal in found["goals"]] == ["R^2 of the Gram >= 0.98"]


def test_quality(studied: tuple[Path, Path], tmp_path: Path) -> None:
    found = run("quality", studied, tmp_path / "quality", "--draws", 1)
    data, findings = found["data"]["int8"], found["findings"]["precisions"]["int8"]
    assert list(data["cells"]) == list(findings["cells"]) == ["2", "3", "4"]
    uniform = np.array(data["runs"]["L" * NUM_STEPS]["error"])
    for count, cell in data["cells"].items():
        made = findings["cells"][count]
        rules = fixed_rules(NUM_STEPS, int(count))
        assert {pattern.count("H") for pattern in (cell["schedule"], *cell["random"])} == {int(count)}
        assert cell["candidates"][0]["pattern"] == cell["schedule"]
        assert set(cell["rules"]) == set(rules)
        best = min(cell["rules"], key=cell["rules"].__getitem__)
        names = {candidate["pattern"] for candidate in cell["candidates"]}
        assert {*rules.values(), cell["schedule"]} <= names
        for candidate in cell["candidates"]:
            assert candidate["calls"] <= candidate["samples"] * NUM_STEPS
        typical = {name: typical_errors(np.array(data["runs"][rule]["error"])) for name, rule in rules.items()}
        mine = typical_errors(np.array(data["runs"][cell["schedule"]]["error"]))
        assert made["ratios"]["best rule"]["value"] == pytest.approx(mine / typical[best], rel=1e-4)
        assert made["ratios"]["last K"]["value"] == pytest.approx(mine / typical["last K"], rel=1e-4)
        mixed = (1 - int(count) / NUM_STEPS) * typical_errors(uniform)
        assert made["typical"]["uniform, mixed"]["value"] == pytest.approx(mixed, rel=1e-4)
        assert made["ratios"]["uniform, mixed"]["value"] == pytest.approx(mine / mixed, rel=1e-4)
        assert made["pictures"]["dissimilarity"]["last K"] == pytest.approx(
            np.mean(data["runs"][rules["last K"]]["dissimilarity"]), rel=1e-4
        )
        assert made["calls"]["now"]["guard"] == cell["calls"] > 0
        assert made["calls"]["now"]["scores"] == data["calls"]["downcast int8"] + data["calls"]["rounding"]
        assert data["calls"]["rounding"] == 2 * NUM_STEPS
        earlier = made["calls"]["earlier"]
        assert earlier["scores"] == earlier["race"] == 2 * data["calls"]["downcast int8"]
        assert earlier["fit"] == data["calls"]["fit"], "as many samples of either kind"
    assert len(found["goals"]) == 3 * 4 + 2
    assert {goal["verdict"] for goal in found["goals"]} <= {"met", "missed", "not distinguishable"}
    drawn = (tmp_path / "quality.json").read_bytes()
    redrawn = command("quality", "--redraw", tmp_path / "quality.json")
    assert redrawn.returncode == 0, redrawn.stderr
    assert (tmp_path / "quality.json").read_bytes() == drawn
    assert "int8, K = 3: " in redrawn.stdout

    late = run("quality", studied, tmp_path / "late", "--seconds-limit", 0)
    assert late["data"] == {}
    assert late["findings"]["all"]["cells"] == 0


def test_the_proof_measures_in_processes_and_is_summed_up(studied: tuple[Path, Path], tmp_path: Path) -> None:
    bundle, prompts = studied
    out = tmp_path / "proof"
    words = ("--prompts", prompts, "--processes", 2, "--out", out)
    done = started("tools.experiments.proof", "--bundle", bundle, 2, 2, *words)
    assert done.returncode == 0, done.stderr
    assert "bundle int8: int8, K = 3\n" in done.stdout
    alone = run("quality", studied, tmp_path / "alone")
    together = json.loads((out / "quality-bundle.json").read_text())
    assert together["data"] == alone["data"]
    assert together["findings"] == alone["findings"]
    assert together["setting"]["precisions"] == ["int8"]
    for name in ("quality", "prediction"):
        assert (out / f"{name}-bundle.png").exists()

    summed = tmp_path / "summary.json"
    files = (out / "quality-bundle.json", out / "prediction-bundle.json")
    done = command("summary", *files, "--out", summed)
    assert done.returncode == 0, done.stderr
    found = json.loads(summed.read_text())
    ((name, family),) = found["families"].items()
    assert name == f"PixArtTransformer2DModel, T = {NUM_STEPS}"
    assert family["r2"].keys() == {"int8"}
    assert {key: value for key, value in family.items() if key != "r2"} == found["all"]
    assert found["all"] == {
        key: value if isinstance(value, dict) else pytest.approx(value, rel=1e-4)
        for key, value in alone["findings"]["all"].items()
    }
    ratios = [c["ratios"]["best rule"]["value"] for c in alone["findings"]["precisions"]["int8"]["cells"].values()]
    assert family["over_best_rule"] == pytest.approx(np.prod(ratios) ** (1 / 3), rel=1e-3)
    assert "worst cell <= 1.02" in done.stdout
    done = command("summary", out / "parts" / "quality-bundle-int8.json")
    assert done.returncode == 1
    assert "expected a result file of prediction or quality" in done.stderr

    late = started("tools.experiments.proof", "--bundle", bundle, 2, 2, *words, "--seconds-limit", 0)
    assert late.returncode == 0, late.stderr
    assert "quality, bundle: nothing was measured" in late.stdout
    refused = started("tools.experiments.proof", "--bundle", bundle, 9, 2, *words)
    assert refused.returncode == 1
    assert "bundle int8: FAILED" in refused.stdout
    assert "not measured to the end: bundle int8" in refused.stderr


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
    runs = [content["data"]["int8"]["runs"] for content in found]
    shared = runs[0].keys() & runs[1].keys()  # E of a few 1e-5: rounding may turn a choice
    assert set(fixed_rules(NUM_STEPS, 2).values()) <= shared
    for pattern in shared:
        one, other = runs[0][pattern], runs[1][pattern]
        assert np.array(other["error"]) == pytest.approx(np.array(one["error"]), rel=0.05)
        assert np.array(other["dissimilarity"]) == pytest.approx(np.array(one["dissimilarity"]), abs=1e-3)
        assert np.array(other["lpips"]) == pytest.approx(np.array(one["lpips"]), abs=1e-3)
        assert np.all(np.array(one["lpips"]) > 0)
    assert [content["setting"]["pictures_per_call"] for content in found] == [1, 2]
    assert (
        found[0]["findings"]["precisions"]["int8"]["cells"]["2"]["picture_ratios"]["lpips"]["uniform, mixed"]["value"]
        > 0
    )


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
