"""`tmpdiff-export calibrate`: find the schedule of a bundle, and say how it was found."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from calibration import CalibrationOptions, ErrorBudget, HighSteps, LatencyBudget
from calibration.choose.allocation import Budget
from calibration.choose.costs import AllocationCosts
from calibration.choose.picture_budget import METRICS, QualityBudget
from engines.arguments import (
    add_setting_arguments,
    parse_guidance_scale,
    parse_resident_engines,
    parse_seed,
    parse_text_length,
    parse_threads,
    setting_choice,
)
from engines.setting_choice import SettingChoice
from engines.terminal import print_json
from engines.text import PromptFile, read_prompts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the subcommand's arguments."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="bundle folder")
    parser.add_argument(
        "--prompts", type=Path, required=True, metavar="FILE", help="calibration and validation prompts"
    )
    add_setting_arguments(parser)
    new = parser.add_argument_group("a setting that the bundle does not have yet is added, if its engines run it")
    new.add_argument(
        "--guidance-scale", type=parse_guidance_scale, metavar="G", help="default: that of the first setting"
    )
    new.add_argument(
        "--text-length", type=parse_text_length, metavar="TOKENS", help="default: that of the first setting"
    )
    new.add_argument(
        "--scheduler",
        metavar="CLASS|FILE.json",
        help="diffusers scheduler, made from the pipeline's configuration, or a scheduler_config.json (default: the pipeline's)",
    )
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--budget-latency", type=float, metavar="R", help="mean step latency, as a fraction of FP16's")
    budget.add_argument(
        "--budget-error",
        type=_error_budget,
        metavar="E|ssim:X|psnr:DB",
        help="predicted error of the final latents, or picture quality measured on the calibration prompts",
    )
    budget.add_argument("--high-steps", type=int, metavar="K", help="number of steps at FP16")
    parser.add_argument(
        "--reuse",
        type=_reuse,
        default="auto",
        metavar="auto|off|N",
        help="most steps that take their model output from past ones instead of computing it (default auto: half the steps)",
    )
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
    parser.add_argument("--samples", type=int, default=8, metavar="N", help="calibration prompts used (default 8)")
    parser.add_argument("--validation-samples", type=int, default=8, metavar="N", help="validation prompts (default 8)")
    parser.add_argument("--seed", type=parse_seed, default=0, metavar="S", help="seed of the first sample (default 0)")
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


def _reuse(text: str) -> int | None:
    """An argument such as "auto" (None), "off" or "8"."""
    if text in ("auto", "off"):
        return None if text == "auto" else 0
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r}: expected auto, off, or a number of steps")
    return int(text)


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
    from tmpdiff_export.calibrate.settings import Wanted, open_setting
    from tmpdiff_export.commands.tables import print_sensitivity
    from tmpdiff_export.display import print_note, progress_bar

    budget, costs = budget_of(args), AllocationCosts(args.swap_ms, args.resident_engines)
    prompts = read_prompts(args.prompts)
    for name, count in (("--samples", args.samples), ("--validation-samples", args.validation_samples)):
        if count < 1:
            raise ValueError(f"{name} is {count}, expected 1 or more")
    chosen = PromptFile(prompts.calibration[: args.samples], prompts.validation[: args.validation_samples])
    wanted = Wanted(setting_choice(args), args.guidance_scale, args.text_length, args.scheduler)
    setting, added = open_setting(args.bundle, wanted)
    if added:
        print_note(f"setting {setting.name} was added to the bundle: {setting.described}")
    reuse = setting.num_steps // 2 if args.reuse is None else args.reuse
    options = CalibrationOptions(budget=budget, method=args.method, costs=costs, reuse=reuse)
    how = RunOptions(
        seed=args.seed,
        batch=args.batch,
        threads=args.threads,
        workers=args.workers,
        fresh_latencies=args.fresh_latencies,
        setting=SettingChoice(named=setting.name),
        source=args.source,
    )
    begin = time.perf_counter()
    try:
        with progress_bar() as report:
            found = calibrate_bundle(args.bundle, chosen, options, how, report, print_note)
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
