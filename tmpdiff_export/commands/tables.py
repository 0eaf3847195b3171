"""A calibration as tables and sentences: what `calibrate`, `inspect` and `demo` print."""

from __future__ import annotations

import math
from collections.abc import Iterator

from calibration.choose.stored_prediction import StoredPrediction
from calibration.document import Sensitivity
from calibration.records import DepartureRecord, QualityRecord, TransferRecord, ValidationRow
from engines.reuse import reused_steps
from tmpdiff_export.display import departures, interval, number, print_table, schedule_strip

NAME_WIDTH = 36


def print_sensitivity(found: Sensitivity) -> None:
    """Scores, cost, fit, Pareto front, guard, validation and schedule."""
    _print_precisions(found)
    if found.scores:
        _print_scores(found)
    if found.transfer:
        print_transfer(found.transfer)
    _print_fit(found)
    _print_reuse(found)
    _print_front(found)
    _print_guard(found)
    print_validation(found)
    if found.settings:
        print(f"latencies are sums of step latencies measured on {found.settings.machine}")
    print(f"budget: {found.budget}")
    print(f"schedule: {schedule_strip(found.schedule)}")
    if found.reuse:
        print(f"{len(reused_steps(found.schedule))} of {found.num_steps} steps reuse model outputs")
    print(f"predicted E {found.predicted_error:.3e} from {found.num_samples} calibration prompts, by {found.predictor}")
    for line in verdict(found):
        print(line)
    ratio = next((fit.ratio for fit in found.fit if fit.predictor == found.predictor), None)
    if ratio is not None and not 0.5 <= ratio <= 2:
        print(
            f"predicted E is {ratio:.2f} times the measured one on random schedules: read predictions as a ranking, not as a level"
        )


def verdict(found: Sensitivity) -> Iterator[str]:
    """What the validation rows say of the schedule, in words; and whether fewer steps would do better."""
    for record in found.fewer_steps:
        if record.beats:
            yield (
                f"FEWER STEPS by the scheduler do better on calibration prompts: {record.num_steps} at {record.precision} are "
                f"no slower and err less (the schedule has {interval(record.against, '.2f')} times their typical error); "
                f"calibrate that number of steps instead"
            )
    chosen, best = found.chosen, found.best_rule
    if chosen is None:
        yield "not run on validation prompts"
        return
    yield (
        f"on {len(chosen.sample_errors)} validation prompts: typical error {interval(chosen.typical, '.2e')}, departures "
        f"{departures(chosen.departures)}"
    )
    if not 0.5 <= (factor := chosen.typical.value / found.predicted_error if found.predicted_error > 0 else 1.0) <= 2:
        yield f"that is {factor:.2g} times the predicted error: these prompts err {'more' if factor > 1 else 'less'}"
    if found.quality:
        yield _quality(found.quality, chosen)
    if best and best.schedules == chosen.schedules:
        yield f"the schedule is the {best.name.removeprefix('best rule: ')!r} of the rules, the best one on calibration prompts"
    elif best:
        yield f"{best.name}: typical error {interval(best.typical, '.2e')}, departures {departures(best.departures)}"
        if best.against and best.standing:
            words = "not distinguishable from 1" if best.standing == "not distinguishable" else best.standing
            yield f"the schedule has {interval(best.against, '.2f')} of the best rule's typical error: {words}"
    if found.losses:
        names = ", ".join(row.name for row in found.losses)
        yield (
            f"the schedule LOSES on validation to: {names} (no slower, less typical error, beyond the 95 % interval); more "
            f"calibration prompts than {found.num_samples} choose better (--samples)"
        )
    else:
        yield (
            "no schedule that is as fast has a lower typical error beyond its 95 % interval; more validation prompts tell "
            "close ones apart"
        )


def _quality(asked: QualityRecord, chosen: ValidationRow) -> str:
    """Whether unseen prompts have the picture quality that calibration prompts were found to have."""
    name, unit = ("SSIM", "") if asked.metric == "ssim" else ("PSNR", " dB")
    # no PSNR: every picture is identical
    found = chosen.ssim if asked.metric == "ssim" else chosen.psnr_db or math.inf
    if found is None:
        return f"{name} was not measured on validation prompts"
    word = "as asked" if found >= asked.target else f"BELOW the {asked.target:g}{unit} asked for"
    return f"{name} on validation prompts: {found:.4g}{unit}, {word}; a picture budget is met by measuring pictures, without a guard"


def print_validation(found: Sensitivity) -> None:
    """The validation rows as a table; nothing without any."""
    if not found.validation:
        return
    rows = []
    for row in found.validation:
        beside = "-"
        if row.against and row.standing:
            word = "" if row.standing == "not distinguishable" else f" {row.standing}"
            beside = f"{interval(row.against, '.2f')}{word}"
        figures = [f"{row.latency:.3f}", _short(interval(row.typical, ".1e")), _count(row.departures), beside]
        rows.append([_name(row.name), *figures, number(row.ssim, ".4f"), number(row.psnr_db, ".1f")])
    print_table(
        "Validation prompts",
        ["schedule", "latency", "typical error", "departures", "schedule's / its", "SSIM", "PSNR dB"],
        rows,
        [
            f"latency: mean step latency over that of {found.precisions[0]}; in brackets 95 % intervals",
            "schedule's / its: the schedule's typical error over the row's; neither worse nor better where the interval holds 1",
            f"a rule such as 'first 7 (int8)' has its first 7 steps at {found.precisions[0]}, the others at int8; 'uniform, mixed' "
            "shares pictures out among uniform precisions",
        ],
    )


def print_transfer(transfer: TransferRecord) -> None:
    """Where carried scores come from, and how they compare with the measured ones, as a table."""
    print_table(
        f"Scores carried from {transfer.setting or 'the setting'} of bundle {transfer.bundle_id[:12]}, T = {transfer.num_steps}, "
        f"guidance {transfer.guidance_scale:g}",
        ["precision", "checked steps", "measured / carried", "scatter about it", "Spearman"],
        [
            [
                check.precision,
                ", ".join(map(str, check.steps)),
                f"{check.level:.2f}",
                f"x {math.exp(check.scatter):.2f}",
                number(check.spearman, ".2f"),
            ]
            for check in transfer.checks
        ],
    )


def _print_precisions(found: Sensitivity) -> None:
    reference = found.precisions[0]
    dropped = {item.precision: f"dropped, {item.by} beats it" for item in found.dropped}
    print_table(
        "Precisions",
        ["precision", "step ms", f"of {reference}", "typical error, all steps", "departures", "use"],
        [
            [
                name,
                f"{found.latencies_ms[name]:.1f}",
                f"{found.latencies_ms[name] / found.latencies_ms[reference]:.2f}",
                interval(found.uniform.get(name), ".2e"),
                departures(found.uniform_departures.get(name)),
                dropped.get(name, "reference" if name == reference else "scored"),
            ]
            for name in found.precisions
        ],
        [f"{item.precision}: {item.reason}" for item in found.dropped],
    )


def _print_scores(found: Sensitivity) -> None:
    print_table(
        "Scores per step index (* measured, the others interpolated)",
        ["step index", *(record.precision for record in found.scores)],
        [
            [
                str(index),
                *(f"{record.scores[index]:.2e}{'*' if record.measured[index] else ' '}" for record in found.scores),
            ]
            for index in range(found.num_steps)
        ],
        [
            f"denoiser calls for the scores: {found.search_calls} ({found.method}); "
            f"full sweeps would take {found.sweep_calls}"
        ],
    )


def _print_fit(found: Sensitivity) -> None:
    print_table(
        f"Predicted against measured E on {len(found.fit_points)} random schedules (calibration prompts)",
        ["predictor", "R^2", "Spearman", "predicted / measured", "scatter", ""],
        [
            [
                fit.predictor,
                number(fit.r2, ".3f"),
                number(fit.spearman, ".3f"),
                number(fit.ratio, ".2f"),
                "-" if fit.scatter is None else f"x {math.exp(fit.scatter):.2f}",
                "used" if fit.predictor == found.predictor else "",
            ]
            for fit in found.fit
        ],
    )


def _print_reuse(found: Sensitivity) -> None:
    if found.reuse is None:
        return
    record = found.reuse
    model = StoredPrediction(found)
    print_table(
        f"Reuse of model outputs: plans, measured on {len(record.samples)} calibration prompts",
        ["plan", "reused", f"latency / {found.precisions[0]}", "predicted E", "measured E", "largest influence"],
        [
            [
                plan.rule or f"{len(reused_steps(plan.choices))} steps",
                str(len(reused_steps(plan.choices))),
                f"{model.latency(plan.choices):.3f}",
                f"{plan.predicted:.2e}",
                f"{plan.measured:.2e}",
                f"{max(map(abs, plan.influence)):.1f}",
            ]
            for plan in record.plans
        ],
        [
            f"denoiser calls for reuse: {sum(record.calls.values())}; at most {record.most_calls} were expected",
            f"all other steps at {found.precisions[0]}; influence: how much more an output counts than without reuse",
        ],
    )
    for fewer in found.fewer_steps:
        if fewer.reason:
            print(f"fewer steps at {fewer.precision} were not compared: {fewer.reason}")


def _print_front(found: Sensitivity) -> None:
    reused = [len(reused_steps(point.precisions)) for point in found.pareto]
    print_table(
        "Pareto front (predicted)",
        [f"latency / {found.precisions[0]}", "E", *found.precisions, *(["reused"] if any(reused) else [])],
        [
            [
                f"{point.latency:.3f}",
                f"{point.error:.2e}",
                *(str(point.precisions.count(name)) for name in found.precisions),
                *([str(count)] if any(reused) else []),
            ]
            for point, count in zip(found.pareto, reused, strict=True)
        ],
    )


def _print_guard(found: Sensitivity) -> None:
    if found.guard is None or not found.guard.candidates:
        return
    guard = found.guard
    rows = []
    for index, trial in enumerate(guard.candidates):
        marks = [
            *(["winner"] if index == 0 else []),
            *(["best rule"] if trial.rule and trial.rule == guard.best_rule else []),
        ]
        rows.append(
            [
                _name(trial.names[0]),
                f"{trial.latency:.3f}",
                str(trial.leading) + (f" + {more}" if (more := len(trial.samples) - trial.leading) else ""),
                _short(interval(trial.typical, ".1e")),
                _short(f"{trial.expected:.2e}"),
                _count(trial.departures),
                str(trial.calls),
                "; ".join([*marks, *(f"also {name}" for name in trial.names[1:])]),
            ]
        )
    print_table(
        "Guard: candidates on calibration prompts",
        ["candidate", "latency", "prompts", "typical error", "expected", "departures", "calls", ""],
        rows,
        [
            f"denoiser calls for the guard: {sum(guard.calls.values())}",
            "prompts: those that typical errors are of, and fragile ones, on which only departures are looked for",
            "expected: typical error averaged with the predicted one, where few prompts leave it noisy; the least wins among "
            "candidates that do not depart significantly more often",
        ],
    )


def _count(found: DepartureRecord | None) -> str:
    return f"{found.count} of {found.samples}" if found else "-"


def _name(name: str) -> str:
    """A name for a column: of a rule that mixes many precisions on two lines."""
    return name if len(name) <= NAME_WIDTH else name.replace(" (", "\n (", 1)


def _short(text: str) -> str:
    """Figures such as 2.4e-03 without the zero."""
    return text.replace("e-0", "e-").replace("e+00", "")
