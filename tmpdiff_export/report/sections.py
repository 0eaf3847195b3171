"""The sections of the report, each from the stored documents to HTML."""

from __future__ import annotations

from html import escape

from calibration import Sensitivity
from engines.manifest import Manifest
from tmpdiff_export.display import number, schedule_strip
from tmpdiff_export.report.carried import carried
from tmpdiff_export.report.figures import (
    error_rows,
    fit_scatter,
    rank_deviation,
    rule_curves,
    ruled_precision,
    score_curves,
    trade_off,
)
from tmpdiff_export.report.pieces import ORDER, error_cell, precision_name, strip, table


def what(manifest: Manifest, found: Sensitivity) -> str:
    """What was calibrated, and what this page is about."""
    engine, sampling, model = manifest.denoisers[found.precisions[0]], manifest.sampling, manifest.model
    facts = {
        "pipeline": f"{model.pipeline_class}, {model.denoiser_class} with {model.parameters:,} parameters",
        "sampling": f"{sampling.scheduler}, T = {sampling.num_steps} steps, guidance scale "
        f"{sampling.guidance_scale:g} by default, {sampling.width} x {sampling.height} pixels",
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
    keys = "".join(
        f'<span class="key">{precision_name(found, name)}: {found.schedule.count(name)} of {found.num_steps}</span>'
        for name in found.precisions
        if name in found.schedule
    )
    return (
        '<p class="lead">The precision of every step index, from pure noise on the left to the finished picture on the '
        f'right.</p>{strip(found, found.schedule, "strip big")}<div class="axis" aria-hidden="true">{marks}</div>'
        f'<p>{keys}</p><p class="note">By step index: {escape(schedule_strip(found.schedule))}. '
        f"Predicted E {found.predicted_error:.3e}, on validation prompts {number(found.measured_error, '.3e')}.</p>"
    )


def precisions(manifest: Manifest, found: Sensitivity) -> str:
    """What a step takes at each precision, and how wrong the picture becomes."""
    reference = found.precisions[0]
    dropped = {item.precision: f"dropped: {item.reason}" for item in found.dropped}
    rows = []
    for name in found.precisions:
        entry, latency = manifest.denoisers[name], found.latencies_ms[name]
        used = "scored, in the schedule" if name in found.schedule else "scored, not in the schedule"
        cells = (
            f"{latency:.2f}",
            f"{latency / found.latencies_ms[reference]:.3f}",
            error_cell(found.uniform_errors[name], ".2e"),
            f"{entry.sqnr_db:.1f}",
            f"{entry.bytes / 1e6:.1f}",
            escape(entry.recipe),
        )
        use = dropped.get(name, "reference" if name == reference else used)
        emulated = any("emulated" in what for what in entry.lowering)
        remark = "<small>simulated</small>" if emulated else ""
        rows.append(
            f"<tr><td>{precision_name(found, name)}{remark}</td>{''.join(f'<td>{c}</td>' for c in cells)}"
            f'<td class="wrap">{escape(use)}</td></tr>'
        )
    head = ("precision", "step ms", f"/ {reference}", "E, all steps", "SQNR dB", "size MB", "recipe", "use")
    return (
        '<p class="lead">One engine per precision: how fast a step is, and how wrong the result is if every step uses it.'
        f"</p>{table(head, rows, 'precisions')}"
        '<p class="note">Step latencies were measured on the machine that calibrated. SQNR compares one denoiser call '
        "with FP32 torch (higher is better). Simulated: the backend has no kernels for it and computes what they would give, so "
        "that its errors count but its latency does not. A precision that is no faster than another and errs no less is dropped "
        "before it is scored. E, as in scores and predictions, is a mean over the calibration prompts in which none counts for more "
        "than ten medians; the validation table has plain means.</p>"
    )


RISK = (
    " Dotted: the risk of a departure, a run that ends elsewhere altogether because of this step at the low precision, as the "
    "spread of scores over prompts foretells it. It counts beside the score when steps are chosen, as far as it costs the other prompts "
    "at most a tenth more error, and is part of every predicted E below except in the fit."
)


def scores(found: Sensitivity) -> str:
    """Score curves, where they come from, and how soon the ranking of steps settles."""
    text = (
        '<p class="lead">The score of a step says how much the final latents change when only that step changes its '
        "precision.</p>"
    )
    if not found.scores:
        return f"{text}<p>No precision was left to score: each is dropped, see the table above.</p>"
    captions = {
        "downcast": f"Downcast: everything at {found.precisions[0]}, one step at the low precision.",
        "upcast": f"Upcast: everything at the low precision, one step at {found.precisions[0]}; "
        "the score is the error this saves.",
    }
    figures = "".join(
        f'<figure role="img" aria-label="{direction} scores per step index">{score_curves(found, direction)}'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
        for direction, caption in captions.items()
    )
    return (
        f'{text}<div class="figures">{figures}</div><p class="note">Filled points were measured, hollow ones '
        "interpolated. Crosses on the lower edge are scores of 0 or less."
        f"{RISK if any(any(record.risk) for record in found.scores) else ''}</p>"
        f"{carried(found, found.transfer) if found.transfer else ''}<h3>Rank deviation</h3>{_rank_deviation(found)}"
    )


def _rank_deviation(found: Sensitivity) -> str:
    if not all(all(record.measured) for record in found.scores):
        return (
            '<p class="note">How far the steps stand from their true rank is known only where every step was measured: '
            "<code>calibrate --method sweep</code> shows it here.</p>"
        )
    return (
        '<figure role="img" aria-label="mean rank deviation over the number of steps measured">'
        f"{rank_deviation(found)}<figcaption>Every step was measured, so the bisection can be replayed on these scores: "
        "the mean distance of a step from its true rank, over the number of steps measured. A line ends where the search "
        "takes the ranking as settled.</figcaption></figure>"
    )


def fit(found: Sensitivity) -> str:
    """How well the predictors foretell random schedules."""
    rows = [
        f"<tr{' class=chosen' if fit.predictor == found.predictor else ''}><td>{escape(fit.predictor)}"
        f"{' (used)' if fit.predictor == found.predictor else ''}</td><td>{number(fit.r2, '.3f')}</td>"
        f"<td>{number(fit.spearman, '.3f')}</td><td>{number(fit.ratio, '.2f')}</td></tr>"
        for fit in found.fit
    ]
    fits = table(("predictor", "R²", "Spearman", "predicted / measured"), rows, "fit of the predictors")
    figure = "<p>No random schedules were run.</p>"
    if found.fit_points:
        figure = (
            '<figure role="img" aria-label="predicted against measured E of random schedules">'
            f"{fit_scatter(found)}<figcaption>{len(found.fit_points)} random schedules on the "
            f"{found.fit_samples} prompts, predictor {escape(found.predictor)}.</figcaption></figure>"
        )
    used = next(fit for fit in found.fit if fit.predictor == found.predictor)
    level = ""
    if used.ratio is not None and not 0.5 <= used.ratio <= 2:
        level = (
            f'<div class="loss" role="note">On these schedules the predicted E is {used.ratio:.2f} times the measured '
            "one: read predictions as a ranking, not as a level.</div>"
        )
    return (
        '<p class="lead">If scores of single steps add up, they predict the error of any schedule; random schedules were '
        f'run to check.</p>{level}<div class="figures">{figure}<div>{fits}<p class="note">R² of the regression line and '
        "Spearman's rank correlation: 1 is perfect. Predicted / measured: sums over the schedules, 1 is the right level. "
        "A dash: too few schedules for the figure.</p></div></div>"
    )


def pareto(found: Sensitivity) -> str:
    """Error against latency: the front, the schedule and the fixed rules."""
    shown = "" if len(found.pareto) == found.pareto_size else f" ({len(found.pareto)} of {found.pareto_size} points)"
    measured = ""
    if found.validation:
        measured = (
            f'<figure role="img" aria-label="measured E of the schedule and the baselines">{error_rows(found)}'
            "<figcaption>The same measured E, smallest on top. Filled baselines have the schedule's latency or less and "
            "a smaller E: the schedule loses to them.</figcaption></figure>"
        )
    return (
        '<p class="lead">Further left is faster, further down is closer to the reference; a good schedule is near the '
        "lower left.</p>"
        f'<div class="figures"><figure role="img" aria-label="E against latency: Pareto front, schedule and baselines">'
        f"{trade_off(found)}"
        f"<figcaption>The front{shown} and the hollow star are predicted from scores of the calibration prompts; every "
        "other mark was measured on the validation prompts. Marks on the lower edge have E = 0.</figcaption></figure>"
        f"{measured}</div>{_rules(found)}"
    )


def _rules(found: Sensitivity) -> str:
    precision = ruled_precision(found)
    if precision is None:
        return ""
    return (
        f'<figure role="img" aria-label="predicted E of the fixed rules at every K">{rule_curves(found, precision)}'
        f"<figcaption>The rules with every number K of {escape(found.precisions[0])} steps from 0 to {found.num_steps}, the "
        f"others {escape(precision)}, as the scores predict them (random: mean of 20 draws). Points with E = 0 are left "
        "out.</figcaption></figure>"
    )


def cost(found: Sensitivity) -> str:
    """The denoiser calls that calibration took."""
    curves = [
        f"<tr><td>{precision_name(found, record.precision)} {record.direction}</td>"
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
