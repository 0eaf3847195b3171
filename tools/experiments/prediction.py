"""What single-step scores predict for schedules of one low precision, and how well."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from calibration.measure.metrics import limited
from calibration.scores.divergence import affordable, risk_curve, with_risk
from calibration.scores.predictors import PREDICTORS, Contributions, contributions
from calibration.scores.single_step import DIRECTIONS
from calibration.statistics import Interval, bootstrap_interval
from tools.experiments.schedules import fixed_rules, high_steps
from tools.experiments.statistics import r_squared, spearman

_NAMES = ("reference", "low")


def mean_scores(direction: str, scores: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """The score curve of samples as the calibrator makes it, float64 [T].

    Args:
        direction: "downcast" or "upcast".
        scores: of each sample, float64 [S, T].
        uniform: E(all p), float64 [S].
    """
    if direction == "downcast":
        return np.asarray(limited(scores).mean(axis=0))
    return np.asarray(limited(uniform).mean() - limited(uniform[:, None] - scores).mean(axis=0))


@dataclass(frozen=True)
class SampleScores:
    """Scores of one low precision, sample by sample.

    Attributes:
        scores: by direction, float64 [S, T].
        uniform: E(all p), float64 [S].
    """

    scores: dict[str, np.ndarray]
    uniform: np.ndarray

    @classmethod
    def of(cls, data: dict[str, Any]) -> SampleScores:
        """From the data of a result file."""
        return cls({name: np.array(data[name]) for name in DIRECTIONS}, np.array(data["uniform"]))

    def predicted(self, predictor: str, high: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        """Predicted E of schedules, float64 [N].

        Args:
            predictor: one of `PREDICTORS`.
            high: bool [N, T], the steps at the reference.
            rows: samples whose mean scores to use, repeated ones counting more; None for all.
        """
        found = self.contributions(predictor, rows)
        return np.asarray((~high @ found.values[:, 1]) ** found.power)

    def curves(self, rows: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Score curves by direction, float64 [T]; `rows` as above."""
        rows = np.arange(len(self.uniform)) if rows is None else rows
        return {name: mean_scores(name, values[rows], self.uniform[rows]) for name, values in self.scores.items()}

    def contributions(self, predictor: str, rows: np.ndarray | None = None) -> Contributions:
        """What a step at the reference (0) and at the low precision adds; values float64 [T, 2]."""
        rows = np.arange(len(self.uniform)) if rows is None else rows
        curves = {(name, _NAMES[1]): curve for name, curve in self.curves(rows).items()}
        return contributions(predictor, _NAMES, curves, {_NAMES[1]: float(limited(self.uniform[rows]).mean())})

    def risks(self, predictor: str, *, afford: bool = True) -> dict[str, np.ndarray]:
        """The risk of departures (`calibration.scores.divergence`), or as much of it as the predictor's schedules afford."""
        errors = self.scores["downcast"]
        risks = {_NAMES[1]: risk_curve(dict(enumerate(errors.T)), errors.shape[1])}
        return affordable(self.contributions(predictor), _NAMES, risks) if afford else risks

    def weighed(self, predictor: str, risks: Mapping[str, np.ndarray]) -> Contributions:
        """Contributions with risk: what schedules are chosen by."""
        return with_risk(self.contributions(predictor), _NAMES, risks)


def attainable(scores: SampleScores, predictor: str, counts: Sequence[int]) -> dict[int, tuple[float, str]]:
    """How far the best schedule of K steps at the reference lies below the best fixed rule, both as predicted.

    Returns:
        By K, the share of the rule's E, and the rule.
    """
    found = scores.contributions(predictor)
    values = found.values[:, 1]
    shares = {}
    for count in counts:
        best = float(np.sort(values)[: len(values) - count].sum() ** found.power)
        rules = {
            name: float(scores.predicted(predictor, high_steps([pattern]))[0])
            for name, pattern in fixed_rules(len(values), count).items()
        }
        rule = min(rules, key=lambda name: rules[name])
        shares[count] = (1 - best / rules[rule] if rules[rule] > 0 else 0.0, rule)
    return shares


@dataclass(frozen=True)
class Fit:
    """How well one predictor describes measured errors; intervals over samples.

    Attributes:
        r2: over all schedules.
        r2_within: among schedules that agree on the heaviest step, the one with the largest contribution. Where one
            step dwarfs the others, `r2` says little more than whether it was spared; this is what is left to the
            others.
        ratio: sum of predicted over sum of measured.
    """

    predictor: str
    r2: Interval
    r2_within: Interval
    spearman: Interval
    ratio: Interval


def fit_predictors(scores: SampleScores, patterns: list[str], measured: np.ndarray, *, held_out: bool) -> list[Fit]:
    """A fit per predictor.

    Args:
        scores: of the calibration samples.
        patterns: N schedules.
        measured: E, float64 [N, samples].
        held_out: whether `measured` is of other samples than the scores; both are then resampled.
    """
    high = high_steps(patterns)
    return [_fit(predictor, scores, high, measured, held_out) for predictor in PREDICTORS]


def _fit(predictor: str, scores: SampleScores, high: np.ndarray, measured: np.ndarray, held_out: bool) -> Fit:
    sizes = (len(scores.uniform), measured.shape[1]) if held_out else (len(scores.uniform),)
    spared = high[:, int(np.argmax(scores.contributions(predictor).values[:, 1]))]

    def interval(agreement: Callable[[np.ndarray, np.ndarray], float]) -> Interval:
        def statistic(rows: np.ndarray, others: np.ndarray | None = None) -> float:
            chosen = rows if others is None else others  # without samples of their own the two are paired
            return agreement(scores.predicted(predictor, high, rows), limited(measured[:, chosen].T).mean(axis=0))

        return bootstrap_interval(statistic, *sizes)

    return Fit(
        predictor,
        r2=interval(r_squared),
        r2_within=interval(lambda predicted, found: r_squared(_centred(predicted, spared), _centred(found, spared))),
        spearman=interval(spearman),
        ratio=interval(_ratio),
    )


def plain_r_squared(scores: SampleScores, patterns: list[str], measured: np.ndarray) -> float:
    """R^2 of the best predictor where all means are plain ones, `measured` [N, samples] included."""
    curves = {(name, _NAMES[1]): values.mean(axis=0) for name, values in scores.scores.items()}
    low = ~high_steps(patterns)
    found = [contributions(name, _NAMES, curves, {_NAMES[1]: float(scores.uniform.mean())}) for name in PREDICTORS]
    return max(r_squared((low @ item.values[:, 1]) ** item.power, measured.mean(axis=1)) for item in found)


def plain_agreement(
    scores: SampleScores, predictor: str, patterns: list[str], measured: np.ndarray
) -> dict[str, Interval]:
    """Spearman of predictions with plain means of E, `measured` [N, samples]: without risk and with it.

    Departures decide these means; intervals are over the samples of `measured`.
    """
    low = ~high_steps(patterns)
    return {
        name: bootstrap_interval(
            lambda rows, predicted=low @ found.values[:, 1]: spearman(predicted, measured[:, rows].mean(axis=1)),
            measured.shape[1],
        )
        for name, found in (
            ("limited", scores.contributions(predictor)),
            ("with risk", scores.weighed(predictor, scores.risks(predictor))),
        )
    }


def better(fits: list[Fit]) -> Fit:
    """The one with the highest R^2 among those that rise; the first where none does."""
    return max(fits, key=lambda fit: fit.r2.value if fit.spearman.value > 0 else -1.0)


def _centred(values: np.ndarray, spared: np.ndarray) -> np.ndarray:
    """Values less the mean of the group they belong to, [N]."""
    groups = {chosen: values[spared == chosen].mean() for chosen in np.unique(spared)}
    return values - np.array([groups[chosen] for chosen in spared])


def _ratio(predicted: np.ndarray, measured: np.ndarray) -> float:
    total = float(measured.sum())
    return float(predicted.sum()) / total if total > 0 else float("nan")
