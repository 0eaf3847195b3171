"""Planted samples that worker processes of the tests open; importable there, and quickly: no torch."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from helpers.planted import OneByOne, PlantedEvaluator, calibrate_loops

from calibration import HighSteps
from calibration.measure.evaluator import SampleSet
from calibration.measure.journal import Journal
from calibration.measure.sample_batches import SampleBatches

if TYPE_CHECKING:
    from tmpdiff_export.calibrate.dask_pool import SampleWorkers

STEPS = 10
SAMPLES = 5
LATENCIES_MS = {"fp16": 8.0, "fp8": 9.0, "int8": 4.0, "int4": 3.0}


def loop(seed=0, num_samples=SAMPLES):
    """fp8 errs least but is slower than the reference, so that its states are forgotten."""
    scale = np.exp(2 * np.linspace(-0.7, 1.1, STEPS) ** 2)
    errors = {"fp8": 0.05 * scale, "int8": 0.1 * scale, "int4": 0.3 * scale}
    return PlantedEvaluator(errors, [0.95] * STEPS, correlation=0.3, num_samples=num_samples, seed=seed)


def pictures(latents):
    return np.clip(128 + 40 * np.moveaxis(latents, 1, -1), 0, 255).astype(np.uint8)


class Traced(OneByOne):
    """Writes a line for every step; the process that takes away the file `fatal` at step `fatal_call` dies."""

    def __init__(self, inner, folder: Path, fatal_call: int, seconds: float):
        self.inner, self.folder, self.fatal_call, self.seconds = inner, folder, fatal_call, seconds
        self.num_steps, self.precisions, self.num_samples = inner.num_steps, inner.precisions, inner.num_samples
        self.start, self.latents, self.key = inner.start, inner.latents, inner.key
        self.calls = 0

    def step(self, sample, state, precision):
        self.calls += 1
        time.sleep(self.seconds)
        if self.calls == self.fatal_call and self._taken():
            os.kill(os.getpid(), signal.SIGKILL)
        if self.folder.name == "deadly" and sample == 1 and self.calls > 3:
            os.kill(os.getpid(), signal.SIGKILL)
        with open(self.folder / f"steps-{os.getpid()}", "a") as stream:
            stream.write(f"{sample} {precision}\n")
        return self.inner.step(sample, state, precision)

    def steps(self, samples, states, precision):
        with open(self.folder / f"together-{os.getpid()}", "a") as stream:
            stream.write(f"{len(samples)}\n")
        return super().steps(samples, states, precision)

    def _taken(self) -> bool:
        try:
            (self.folder / "fatal").unlink()
        except FileNotFoundError:
            return False
        return True


def planted_samples(folder: Path, fatal_call: int, seconds: float, at_once: int):
    (folder / f"environment-{os.getpid()}").write_text(os.environ.get("WORKER_NUMBER", "none"))
    made = partial(Traced, folder=folder, fatal_call=fatal_call, seconds=seconds)
    sets = {"calibration": SampleSet(made(loop())), "validation": SampleSet(made(loop(seed=1)), pictures)}
    return SampleBatches(sets, at_once)


def broken_samples():
    from engines.errors import BundleError

    raise BundleError("bundle x is damaged")


def not_finite_samples():
    class Overflowing(PlantedEvaluator):
        def latents(self, state):
            return super().latents(state) * np.nan

    evaluator = Overflowing(loop().errors, loop().gains, num_samples=SAMPLES)
    return SampleBatches({"calibration": SampleSet(evaluator)})


def open_planted(
    folder: Path, workers: int, *, fatal_call: int = 0, seconds: float = 0.0, at_once: int = 1
) -> SampleWorkers:
    from tmpdiff_export.calibrate.dask_pool import SampleWorkers  # not needed in workers

    folder.mkdir(exist_ok=True)
    environments = [{"WORKER_NUMBER": str(index)} for index in range(workers)]
    return SampleWorkers(partial(planted_samples, folder, fatal_call, seconds, at_once), environments, at_once)


def calibrated(journal: Journal | None = None, pool: SampleWorkers | None = None, **options):
    options = {"budget": HighSteps(4), "decode": pictures} | options
    options |= {"validation": loop(seed=1), "journal": journal, "pool": pool}
    return calibrate_loops(loop(), LATENCIES_MS, **options).sensitivity
