"""Distances of pictures, measured by other processes meanwhile."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from calibration.measure.metrics import picture_ssim
from tools.experiments.lpips import lpips, read_weights

_weights: dict[str, torch.Tensor] | None = None


def _begin(path: Path | None) -> None:
    global _weights
    torch.set_num_threads(1)
    _weights = None if path is None else read_weights(path)


def _compare(picture: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    found = {"ssim": picture_ssim(picture, reference)}
    return found if _weights is None else found | {"lpips": lpips(_weights, picture, reference)}


class Comparison:
    """A pool of processes that compare pictures."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool

    def begin(self, pictures: np.ndarray, references: np.ndarray) -> list[Future[dict[str, float]]]:
        """Compares uint8 [N, H, W, 3] one by one; "ssim", and "lpips" if there are weights."""
        return [self._pool.submit(_compare, a, b) for a, b in zip(pictures, references, strict=True)]


@contextmanager
def comparison(weights: Path | None, workers: int) -> Iterator[Comparison]:
    """The pool; `weights` as `tools.experiments.fetch_lpips` writes them."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(weights,)) as pool:
        yield Comparison(pool)
