"""Measured error of random schedules against what single-step scores add up to (figures 2 and 5 of the paper).

Random schedules at every K asked for run on the calibration samples and on samples that calibration does not use.
Goal: R^2 of the best predictor, of either score or of both, of at least 0.95 for every precision, on both.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from calibration.measure.metrics import limited
from tools.experiments.command import Analysis, Experiment, Goal, verdict, wording
from tools.experiments.figures import INK, headline, label, panels
from tools.experiments.prediction import (
    SampleScores,
    attainable,
    better,
    fit_predictors,
    plain_agreement,
    plain_r_squared,
)
from tools.experiments.schedules import HIGH, counts_between, high_steps, precisions_of, random_patterns
from tools.experiments.study import Study

GOAL_R2 = 0.95
ROOM_PARTS = 5  # K = T/5, 2T/5, ... of the note on what any schedule can gain over the fixed rules
SETS = {"calibration": "calibration prompts", "validation": "unseen prompts"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares which schedules."""
    parser.add_argument("--every", type=int, default=2, metavar="N", help="every Nth K from T/5 to 4T/5 (default 2)")
    parser.add_argument("--draws", type=int, default=3, metavar="N", help="random schedules per K (default 3)")


def random_schedules(num_steps: int, every: int, draws: int) -> list[str]:
    """The patterns of the experiment."""
    return [
        pattern for count in counts_between(num_steps, every) for pattern in random_patterns(num_steps, count, draws)
    ]


def measure(study: Study, args: argparse.Namespace) -> dict[str, Any]:
    """Per precision the scores, the "patterns", and E by pattern and sample of both sets."""
    data: dict[str, Any] = {}
    patterns = random_schedules(study.num_steps, args.every, args.draws)
    for precision in study.precisions:
        schedules = [precisions_of(pattern, study.reference, precision) for pattern in patterns]
        data[precision] = {
            "uniform": study.uniform(precision),
            **study.scores(precision),
            "patterns": patterns,
            "calibration": study.calibration_errors("random schedules", schedules),
            "validation": [
                [values["error"] for values in rows]
                for rows in study.validation_errors("random schedules", schedules, pictures=False)
            ],
        }
        study.forget(precision)
    return data


def analyse(content: dict[str, Any]) -> Analysis:
    """R^2, Spearman and level of every predictor, with intervals over samples."""
    findings: dict[str, Any] = {}
    goals, notes = [], []
    backend, num_steps = content["setting"]["backend"], content["setting"]["num_steps"]
    for precision, measured in content["data"].items():
        scores = SampleScores.of(measured)
        findings[precision] = {}
        for name, words in SETS.items():
            fits = fit_predictors(scores, measured["patterns"], np.array(measured[name]), held_out=name == "validation")
            best = better(fits)
            findings[precision][name] = {
                "better": best.predictor,
                "plain_r2": plain_r_squared(scores, measured["patterns"], np.array(measured[name])),
                "plain_spearman": {
                    words: asdict(found)
                    for words, found in plain_agreement(
                        scores, best.predictor, measured["patterns"], np.array(measured[name])
                    ).items()
                },
                "fits": {
                    fit.predictor: {key: asdict(getattr(fit, key)) for key in ("r2", "r2_within", "spearman", "ratio")}
                    for fit in fits
                },
            }
            goals.append(
                Goal(
                    f"{label(precision, backend)}, {words}",
                    f"R^2 of the best predictor >= {GOAL_R2}",
                    f"{wording(best.r2)} ({best.predictor}), within {wording(best.r2_within, '.2f')}, "
                    f"Spearman {wording(best.spearman, '.2f')}",
                    verdict(best.r2.value >= GOAL_R2),
                )
            )
        predictor = findings[precision]["validation"]["better"]
        room = attainable(scores, predictor, counts_between(num_steps, max(1, num_steps // ROOM_PARTS)))
        findings[precision]["attainable"] = {str(count): list(entry) for count, entry in room.items()}
        plain = ", ".join(f"{findings[precision][name]['plain_r2']:.3f} on {words}" for name, words in SETS.items())
        notes.append(f"{label(precision, backend)}: with plain means, R^2 would be {plain}")
        ranked = ", ".join(
            f"{found['with risk']['value']:.2f} on {SETS[name]} (limited scores alone {found['limited']['value']:.2f})"
            for name in SETS
            for found in [findings[precision][name]["plain_spearman"]]
        )
        notes.append(f"{label(precision, backend)}: Spearman of scores with risk and plain means: {ranked}")
        notes.append(
            f"{label(precision, backend)}: by these scores ({predictor}), the best schedule is "
            + ", ".join(f"{share:.0%} below {rule} at K = {count}" for count, (share, rule) in room.items())
        )
    return Analysis(findings, tuple(goals), tuple(notes))


def draw(content: dict[str, Any], findings: dict[str, Any]) -> Figure:
    """A column per precision, a row per set of prompts; predicted by the best predictor there."""
    figure, rows = panels(len(SETS), len(findings), width=3.3, height=2.9)
    setting, mappable = content["setting"], None
    for row, (name, words) in zip(rows, SETS.items(), strict=True):
        for axes, (precision, found) in zip(row, findings.items(), strict=True):
            measured, best = content["data"][precision], found[name]["better"]
            patterns = measured["patterns"]
            counts = np.array([pattern.count(HIGH) for pattern in patterns])
            errors = limited(np.array(measured[name]).T).mean(axis=0)
            predicted = SampleScores.of(measured).predicted(best, high_steps(patterns))
            mappable = axes.scatter(
                predicted, errors, c=counts, cmap="viridis", s=26, vmin=counts.min(), vmax=counts.max(), zorder=3
            )
            ends = np.array([predicted.min(), predicted.max()])
            axes.plot(ends, ends, ":", color=INK, linewidth=1, label="predicted = measured")
            if ends[1] > ends[0]:
                slope, intercept = np.polyfit(predicted, errors, 1)
                axes.plot(ends, slope * ends + intercept, color=INK, linewidth=1, label="regression line")
            r2 = found[name]["fits"][best]["r2"]
            axes.text(
                0.03, 0.97, f"R² {r2['value']:.3f} [{r2['low']:.3f}, {r2['high']:.3f}]\n{best}",
                transform=axes.transAxes, va="top", fontsize=8,
            )  # fmt: skip
            axes.margins(0.08, 0.16)
            axes.ticklabel_format(style="sci", scilimits=(-2, 2))
            axes.set_xlabel("predicted E")
            if name == "calibration":
                axes.set_title(label(precision, setting["backend"]))
        row[0].set_ylabel(f"measured E, {words}")
    if mappable:
        figure.colorbar(mappable, ax=[axes for row in rows for axes in row], label="K", shrink=0.6)
    figure.legend(*rows[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    headline(
        figure,
        f"Random schedules, {setting['denoiser']}, T = {setting['num_steps']}, "
        f"{len(setting['calibration_prompts'])} calibration and {len(setting['validation_prompts'])} unseen samples",
    )
    return figure


EXPERIMENT = Experiment("additivity", __doc__.splitlines()[0], add_arguments, measure, analyse, draw)

if __name__ == "__main__":
    sys.exit(EXPERIMENT.main())
