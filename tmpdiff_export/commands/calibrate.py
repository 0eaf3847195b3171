"""`tmpdiff-export calibrate`: find the schedule of a bundle, and say how it was found."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from calibration import CalibrationOptions, ErrorBudget, HighSteps, LatencyBudget, Sensitivity
from calibration.choose.allocation import Budget
from calibration.choose.costs import AllocationCosts
from calibration.choose.picture_budget import METRICS, QualityBudget
from calibration.document import TransferRecord
from calibration.measure.metrics import departed
from engines.arguments import parse_guidance_scale, parse_resident_engines, parse_seed, parse_threads
from engines.text import PromptFile, read_prompts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the subcommand's arguments."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="bundle folder")
    parser.add_argument(
        "--prompts", type=Path, required=True, metavar="FILE", help="calibration and validation prompts"
    )
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--budget-latency", type=float, metavar="R", help="mean step latency, as a fraction of FP16's")
    budget.add_argument(
        "--budget-error",
        type=_error_budget,
        metavar="E|ssim:X|psnr:DB",
        help="predicted error of the final latents, or picture quality measured on the validation prompts",
    )
    budget.add_argument("--high-steps", type=int, metavar="K", help="number of steps at FP16")
    parser.add_argument(
        "--swap-ms", type=float, default=0.0, metavar="MS", help="cost of a change of precision (`bench` measures it)"
    )
    parser.add_argument(
        "--resident-engines",
        type=parse_resident_engines,
        metavar="R",
        help="most different precisions in the schedule, so that no engine is loaded inside a loop (default: any number)",
    )
    scores = parser.add_mutually_exclusive_group()
    scores.add_argument("--method", choices=("bisection", "sweep"), default="bisection", help="default bisection")
    scores.add_argument(
        "--from",
        type=Path,
        dest="source",
        metavar="OTHER_BUNDLE",
        help="carry the scores of this calibrated bundle over through noise level, after checking a few of them here",
    )
    parser.add_argument(
        "--refine-calls",
        type=int,
        metavar="N",
        help="denoiser calls of the local search that measures the schedules nearest to the predicted best "
        "(default: as many as the scores take; 0: none)",
    )
    parser.add_argument("--samples", type=int, default=8, metavar="N", help="calibration prompts used (default 8)")
    parser.add_argument("--validation-samples", type=int, default=8, metavar="N", help="validation prompts (default 8)")
    parser.add_argument("--seed", type=parse_seed, default=0, metavar="S", help="seed of the first sample (default 0)")
    parser.add_argument("--guidance-scale", type=parse_guidance_scale, metavar="G", help="default: the bundle's")
    parser.add_argument(
        "--batch", type=int, default=1, metavar="N", help="pictures at once that latencies are measured for (default 1)"
    )
    parser.add_argument(
        "--fresh-latencies", action="store_true", help="measure latencies anew, as where the machine was busy before"
    )
    parser.add_argument(
        "--threads", type=parse_threads, metavar="N", help="threads on a CPU, of all workers (default: one per core)"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="processes that share the samples out, each on a GPU of its own, or on a CPU with its share of the threads "
        "(default 1: all in this process)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _error_budget(text: str) -> ErrorBudget | QualityBudget:
    """An argument such as "0.001", "ssim:0.95" or "psnr:35"."""
    kind, colon, number = text.rpartition(":")
    try:
        if not colon:
            return ErrorBudget(float(number))
        for metric in METRICS:
            if kind == metric:
                return QualityBudget(metric, float(number))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None
    raise argparse.ArgumentTypeError(f"{text!r} names no quality; choose from {', '.join(METRICS)}, or give an error")


def budget_of(args: argparse.Namespace) -> Budget | QualityBudget | None:
    """The budget the arguments ask for.

    Raises:
        ValueError: a fraction, error or count out of range.
    """
    if args.budget_latency is not None:
        return LatencyBudget(args.budget_latency)
    if args.budget_error is not None:
        return args.budget_error
    if args.high_steps is not None:
        return HighSteps(args.high_steps)
    return None


def run(args: argparse.Namespace) -> int:
    """Calibrates, stores schedule and sensitivity in the bundle, and prints them."""
    from tmpdiff_export.calibrate.bundle import RunOptions, calibrate_bundle
    from tmpdiff_export.display import print_json, progress_bar

    options = CalibrationOptions(
        budget=budget_of(args),
        method=args.method,
        costs=AllocationCosts(args.swap_ms, args.resident_engines),
        refine_calls=args.refine_calls,
    )
    how = RunOptions(args.seed, args.guidance_scale, args.batch, args.threads, args.workers, args.fresh_latencies)
    prompts = read_prompts(args.prompts)
    for name, count in (("--samples", args.samples), ("--validation-samples", args.validation_samples)):
        if count < 1:
            raise ValueError(f"{name} is {count}, expected 1 or more")
    chosen = PromptFile(prompts.calibration[: args.samples], prompts.validation[: args.validation_samples])
    begin = time.perf_counter()
    try:
        with progress_bar() as report:
            found = calibrate_bundle(args.bundle, chosen, options, how, source=args.source, progress=report)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("finished measurements are kept, and the same command goes on from them") from None
    if args.json:
        seconds = round(time.perf_counter() - begin, 3)
        print_json(
            {"bundle": str(args.bundle), "workers": args.workers, "seconds": seconds, **found.model_dump(mode="json")}
        )
    else:
        print_sensitivity(found)
    return 0


def print_sensitivity(found: Sensitivity) -> None:
    """Scores, cost, fit, Pareto front, schedule and validation as tables."""
    from tmpdiff_export.display import number, print_table, schedule_strip

    reference = found.precisions[0]
    dropped = {item.precision: f"dropped, {item.by} beats it" for item in found.dropped}
    print_table(
        "Precisions",
        ["precision", "step ms", f"of {reference}", "E, all steps", "use"],
        [
            [
                name,
                f"{found.latencies_ms[name]:.1f}",
                f"{found.latencies_ms[name] / found.latencies_ms[reference]:.2f}",
                f"{found.uniform_errors[name]:.2e}",
                dropped.get(name, "reference" if name == reference else "scored"),
            ]
            for name in found.precisions
        ],
        [f"{item.precision}: {item.reason}" for item in found.dropped],
    )
    if found.scores:
        print_table(
            "Scores per step index (* measured, the others interpolated)",
            ["step index", *(f"{record.direction} {record.precision}" for record in found.scores)],
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
    if found.transfer:
        print_transfer(found.transfer)
    print_table(
        f"Predicted against measured E on random schedules ({found.fit_samples} prompts)",
        ["predictor", "R^2", "Spearman", "predicted / measured", ""],
        [
            [
                fit.predictor,
                number(fit.r2, ".3f"),
                number(fit.spearman, ".3f"),
                number(fit.ratio, ".2f"),
                "used" if fit.predictor == found.predictor else "",
            ]
            for fit in found.fit
        ],
    )
    print_table(
        "Pareto front (predicted)",
        [f"latency / {reference}", "E", *found.precisions],
        [
            [f"{point.latency:.3f}", f"{point.error:.2e}", *(str(point.precisions.count(p)) for p in found.precisions)]
            for point in found.pareto
        ],
    )
    print_validation(found)
    if found.settings:
        print(f"latencies are sums of step latencies measured on {found.settings.machine}")
    print(f"budget: {found.budget}")
    if found.refinement and found.refinement.trials:
        outcome = "stood" if found.refinement.origin == "scores" else f"gave way to a rival ({found.refinement.origin})"
        print(
            f"local search: {len(found.refinement.trials)} schedules run in {sum(found.refinement.calls.values())} "
            f"denoiser calls; the predicted best {outcome}"
        )
    print(f"schedule: {schedule_strip(found.schedule)}")
    held_out = len(found.validation[0].sample_errors) if found.validation else 0
    print(
        f"predicted E {found.predicted_error:.3e} from {found.num_samples} calibration prompts, measured "
        f"{number(found.measured_error, '.3e')} on {held_out} validation prompts"
    )
    for line in _cautions(found):
        print(line)


def _cautions(found: Sensitivity) -> Iterator[str]:
    """What speaks against trusting the schedule, and what to do about it."""
    errors = np.array(found.validation[0].sample_errors if found.validation else ())
    if len(errors) and (count := departed(errors)):
        yield (
            f"{count} of {len(errors)} validation prompts departed: their E is more than ten times the median, and weighs in "
            "the measured E"
        )
    ratio = next((fit.ratio for fit in found.fit if fit.predictor == found.predictor), None)
    if ratio is not None and not 0.5 <= ratio <= 2:
        yield (
            f"predicted E is {ratio:.2f} times the measured one on random schedules: read predictions as a ranking, not as a level"
        )
    if found.loses_to:
        yield (
            f"the schedule LOSES on validation to: {', '.join(found.loses_to)} (no slower, smaller E); more calibration prompts "
            f"than {found.num_samples} rank steps better (--samples), and `report` says which differences may be chance"
        )


def print_transfer(transfer: TransferRecord) -> None:
    """Where carried scores come from, and how they compare with the measured ones, as a table."""
    from tmpdiff_export.display import number, print_table

    print_table(
        f"Scores carried from bundle {transfer.bundle_id[:12]}, T = {transfer.num_steps}, "
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


def print_validation(found: Sensitivity) -> None:
    """The validation rows as a table."""
    from tmpdiff_export.display import number, print_table

    reference = found.precisions[0]
    print_table(
        "Validation prompts",
        ["schedule", "steps", f"latency / {reference}", "E", "SSIM", "PSNR dB"],
        [
            [
                row.name,
                " + ".join(f"{count} {name}" for name, count in row.counts.items()),
                f"{row.latency:.3f}",
                f"{row.error:.3e}" + (f" +- {row.error_spread:.1e}" if row.error_spread is not None else ""),
                number(row.ssim, ".4f"),
                number(row.psnr_db, ".1f"),
            ]
            for row in found.validation
        ],
    )
