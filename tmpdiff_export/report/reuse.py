"""The section of the report on steps that reuse model outputs: the plans that were measured, and fewer steps beside them."""

from __future__ import annotations

from html import escape

from calibration.choose.stored_prediction import StoredPrediction
from calibration.document import Sensitivity
from calibration.reuse_records import FewerStepsRecord, ReusePlanRecord
from engines.reuse import reused_steps
from tmpdiff_export.display import interval
from tmpdiff_export.report.pieces import BY_STEP, strip, table


def reuse_section(found: Sensitivity) -> str:
    """A ladder of reuse plans, and loops of fewer steps that are no slower than the schedule."""
    lead = (
        '<p class="lead">A step may take its model output from past ones, the last one or a line or parabola through the last, '
        "and then calls no denoiser.</p>"
    )
    record = found.reuse
    if record is None:  # the page then leaves this section out
        return lead
    count, reference = len(reused_steps(found.schedule)), escape(found.precisions[0])
    model = StoredPrediction(found)
    head = ("plan", BY_STEP, "reused", f"latency / {reference}", "predicted E", "measured E", "influence")
    rows = [_row(found, model, plan) for plan in record.plans]
    return (
        f"{lead}<p>The schedule reuses {count} of {found.num_steps} steps, of {record.most} that were allowed.</p>"
        f"{table(head, rows, 'reuse')}"
        f'<p class="note">Typical error with {reference} at all other steps, on {len(record.samples)} calibration prompts; '
        "predicted from single reuses and the plan before it. A reused step takes "
        f"{record.step_ms:.3g} ms. Influence: the largest factor by which an output counts more in the final latents than without "
        "reuse. The search took "
        f"{sum(record.calls.values()):,} denoiser calls, of at most {record.most_calls:,}.</p>{_fewer(found)}"
    )


def _row(found: Sensitivity, model: StoredPrediction, plan: ReusePlanRecord) -> str:
    reused = reused_steps(plan.choices)
    own = [k for k, choice in enumerate(found.schedule) if choice == plan.choices[k]]
    chosen = reused == reused_steps(found.schedule) and set(reused) <= set(own)
    name = escape(plan.rule or f"{len(reused)} steps")
    return (
        f"<tr{' class=chosen' if chosen else ''}><td>{name}</td><td>{strip(found, plan.choices)}</td><td>{len(reused)}</td>"
        f"<td>{model.latency(plan.choices):.3f}</td><td>{plan.predicted:.2e}</td><td>{plan.measured:.2e}</td>"
        f"<td>{max(map(abs, plan.influence)):.1f}</td></tr>"
    )


def _fewer(found: Sensitivity) -> str:
    if not found.fewer_steps:
        return ""
    beaten = [record for record in found.fewer_steps if record.beats]
    names = escape(", ".join(f"{record.num_steps} steps at {record.precision}" for record in beaten))
    verdict = (
        f'<div class="loss" role="note">Fewer steps by the scheduler err less: {names}. Calibrate that number of steps.</div>'
        if beaten
        else "<p>No loop of fewer steps that is as fast errs less than the schedule beyond the interval.</p>"
    )
    head = ("fewer steps", f"latency / {escape(found.precisions[0])}", "prompts", "typical error", "schedule's / its")
    return f"<h3>Fewer steps by the scheduler</h3>{verdict}{table(head, list(map(_fewer_row, found.fewer_steps)), 'fewer steps')}"


def _fewer_row(record: FewerStepsRecord) -> str:
    if record.reason is not None:
        return f'<tr><td>{escape(record.precision)}</td><td colspan="4" class="wrap">{escape(record.reason)}</td></tr>'
    figures = (interval(record.typical, ".1e"), interval(record.against, ".2f"))
    return (
        f"<tr><td>{record.num_steps} at {escape(record.precision)}</td><td>{record.latency:.3f}</td><td>{record.samples}</td>"
        f"{''.join(f'<td>{figure}</td>' for figure in figures)}</tr>"
    )
