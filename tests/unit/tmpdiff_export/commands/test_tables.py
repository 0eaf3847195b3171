"""A calibration in words and tables, as `calibrate`, `inspect` and `demo` print it."""

from __future__ import annotations

import pytest
from helpers import made_up

from calibration.document import Sensitivity
from calibration.records import IntervalRecord, QualityRecord
from tmpdiff_export.commands.tables import print_sensitivity, verdict
from tmpdiff_export.display import schedule_strip


@pytest.fixture(scope="module")
def found() -> Sensitivity:
    return made_up.calibration(10, ("fp16", "fp8", "int8", "int4"))


def cells(printed: str, title: str) -> list[list[str]]:
    """The rows of a printed table; names that go on below are joined."""
    lines = printed[printed.index(f"{title}") :].splitlines()
    rows = []
    for line in lines[1:]:
        if line.startswith("└"):
            break
        if line.startswith("│"):
            rows.append([cell.strip() for cell in line.strip("│").split("│")])
    joined: list[list[str]] = []
    for row in rows:
        if row[1]:
            joined.append(row)
        else:
            joined[-1] = [" ".join(filter(None, pair)) for pair in zip(joined[-1], row, strict=True)]
    return joined


def test_everything_is_printed(found: Sensitivity, capsys: pytest.CaptureFixture[str]) -> None:
    print_sensitivity(found)
    printed = capsys.readouterr().out
    assert [row[0] for row in cells(printed, "Precisions")] == list(found.precisions)
    scores = cells(printed, "Scores per step index")
    assert len(scores) == found.num_steps
    assert [cell.endswith("*") for cell in (row[1] for row in scores)] == list(found.scores[0].measured)
    fits = cells(printed, "Predicted against measured E")
    assert [(row[0], row[1], row[-1]) for row in fits] == [("gram", "0.991", "used"), ("downcast sum", "0.840", "")]
    assert len(cells(printed, "Pareto front")) == len(found.pareto)
    guard = found.guard
    assert guard is not None
    trials = cells(printed, "Guard: candidates")
    assert [row[0] for row in trials] == [trial.names[0] for trial in guard.candidates]
    for row, trial in zip(trials, guard.candidates, strict=True):
        assert float(row[4]) == pytest.approx(trial.expected, rel=6e-3)
        assert row[5:7] == [f"{trial.departures.count} of {trial.departures.samples}", str(trial.calls)]
    assert trials[0][-1].startswith("winner")
    assert f"denoiser calls for the guard: {sum(guard.calls.values())}" in printed
    rows = cells(printed, "Validation prompts")
    assert [row[0] for row in rows] == [row.name for row in found.validation]
    words = {row[4].rpartition("] ")[2] for row in rows if row[4].endswith(("worse", "better"))}
    assert words == {"worse", "better"}
    for row, record in zip(rows, found.validation, strict=True):
        if record.against and record.typical.value > 0:
            assert row[4].startswith(
                f"{record.against.value:.2f} [{record.against.low:.2f}, {record.against.high:.2f}]"
            )
    assert f"schedule: {schedule_strip(found.schedule)}" in printed
    assert f"predicted E {found.predicted_error:.3e} from 24 calibration prompts, by gram" in printed


def test_reused_steps_are_counted_beside_the_precisions(found: Sensitivity, capsys: pytest.CaptureFixture[str]) -> None:
    fastest, *others = found.pareto
    choices = (*fastest.precisions[:4], "reuse0", "reuse1", *fastest.precisions[6:])
    reusing = found.model_copy(
        update={"schedule": choices, "pareto": (fastest.model_copy(update={"precisions": choices}), *others)}
    )
    print_sensitivity(reusing)
    printed = capsys.readouterr().out
    front = cells(printed, "Pareto front")
    assert [row[-1] for row in front] == ["2", *["0"] * len(others)]
    assert [sum(map(int, row[2:])) for row in front] == [found.num_steps] * len(found.pareto)
    assert "| reuse0 4 | reuse1 5 |" in printed.replace("\n", " ")
    print_sensitivity(found)
    assert "reused" not in capsys.readouterr().out


def test_a_picture_budget_that_unseen_prompts_miss_says_so(found: Sensitivity) -> None:
    chosen = found.chosen
    assert chosen is not None
    assert chosen.ssim is not None
    for target, word in ((chosen.ssim - 1e-4, "as asked"), (chosen.ssim + 1e-3, "BELOW the ")):
        asked = found.model_copy(update={"quality": QualityRecord(metric="ssim", target=target), "guard": None})
        assert [word in line for line in verdict(asked) if line.startswith("SSIM on validation prompts: ")] == [True]


def test_predictions_that_unseen_prompts_do_not_bear_out_say_so(found: Sensitivity) -> None:
    chosen = found.chosen
    assert chosen is not None
    low = found.model_copy(update={"predicted_error": chosen.typical.value / 3})
    assert [line for line in verdict(low) if "times the predicted" in line] == [
        "that is 3 times the predicted error: these prompts err more"
    ]


def test_a_schedule_that_is_the_best_rule_says_so(found: Sensitivity) -> None:
    chosen, best = found.chosen, found.best_rule
    assert chosen is not None
    assert best is not None
    same = tuple(
        row.model_copy(update={"schedules": chosen.schedules}) if row is best else row for row in found.validation
    )
    lines = list(verdict(found.model_copy(update={"validation": same})))
    assert any(line.startswith("the schedule is the ") for line in lines)


@pytest.mark.parametrize("precisions", [("fp16", "int8"), ("fp16", "fp8", "int8", "int4", "nvfp4")])
def test_no_figure_of_validation_is_wrapped(capsys: pytest.CaptureFixture[str], precisions: tuple[str, ...]) -> None:
    found = made_up.calibration(50, precisions)
    print_sensitivity(found)
    printed = capsys.readouterr().out
    table = printed[printed.index("Validation prompts") :]
    lines = [line.strip("│").split("│") for line in table.splitlines() if line.startswith("│")]
    goes_on = [line for line in lines if not line[1].strip()]
    assert len(lines) - len(goes_on) == len(found.validation)
    assert all(line[0].startswith("  (") and not "".join(line[1:]).strip() for line in goes_on)
    assert bool(goes_on) == (len(precisions) > 2)


@pytest.mark.parametrize(
    ("low", "high", "word"), [(1.1, 1.5, "worse"), (0.9, 1.5, "not distinguishable from 1"), (0.6, 0.9, "better")]
)
def test_the_verdict_goes_by_the_interval(found: Sensitivity, low: float, high: float, word: str) -> None:
    best = found.best_rule
    assert best is not None
    against = IntervalRecord(value=(low + high) / 2, low=low, high=high)
    even = IntervalRecord(value=1.0, low=0.9, high=1.1)
    rows = [
        row if row.against is None else row.model_copy(update={"against": against if row.name == best.name else even})
        for row in found.validation
    ]
    lines = list(verdict(found.model_copy(update={"validation": tuple(rows)})))
    assert lines[0].startswith("on 24 validation prompts: typical error ")
    assert f"departures {found.validation[0].departures.count} of 24 [" in lines[0]  # type: ignore[union-attr]
    assert lines[1].startswith(f"{best.name}: typical error ")
    assert lines[2] == (
        f"the schedule has {against.value:.2f} [{low:.2f}, {high:.2f}] of the best rule's typical error: {word}"
    )
    assert (f"LOSES on validation to: {best.name} " in lines[3]) == (word == "worse")
    assert ("no schedule that is as fast has a lower typical error" in lines[3]) == (word != "worse")


def test_without_validation_that_is_said(found: Sensitivity, capsys: pytest.CaptureFixture[str]) -> None:
    print_sensitivity(found.model_copy(update={"validation": ()}))
    printed = capsys.readouterr().out
    assert "not run on validation prompts" in printed
    assert "Validation prompts" not in printed


def test_a_wrong_level_is_said(found: Sensitivity, capsys: pytest.CaptureFixture[str]) -> None:
    for ratio, told in ((1.1, False), (0.3, True)):
        fits = tuple(fit.model_copy(update={"ratio": ratio}) for fit in found.fit)
        print_sensitivity(found.model_copy(update={"fit": fits}))
        assert ("read predictions as a ranking" in capsys.readouterr().out) == told
