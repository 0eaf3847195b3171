"""A small planted calibration: what several tests, and the processes they kill, run."""

from __future__ import annotations

import numpy as np
from helpers.planted import PlantedEvaluator, calibrate_loops

from calibration import HighSteps

STEPS = 10
LATENCIES_MS = {"fp16": 8.0, "fp8": 9.0, "int8": 4.0, "int4": 3.0}
U_SHAPE = np.exp(2 * np.linspace(-0.7, 1.1, STEPS) ** 2)


def loop(*, seed=0, correlation=0.3, scale=U_SHAPE, num_samples=2):
    """fp8 errs least but is slower than the reference; int4 is fastest and errs most."""
    errors = {"fp8": 0.05 * scale, "int8": 0.1 * scale, "int4": 0.3 * scale}
    return PlantedEvaluator(errors, gains=[0.95] * STEPS, correlation=correlation, num_samples=num_samples, seed=seed)


def pictures(latents):
    return np.clip(128 + 40 * np.moveaxis(latents, 1, -1), 0, 255).astype(np.uint8)


def run(evaluator=None, **options):
    options = {"validation": loop(seed=1), "budget": HighSteps(4)} | options
    return calibrate_loops(evaluator or loop(), LATENCIES_MS, **options)
