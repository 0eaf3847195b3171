"""What calibration needs from a model: a loop over samples that can be entered at any step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from calibration.measure.metrics import picture_errors

State = Any
"""Everything the loop carries from one step to the next; opaque here, immutable, safe to keep and reuse."""

Decode = Callable[[np.ndarray], np.ndarray]
"""Final latents float32 [N, C, H, W] -> pictures uint8 [N, H, W, 3]."""

Compare = Callable[[np.ndarray, np.ndarray], dict[str, float]]
"""Errors by name of a picture and the reference's, uint8 [H, W, 3]."""


class Evaluator(Protocol):
    """A denoising loop over fixed samples (prompt and starting noise) that can be entered at any step.

    `steps` is deterministic: the same samples, states and choice give the same next states, bit for bit. The
    resumption of an interrupted calibration and the reuse of shared prefixes rest on it.

    What reuse is calibrated with (`timesteps`, `influence`, `shorter`) is asked for only then.

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

    def start(self, sample: int, nudged: bool = False) -> State:
        """The state before step 0.

        Args:
            sample: which one.
            nudged: changes it by a relative 2^-16 or so, the same change every time: how far the reference run then
                ends from itself is what its own rounding does.
        """
        ...

    def steps(self, samples: Sequence[int], states: Sequence[State], choice: str) -> list[State]:
        """The state of every sample after one more step, all at the same one: one denoiser call for all of them.

        Counted as a call per sample; with guidance it is a batch of twice as many. A reuse (`engines.reuse`) is no call.
        """
        ...

    def latents(self, state: State) -> np.ndarray:
        """Latents of a state, float32 [C, H, W] (any shape, without a batch axis)."""
        ...

    def timesteps(self) -> list[float]:
        """Where the model outputs of the T steps lie, in any units: what reused steps are extrapolated over."""
        ...

    def influence(self, choices: Sequence[str]) -> np.ndarray:
        """dx_T / dm_j of every computed model output, the others held fixed: float64 [T], 0 for reused steps.

        Args:
            choices: precisions and reuses of a schedule.
        """
        ...

    def shorter(self, loop: str) -> Evaluator:
        """The same samples in a loop of fewer steps.

        Args:
            loop: as `SampleSets.shorter` gives it.
        """
        ...

    def key(self) -> str:
        """Digest of everything that shapes a measurement: bundle, prompts, seeds, guidance scale."""
        ...


@dataclass(frozen=True)
class SampleSet:
    """Samples to measure on.

    Attributes:
        evaluator: their loop.
        decode: of their final latents; None where no pictures are compared.
        compare: decoded pictures; a journal holds the errors of one way to compare only.
    """

    evaluator: Evaluator
    decode: Decode | None = None
    compare: Compare = picture_errors


@dataclass(frozen=True)
class ShorterLoop:
    """A loop of fewer steps, as data that can travel.

    Attributes:
        loop: what `Evaluator.shorter` takes.
        num_steps: its T.
    """

    loop: str
    num_steps: int


@dataclass(frozen=True)
class SampleSets:
    """What a calibration measures on.

    Attributes:
        calibration: the samples that scores are measured and schedules chosen on.
        validation: others, of the same steps and precisions, which only judge; with a decoder where SSIM and PSNR are
            wanted. None: no schedule is validated.
        shorter: gives a loop of at most so many steps, which reuse has to beat; it raises `TmpDiffError` where there is
            none. None: no such loop is compared.
    """

    calibration: SampleSet
    validation: SampleSet | None = None
    shorter: Callable[[int], ShorterLoop] | None = None

    @property
    def evaluators(self) -> tuple[Evaluator, Evaluator | None]:
        """Those of the calibration and the validation samples."""
        return self.calibration.evaluator, self.validation.evaluator if self.validation else None

    def named(self) -> dict[str, SampleSet]:
        """The sets by name, as pools and journals have them."""
        sets = {"calibration": self.calibration, "validation": self.validation}
        return {name: samples for name, samples in sets.items() if samples}
