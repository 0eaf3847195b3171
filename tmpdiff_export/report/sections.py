"""The plain sections of the report: what was calibrated, the schedule, the precisions and what it cost."""

from __future__ import annotations

from html import escape

from calibration.document import Sensitivity
from engines.manifest import Manifest
from engines.setting_entry import SettingEntry
from tmpdiff_export.display import departures, interval, schedule_strip
from tmpdiff_export.report.pieces import (
    DEPARTURES,
    ORDER,
    choice_keys,
    departures_cell,
    precision_name,
    reuse_note,
    strip,
    table,
    typical_cell,
)


def what(manifest: Manifest, setting: SettingEntry, found: Sensitivity) -> str:
    """What was calibrated, and what this page is about."""
    engine, model = manifest.reference, manifest.model
    facts = {
        "pipeline": f"{model.pipeline_class}, {model.denoiser_class} with {model.parameters:,} parameters",
        "setting": f"{setting.name}: {setting.described}; T = {setting.num_steps} steps",
        "backend": f"{engine.backend} {engine.backend_version}, {engine.device}",
        "budget": found.budget,
        "samples": f"{found.num_samples} calibration prompts; errors predicted by {found.predictor}",
        "built with": manifest.created_with,
        "bundle id": manifest.bundle_id,
        "denoiser weights": f"sha256 {model.denoiser_sha256}",
        "calibration samples": found.evaluator_key,
        "validation samples": found.validation_key or "none",
    }
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    return (
        '<p class="lead">A diffusion model makes a picture in T steps; this page shows which of them can run at a lower '
        "precision, and what that costs.</p>"
        "<p>Every step calls the same network, the denoiser. At a low precision it is faster and slightly wrong, and how "
        "much an error matters depends on the step. Calibration measured that, then chose a precision per step index. "
        f"<b>E</b> is the squared difference of the final latents from those of an all-{escape(found.precisions[0])} run, "
        f"relative to their size: 0 is equal, 1e-2 is one percent.</p><dl>{items}</dl>"
    )


def schedule(found: Sensitivity) -> str:
    """The schedule, step by step."""
    every = next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000) if found.num_steps / step <= 11)
    marks = "".join(f"<span>{k if k % every == 0 else ''}</span>" for k in range(found.num_steps))
    return (
        '<p class="lead">The precision of every step index, from pure noise on the left to the finished picture on the '
        f'right.</p>{strip(found, found.schedule, "strip big")}<div class="axis" aria-hidden="true">{marks}</div>'
        f'<p>{choice_keys(found, found.schedule)}</p><p class="note">By step index: {escape(schedule_strip(found.schedule))}. '
        f"{reuse_note([found.schedule])}"
        f"Predicted E {found.predicted_error:.3e}{_measured(found)}.</p>"
    )


def _measured(found: Sensitivity) -> str:
    if found.chosen is None:
        return ", not run on validation prompts"
    departed = f", {departures(found.chosen.departures)} departed" if found.chosen.departures else ""
    return f"; typical error on validation prompts {interval(found.chosen.typical, '.2e')}{departed}"


def precisions(manifest: Manifest, found: Sensitivity) -> str:
    """What a step takes at each precision, and how wrong the picture becomes."""
    reference = found.precisions[0]
    dropped = {item.precision: f"dropped: {item.reason}" for item in found.dropped}
    rows = []
    for name in found.precisions:
        entry, latency = manifest.denoisers[name][0], found.latencies_ms[name]
        used = "scored, in the schedule" if name in found.schedule else "scored, not in the schedule"
        measured = typical_cell(found.uniform[name]) + departures_cell(found.uniform_departures.get(name))
        figures = (f"{entry.sqnr_db:.1f}", f"{entry.bytes / 1e6:.1f}", escape(entry.recipe))
        use = dropped.get(name, "reference" if name == reference else used)
        emulated = any("emulated" in what for what in entry.lowering)
        remark = "<small>simulated</small>" if emulated else ""
        rows.append(
            f"<tr><td>{precision_name(found, name)}{remark}</td><td>{latency:.2f}</td>"
            f"<td>{latency / found.latencies_ms[reference]:.3f}</td>{measured}{''.join(f'<td>{c}</td>' for c in figures)}"
            f'<td class="wrap">{escape(use)}</td></tr>'
        )
    head = (
        "precision",
        "step ms",
        f"/ {reference}",
        "typical error",
        DEPARTURES,
        "SQNR dB",
        "size MB",
        "recipe",
        "use",
    )
    return (
        '<p class="lead">One engine per precision: how fast a step is, and how wrong the result is if every step uses it.'
        f"</p>{table(head, rows, 'precisions')}"
        '<p class="note">Step latencies were measured on the machine that calibrated. SQNR compares one denoiser call '
        "with FP32 torch (higher is better). Simulated: the backend has no kernels for it and computes what they would give, so "
        "that its errors count but its latency does not. A precision that is no faster than another and errs no less is dropped "
        "before it is scored. Typical error: of every step at that precision, a mean of E over the calibration prompts in which none "
        "counts for more than ten medians. A departure is a run that ends elsewhere: E above .05 and ten medians.</p>"
    )


def cost(found: Sensitivity) -> str:
    """The denoiser calls that calibration took."""
    curves = [
        f"<tr><td>{precision_name(found, record.precision)}</td>"
        f"<td>{sum(record.measured)} of {found.num_steps}</td><td>{sum(record.calls.values()):,}</td>"
        f"<td>{record.sweep_calls:,}</td><td>{'yes' if record.settled else 'no'}</td>"
        f'<td class="wrap">{", ".join(map(str, record.order))}</td></tr>'
        for record in found.scores
    ]
    stages = [
        f"<tr><td>{escape(stage)}</td>{''.join(f'<td>{calls.get(name, 0):,}</td>' for name in found.precisions)}"
        f"<td>{sum(calls.values()):,}</td></tr>"
        for stage, calls in found.calls.items()
    ]
    bars = "".join(
        f'<tr><td>{text}</td><td>{calls:,}</td><td style="width:60%"><div class="bar {kind}" '
        f'style="width:{100 * calls / max(found.search_calls, found.sweep_calls, 1):.1f}%"></div></td></tr>'
        for text, calls, kind in (
            (f"spent ({found.method})", found.search_calls, ""),
            ("full sweep", found.sweep_calls, "all"),
        )
    )
    total = sum(sum(calls.values()) for calls in found.calls.values())
    head = ("score curve", "steps measured", "calls", "full sweep", "settled", ORDER)
    return (
        '<p class="lead">The unit of cost is one denoiser call; an adaptive bisection measures only the steps that the '
        "ranking needs.</p>"
        f'<table style="width:100%;max-width:40rem" aria-label="calls for the scores">{bars}</table>'
        f"<h3>Score curves</h3>{table(head, curves, 'score curves') if curves else '<p>No score was measured.</p>'}"
        f"<h3>All denoiser calls: {total:,}</h3>"
        f"{table(('stage', *found.precisions, 'sum'), stages, 'denoiser calls by stage')}"
    )
