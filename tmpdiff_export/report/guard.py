"""The section of the report on the guard: the candidates that were measured beside each other, and which one won."""

from __future__ import annotations

from html import escape

from calibration.document import Sensitivity
from calibration.records import CandidateRecord, GuardRecord
from tmpdiff_export.report.marks import error_rows, tried
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


def guard_section(found: Sensitivity) -> str:
    """The candidates, as a picture and as a table."""
    lead = (
        '<p class="lead">Before a schedule is taken, it has to win against others of the same budget, run on the calibration '
        "prompts.</p>"
    )
    record = found.guard
    if record is None or not record.candidates:
        return f"{lead}<p>No guard was held: there was nothing to compare the schedule with.</p>"
    winner = record.candidates[0]
    others = f" (also: {escape('; '.join(winner.names[1:]))})" if len(winner.names) > 1 else ""
    rule = f" Of the rules, {escape(record.best_rule)} was best." if record.best_rule else ""
    rounds = " and ".join(f"{candidates} on {samples}" for samples, candidates in record.rounds)
    figure = picture(
        error_rows(found, tried(found), "guard", "winner"),
        "typical error of every candidate on calibration prompts, with intervals",
        "Typical error on calibration prompts with its 95 % interval, smallest on top. Candidates that were left behind ran "
        "on fewer prompts, and have wider intervals.",
    )
    head = (
        "candidate",
        BY_STEP,
        f"latency / {found.precisions[0]}",
        "predicted E",
        "prompts",
        "typical error",
        "expected",
        DEPARTURES,
        "calls",
    )
    rows = [_row(found, record, trial) for trial in record.candidates]
    return (
        f"{lead}<p>Of {len(record.candidates)} candidates, the winner is {escape(winner.names[0])}{others}.{rule} The comparison took "
        f"{sum(record.calls.values()):,} denoiser calls.</p>{figure}{table(head, rows, 'guard')}"
        f'<p class="note">{reuse_note(trial.precisions for trial in record.candidates)}Candidates by round and leading prompts: {rounds or "-"}. The winner has the least expected error of '
        "those that do not depart significantly more often. Expected is the typical error, averaged with the predicted one where "
        f"few prompts leave it noisy. Departures were looked for on {len(record.fragile)} fragile "
        f"prompt{'s' * (len(record.fragile) != 1)}, whichever round; a dot is a run that departed.</p>"
    )


def _row(found: Sensitivity, record: GuardRecord, trial: CandidateRecord) -> str:
    won = trial is record.candidates[0]
    remarks = [*(["winner"] if won else []), *(["best rule"] if trial.rule and trial.rule == record.best_rule else [])]
    if len(trial.names) > 1:
        remarks.append(f"also: {escape('; '.join(trial.names[1:]))}")
    remark = "".join(f"<small>{text}</small>" for text in remarks)
    fragile = len(trial.samples) - trial.leading
    extra = f"<small>+ {fragile} fragile</small>" if fragile else ""
    return (
        f"<tr{' class=chosen' if won else ''}><td>{escape(trial.names[0])}{remark}</td><td>{strip(found, trial.precisions)}</td>"
        f"<td>{trial.latency:.3f}</td><td>{trial.predicted_error:.2e}</td><td>{trial.leading}{extra}</td>"
        f"{typical_cell(trial.typical, trial.errors)}<td>{trial.expected:.2e}</td>"
        f"{departures_cell(trial.departures)}<td>{trial.calls:,}</td></tr>"
    )
