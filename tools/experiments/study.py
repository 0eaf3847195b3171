"""A bundle under study: its samples, the journal all experiments share, and what they measure on it."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from calibration import open_journal
from calibration.measure.bundle_evaluator import BundleSamples, samples_per_call
from calibration.measure.evaluator import Compare, SampleSet
from calibration.measure.journal import Journal
from calibration.measure.latency import machine
from calibration.measure.measurements import Measurements
from calibration.measure.metrics import picture_errors
from calibration.measure.requests import Pool
from calibration.measure.sample_batches import SampleBatches
from engines.arguments import add_setting_arguments, setting_choice
from engines.errors import TmpDiffError
from engines.files import sha256_bytes
from engines.runtime import DenoiseRuntime
from engines.text import read_prompts
from engines.version import VERSION
from tools.experiments.curves import Direction
from tools.experiments.lpips import lpips, read_weights

JOURNAL_FOLDER = "experiments"
LIBRARIES = ("numpy", "scipy", "scikit-image")
Report = Callable[[str, int, int], None]
Schedule = tuple[str, ...]
Values = dict[str, float]


@dataclass(frozen=True)
class Study:
    """What an experiment measures on.

    Attributes:
        samples: of the calibration prompts; sample i is prompt i with seed + i.
        pool: takes all measurements.
        calibration: of these samples.
        validation: of prompts that calibration does not use; their pictures are compared too.
        precisions: the low precisions studied.
        at_once: samples measured together; what one engine call is compiled for.
        setting: what was run on what, for the result file.
        until: when to begin nothing new (`time.monotonic`), None for never.
    """

    runtime: DenoiseRuntime
    journal: Journal
    samples: SampleSet
    pool: Pool
    calibration: Measurements
    validation: Measurements
    precisions: tuple[str, ...]
    at_once: int
    setting: dict[str, Any]
    report: Report
    until: float | None

    @property
    def reference(self) -> str:
        """The reference precision."""
        return self.calibration.reference

    @property
    def num_steps(self) -> int:
        """T."""
        return self.calibration.num_steps

    def uniform(self, precision: str) -> list[float]:
        """E(all p) of every calibration sample."""
        return self.calibration_errors("uniform runs", [(precision,) * self.num_steps])[0]

    def scores(self, precision: str, directions: Sequence[Direction]) -> dict[str, list[list[float]]]:
        """Scores by direction, sample and step, from a full sweep.

        Costs at most T (T + 1) / 2 denoiser calls per direction and sample.
        """
        found: dict[str, list[list[float]]] = {}
        samples = self.calibration.num_samples
        for direction in directions:
            rows: list[list[float]] = [[] for _ in range(samples)]
            done = 0
            for block in self._blocks(samples):
                for step in range(self.num_steps):
                    if direction == "downcast":
                        self.calibration.expect_downcasts(step, precision, samples=block)
                    else:
                        self.calibration.expect([self._upcast(precision, step)], pictures=False, samples=block)
                    for sample in block:
                        rows[sample].append(self._score(precision, direction, step, sample))
                    done += len(block)
                    self.report(f"{direction} {precision}", done, samples * self.num_steps)
            found[direction] = rows
        return found

    def _score(self, precision: str, direction: Direction, step: int, sample: int) -> float:
        if direction == "downcast":
            return self.calibration.downcast(step, precision, sample).error
        schedule = self._upcast(precision, step)
        upcast = self.calibration.schedule_error(f"upcast {precision}", schedule, sample, pictures=False)
        return self.calibration.uniform_error(precision, sample)["error"] - upcast["error"]

    def _upcast(self, precision: str, step: int) -> Schedule:
        return tuple(self.reference if index == step else precision for index in range(self.num_steps))

    def calibration_errors(self, stage: str, schedules: Sequence[Schedule]) -> list[list[float]]:
        """E of each schedule on every calibration sample."""
        return [
            [row["error"] for row in rows] for rows in self._errors(self.calibration, stage, schedules, pictures=False)
        ]

    def validation_errors(self, stage: str, schedules: Sequence[Schedule], *, pictures: bool) -> list[list[Values]]:
        """Of each schedule and validation sample "error", with pictures "ssim", "mse" and, if asked for, "lpips"."""
        return self._errors(self.validation, stage, schedules, pictures=pictures)

    def _errors(
        self, measurements: Measurements, stage: str, schedules: Sequence[Schedule], *, pictures: bool
    ) -> list[list[Values]]:
        rows: list[list[Values]] = [[] for _ in schedules]
        samples, done = measurements.num_samples, 0
        for block in self._blocks(samples):
            for index, schedule in enumerate(schedules):
                measurements.expect([schedule], pictures=pictures, samples=block)
                for sample in block:
                    rows[index].append(measurements.schedule_error(stage, schedule, sample, pictures=pictures))
                done += len(block)
                self.report(stage, done, samples * len(schedules))
        return rows

    def _blocks(self, samples: int) -> list[range]:
        """Samples measured together; block by block, so that an interrupted command has whole samples to show."""
        return [range(start, min(start + self.at_once, samples)) for start in range(0, samples, self.at_once)]

    def forget(self, precision: str) -> None:
        """Frees what is kept of a low precision that is done with."""
        self.calibration.forget(precision)
        self.validation.forget(precision)

    def recounted(self, num_samples: int | None = None) -> Measurements:
        """The calibration samples, or only the first ones, with a count of calls from nothing; nothing is measured twice."""
        return Measurements(
            "calibration", self.samples, self.journal, self.pool, num_samples or self.calibration.num_samples
        )

    def in_time(self) -> bool:
        """Whether something new may be begun."""
        return self.until is None or time.monotonic() < self.until


def add_study_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what every experiment takes to measure."""
    parser.add_argument("bundle", type=Path, nargs="?", metavar="BUNDLE", help="bundle folder")
    add_setting_arguments(parser)
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="calibration and validation prompts")
    parser.add_argument("--precisions", metavar="LIST", help="low precisions, comma-separated (default: all built)")
    parser.add_argument("--samples", type=int, default=6, metavar="N", help="calibration samples (default %(default)s)")
    parser.add_argument(
        "--validation-samples", type=int, default=12, metavar="N", help="validation samples (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the first sample (default 0)")
    parser.add_argument("--guidance-scale", type=float, metavar="G", help="default: the bundle's")
    parser.add_argument("--threads", type=int, metavar="N", help="worker threads (default: one per core)")
    parser.add_argument(
        "--lpips",
        type=Path,
        metavar="FILE",
        help="weights from tools.experiments.fetch_lpips: measures LPIPS of pictures, too",
    )
    parser.add_argument(
        "--seconds-limit", type=float, metavar="S", help="begins nothing new after S seconds; what is there is written"
    )


@contextlib.contextmanager
def open_study(args: argparse.Namespace, report: Report) -> Iterator[Study]:
    """The study the arguments ask for.

    Studies of other precisions have journals of their own: they may run at once.

    Raises:
        TmpDiffError: the bundle or prompts cannot be used, a precision is not built, there are too few samples, or
            another experiment is at work on the same samples.
    """
    prompts = read_prompts(args.prompts)
    for name, count, there in (
        ("--samples", args.samples, prompts.calibration),
        ("--validation-samples", args.validation_samples, prompts.validation),
    ):
        if not 2 <= count <= len(there):
            raise TmpDiffError(
                f"{name} is {count}, expected 2 (a confidence interval needs two) to {len(there)} "
                f"(the prompts of {args.prompts.name})"
            )
    until = None if args.seconds_limit is None else time.monotonic() + args.seconds_limit
    with DenoiseRuntime.load(args.bundle, setting=setting_choice(args), threads=args.threads) as runtime:
        runtime.bundle.verify(runtime.manifest.files())
        precisions = _low_precisions(args.precisions, runtime.precisions)
        scale = runtime.setting.guidance_scale if args.guidance_scale is None else args.guidance_scale
        # all prompts are samples, of which the first ones are used: more of them later reuse what was measured
        sets = BundleSamples(prompts, args.seed, scale).open(runtime)
        folder = runtime.bundle.folder / JOURNAL_FOLDER
        folder.mkdir(exist_ok=True)
        compare, compared = _comparison(args.lpips)
        keys = " ".join(samples.evaluator.key() for samples in sets.named().values())
        digest = sha256_bytes(f"{keys}{compared} {' '.join(precisions)}".encode())[:16]
        path = folder / f"{digest}-{'-'.join(precisions)}.journal"
        with _alone(path):
            journal = open_journal(path, *sets.evaluators)
            at_once = samples_per_call(runtime, scale)
            named = sets.named()
            named["calibration"] = replace(named["calibration"], decode=None)
            named["validation"] = replace(named["validation"], compare=compare)
            pool = SampleBatches(named, at_once, args.threads)
            yield Study(
                runtime=runtime,
                journal=journal,
                samples=named["calibration"],
                pool=pool,
                calibration=Measurements("calibration", named["calibration"], journal, pool, args.samples),
                validation=Measurements("validation", named["validation"], journal, pool, args.validation_samples),
                precisions=precisions,
                at_once=at_once,
                setting={
                    "num_steps": runtime.num_steps,
                    "reference": runtime.precisions[0],
                    "precisions": list(precisions),
                    "recipes": {name: runtime.manifest.denoisers[name][0].recipe for name in runtime.precisions[1:]},
                    "backend": runtime.manifest.reference.backend,
                    "machine": machine(runtime, args.threads),
                    "versions": {
                        "tmpdiff": VERSION,
                        "python": platform.python_version(),
                        **{name: version(name) for name in LIBRARIES},
                    },
                    "bundle_id": runtime.manifest.bundle_id,
                    "denoiser": runtime.manifest.model.denoiser_class,
                    "guidance_scale": scale,
                    "pictures_per_call": at_once,
                    "seed": args.seed,
                    "calibration_prompts": list(prompts.calibration[: args.samples]),
                    "validation_prompts": list(prompts.validation[: args.validation_samples]),
                },
                report=report,
                until=until,
            )


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Refuses a journal that another process writes: what the two measure would be recorded twice."""
    with open(path.with_suffix(".lock"), "wb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TmpDiffError(
                f"journal {path} is in use by another experiment; wait for it, as what it measures is reused"
            ) from None
        yield


def _comparison(weights: Path | None) -> tuple[Compare, str]:
    """How pictures are compared, and a name for it where it is not the usual way."""
    if weights is None:
        return picture_errors, ""
    tensors = read_weights(weights)

    def compare(picture: np.ndarray, reference: np.ndarray) -> dict[str, float]:
        return picture_errors(picture, reference) | {"lpips": lpips(tensors, picture, reference)}

    return compare, " with LPIPS"


def _low_precisions(asked: str | None, built: tuple[str, ...]) -> tuple[str, ...]:
    low = built[1:]
    names = low if asked is None else tuple(asked.split(","))
    unknown = [name for name in names if name not in low]
    if unknown or not names:
        raise TmpDiffError(
            f"low precision {unknown[0] if unknown else 'none'!r} is not in the bundle; choose from {', '.join(low)}"
        )
    return names
