"""SQNR of an engine against FP32 torch on real inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from engines.engine import Engine
from tmpdiff_export.ranges import Batch

# What identical outputs count as, so that every figure is a finite number.
PERFECT_DB = 200.0


def sqnr_db(reference: np.ndarray, measured: np.ndarray) -> float:
    """Signal to quantization noise ratio, 10 log10(sum ref^2 / sum (ref - measured)^2), in dB.

    Not-a-number or infinite values in `measured` count as no signal at all: minus `PERFECT_DB`.
    """
    if not np.isfinite(measured).all():
        return -PERFECT_DB
    signal = float(np.square(reference, dtype=np.float64).sum())
    noise = float(np.square(reference.astype(np.float64) - measured).sum())
    if noise == 0.0:
        return PERFECT_DB
    if signal == 0.0:
        return -PERFECT_DB
    return float(np.clip(10.0 * math.log10(signal / noise), -PERFECT_DB, PERFECT_DB))


def torch_outputs(module: torch.nn.Module, batches: Sequence[Batch]) -> list[np.ndarray]:
    """First output of `module` on every batch, float32."""
    outputs = []
    with torch.inference_mode():
        for batch in batches:
            result = module(*batch)
            outputs.append((result[0] if isinstance(result, tuple) else result).float().numpy())
    return outputs


def engine_sqnr_db(
    engine: Engine, names: Sequence[str], output: str, batches: Sequence[Batch], references: Sequence[np.ndarray]
) -> float:
    """SQNR of one engine output over all batches together, in dB."""
    measured = [
        engine.run({name: tensor.numpy() for name, tensor in zip(names, batch, strict=True)})[output]
        for batch in batches
    ]
    return sqnr_db(np.concatenate(references), np.concatenate(measured))
