"""The section of the report on what was tried after the scores: the local search."""

from __future__ import annotations

import math
from html import escape

import numpy as np

from calibration import Sensitivity
from calibration.document import TrialRecord
from tmpdiff_export.report.pieces import BY_STEP, strip, table


def search(found: Sensitivity) -> str:
    """The local search around the predicted best schedule."""
    lead = (
        '<p class="lead">Scores predict which schedule is best; before it is taken, it has to win against its nearest '
        "rivals, run on the calibration prompts.</p>"
    )
    record = found.refinement
    if record is None:
        return (
            f"{lead}<p>No search was held: the budget is in picture quality, and the schedule was chosen by measuring "
            "that already.</p>"
        )
    if not record.trials:
        reason = (
            "one calibration prompt cannot tell a difference from chance"
            if found.num_samples < 2
            else f"{record.max_calls:,} denoiser calls allow no race, or there was no rival"
        )
        return f"{lead}<p>No search was held: {reason}.</p>"
    calls = sum(record.calls.values())
    outcome = (
        "The predicted best schedule stood."
        if record.origin == "scores"
        else f"The predicted best schedule gave way to one that was tried because: {escape(record.origin)}."
    )
    rows = [_trial(found, trial, record.trials[0]) for trial in record.trials]
    head = (
        "schedule",
        BY_STEP,
        f"latency / {found.precisions[0]}",
        "E predicted",
        "E measured",
        "of the first",
        "prompts",
    )
    return (
        f"{lead}<p>{outcome} {len(record.trials)} schedules ran in {calls:,} denoiser calls, {record.rounds} "
        f"{'race' if record.rounds == 1 else 'races'}.</p>{table(head, rows, 'local search')}"
        '<p class="note">The worse half of a race runs on a part of the prompts only. "Of the first" compares with the '
        "predicted best on the same prompts: the geometric mean of the ratios of E, by which races are decided. Where a run "
        "departs, schedules that spare the first steps run on all prompts, and the mean of E decides.</p>"
    )


def _trial(found: Sensitivity, trial: TrialRecord, first: TrialRecord) -> str:
    measured = np.array(trial.errors)
    ratio = math.exp(float(np.mean(_logs(measured) - _logs(np.array(first.errors[: len(measured)])))))
    chosen = trial.precisions == found.schedule
    origin = "predicted best" if trial.origin == "scores" else trial.origin
    remark = "<small>chosen</small>" if chosen else ""
    return (
        f"<tr{' class=chosen' if chosen else ''}><td>{escape(origin)}{remark}</td><td>{strip(found, trial.precisions)}</td>"
        f"<td>{trial.latency:.3f}</td><td>{trial.predicted_error:.2e}</td><td>{measured.mean():.2e}</td>"
        f"<td>{ratio:.2f}</td><td>{len(measured)}</td></tr>"
    )


def _logs(errors: np.ndarray) -> np.ndarray:
    return np.asarray(np.log(np.maximum(errors, 1e-300)))
