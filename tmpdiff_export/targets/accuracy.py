"""SQNR of an engine against FP32 torch on real inputs.

A denoiser's output counts for as much as its loop step moves the latents with it. Flow matching shows why: at a last
sigma of 0.009 the flow is the little noise that is left, divided by 0.009, so that rounding nothing but the latents to
BF16 leaves that call 20 to 30 dB; the step then multiplies the error by 0.009. Unweighed, that one call would decide
the SQNR of an engine whose pictures are as good.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from engines.engine import Engine
from engines.sampler import SamplerTable
from tmpdiff_export.devices import CPU, Batch, on
from tmpdiff_export.weights.files import places, write_tensors
from tmpdiff_export.weights.streamed import Read, streamed

# What identical outputs count as, so that every figure is a finite number.
PERFECT_DB = 200.0
# Names of what a check has beside its inputs, in its file; no input of an engine is called so.
_REFERENCE, _WEIGHTS = "~reference", "~weights"


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


def step_sizes(table: SamplerTable) -> np.ndarray:
    """How far a unit of the denoiser's output moves the latents at every loop step, float64 [T].

    In units of the denoiser's input: schedulers differ in how they scale the latents.
    """
    return np.abs(table.own_coefficients()) * table.input_scale


def torch_outputs(module: torch.nn.Module, read: Read, batches: Sequence[Batch], device: str = CPU) -> list[np.ndarray]:
    """First output of a hollow module, whose weights are `read` and which runs on `device`, on every batch, float32."""
    outputs = []
    with torch.inference_mode(), streamed(module, read, device):
        for batch in batches:
            result = module(*on(batch, device))
            outputs.append((result[0] if isinstance(result, tuple) else result).float().cpu().numpy())
    return outputs


@dataclass(frozen=True)
class AccuracyCheck:
    """Real inputs and what FP32 torch makes of them.

    Attributes:
        names: engine input names in the order of each batch.
        output: the engine output that is compared.
        batches: inputs that range calibration has not seen.
        references: float32 torch outputs, one per batch.
        weights: what the rows of every batch count for (`step_sizes`), None where all count alike.
    """

    names: tuple[str, ...]
    output: str
    batches: tuple[Batch, ...]
    references: tuple[np.ndarray, ...]
    weights: tuple[np.ndarray, ...] | None = None

    def save(self, path: Path) -> None:
        """Writes everything to a safetensors file."""
        tensors = {}
        for index, (batch, reference) in enumerate(zip(self.batches, self.references, strict=True)):
            tensors.update({f"{index}.{name}": item for name, item in zip(self.names, batch, strict=True)})
            tensors[f"{index}.{_REFERENCE}"] = torch.from_numpy(reference)
            if self.weights is not None:
                tensors[f"{index}.{_WEIGHTS}"] = torch.from_numpy(self.weights[index])
        write_tensors(path, tensors)

    @classmethod
    def load(cls, path: Path, names: Sequence[str], output: str) -> AccuracyCheck:
        """What `save` wrote of a check with these names.

        Raises:
            OSError: it cannot be read.
        """
        tensors = {name: place.read() for name, place in places(path).items()}
        count = len({name.partition(".")[0] for name in tensors})
        weights = [tensors.get(f"{index}.{_WEIGHTS}") for index in range(count)]
        return cls(
            tuple(names),
            output,
            tuple(tuple(tensors[f"{index}.{name}"] for name in names) for index in range(count)),
            tuple(tensors[f"{index}.{_REFERENCE}"].numpy() for index in range(count)),
            tuple(item.numpy() for item in weights if item is not None) or None,
        )

    def sqnr_db(self, engine: Engine, batch_size: int | None = None) -> float:
        """SQNR of the engine over all batches together, in dB.

        Args:
            engine: takes and returns the batch on axis 0 of every array.
            batch_size: regroup the samples to engine calls of this size, None for the batches as they are; what
                is missing in the last one is filled with its last sample.
        """
        weights = self.weights or tuple(np.ones(len(item), np.float32) for item in self.references)
        alike: dict[tuple[tuple[int, ...], ...], list[int]] = {}  # by picture size, which calls cannot have two of
        for index, batch in enumerate(self.batches):
            alike.setdefault(tuple(tuple(item.shape[1:]) for item in batch), []).append(index)
        expected, found = [], []
        for indices in alike.values():
            arrays = [[tensor.numpy() for tensor in self.batches[index]] for index in indices]
            if batch_size is not None:
                arrays = _regrouped(arrays, batch_size)
            measured = [engine.run(dict(zip(self.names, batch, strict=True)))[self.output] for batch in arrays]
            wanted = np.concatenate([self.references[index] for index in indices])
            factors = np.concatenate([weights[index] for index in indices]).reshape(-1, *[1] * (wanted.ndim - 1))
            expected.append((wanted * factors).ravel())
            found.append((np.concatenate(measured)[: len(wanted)] * factors).ravel())
        return sqnr_db(np.concatenate(expected), np.concatenate(found))


def _regrouped(batches: Sequence[Sequence[np.ndarray]], size: int) -> list[list[np.ndarray]]:
    whole = [np.concatenate(arrays) for arrays in zip(*batches, strict=True)]
    short = -len(whole[0]) % size
    whole = [np.concatenate([array, np.repeat(array[-1:], short, axis=0)]) for array in whole]
    return [[array[start : start + size] for array in whole] for start in range(0, len(whole[0]), size)]
