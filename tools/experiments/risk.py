"""Whether the risk of departures (`calibration.scores.divergence`) foretells plain means of E, from result files alone.

    python -m tools.experiments.risk ADDITIVITY.json [QUALITY.json]

Takes the scores of the first file, and every schedule that either file ran on unseen prompts: random ones, fixed rules,
calibrated ones. Prints Spearman's correlation of their plain mean of E, which departures decide, with what is predicted: by
limited scores alone, with all of the risk, and with as much as calibration affords. Repeated with fewer calibration
samples, drawn at random. Then the tails that risk is read off, and the schedules that scores choose with risk and
without, before any local search, and by how much the former have more limited E, as predicted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from calibration.choose.allocation import HighSteps, allocate
from calibration.choose.costs import LatencyModel
from calibration.measure.metrics import limited
from calibration.scores.predictors import predict
from engines.cli import guarded
from engines.documents import read_json
from engines.errors import TmpDiffError
from tmpdiff_export.display import print_table
from tools.experiments.figures import label
from tools.experiments.prediction import SampleScores
from tools.experiments.schedules import high_steps, pattern_of
from tools.experiments.statistics import spearman

SAMPLES = (12, 24, 48)
TAILS = (5, 10, 40, 100)
DRAWS = 50


def measured_schedules(
    fits: dict[str, Any], quality: dict[str, Any] | None, precision: str
) -> tuple[list[str], np.ndarray]:
    """Patterns that ran on unseen samples, and E, float64 [N, samples]."""
    data = fits["data"][precision]
    found = dict(zip(data["patterns"], data["validation"], strict=True))
    for rows in quality["data"]["precisions"].get(precision, {"rows": {}})["rows"].values() if quality else ():
        for row in rows.values():
            found |= dict(zip(row["patterns"], row["error"], strict=True))
    return list(found), np.array(list(found.values()))


def agreements(scores: SampleScores, predictor: str, patterns: list[str], errors: np.ndarray) -> list[float]:
    """Spearman with plain means of E: of limited scores, with all of the risk, with what is afforded."""
    low = ~high_steps(patterns)
    plain = errors.mean(axis=1)
    whole, afforded = scores.risks(predictor, afford=False), scores.risks(predictor)
    found = scores.contributions(predictor), *(scores.weighed(predictor, risks) for risks in (whole, afforded))
    return [spearman(plain, low @ one.values[:, 1]) for one in found]


def fewer(scores: SampleScores, rows: np.ndarray) -> SampleScores:
    """The scores of some of the samples."""
    return replace(
        scores, scores={name: values[rows] for name, values in scores.scores.items()}, uniform=scores.uniform[rows]
    )


def table(fits: dict[str, Any], quality: dict[str, Any] | None) -> list[list[str]]:
    """A row of words per precision and number of calibration samples."""
    rows = []
    for precision, measured in fits["data"].items():
        scores = SampleScores.of(measured)
        patterns, errors = measured_schedules(fits, quality, precision)
        predictor = fits["findings"][precision]["validation"]["better"]
        departed = int(np.count_nonzero(errors.T - limited(errors.T)))
        generator = np.random.default_rng(0)
        count = len(scores.uniform)
        for size in (*(size for size in SAMPLES if size < count), count):
            drawn = [np.arange(count)] if size == count else [generator.permutation(count)[:size] for _ in range(DRAWS)]
            found = np.mean([agreements(fewer(scores, pick), predictor, patterns, errors) for pick in drawn], axis=0)
            name = f"{label(precision, fits['setting']['backend'])}: {len(patterns)} schedules, {departed} departures"
            rows.append([name if size == count else "", str(size), *(f"{value:.2f}" for value in found)])
    return rows


def tails(fits: dict[str, Any]) -> list[list[str]]:
    """A row per precision and tail: calibration samples whose downcast score is above so many medians, by step."""
    rows = []
    for precision, measured in fits["data"].items():
        scores = np.array(measured["downcast"])
        for medians in TAILS:
            counts = (scores > medians * np.median(scores, axis=0)).sum(axis=0)
            rows.append([precision, str(medians), " ".join(map(str, counts))])
    return rows


def choices(fits: dict[str, Any]) -> list[list[str]]:
    """A row per precision and K = T/5, 2T/5, 3T/5, 4T/5: schedules without risk and with it, and what that costs."""
    rows = []
    num_steps, reference = fits["setting"]["num_steps"], fits["setting"]["reference"]
    for precision, measured in fits["data"].items():
        scores, predictor = SampleScores.of(measured), fits["findings"][precision]["validation"]["better"]
        plain = scores.contributions(predictor)
        weighed = scores.weighed(predictor, scores.risks(predictor))
        pair = (reference, precision)
        equal = LatencyModel(pair, dict.fromkeys(pair, 1.0))  # K says it all: latency has no part in it
        for count in (round(num_steps * part / 5) for part in range(1, 5)):
            chosen = [allocate(equal, found, HighSteps(count)).precisions for found in (plain, weighed)]
            cost = predict(plain, pair, chosen[1]) / predict(plain, pair, chosen[0]) - 1
            patterns = [pattern_of(schedule, reference) for schedule in chosen]
            rows.append([precision, str(count), *patterns, f"{cost:+.0%}"])
    return rows


def _read(path: Path, experiment: str) -> dict[str, Any]:
    content = read_json(path, "result file", TmpDiffError)
    if content.get("experiment") != experiment:
        raise TmpDiffError(f"{path} holds {content.get('experiment')!r}, expected a file of {experiment!r}")
    return content


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.experiments.risk", description=__doc__.splitlines()[0])
    parser.add_argument("additivity", type=Path, metavar="ADDITIVITY.json")
    parser.add_argument("quality", type=Path, nargs="?", metavar="QUALITY.json", help="of the same samples")
    args = parser.parse_args(arguments)

    def run() -> int:
        fits = _read(args.additivity, "additivity")
        quality = _read(args.quality, "quality") if args.quality else None
        if quality and quality["setting"]["validation_prompts"] != fits["setting"]["validation_prompts"]:
            raise TmpDiffError(f"{args.quality} was measured on other unseen prompts than {args.additivity}")
        head = ["", "calibration samples", "limited scores", "with risk", "as afforded"]
        print_table("Spearman with plain means of E on unseen prompts", head, table(fits, quality))
        samples = len(fits["setting"]["calibration_prompts"])
        print_table(f"Scores above so many medians, of {samples}", ["", "medians", "samples by step"], tails(fits))
        print_table("Chosen by scores", ["", "K", "without risk", "with risk", "limited E"], choices(fits))
        return 0

    return guarded("risk", run)


if __name__ == "__main__":
    sys.exit(main())
