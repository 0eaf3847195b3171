"""The section of the report on how the schedule and the baselines did on validation prompts."""

from __future__ import annotations

from html import escape

import numpy as np

from calibration import Sensitivity
from calibration.document import ValidationRow
from calibration.measure.metrics import departed
from calibration.statistics import bootstrap_interval
from tmpdiff_export.display import number
from tmpdiff_export.report.pieces import BY_STEP, error_cell, strip, table


def validation(found: Sensitivity) -> str:
    """The table of the schedule and the baselines, and who beats it."""
    lead = (
        '<p class="lead">The schedule and simpler rules, run on prompts that calibration had not seen; the rules have as '
        "many steps per precision as the schedule, so the same latency; a uniform row has one precision throughout.</p>"
    )
    if not found.validation:
        return f"{lead}<p>There were no validation prompts.</p>"
    rows = [_validation_row(found, row, found.validation[0]) for row in found.validation]
    reference = found.precisions[0]
    head = ("schedule", f"latency / {reference}", "E", "E / schedule's", "SSIM", "PSNR dB", BY_STEP, "steps")
    verdict = (
        f'<div class="loss" role="note">The schedule loses to: {escape(", ".join(found.loses_to))}.</div>'
        if found.loses_to
        else "<p>No row that is as fast or faster has a smaller E than the schedule.</p>"
    )
    return (
        f"{lead}{verdict}{table(head, rows, 'validation')}"
        '<p class="note">Latency is computed from the measured step latencies. SSIM and PSNR compare the pictures with '
        f"those of {escape(reference)}; a dash for PSNR: identical or not decoded. A random row is the mean of its draws, "
        "+- their standard deviation. In brackets: 95 % interval of the ratio over resampled prompts; where it holds 1, the "
        f"difference may be chance; with few prompts it is too narrow.{_departed(found)}</p>"
    )


def _departed(found: Sensitivity) -> str:
    """Rows in which a run departed, which their plain means of E do not show."""
    counts = {row.name: departed(np.array(row.sample_errors)) for row in found.validation if row.sample_errors}
    rows = ", ".join(f"{escape(name)} ({count})" for name, count in counts.items() if count)
    return f" Departures, prompts that ended more than ten medians away, weigh in the mean: {rows}." if rows else ""


def _validation_row(found: Sensitivity, row: ValidationRow, chosen: ValidationRow) -> str:
    kind = "chosen" if row.name == "schedule" else "winner" if row.name in found.loses_to else ""
    spread = f"<small>+- {row.error_spread:.1e}</small>" if row.error_spread is not None else ""
    strips = "".join(strip(found, schedule) for schedule in row.schedules)
    cells = (
        f"{row.latency:.3f}",
        f"{error_cell(row.error, '.3e')}{spread}",
        _ratio(row, chosen),
        number(row.ssim, ".4f"),
        number(row.psnr_db, ".1f"),
    )
    steps = escape(" + ".join(f"{count} {name}" for name, count in row.counts.items()))
    remark = "beats the schedule" if kind == "winner" else ""
    if not kind and found.schedule in row.schedules:
        remark = "the schedule's own steps"
    name = escape(row.name) + (f"<small>{remark}</small>" if remark else "")
    return (
        f"<tr{f' class={kind}' if kind else ''}><td>{name}</td>"
        f"{''.join(f'<td>{cell}</td>' for cell in cells)}<td>{strips}</td><td class=left>{steps}</td></tr>"
    )


def _ratio(row: ValidationRow, chosen: ValidationRow) -> str:
    """E over the schedule's, with an interval over prompts where there are two or more."""
    if not chosen.error > 0:
        return "-"
    text = f"{row.error / chosen.error:.2f}"
    own, of = np.array(row.sample_errors), np.array(chosen.sample_errors)
    if row is chosen or len(own) < 2 or len(own) != len(of):
        return text
    found = bootstrap_interval(lambda pick: _over(own[pick].mean(), of[pick].mean()), len(own))
    return f"{text}<small>[{found.low:.2f}, {found.high:.2f}]</small>" if np.isfinite(found.low) else text


def _over(first: float, second: float) -> float:
    return float(first / second) if second > 0 else float("nan")
