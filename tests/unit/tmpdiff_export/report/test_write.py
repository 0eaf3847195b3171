"""`tmpdiff-export report`: figures and tables that say what the documents say, safe, and readable in a browser."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from helpers.chromium import CHROMIUM, Browser
from helpers.demo_build import linked_copy
from helpers.paths import ROOT
from helpers.planted import PlantedEvaluator, calibrate_loops
from PIL import Image

from calibration import HighSteps, Sensitivity
from calibration.choose.stored_prediction import StoredPrediction
from calibration.document import CheckRecord, TransferRecord
from engines.bundle import SCHEDULE_NAME, SENSITIVITY_NAME, Bundle
from engines.runtime import DenoiseRuntime
from engines.schedule import Schedule
from tmpdiff_export.report.figures import rule_points, ruled_precision
from tmpdiff_export.report.page import page

SOURCE = ROOT
SECTIONS = ("what", "schedule", "precisions", "scores", "fit", "pareto", "search", "validation", "cost", "pictures")
HOSTILE = '<img src=x onerror="alert(1)"> </title></style><script>alert(2)</script> & $x^2$'


class Parsed(HTMLParser):
    """Elements of a page, and its text by section (the header under "")."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str], str]] = []
        self.text: dict[str, str] = {"": ""}
        self.tables: dict[str, list[list[str]]] = {}
        self._section = ""
        self._table: list[list[str]] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attributes}
        if tag == "section":
            self._section = values["id"]
            self.text[self._section] = ""
        self.elements.append((tag, values, self._section))
        if values.get("role") == "region":
            self._table = self.tables.setdefault(values["aria-label"], [])
        if tag == "tr" and self._table is not None:
            self._table.append([])
        if tag in ("td", "th") and self._table:
            self._table[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "table":
            self._table = None
        if tag == "section":
            self._section = ""

    def handle_data(self, data: str) -> None:
        self.text[self._section] += data
        if self._table and self._table[-1]:
            self._table[-1][-1] += data

    def named(self, tag: str, section: str | None = None) -> list[dict[str, str]]:
        return [a for name, a, where in self.elements if name == tag and section in (None, where)]


def figures(text: str) -> dict[str, ElementTree.Element]:
    """The SVG elements of a page by the prefix of their ids."""
    found = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)]
    return {str(svg.find("g").get("id")).removesuffix("-figure_1"): svg for svg in found}  # type: ignore[union-attr]


def marks(svg: ElementTree.Element, name: str) -> list[tuple[float, float, str]]:
    """(x, y, style) of the markers of the curves, those of the legend and the ticks left out."""
    axes = next(group for group in svg.iter("g") if group.get("id") == f"{name}-axes_1")
    lines = [group for group in axes if str(group.get("id")).startswith(f"{name}-line2d")]
    return [
        (float(use.get("x", "nan")), float(use.get("y", "nan")), use.get("style", ""))
        for line in lines
        for use in line.iter("use")
    ]


def command(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tmpdiff_export.cli", "report", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "2", **environment},
        timeout=300,
    )


@pytest.fixture(scope="module")
def written(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A report with one picture of a hostile prompt, and what the command printed."""
    out = tmp_path_factory.mktemp("report") / "report.html"
    result = command(demo_bundle, "--out", out, "--prompt", HOSTILE, "--pictures", 1, "--json")
    assert result.returncode == 0, result.stderr
    return out, json.loads(result.stdout)


@pytest.fixture(scope="module")
def text(written: tuple[Path, dict[str, Any]]) -> str:
    return written[0].read_text()


@pytest.fixture(scope="module")
def parsed(text: str) -> Parsed:
    return Parsed(text)


@pytest.fixture(scope="module")
def bundle(demo_bundle: Path) -> Bundle:
    return Bundle.open(demo_bundle)


@pytest.fixture(scope="module")
def found(bundle: Bundle) -> Sensitivity:
    return Sensitivity.load(bundle.sensitivity_path)


def planted(num_steps: int = 10, num_samples: int = 1, **options: Any) -> Sensitivity:
    """A calibration of a planted loop with the demo bundle's precisions."""

    def loop(seed: int) -> PlantedEvaluator:
        shape = np.exp(2 * np.linspace(-0.7, 1.1, num_steps) ** 2)
        errors = {"fp8": 0.05 * shape, "int8": 0.1 * shape, "int4": 0.3 * shape}
        return PlantedEvaluator(errors, gains=[0.95] * num_steps, correlation=0.3, num_samples=num_samples, seed=seed)

    latencies = options.pop("latencies", {"fp16": 8.0, "fp8": 6.0, "int8": 4.0, "int4": 3.0})
    validation = loop(1) if options.pop("validated", True) else None
    return calibrate_loops(loop(0), latencies, validation=validation, **options).sensitivity


def test_every_section_opens_with_a_plain_sentence(parsed: Parsed) -> None:
    assert tuple(parsed.text)[1:] == SECTIONS
    for name in SECTIONS:
        inside = [(tag, a.get("class")) for tag, a, section in parsed.elements if section == name]
        assert inside[1:3] == [("h2", None), ("p", "lead")]
    assert [link["href"] for link in parsed.named("a")] == [f"#{name}" for name in SECTIONS]


def test_strips_show_the_schedules(parsed: Parsed, bundle: Bundle, found: Sensitivity) -> None:
    cells = [cell["title"] for cell in parsed.named("i", "schedule")]
    assert cells == [f"step index {k}: {name}" for k, name in enumerate(bundle.schedule().precisions)]
    tried = [name for row in found.validation for schedule in row.schedules for name in schedule]
    assert [cell["title"].partition(": ")[2] for cell in parsed.named("i", "validation")] == tried
    colours = {(cell["title"].partition(": ")[2], cell["style"]) for cell in parsed.named("i")}
    assert len(colours) == len({name for name, _ in colours}) == len({style for _, style in colours})


def test_tables_hold_the_documents_figures(parsed: Parsed, bundle: Bundle, found: Sensitivity) -> None:
    rows = parsed.tables["validation"][1:]
    assert len(rows) == len(found.validation) >= 9
    for cells, row in zip(rows, found.validation, strict=True):
        remark = "beats the schedule" if row.name in found.loses_to else ""
        if row.name != "schedule" and found.schedule in row.schedules:
            remark = "the schedule's own steps"
        assert cells[0] == row.name + remark
        assert float(cells[1]) == pytest.approx(row.latency, abs=6e-4)
        assert float(cells[2].partition("+-")[0]) == pytest.approx(row.error, rel=1e-3)
        assert float(cells[4]) == pytest.approx(row.ssim, abs=1e-4)
        assert cells[5] == ("-" if row.psnr_db is None else f"{row.psnr_db:.1f}")
    for cells, name in zip(parsed.tables["precisions"][1:], found.precisions, strict=True):
        entry = bundle.manifest.denoisers[name]
        assert cells[0] == name + ("simulated" if name == "fp8" else "")  # on the CPU
        assert float(cells[1]) == pytest.approx(found.latencies_ms[name], abs=6e-3)
        assert float(cells[3]) == pytest.approx(found.uniform_errors[name], rel=1e-2)
        assert float(cells[4]) == pytest.approx(entry.sqnr_db, abs=0.06)
        assert float(cells[5]) == pytest.approx(entry.bytes / 1e6, abs=0.06)
        assert ("dropped" in cells[7]) == (name in {item.precision for item in found.dropped})
    for cells, record in zip(parsed.tables["fit of the predictors"][1:], found.fit, strict=True):
        assert cells[0].removesuffix(" (used)") == record.predictor
        assert cells[1:3] == [f"{record.r2:.3f}", f"{record.spearman:.3f}"]
    for cells, curve in zip(parsed.tables["score curves"][1:], found.scores, strict=True):
        assert cells[2].replace(",", "") == str(sum(curve.calls.values()))
        assert cells[5] == ", ".join(map(str, curve.order))
    total = sum(int(cells[-1].replace(",", "")) for cells in parsed.tables["denoiser calls by stage"][1:])
    assert total == sum(sum(calls.values()) for calls in found.calls.values())
    for count in (found.search_calls, found.sweep_calls):
        assert f"{count:,}" in parsed.text["cost"]
    for identity in (bundle.manifest.bundle_id, found.evaluator_key, bundle.manifest.model.denoiser_sha256):
        assert identity in parsed.text["what"]


@pytest.mark.parametrize("direction", ["downcast", "upcast"])
def test_score_curves_stand_where_the_scores_are(text: str, found: Sensitivity, direction: str) -> None:
    drawn = marks(figures(text)[f"scores-{direction}"], f"scores-{direction}")
    records = [record for record in found.scores if record.direction == direction]
    assert len(drawn) == found.num_steps * len(records)
    for record in records:
        place = {"fp8": 1, "int8": 2, "int4": 3}[record.precision]
        curve = sorted(mark for mark in drawn if f"stroke: var(--p{place})" in mark[2])
        heights = [-y for _, y, _ in curve]
        positive = [k for k, score in enumerate(record.scores) if score > 0]
        hollow = [k for k, (*_, style) in enumerate(curve) if "fill: var(--paper)" in style]
        assert hollow == [k for k in positive if not record.measured[k]]
        logs = np.log([record.scores[k] for k in positive])
        slope, start = np.polyfit(logs, [heights[k] for k in positive], 1)
        assert slope > 0
        np.testing.assert_allclose([heights[k] for k in positive], slope * logs + start, atol=0.01)


def test_fit_figure_has_every_random_schedule(text: str, found: Sensitivity) -> None:
    drawn = sorted((x, -y) for x, y, _ in marks(figures(text)["fit"], "fit"))
    points = sorted((point.predicted[found.predictor], point.measured) for point in found.fit_points)
    assert len(drawn) == len(points)
    for axis in (0, 1):
        values, places = np.array(points)[:, axis], np.array(drawn)[:, axis]
        slope, start = np.polyfit(values, places, 1)
        assert slope > 0
        np.testing.assert_allclose(places, slope * values + start, atol=0.01)


def test_pareto_figure_has_the_schedule_and_every_baseline(text: str, found: Sensitivity) -> None:
    svg = figures(text)["pareto"]
    rows = [mark for mark in marks(svg, "pareto") if "--muted" not in mark[2]]
    legend = {element.text for element in svg.iter("text")}
    assert {row.name for row in found.validation} | {"schedule, predicted", "front, predicted"} <= legend
    expected = {round(row.latency, 6) for row in found.validation}
    assert len({round(x, 2) for x, *_ in rows}) == len(expected)


def test_nothing_is_loaded_or_run(parsed: Parsed, text: str) -> None:
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, *_ in parsed.elements}
    for _, attributes, _ in parsed.elements:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            assert attributes.get(name, "#").startswith(("#", "data:image/png;base64,"))
    assert not re.findall(r"url\((?!#)|@import|https?:", text.replace(HOSTILE, ""))
    identifiers = [a["id"] for _, a, _ in parsed.elements if "id" in a]
    assert len(set(identifiers)) == len(identifiers)
    assert {a["href"][1:] for a in parsed.named("use")} <= set(identifiers)


def test_hostile_prompt_is_text(parsed: Parsed) -> None:
    assert HOSTILE in parsed.text["pictures"]
    assert all(picture["src"].startswith("data:") for picture in parsed.named("img"))
    assert len(parsed.named("title")) == 1


def test_hostile_documents_are_text(bundle: Bundle, found: Sensitivity) -> None:
    row = found.validation[1].model_copy(update={"name": HOSTILE})
    hostile = found.model_copy(
        update={
            "budget": HOSTILE,
            "validation": (found.validation[0], row, *found.validation[2:]),
            "loses_to": (HOSTILE,),
            "calls": {HOSTILE: {"fp16": 1}},
        }
    )
    sampling = bundle.manifest.sampling.model_copy(update={"scheduler": HOSTILE})
    model = bundle.manifest.model.model_copy(update={"pipeline_class": HOSTILE})
    result = Parsed(page(bundle.manifest.model_copy(update={"sampling": sampling, "model": model}), hostile))
    assert not result.named("script")
    assert not result.named("img")
    for section in ("", "what", "validation", "cost", "pareto"):
        assert HOSTILE in result.text[section]


def test_pictures_are_the_runtimes(parsed: Parsed, bundle: Bundle, written: tuple[Path, dict[str, Any]]) -> None:
    runtime = DenoiseRuntime(bundle, threads=2)
    images = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(a["src"].partition(",")[2]))).convert("RGB"))
        for a in parsed.named("img")
    ]
    names = [*runtime.precisions, "schedule"]
    assert len(images) == 2 * len(names) == 2 * written[1]["pictures"]
    drawn = dict(zip(names, images[::2], strict=True))
    heat = dict(zip(names, images[1::2], strict=True))
    for name, schedule in (("fp16", bundle.schedule("uniform:fp16")), ("schedule", bundle.schedule())):
        expected = runtime.generate([HOSTILE], [0], schedule)[0]
        assert np.abs(drawn[name].astype(int) - expected).max() <= 1  # another number of threads may round otherwise
    assert len(np.unique(heat["fp16"].reshape(-1, 3), axis=0)) == 1
    for name in names[1:]:
        difference = np.abs(drawn[name].astype(float) - drawn["fp16"]).mean(axis=-1)
        brightness = heat[name].astype(int).sum(axis=-1)
        assert brightness.flat[difference.argmax()] == brightness.max() > heat["fp16"].max()


def test_same_documents_give_same_bytes(demo_bundle: Path, tmp_path: Path) -> None:
    pages = []
    for seed in ("1", "2"):
        out = tmp_path / f"{seed}.html"
        assert command(demo_bundle, "--out", out, PYTHONHASHSEED=seed).returncode == 0
        pages.append(out.read_bytes())
    assert pages[0] == pages[1]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_loss_is_shown_first(bundle: Bundle, found: Sensitivity) -> None:
    clean = Parsed(page(bundle.manifest, found.model_copy(update={"loses_to": ()})))
    assert "loses to" not in clean.text[""]
    assert "No row that is as fast or faster has a smaller E" in clean.text["validation"]
    loser = Parsed(page(bundle.manifest, found.model_copy(update={"loses_to": (found.validation[-1].name,)})))
    assert f"loses to: {found.validation[-1].name}" in loser.text[""]
    assert f"loses to: {found.validation[-1].name}" in loser.text["validation"]
    assert loser.tables["validation"][-1][0] == f"{found.validation[-1].name}beats the schedule"


def test_predictions_at_the_wrong_level_are_marked(bundle: Bundle, found: Sensitivity) -> None:
    for ratio, marked in ((1.1, False), (0.1, True), (3.0, True)):
        fits = tuple(fit.model_copy(update={"ratio": ratio}) for fit in found.fit)
        text = Parsed(page(bundle.manifest, found.model_copy(update={"fit": fits}))).text["fit"]
        assert ("not as a level" in text) == marked


def test_rank_deviation_of_a_swept_calibration(bundle: Bundle) -> None:
    swept = page(bundle.manifest, planted(num_steps=16, method="sweep"))
    drawn = sorted(marks(figures(swept)["ranks"], "ranks"))
    bottom = max(y for _, y, _ in drawn)
    assert drawn[-1][1] == pytest.approx(bottom)  # all steps measured: no deviation
    assert min(y for x, y, _ in drawn if x == drawn[0][0]) < bottom - 20  # three steps: a visible one
    assert "ranks" not in figures(page(bundle.manifest, planted(num_steps=16)))


def test_every_schedule_of_the_search_is_shown(bundle: Bundle) -> None:
    found = planted(num_samples=4, budget=HighSteps(4))
    record = found.refinement
    assert record is not None
    parsed = Parsed(page(bundle.manifest, found))
    rows = parsed.tables["local search"][1:]
    assert len(rows) == len(record.trials) > 4
    start = record.trials[0]
    for cells, trial in zip(rows, record.trials, strict=True):
        origin = "predicted best" if trial is start else trial.origin
        assert cells[0] == origin + ("chosen" if trial.precisions == found.schedule else "")
        assert float(cells[4]) == pytest.approx(np.mean(trial.errors), rel=1e-2)
        ratios = np.array(trial.errors) / np.array(start.errors[: len(trial.errors)])
        assert float(cells[5]) == pytest.approx(np.exp(np.log(ratios).mean()), abs=6e-3)
        assert int(cells[6]) == len(trial.errors)
    assert rows[0][5] == "1.00"
    drawn = [cell["title"].partition(": ")[2] for cell in parsed.named("i", "search")]
    assert drawn == [name for trial in record.trials for name in trial.precisions]
    assert f"{sum(record.calls.values()):,} denoiser calls" in parsed.text["search"]
    stood = "The predicted best schedule stood" in parsed.text["search"]
    assert stood == (record.origin == "scores")
    beaten = found.model_copy(update={"refinement": record.model_copy(update={"origin": HOSTILE})})
    assert f"gave way to one that was tried because: {HOSTILE}" in Parsed(page(bundle.manifest, beaten)).text["search"]


def test_carried_scores_say_where_they_come_from(bundle: Bundle) -> None:
    assert "carried scores" not in Parsed(page(bundle.manifest, planted())).tables
    check = CheckRecord(
        precision="int4", steps=(0, 5, 9), carried=(1.0, 2.0, 3.0), measured=(2.0, 4.0, 7.0), level=2.1, scatter=0.3,
        spearman=None,
    )  # fmt: skip
    record = TransferRecord(bundle_id="c" * 64, num_steps=30, guidance_scale=2.5, checks=(check,))
    carried = planted().model_copy(update={"transfer": record, "method": "transfer"})
    parsed = Parsed(page(bundle.manifest, carried))
    assert parsed.tables["carried scores"][1:] == [["int4", "0, 5, 9", "2.10", f"\u00d7 {np.exp(0.3):.2f}", "-"]]
    assert f"bundle {'c' * 12} with T = 30 and guidance scale 2.5" in parsed.text["scores"]


def test_intervals_are_those_of_the_ratio_over_prompts(bundle: Bundle) -> None:
    found = planted(num_samples=5, budget=HighSteps(4))
    rows = Parsed(page(bundle.manifest, found)).tables["validation"][1:]
    schedule = found.validation[0]
    for cells, row in zip(rows, found.validation, strict=True):
        ratio, _, interval = cells[3].partition("[")
        assert float(ratio) == pytest.approx(row.error / schedule.error, abs=6e-3)
        assert np.mean(row.sample_errors) == pytest.approx(row.error)
        if row is schedule:
            assert not interval
            continue
        low, high = map(float, interval.rstrip("]").split(", "))
        single = np.array(row.sample_errors) / np.array(schedule.sample_errors)
        assert single.min() - 0.01 <= low <= float(ratio) <= high <= single.max() + 0.01
    older = tuple(row.model_copy(update={"sample_errors": ()}) for row in found.validation)
    without_samples = Parsed(page(bundle.manifest, found.model_copy(update={"validation": older})))
    assert not any("[" in cells[3] for cells in without_samples.tables["validation"][1:])


def test_departures_are_counted(bundle: Bundle) -> None:
    found = planted(num_samples=5, budget=HighSteps(4))
    words = "Departures, prompts that ended more than ten medians away"
    assert words not in Parsed(page(bundle.manifest, found)).text["validation"]
    row = found.validation[2]
    far = row.model_copy(update={"sample_errors": (*row.sample_errors[:-1], 100 * max(row.sample_errors))})
    rows = tuple(far if item is row else item for item in found.validation)
    text = Parsed(page(bundle.manifest, found.model_copy(update={"validation": rows}))).text["validation"]
    assert f"{words}, weigh in the mean: {row.name} (1)." in text


def test_risk_is_drawn_said_and_part_of_predictions(bundle: Bundle) -> None:
    found = planted(budget=HighSteps(4))
    words = "the risk of a departure"
    assert words not in Parsed(page(bundle.manifest, found)).text["scores"]
    records = tuple(
        record.model_copy(update={"risk": tuple(max(score, 0.0) / 2 for score in record.scores)})
        if record.direction == "downcast"
        else record
        for record in found.scores
    )
    risky = found.model_copy(update={"scores": records})
    text = page(bundle.manifest, risky)
    assert words in Parsed(text).text["scores"]
    before, after = (figures(page(bundle.manifest, one))["scores-downcast"] for one in (found, risky))
    drawn = [
        len([path for path in svg.iter() if "stroke-dasharray" in path.get("style", "")]) for svg in (before, after)
    ]
    assert drawn[1] > drawn[0], "dotted"
    low = next(record for record in records if record.risk)
    schedule = (found.precisions[0],) * (found.num_steps - 1) + (low.precision,)
    assert (StoredPrediction(risky).error(schedule) or 0) > (StoredPrediction(found).error(schedule) or 0) > 0


def test_rules_are_drawn_at_every_count(bundle: Bundle) -> None:
    found = planted(method="sweep", budget=HighSteps(4))
    precision = ruled_precision(found)
    assert precision in found.schedule
    points = rule_points(found, precision)
    prediction = StoredPrediction(found)
    count = 3
    for name, schedule in (
        ("first K", ("fp16",) * count + (precision,) * 7),
        ("last K", (precision,) * 7 + ("fp16",) * count),
    ):
        assert points[name][count] == pytest.approx((prediction.latency(schedule), prediction.error(schedule)))
    for line in points.values():
        assert len(line) == found.num_steps + 1
        assert line[0] == pytest.approx(points["first K"][0])
        assert line[-1] == pytest.approx((1.0, 0.0))
    drawn = marks(figures(page(bundle.manifest, found))["rules"], "rules")
    assert len(drawn) == len(points) * found.num_steps + 1  # without E = 0, and with the schedule
    dropped = planted(latencies=dict.fromkeys(("fp16", "fp8", "int8", "int4"), 8.0))
    assert ruled_precision(dropped) is None
    assert "rules" not in figures(page(bundle.manifest, dropped))


@pytest.mark.parametrize(
    "options",
    [
        {"num_steps": 1},
        {"num_steps": 2, "method": "sweep"},
        {"validated": False},
        {"latencies": dict.fromkeys(("fp16", "fp8", "int8", "int4"), 8.0)},  # nothing is faster: all dropped
        {"budget": HighSteps(10)},  # E = 0 throughout
        {"budget": HighSteps(10), "num_samples": 3},
        {"budget": HighSteps(4), "num_samples": 3, "refine_calls": 0},
    ],
    ids=["T=1", "T=2", "not validated", "all dropped", "all fp16", "all fp16, several samples", "no calls to search"],
)
def test_unusual_calibrations_have_every_section(bundle: Bundle, options: dict[str, Any]) -> None:
    text = page(bundle.manifest, planted(**options))
    assert tuple(Parsed(text).text)[1:] == SECTIONS
    assert not re.search(r"\b(nan|inf|None)\b", re.sub(r"<[^>]*>", "", text[text.index("<body>") :]))
    if not options.get("validated", True):
        assert "not run on validation prompts" in Parsed(text).text[""]


def without(name: str) -> Callable[[Path], None]:
    return lambda bundle: (bundle / name).unlink()


def other_schedule(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    Schedule.uniform(opened.manifest.bundle_id, "fp16", opened.manifest.sampling.num_steps).save(opened.schedule_path)


def other_calibration(bundle: Path) -> None:
    planted(num_steps=5).save(bundle / SENSITIVITY_NAME)


@pytest.mark.parametrize(
    ("damage", "arguments", "words"),
    [
        (without(SENSITIVITY_NAME), (), "not calibrated: it holds no sensitivity.json; run `tmpdiff-export calibrate"),
        (without(SCHEDULE_NAME), (), "not calibrated: it holds no schedule.json; run `tmpdiff-export calibrate"),
        (other_schedule, (), "is not the schedule that sensitivity.json describes"),
        (other_calibration, (), "has 5 steps"),
        (None, ("--pictures", "2"), "add --prompt TEXT"),
        (None, ("--pictures", "-1", "--prompt", "a"), "--pictures is -1"),
        (None, ("--prompt", "word " * 500), "token"),
    ],
    ids=["no sensitivity", "no schedule", "other schedule", "other T", "no prompt", "negative", "long prompt"],
)
def test_refusals(
    demo_bundle: Path, tmp_path: Path, damage: Callable[[Path], None] | None, arguments: tuple[str, ...], words: str
) -> None:
    bundle = linked_copy(demo_bundle, tmp_path / "bundle")
    if damage:
        damage(bundle)
    out = tmp_path / "out" / "report.html"
    out.parent.mkdir()
    out.write_text("the old one")
    result = command(bundle, "--out", out, *arguments)
    assert result.returncode == 1
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stdout == ""
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]
    assert out.read_text() == "the old one"


@pytest.mark.parametrize(("out", "words"), [("missing/report.html", "does not exist"), (".", "is a folder")])
def test_refuses_where_it_cannot_write(demo_bundle: Path, tmp_path: Path, out: str, words: str) -> None:
    result = command(demo_bundle, "--out", tmp_path / out)
    assert (result.returncode, words in result.stderr) == (1, True)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no chromium on PATH; install Debian's package chromium to check the page in a browser")
    started = Browser(CHROMIUM, tmp_path_factory.mktemp("profile"))
    yield started
    started.close()


CONTRAST = """(() => {
  const light = c => { const v = c.match(/[\\d.]+/g).slice(0, 3).map(x => x / 255)
    .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * v[0] + 0.7152 * v[1] + 0.0722 * v[2] };
  const back = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
    if (c != 'rgba(0, 0, 0, 0)') return c } return 'rgb(255, 255, 255)' };
  return [...document.querySelectorAll('p, b, td, th, dt, dd, h1, h2, h3, a, figcaption, .loss, svg text')].map(e => {
    const s = getComputedStyle(e), a = light(e.closest('svg') ? s.fill : s.color), b = light(back(e));
    return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.outerHTML.slice(0, 120)] })
    .sort((a, b) => a[0] - b[0])[0] })()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_page_in_a_browser(
    browser: Browser, written: tuple[Path, dict[str, Any]], tmp_path: Path, width: int, scheme: str
) -> None:
    browser.open(written[0], width, scheme)
    picture = browser.screenshot()
    assert picture.shape[1] == width
    Image.fromarray(picture).save(tmp_path / f"report-{width}-{scheme}.png")
    assert (np.median(picture) < 64) == (scheme == "dark")
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    outside = "[...document.querySelectorAll('section *')].filter(e => !e.closest('.scroll') && !e.closest('svg') && "
    assert browser.evaluate(outside + f"e.getBoundingClientRect().right > {width}).map(e => e.outerHTML)") == []
    contrast, element = browser.evaluate(CONTRAST)
    assert contrast >= 4.5, element
    sizes = "[...document.querySelectorAll('svg text')].map(e => e.getBoundingClientRect())"
    assert browser.evaluate(f"Math.min(...{sizes}.map(r => Math.max(r.width, r.height)))") >= 9
    assert browser.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)") is True
    kinds = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
    assert [event for event in browser.events if event["method"] in kinds] == []
    asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [written[0].as_uri()]
