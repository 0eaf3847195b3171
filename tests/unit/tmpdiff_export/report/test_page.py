"""`tmpdiff-export report`: tables and text that say what the documents say, and are safe."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from helpers.report_page import HOSTILE, SECTIONS, Parsed, planted

from calibration import HighSteps, Sensitivity
from calibration.document import CheckRecord, TransferRecord
from engines.bundle import Bundle
from tmpdiff_export.report.page import page


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
