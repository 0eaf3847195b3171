"""Does sparing the first steps keep samples that would depart? On chosen samples, with scores of any machine.

    python -m tools.experiments.sparing BUNDLE --scores single_steps.json --precision int4 --high-steps 8,16 \\
        --prompts FILE --samples 94,180,0,1,2 --validation-samples 114,24,0,1,2 --out sparing.json

One sample in a hundred departs, so that few samples show nothing and many take a GPU. Which ones do is much the same on
other machines: a run on a GPU says which, and a CPU can look at these and a few others, one at a time. Takes scores
from a result file of `single_steps`, and repeats from there what calibration does at K steps at the reference
(`calibration.choose.race`), on the samples named by their index in the prompt file; `additivity` says which predictor
fits. Prints every schedule that ran on all of them, and on unseen ones what was found, what scores chose, and the fixed
rules.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from calibration.measure.bundle_evaluator import BundleSamples
from calibration.measure.evaluator import Evaluator, SampleSet
from calibration.measure.journal import Journal
from calibration.measure.latency import machine
from calibration.measure.measurements import Measurements
from calibration.measure.metrics import departed
from calibration.measure.sample_batches import SampleBatches
from calibration.scores.predictors import PREDICTORS
from engines.cli import guarded
from engines.documents import read_json
from engines.errors import TmpDiffError
from engines.files import atomic_write_text
from engines.runtime import DenoiseRuntime
from engines.text import read_prompts
from tmpdiff_export.display import print_table, progress_bar
from tools.experiments.command import compact_json, round_numbers
from tools.experiments.prediction import SampleScores
from tools.experiments.schedules import fixed_rules, pattern_of, precisions_of
from tools.experiments.search import search

PROGRAM = "sparing"


@dataclass(frozen=True)
class Chosen:
    """Some samples of an evaluator, in the order given; with their own prompts and noise."""

    whole: Evaluator
    samples: tuple[int, ...]

    @property
    def num_samples(self) -> int:
        """How many."""
        return len(self.samples)

    @property
    def num_steps(self) -> int:
        """T."""
        return self.whole.num_steps

    @property
    def precisions(self) -> tuple[str, ...]:
        """Reference first."""
        return self.whole.precisions

    def start(self, sample: int, nudged: bool = False) -> Any:
        """The state before step 0."""
        return self.whole.start(self.samples[sample], nudged)

    def steps(self, samples: Sequence[int], states: Sequence[Any], precision: str) -> list[Any]:
        """The states after one more step."""
        return self.whole.steps([self.samples[sample] for sample in samples], states, precision)

    def latents(self, state: Any) -> np.ndarray:
        """Latents of a state, float32 [C, H, W]."""
        return self.whole.latents(state)

    def key(self) -> str:
        """Says what is measured."""
        return f"{self.whole.key()} {self.samples}"


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="bundle folder")
    parser.add_argument("--scores", type=Path, required=True, metavar="JSON", help="result file of single_steps")
    parser.add_argument("--precision", required=True, metavar="NAME", help="the low precision")
    parser.add_argument("--predictor", choices=PREDICTORS, default="upcast-power", help="default upcast-power")
    parser.add_argument("--high-steps", type=_numbers, required=True, metavar="LIST", help="K, comma-separated")
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="those of the scores")
    parser.add_argument("--samples", type=_numbers, required=True, metavar="LIST", help="calibration samples, by index")
    parser.add_argument(
        "--validation-samples", type=_numbers, required=True, metavar="LIST", help="unseen samples, by index"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="worker threads (default: one per core)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="result file, JSON")
    args = parser.parse_args()
    return guarded(PROGRAM, lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Measures at every K, prints, and stores what came out after each."""
    content = read_json(args.scores, "result file", TmpDiffError)
    data = content.get("data", {}).get(args.precision) if content.get("experiment") == "single_steps" else None
    if data is None:
        raise TmpDiffError(f"{args.scores} holds no scores of {args.precision}; give a result file of single_steps")
    scores = SampleScores.of(data)
    prompts = read_prompts(args.prompts)
    with DenoiseRuntime.load(args.bundle, threads=args.threads) as runtime:
        runtime.bundle.verify(runtime.manifest.files())
        num_steps, reference = runtime.num_steps, runtime.precisions[0]
        if args.precision not in runtime.precisions[1:] or content["setting"]["num_steps"] != num_steps:
            raise TmpDiffError(
                f"bundle {args.bundle} has T = {num_steps} and {', '.join(runtime.precisions)}; scores are of "
                f"{args.precision} at T = {content['setting']['num_steps']}"
            )
        scale = runtime.manifest.sampling.guidance_scale
        sets = BundleSamples(prompts, 0, scale).open(runtime).named()

        def measurements(name: str, samples: tuple[int, ...]) -> Measurements:
            whole = sets[name].evaluator
            if max(samples) >= whole.num_samples:
                raise TmpDiffError(
                    f"{name} sample {max(samples)} is not in {args.prompts}, which has {whole.num_samples}"
                )
            chosen = SampleSet(Chosen(whole, samples))
            journal = Journal.in_memory(chosen.evaluator.key())
            return Measurements(name, chosen, journal, SampleBatches({name: chosen}))

        calibration = measurements("calibration", args.samples)
        unseen = measurements("validation", args.validation_samples)
        result: dict[str, Any] = {
            "experiment": PROGRAM,
            "command": f"python -m tools.experiments.{PROGRAM} BUNDLE --scores {args.scores.name} --precision "
            f"{args.precision} --predictor {args.predictor} --high-steps {_listed(args.high_steps)} --prompts "
            f"{args.prompts.name} --samples {_listed(args.samples)} --validation-samples "
            f"{_listed(args.validation_samples)} --out {args.out.name}",
            "setting": {
                "num_steps": num_steps,
                "machine": machine(runtime, args.threads),
                "bundle_id": runtime.manifest.bundle_id,
                "denoiser": runtime.manifest.model.denoiser_class,
                "guidance_scale": scale,
            },
            "counts": {},
        }
        for count in args.high_steps:
            found = _search(calibration, scores, args.predictor, args.precision, count)
            schedules = {"found": found["best"], "scores": found["start"], **fixed_rules(num_steps, count)}
            found["unseen"] = [
                {"origin": name, "pattern": pattern, "errors": _errors(unseen, reference, args.precision, pattern)}
                for name, pattern in schedules.items()
            ]
            result["counts"][str(count)] = found
            atomic_write_text(args.out, compact_json(round_numbers(result)) + "\n")
            _print(count, found)
    print(f"wrote {args.out}")
    return 0


def _search(
    calibration: Measurements, scores: SampleScores, predictor: str, precision: str, count: int
) -> dict[str, Any]:
    """What calibration finds from these scores; schedules that ran on all samples, the first what scores chose."""
    with progress_bar() as report:
        start, best, record = search(calibration, scores, predictor, precision, count, partial(report, f"K = {count}"))
    reference = calibration.reference
    trials = [
        {"origin": trial.origin, "pattern": pattern_of(trial.precisions, reference), "errors": list(trial.errors)}
        for trial in record.trials
        if len(trial.errors) == calibration.num_samples
    ]
    return {
        "start": pattern_of(start.precisions, reference),
        "best": pattern_of(best.precisions, reference),
        "origin": record.origin,
        "calls": sum(record.calls.values()),
        "trials": trials,
    }


def _errors(unseen: Measurements, reference: str, precision: str, pattern: str) -> list[float]:
    schedule = precisions_of(pattern, reference, precision)
    return [
        unseen.schedule_error("schedules", schedule, sample, pictures=False)["error"]
        for sample in range(unseen.num_samples)
    ]


def _print(count: int, found: dict[str, Any]) -> None:
    for samples, rows in (("calibration", found["trials"]), ("unseen", found["unseen"])):
        print_table(
            f"K = {count}, {samples} samples",
            ["", "schedule", "mean E", "median E", "departed"],
            [
                [
                    row["origin"],
                    row["pattern"],
                    f"{np.mean(row['errors']):.2e}",
                    f"{np.median(row['errors']):.2e}",
                    str(departed(np.array(row["errors"]))),
                ]
                for row in rows
            ],
        )


def _numbers(text: str) -> tuple[int, ...]:
    words = text.split(",")
    numbers = tuple(int(word) for word in words if word.isdecimal())
    if len(set(numbers)) < len(words):
        raise argparse.ArgumentTypeError(f"{text!r}: expected different whole numbers from 0, comma-separated")
    return numbers


def _listed(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))


if __name__ == "__main__":
    sys.exit(main())
