"""Scores carried from one calibration to another, beside a fresh one: other settings of a bundle, other bundles.

    python -m tools.experiments.transfer SOURCE TARGET --prompts FILE --out transfer.json

Sweeps both settings (what was measured before is reused), carries the downcast scores of SOURCE to TARGET, and puts
three rankings of TARGET's steps beside each other: fresh, carried as they are, and carried with the checked steps
measured. Schedules by each, and two fixed rules, run on prompts that neither has seen. One entry of the result file
is one pair of settings; a pair measured again replaces its entry.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from calibration.measure.metrics import typical_errors
from calibration.scores.single_step import sweep_calls
from calibration.scores.transfer import StepAxis, carry, check_steps, compare, step_axes
from engines.cli import guarded
from engines.files import atomic_write_text
from tmpdiff_export.display import progress_bar
from tools.experiments.schedules import HIGH, LOW, fixed_rules, precisions_of
from tools.experiments.statistics import bootstrap_interval, error_regret_at, rank_deviation, spearman
from tools.experiments.study import Report, Study, open_study

PROGRAM = "transfer"
FRESH = "fresh"


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, metavar="SOURCE", help="bundle to carry scores from")
    parser.add_argument("target", type=Path, metavar="TARGET", help="bundle to carry them to; it may be SOURCE")
    parser.add_argument(
        "--prompts", type=Path, required=True, metavar="FILE", help="calibration and validation prompts"
    )
    parser.add_argument("--precisions", metavar="LIST", help="low precisions, comma-separated (default: all built)")
    parser.add_argument("--samples", type=int, default=4, metavar="N", help="calibration samples (default 4)")
    parser.add_argument("--validation-samples", type=int, default=6, metavar="N", help="unseen samples (default 6)")
    for side in ("source", "target"):
        parser.add_argument(
            f"--{side}-setting", metavar="NAME", help="as `inspect` lists it (default: the bundle's first)"
        )
        parser.add_argument(f"--{side}-guidance", type=float, metavar="G", help="default: the setting's")
    parser.add_argument("--threads", type=int, metavar="N", help="worker threads (default: one per core)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="result file, JSON")
    args = parser.parse_args()
    return guarded(PROGRAM, lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Measures a pair, prints and stores what came out."""
    with progress_bar() as report:
        with _study(args, "source", report) as study:
            table = study.runtime.table
            setting = _setting(study)
            sweeps = {name: _downcasts(study, name) for name in study.precisions}
        with _study(args, "target", report) as study:
            axes = step_axes(table, study.runtime.table)
            found = {name: _compare(study, name, sweeps[name], axes) for name in study.precisions}
            entry = {"source": setting, "target": _setting(study), "precisions": found}
    stored = json.loads(args.out.read_text()) if args.out.exists() else []
    stored = [item for item in stored if (item["source"], item["target"]) != (entry["source"], entry["target"])]
    atomic_write_text(args.out, json.dumps([*stored, entry], indent=1, allow_nan=False) + "\n")
    _print(entry)
    return 0


def _study(args: argparse.Namespace, side: str, report: Report) -> Any:
    asked = vars(args)
    options = {
        "bundle": asked[side],
        "scheduler_setting": asked[f"{side}_setting"],
        "guidance_scale": asked[f"{side}_guidance"],
        **dict.fromkeys(("steps", "size", "lpips", "seconds_limit")),
        "seed": 0,
    }
    return open_study(argparse.Namespace(**vars(args) | options), report)


def _setting(study: Study) -> dict[str, Any]:
    return {name: study.setting[name] for name in ("bundle_id", "num_steps", "guidance_scale", "machine")} | {
        "samples": study.calibration.num_samples,
        "validation_samples": study.validation.num_samples,
    }


def _downcasts(study: Study, precision: str) -> np.ndarray:
    """Downcast scores, float64 [N, T]."""
    return np.array(study.scores(precision, ("downcast",))["downcast"])


def _compare(study: Study, precision: str, source: np.ndarray, axes: tuple[StepAxis, StepAxis]) -> dict[str, Any]:
    samples = _downcasts(study, precision)
    fresh = typical_errors(samples.T)
    carried = carry(typical_errors(source.T), *axes)
    steps = list(check_steps(study.num_steps))
    check = compare(carried[steps], fresh[steps])
    checked = carried * check.level
    checked[steps] = fresh[steps]
    halves = typical_errors(samples[::2].T), typical_errors(samples[1::2].T)
    rankings = {FRESH: fresh, "carried": carried, "carried, checked": checked}
    log_ratio = np.log(fresh / carried)
    shrink = float(np.log(axes[1].weights[1:-1].mean() / axes[0].weights[1:-1].mean()))
    level = float(np.log(np.median(fresh[1:-1])) - np.log(np.median(typical_errors(source.T)[1:-1])))
    return {
        "source_scores": typical_errors(source.T).tolist(),
        "fresh_scores": fresh.tolist(),
        "carried_scores": carried.tolist(),
        "all_low": {"error": float(np.mean(study.uniform(precision)))},
        # what the scores of the inner steps do with the size of a step; None where the size is the same
        "exponent": level / shrink if abs(shrink) > 1e-6 else None,
        "scatter": float(log_ratio.std(ddof=1)),
        "check": {
            "steps": steps,
            "level": check.level,
            "scatter": check.scatter,
            "spearman": check.spearman,
            "holds": check.holds,
            "calls": sum(study.num_steps - step for step in steps) * study.calibration.num_samples,
            "sweep_calls": sweep_calls(study.num_steps, study.calibration.num_samples),
        },
        "rankings": {name: _ranking(fresh, scores) for name, scores in rankings.items()},
        "fresh, half the samples against the other half": _ranking(*halves),
        "schedules": _schedules(study, precision, rankings),
    }


def _ranking(truth: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """Rank deviation in steps, Spearman, and error regret: a mean over K from T/5 to 4T/5."""
    counts = np.arange(len(truth))
    inside = (counts >= len(truth) / 5) & (counts <= 4 * len(truth) / 5)
    return {
        "rank_deviation": rank_deviation(truth, found),
        "spearman": spearman(truth, found),
        "error_regret": float(error_regret_at(truth, found)[inside].mean()),
    }


def _schedules(study: Study, precision: str, rankings: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """E on unseen prompts at K = T/5, 2T/5, 3T/5 and 4T/5."""
    rows = []
    counts = [round(study.num_steps * share / 5) for share in range(1, 5)]
    for count in counts:
        patterns = {name: _highest(scores, count) for name, scores in rankings.items()}
        rules = fixed_rules(study.num_steps, count)
        patterns |= {name: rules[name] for name in ("both ends", "evenly spread")}
        schedules = [precisions_of(pattern, study.reference, precision) for pattern in patterns.values()]
        runs = study.validation_errors("transfer", schedules, pictures=False)
        errors = {name: np.array([run["error"] for run in of]) for name, of in zip(patterns, runs, strict=True)}
        for name, values in errors.items():
            rows.append({"high_steps": count, "name": name, "pattern": patterns[name], "errors": values.tolist()})
            rows[-1]["over_fresh"] = _over(values, errors[FRESH])
    return rows


def _over(values: np.ndarray, fresh: np.ndarray) -> dict[str, float]:
    """Mean E over that of the fresh schedule, with a 95 % interval over samples."""
    return asdict(bootstrap_interval(lambda pick: float(values[pick].mean() / fresh[pick].mean()), len(values)))


def _highest(scores: np.ndarray, count: int) -> str:
    high = set(np.argsort(-scores, kind="stable")[:count].tolist())
    return "".join(HIGH if step in high else LOW for step in range(len(scores)))


def _print(entry: dict[str, Any]) -> None:
    source, target = (
        f"T = {entry[side]['num_steps']}, guidance {entry[side]['guidance_scale']:g}" for side in ("source", "target")
    )
    print(f"{source} -> {target}, {entry['target']['samples']} samples")
    for precision, found in entry["precisions"].items():
        check = found["check"]
        print(
            f"{precision}: check at {check['steps']}: scatter {check['scatter']:.2f}, level {check['level']:.2f}: "
            f"{'holds' if check['holds'] else 'REFUSED'}; {check['calls']} calls, a sweep takes {check['sweep_calls']}"
        )
        halves = found["fresh, half the samples against the other half"]
        for name, row in {**found["rankings"], "half against half": halves}.items():
            print(f"  {name:18} " + ", ".join(f"{key} {value:.3f}" for key, value in row.items()))
        for row in found["schedules"]:
            over = row["over_fresh"]
            print(
                f"  K {row['high_steps']:2} {row['name']:18} E {np.mean(row['errors']):.3e}, of the fresh one "
                f"{over['value']:.2f} [{over['low']:.2f}, {over['high']:.2f}]  {row['pattern']}"
            )


if __name__ == "__main__":
    sys.exit(main())
