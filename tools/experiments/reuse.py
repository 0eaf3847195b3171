"""What reuse costs: chosen plans, every n-th step and fewer steps beside each other, on unseen prompts of a bundle.

    python -m tools.experiments.reuse BUNDLE --prompts FILE --steps 50 --out reuse.json

Plans are searched on calibration prompts, all at the reference precision; validation prompts judge: typical E, departures and
SSIM at 10 to 50 % of the steps. Measurements are kept in a journal beside the result, so that the command may be repeated.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from calibration.choose.joint import ReusePlan
from calibration.choose.reuse_plans import search_plans
from calibration.measure.bundle_evaluator import BundleSamples, samples_per_call
from calibration.measure.journal import open_journal
from calibration.measure.measurements import Measurements
from calibration.measure.metrics import mean
from calibration.measure.sample_batches import SampleBatches
from calibration.scores.reuse import measure_reuses
from calibration.stages import reuse_samples
from calibration.statistics import departure_record, typical_interval
from engines.arguments import add_setting_arguments, setting_choice
from engines.errors import TmpDiffError
from engines.runtime import DenoiseRuntime
from engines.text import PromptFile, read_prompts
from tmpdiff_export.calibrate.settings import shorter_loop
from tmpdiff_export.display import progress_bar

SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)
STAGE = "reuse"


def main() -> int:
    """Measures, and writes a row for every schedule and loop of fewer steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompts", type=Path, required=True)
    add_setting_arguments(parser)
    parser.add_argument("--samples", type=int, default=16, help="calibration prompts, of which 8 at most are used")
    parser.add_argument("--validation-samples", type=int, default=72)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    given = read_prompts(args.prompts)
    prompts = PromptFile(given.calibration[: args.samples], given.validation[: args.validation_samples])
    with DenoiseRuntime.load(args.bundle, setting=setting_choice(args)) as runtime, progress_bar() as report:
        samples = BundleSamples(prompts, 0, runtime.setting.guidance_scale, reuse=True).open(runtime)
        evaluator, validation = samples.evaluators
        assert validation is not None
        assert samples.validation is not None
        journal = open_journal(args.out.with_suffix(".journal"), evaluator, validation)
        pool = SampleBatches(samples.named(), samples_per_call(runtime, runtime.setting.guidance_scale))
        found = Measurements("calibration", samples.calibration, journal, pool, pictures=False)
        chosen, most = reuse_samples(found.num_samples), found.num_steps // 2
        singles = measure_reuses(found, evaluator.timesteps(), chosen, partial(report, "single reuses"))
        plans = search_plans(found, singles, evaluator.influence, most, chosen, partial(report, "reuse plans"))
        judge = Measurements("validation", samples.validation, journal, pool)
        rows = [*_plan_rows(judge, plans), *_fewer_rows(judge, runtime)]
    calls = {stage: spent for measured in (found, judge) for stage, spent in measured.calls.items()}
    content = {"setting": runtime.setting.name, "prompts": judge.num_samples, "calls": calls, "rows": rows}
    args.out.write_text(json.dumps(content, indent=1) + "\n")
    for row in rows:
        print(
            f"{row['name']:28} {row['saved']:3} E {row.get('typical', float('nan')):.1e} SSIM {row.get('ssim', float('nan')):.4f}"
        )
    return 0


def _plan_rows(judge: Measurements, plans: tuple[ReusePlan, ...]) -> Iterator[dict[str, Any]]:
    """The best plan at every share of the steps, and every rule."""
    picked = {plan.choices: (plan.rule, plan) for plan in plans if plan.rule}
    for share in SHARES:
        within = [plan for plan in plans if plan.rule is None and len(plan.reused) <= share * judge.num_steps]
        if within:
            count = max(len(plan.reused) for plan in within)
            best = min((plan for plan in within if len(plan.reused) == count), key=lambda plan: plan.error)
            picked[best.choices] = ("chosen", best)
    judge.expect(picked, pictures=True)
    for choices, (name, plan) in picked.items():
        runs = [judge.schedule_error(STAGE, choices, sample, pictures=True) for sample in range(judge.num_samples)]
        about = {"name": name, "saved": len(plan.reused), "choices": choices}
        yield about | {"calibration_error": plan.error, "predicted": plan.predicted} | _figures(runs)


def _fewer_rows(judge: Measurements, runtime: DenoiseRuntime) -> Iterator[dict[str, Any]]:
    for share in SHARES:
        most = judge.num_steps - round(share * judge.num_steps)
        try:
            loop = shorter_loop(runtime.bundle, runtime.setting, most)
        except TmpDiffError as error:
            yield {"name": "fewer steps", "saved": judge.num_steps - most, "reason": str(error)}
            continue
        samples = range(judge.num_samples)
        judge.expect_shorter([(loop, judge.reference)], pictures=True, samples=samples)
        runs = [judge.shorter_error(STAGE, loop, judge.reference, sample, pictures=True) for sample in samples]
        yield {"name": "fewer steps", "saved": judge.num_steps - loop.num_steps} | _figures(runs)


def _figures(runs: list[dict[str, float]]) -> dict[str, Any]:
    errors = np.array([run["error"] for run in runs])
    typical, departed = typical_interval(errors), departure_record(errors)
    figures = {"typical": typical.value, "low": typical.low, "high": typical.high, "departures": departed.count}
    return figures | ({"ssim": mean([run["ssim"] for run in runs])} if "ssim" in runs[0] else {})


if __name__ == "__main__":
    raise SystemExit(main())
