"""`tmpdiff-export report`: tables and text that say what the documents say, and are safe."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from helpers import made_up
from helpers.report_page import HOSTILE, SECTIONS, Parsed, page_of, with_reuse

from calibration.document import Sensitivity
from calibration.records import CheckRecord, IntervalRecord, TransferRecord, ValidationRow
from engines.manifest import Manifest
from tmpdiff_export.display import schedule_strip
from tmpdiff_export.report.page import page


def test_every_section_opens_with_a_plain_sentence(parsed: Parsed) -> None:
    assert tuple(parsed.text)[1:] == SECTIONS
    for name in SECTIONS:
        inside = [(tag, a.get("class")) for tag, a, section in parsed.elements if section == name]
        assert inside[1:3] == [("h2", None), ("p", "lead")]
    assert [link["href"] for link in parsed.named("a")] == [f"#{name}" for name in SECTIONS]


def test_strips_show_the_schedules(parsed: Parsed, found: Sensitivity) -> None:
    cells = [cell["title"] for cell in parsed.named("i", "schedule")]
    assert cells == [f"step index {k}: {name}" for k, name in enumerate(found.schedule)]
    tried = [name for row in found.validation for schedule in row.schedules for name in schedule]
    strips = [cell["title"].partition(": ")[2] for cell in parsed.named("i", "validation") if "title" in cell]
    assert strips == tried
    colours = {(c["title"].partition(": ")[2], c["style"]) for c in parsed.named("i") if "title" in c}
    assert len(colours) == len({name for name, _ in colours}) == len({style for _, style in colours})


def test_reused_steps_have_marks_of_their_own_a_legend_and_words(parsed: Parsed, found: Sensitivity) -> None:
    reusing = with_reuse(found)
    assert {"reuse0", "reuse1", "reuse2"} < set(reusing.schedule)
    again = Parsed(page_of(reusing))
    for section in ("schedule", "guard", "validation"):
        cells = [cell for cell in again.named("i", section) if "title" in cell][: found.num_steps]
        assert [cell["title"] for cell in cells] == [
            f"step index {k}: {name}" for k, name in enumerate(reusing.schedule)
        ]
        for cell, name in zip(cells, reusing.schedule, strict=True):
            assert cell.get("class") == (f"reused {name}" if name.startswith("reuse") else None)
            assert ("style" in cell) != ("class" in cell)
        (words, *_) = [
            a["aria-label"] for tag, a, where in again.elements if where == section and "strip" in a.get("class", "")
        ]
        assert words == schedule_strip(reusing.schedule)
        assert "Hatched steps are reused: their model output is not computed" in again.text[section]
        assert "Hatched" not in parsed.text[section]
    for name in ("fp16", "reuse0", "reuse1", "reuse2"):
        assert f"{name}: {reusing.schedule.count(name)} of {found.num_steps}" in again.text["schedule"]
    dots = [span["class"] for span in again.named("span", "schedule") if "reused" in span.get("class", "")]
    assert dots == ["dot reused reuse0", "dot reused reuse1", "dot reused reuse2"]
    assert again.tables["validation"][1][-1].count("reuse") == 3


def test_tables_hold_the_documents_figures(parsed: Parsed, manifest: Manifest, found: Sensitivity) -> None:
    rows = parsed.tables["validation"][1:]
    assert len(rows) == len(found.validation) >= 9
    lost = {row.name for row in found.losses}
    for cells, row in zip(rows, found.validation, strict=True):
        remark = "beats the schedule" if row.name in lost else ""
        if row.name != "schedule" and found.schedule in row.schedules:
            remark = "the schedule's own steps"
        assert cells[0] == row.name + remark
        assert float(cells[2]) == pytest.approx(row.latency, abs=6e-4)
        assert float(cells[3].partition("[")[0]) == pytest.approx(row.typical.value, rel=6e-3)
        assert float(cells[6]) == pytest.approx(row.ssim, abs=1e-4)
        assert cells[7] == ("-" if row.psnr_db is None else f"{row.psnr_db:.1f}")
    for cells, name in zip(parsed.tables["precisions"][1:], found.precisions, strict=True):
        entry = manifest.denoisers[name][0]
        assert cells[0] == name + ("simulated" if name == "fp8" else "")
        assert float(cells[1]) == pytest.approx(found.latencies_ms[name], abs=6e-3)
        assert float(cells[3].partition("[")[0]) == pytest.approx(found.uniform[name].value, rel=6e-3)
        assert cells[4].startswith(
            f"{found.uniform_departures[name].count} of {found.uniform_departures[name].samples}"
        )
        assert float(cells[5]) == pytest.approx(entry.sqnr_db, abs=0.06)
        assert float(cells[6]) == pytest.approx(entry.bytes / 1e6, abs=0.06)
    fits = parsed.tables["fit of the predictors"][1:]
    assert [cells[0] for cells in fits] == ["gram (used)", "downcast sum"]
    for cells, record in zip(fits, found.fit, strict=True):
        assert cells[1:4] == [f"{record.r2:.3f}", f"{record.spearman:.3f}", f"{record.ratio:.2f}"]
        assert float(cells[4].removeprefix("\u00d7 ")) == pytest.approx(np.exp(record.scatter), abs=6e-3)
    for cells, curve in zip(parsed.tables["score curves"][1:], found.scores, strict=True):
        assert cells[2].replace(",", "") == str(sum(curve.calls.values()))
        assert cells[5] == ", ".join(map(str, curve.order))
    total = sum(int(cells[-1].replace(",", "")) for cells in parsed.tables["denoiser calls by stage"][1:])
    assert total == sum(sum(calls.values()) for calls in found.calls.values())
    for count in (found.search_calls, found.sweep_calls):
        assert f"{count:,}" in parsed.text["cost"]
    for identity in (manifest.bundle_id, found.evaluator_key, manifest.model.denoiser_sha256):
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


def test_hostile_documents_are_text(manifest: Manifest, found: Sensitivity) -> None:
    row = found.validation[1].model_copy(update={"name": HOSTILE})
    assert found.guard is not None
    first, second, *others = found.guard.candidates
    trials = (first.model_copy(update={"names": (HOSTILE, HOSTILE)}), second, *others)
    hostile = found.model_copy(
        update={
            "budget": HOSTILE,
            "validation": (found.validation[0], row, *found.validation[2:]),
            "guard": found.guard.model_copy(update={"candidates": trials, "best_rule": HOSTILE}),
            "calls": {HOSTILE: {"fp16": 1}},
        }
    )
    setting = manifest.settings[0].model_copy(update={"scheduler": HOSTILE})
    model = manifest.model.model_copy(update={"pipeline_class": HOSTILE})
    result = Parsed(page(manifest.model_copy(update={"model": model}), setting, hostile))
    assert not result.named("script")
    assert not result.named("img")
    for section in ("", "what", "validation", "cost", "guard"):
        assert HOSTILE in result.text[section]
    assert HOSTILE[:20] in result.text["pareto"]


def with_row(found: Sensitivity, name: str, **changes: Any) -> Sensitivity:
    rows = tuple(row.model_copy(update=changes) if row.name == name else row for row in found.validation)
    return found.model_copy(update={"validation": rows})


def last_rule(found: Sensitivity) -> ValidationRow:
    return next(row for row in found.validation if row.name.startswith("last "))


def test_a_loss_beyond_the_interval_is_shown_first(manifest: Manifest, found: Sensitivity) -> None:
    clean = made_up.calibration(20)
    assert not clean.losses
    parsed = Parsed(page_of(clean))
    assert "loses to" not in parsed.text[""]
    assert "No row that is as fast or faster has less typical error" in parsed.text["validation"]
    rule = last_rule(clean).name
    for low, lost in ((1.01, True), (0.99, False)):
        loser = with_row(clean, rule, against=IntervalRecord(value=1.2, low=low, high=1.5))
        parsed = Parsed(page_of(loser))
        assert (f"loses to: {rule}" in parsed.text[""]) == lost
        assert (f"loses to: {rule}" in parsed.text["validation"]) == lost
        marked = [cells[0] for cells in parsed.tables["validation"] if "beats the schedule" in cells[0]]
        assert marked == ([f"{rule}beats the schedule"] if lost else [])
    slower = with_row(clean, rule, against=IntervalRecord(value=1.2, low=1.1, high=1.5), latency=0.99)
    assert not slower.losses


def test_predictions_at_the_wrong_level_are_marked(manifest: Manifest, found: Sensitivity) -> None:
    for ratio, marked in ((1.1, False), (0.1, True), (3.0, True)):
        fits = tuple(fit.model_copy(update={"ratio": ratio}) for fit in found.fit)
        text = Parsed(page(manifest, manifest.settings[0], found.model_copy(update={"fit": fits}))).text["fit"]
        assert ("not as a level" in text) == marked


def test_every_candidate_of_the_guard_is_shown(parsed: Parsed, manifest: Manifest, found: Sensitivity) -> None:
    record = found.guard
    assert record is not None
    rows = parsed.tables["guard"][1:]
    assert len(rows) == len(record.candidates) > 4
    for cells, trial in zip(rows, record.candidates, strict=True):
        assert cells[0].startswith(trial.names[0])
        assert ("winner" in cells[0]) == (trial is record.candidates[0])
        assert ("best rule" in cells[0]) == (record.best_rule == trial.rule)
        assert all(name in cells[0] for name in trial.names)
        assert float(cells[2]) == pytest.approx(trial.latency, abs=6e-4)
        leading, *fragile = map(int, re.findall(r"\d+", cells[4]))
        assert (leading, leading + sum(fragile)) == (trial.leading, len(trial.samples))
        value, low, high = (float(word) for word in re.findall(r"[\d.]+e-\d+", cells[5]))
        typical = trial.typical
        assert (value, low, high) == pytest.approx((typical.value, typical.low, typical.high), rel=6e-3)
        assert float(cells[6]) == pytest.approx(trial.expected, rel=6e-3)
        assert cells[7].startswith(f"{trial.departures.count} of {trial.departures.samples}[")
        assert int(cells[8].replace(",", "")) == trial.calls
    drawn = [cell["title"].partition(": ")[2] for cell in parsed.named("i", "guard") if "title" in cell]
    assert drawn == [name for trial in record.candidates for name in trial.precisions]
    assert f"{sum(record.calls.values()):,} denoiser calls" in parsed.text["guard"]
    assert f"the winner is {record.candidates[0].names[0]}" in parsed.text["guard"]
    none = Parsed(page(manifest, manifest.settings[0], found.model_copy(update={"guard": None})))
    assert "No guard was held" in none.text["guard"]


def test_departures_are_dots(parsed: Parsed, found: Sensitivity) -> None:
    assert found.guard is not None
    counts = {
        "guard": [trial.departures.count for trial in found.guard.candidates],
        "validation": [row.departures.count for row in found.validation if row.departures],
    }
    for section, expected in counts.items():
        assert sum(expected) > 0
        dots = [cell for cell in parsed.named("i", section) if "title" not in cell]
        assert len(dots) == sum(expected)
        words = [span["aria-label"] for span in parsed.named("span", section) if span.get("class") == "dots"]
        assert [int(word.partition(" ")[0]) for word in words] == [count for count in expected if count]
    row = next(row for row in found.validation if row.departures and row.departures.count)
    bounds = f"[{100 * row.departures.low:.1f}, {100 * row.departures.high:.1f} %]"
    assert bounds in parsed.text["validation"]


def test_intervals_and_words_of_the_ratio(parsed: Parsed, found: Sensitivity) -> None:
    words = {
        "worse": "schedule worse",
        "better": "schedule better",
        "not distinguishable": "not distinguishable from 1",
    }
    seen = set()
    for cells, row in zip(parsed.tables["validation"][1:], found.validation, strict=True):
        if row.against is None or row.standing is None:
            assert cells[5] == "-"
            continue
        seen.add(row.standing)
        assert cells[5].startswith(f"{row.against.value:.2f}[{row.against.low:.2f}, {row.against.high:.2f}]")
        assert cells[5].endswith(words[row.standing])
    assert seen == set(words)
    tips = [cell["title"] for cell in parsed.named("td", "validation") if "title" in cell]
    assert tips == [f"plain mean {np.mean(row.sample_errors):.2e}" for row in found.validation]


def test_one_sample_distinguishes_nothing() -> None:
    found = made_up.calibration(8, samples=1)
    assert {row.standing for row in found.validation} == {None, "not distinguishable"}
    assert not found.losses


def test_rows_that_do_not_explain_themselves_are_explained(parsed: Parsed, found: Sensitivity) -> None:
    best = found.best_rule
    assert best is not None
    assert f"{best.name}: the rule that had the least typical error on the calibration" in parsed.text["validation"]
    assert "uniform, mixed: pictures shared out among uniform precisions" in parsed.text["validation"]


def test_the_gram_matrix_is_described_for_those_who_do_not_see_it(parsed: Parsed, found: Sensitivity) -> None:
    labels = [div["aria-label"] for div in parsed.named("div", "gram") if div.get("role") == "img"]
    assert len(labels) == len(found.precisions) - 1
    for label, name in zip(labels, found.precisions[1:], strict=True):
        assert label.startswith(f"signed correlation of the error vectors of {name}, step by step")
        assert re.search(r"neighbours \+0\.\d\d, all pairs [+-]0\.\d\d; 11 of 20 steps measured", label)
    assert "How to read it: where a cell is orange" in parsed.text["gram"]


def test_a_calibration_by_the_downcast_sum_says_so(manifest: Manifest, found: Sensitivity) -> None:
    text = Parsed(page(manifest, manifest.settings[0], found.model_copy(update={"predictor": "downcast sum"}))).text[
        "gram"
    ]
    assert "by the diagonal alone, the downcast sum" in text


def test_carried_scores_say_where_they_come_from(parsed: Parsed, manifest: Manifest, found: Sensitivity) -> None:
    assert "carried scores" not in parsed.tables
    check = CheckRecord(
        precision="int4", steps=(0, 5, 9), carried=(1.0, 2.0, 3.0), measured=(2.0, 4.0, 7.0), level=2.1, scatter=0.3,
        spearman=None,
    )  # fmt: skip
    record = TransferRecord(bundle_id="c" * 64, num_steps=30, guidance_scale=2.5, checks=(check,))
    carried = found.model_copy(update={"transfer": record, "method": "transfer"})
    parsed = Parsed(page(manifest, manifest.settings[0], carried))
    assert parsed.tables["carried scores"][1:] == [["int4", "0, 5, 9", "2.10", f"\u00d7 {np.exp(0.3):.2f}", "-"]]
    assert f"bundle {'c' * 12} with T = 30 and guidance scale 2.5" in parsed.text["scores"]


@pytest.mark.parametrize(
    "options",
    [
        {"num_steps": 1},
        {"num_steps": 2, "method": "sweep"},
        {"validation": ()},
        {"precisions": ("fp16",)},  # all others dropped
        {"num_steps": 10, "chosen": ("fp16",) * 10},  # E = 0 throughout
        {"samples": 1},
        {"samples": 3},
        {"guard": None, "fit": (), "fit_points": ()},
    ],
    ids=["T=1", "T=2", "not validated", "all dropped", "all fp16", "one sample", "three samples", "no guard, no fit"],
)
def test_unusual_calibrations_have_every_section(options: dict[str, Any]) -> None:
    found = made_up.calibration(**options)
    text = page_of(found)
    assert tuple(Parsed(text).text)[1:] == SECTIONS
    assert not re.search(r"\b(nan|inf|None)\b", re.sub(r"<[^>]*>", "", text[text.index("<body>") :]))
    if not found.validation:
        assert "not run on validation prompts" in Parsed(text).text[""]
