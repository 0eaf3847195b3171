"""What calibration needs from a model, and the counting of denoiser calls."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

State = Any
"""Everything the loop carries from one step to the next; opaque here, immutable, safe to keep and reuse."""


class Evaluator(Protocol):
    """A denoising loop over fixed samples (prompt and starting noise) that can be entered at any step.

    `step` is deterministic: the same state and precision give the same next state, bit for bit. The
    resumption of an interrupted calibration and the reuse of shared prefixes rest on it.

    Attributes:
        num_steps: T, the number of loop iterations.
        precisions: every built precision, the reference first.
        num_samples: samples 0..num_samples-1 can be asked for.
    """

    @property
    def num_steps(self) -> int: ...

    @property
    def precisions(self) -> tuple[str, ...]: ...

    @property
    def num_samples(self) -> int: ...

    def start(self, sample: int) -> State:
        """The state before step 0."""
        ...

    def step(self, sample: int, state: State, precision: str) -> State:
        """The state after one more step: one denoiser call (with guidance, one batch of 2)."""
        ...

    def latents(self, state: State) -> np.ndarray:
        """Latents of a state, float32 [C, H, W] (any shape, without a batch axis)."""
        ...

    def key(self) -> str:
        """Digest of everything that shapes a measurement: bundle, prompts, seeds, guidance scale."""
        ...


class CountingEvaluator:
    """An evaluator that counts the denoiser calls of another one, per precision.

    Attributes:
        spent: calls that belong to a measurement.
        recomputed: calls inside `aside`, which repeat what an earlier, interrupted run had already done.
    """

    def __init__(self, inner: Evaluator) -> None:
        self.inner = inner
        self.num_steps = inner.num_steps
        self.precisions = inner.precisions
        self.num_samples = inner.num_samples
        self.spent: Counter[str] = Counter()
        self.recomputed: Counter[str] = Counter()
        self._current = self.spent

    def start(self, sample: int) -> State:
        return self.inner.start(sample)

    def step(self, sample: int, state: State, precision: str) -> State:
        after = self.inner.step(sample, state, precision)
        self._current[precision] += 1
        return after

    def latents(self, state: State) -> np.ndarray:
        return self.inner.latents(state)

    def key(self) -> str:
        return self.inner.key()

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Counts the calls of the block as recomputed."""
        previous, self._current = self._current, self.recomputed
        try:
            yield
        finally:
            self._current = previous
