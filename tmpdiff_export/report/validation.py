"""The section of the report on how the schedule and simpler ones did on validation prompts."""

from __future__ import annotations

from html import escape

from calibration.document import Sensitivity
from calibration.records import Standing, ValidationRow
from tmpdiff_export.display import interval, number
from tmpdiff_export.report.marks import BEST_RULE, error_rows, validated
from tmpdiff_export.report.pieces import (
    BY_STEP,
    DEPARTURES,
    departures_cell,
    picture,
    reuse_note,
    strip,
    table,
    typical_cell,
)

WORDS: dict[Standing, str] = {
    "worse": "schedule worse",
    "better": "schedule better",
    "not distinguishable": "not distinguishable from 1",
}
MIXED = "uniform, mixed"


def validation(found: Sensitivity) -> str:
    """The schedule and the others, as a picture and as a table, and whether one of them is better."""
    lead = (
        '<p class="lead">The schedule and simpler ones, run on prompts that calibration had not seen and nothing was chosen '
        "on.</p>"
    )
    if not found.validation:
        return f"{lead}<p>There were no validation prompts.</p>"
    reference = escape(found.precisions[0])
    figure = picture(
        error_rows(found, validated(found), "rows", "schedule"),
        "typical error of the schedule and the others on validation prompts, with intervals",
        "Typical error with its 95 % interval, smallest on top; the dotted line is the schedule's.",
    )
    head = (
        "schedule", BY_STEP, f"latency / {found.precisions[0]}", "typical error", DEPARTURES, "schedule's / its", "SSIM",
        "PSNR dB", "steps",
    )  # fmt: skip
    rows = [_row(found, row) for row in found.validation]
    return (
        f"{lead}{_verdict(found)}{figure}{table(head, rows, 'validation')}{_explained(found)}"
        f'<p class="note">{reuse_note(schedule for row in found.validation for schedule in row.schedules)}Typical error: mean of E in which no prompt counts for more than ten medians; in brackets the 95 % '
        "interval over resampled prompts, widened where they are few. A dot is a departure, a run that ended "
        "elsewhere: E above .05 and ten medians; in brackets the interval of their share. Schedule's / its: typical error of "
        "the schedule over that of the row, of the same prompts; below 1 the schedule is better. Latency is computed from "
        f"the measured step latencies. SSIM and PSNR compare the pictures with those of {reference}; a dash for PSNR: "
        "identical or not decoded. A random row is the mean of its draws.</p>"
    )


def _verdict(found: Sensitivity) -> str:
    best, chosen = found.best_rule, found.chosen
    beside = ""
    if best and chosen and best.against and best.standing:
        beside = f" Beside the best rule it has {interval(best.against, '.2f')} of the typical error: {best.standing}."
    if found.losses:
        names = escape(", ".join(row.name for row in found.losses))
        return f'<div class="loss" role="note">The schedule loses to: {names}.{escape(beside)}</div>'
    return f"<p>No row that is as fast or faster has less typical error than the schedule beyond the interval.{escape(beside)}</p>"


def _explained(found: Sensitivity) -> str:
    """A line for each name that does not explain itself."""
    words = {
        BEST_RULE: "the rule that had the least typical error on the calibration prompts, as one would choose it in practice.",
        MIXED: "pictures shared out among uniform precisions so that they take as long on average as with the schedule.",
    }
    items = [
        f"<li><b>{escape(row.name)}</b>: {text}</li>"
        for row in found.validation
        for name, text in words.items()
        if row.name.startswith(name)
    ]
    return f"<ul>{''.join(items)}</ul>" if items else ""


def _row(found: Sensitivity, row: ValidationRow) -> str:
    lost = row in found.losses
    kind = "chosen" if row is found.chosen else "winner" if lost else ""
    remark = "beats the schedule" if lost else ""
    if not kind and found.schedule in row.schedules:
        remark = "the schedule's own steps"
    against = "-"
    if row.against and row.standing:
        value, _, bounds = interval(row.against, ".2f").partition(" ")
        against = f"{value}<small>{bounds}</small><small>{WORDS[row.standing]}</small>"
    cells = (against, number(row.ssim, ".4f"), number(row.psnr_db, ".1f"))
    strips = "".join(strip(found, schedule) for schedule in row.schedules)
    steps = escape(" + ".join(f"{count} {name}" for name, count in row.counts.items()))
    if row.name == MIXED:
        steps = "a share of the pictures each"
    return (
        f"<tr{f' class={kind}' if kind else ''}><td>{escape(row.name)}{f'<small>{remark}</small>' if remark else ''}</td>"
        f"<td>{strips}</td><td>{row.latency:.3f}</td>{typical_cell(row.typical, row.sample_errors)}{departures_cell(row.departures)}"
        f"{''.join(f'<td>{cell}</td>' for cell in cells)}<td class=left>{steps}</td></tr>"
    )
