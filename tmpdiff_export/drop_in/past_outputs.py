"""The model outputs of a run inside a pipeline, for steps that reuse them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engines.errors import ScheduleError
from engines.floating import weighted_sum
from engines.reuse import REUSES, Terms, taken_whole


class PastOutputs:
    """Raw denoiser outputs of the run so far, whole batches before guidance, as long as a reused step needs them.

    Extrapolation is linear and so is guidance: which comes first does not matter. A pipeline may call its denoiser several
    times a step (FLUX with `true_cfg_scale`): each call extrapolates from the calls at its own place.
    """

    def __init__(self, terms: Sequence[Terms | None]) -> None:
        """
        Args:
            terms: of every step, from `engines.reuse.reuse_terms`.
        """
        self._terms = tuple(terms)
        self._last_use = {j: k for k, found in enumerate(terms) for j, _ in found or ()}
        self._kept: dict[tuple[int, int], NDArray[np.float32]] = {}
        self._step_index, self._call = -1, 0

    def begin_run(self) -> None:
        """Forgets the run so far."""
        self._kept.clear()
        self._step_index, self._call = -1, 0

    def enter(self, step_index: int) -> None:
        """Notes that the denoiser is called at a step; where steps were left out, another run has begun."""
        if step_index == self._step_index:
            self._call += 1
            return
        if step_index != self._step_index + 1:
            self.begin_run()
        self._step_index, self._call = step_index, 0
        for key in [key for key in self._kept if self._last_use[key[0]] < step_index]:
            del self._kept[key]

    def add(self, output: NDArray[np.float32]) -> None:
        """Keeps a copy of what an engine returned for the call that was entered, [B, C, h, w], if a later step needs it."""
        if self._step_index in self._last_use:
            self._kept[self._step_index, self._call] = output.copy()

    def reused(self, batch: int, *, rescaled: bool) -> NDArray[np.float32]:
        """The output of the call that was entered, at a reused step: float32 [B, C, h, w], not to be written to.

        Args:
            batch: B of the call.
            rescaled: whether the pipeline rescales its guidance.

        Raises:
            ScheduleError: this run has not computed what the step reuses, or for another batch, or the pipeline makes more
                of outputs than a sum.
        """
        terms = self._terms[self._step_index]
        assert terms is not None
        steps = ("step index " if len(terms) == 1 else "step indices ") + ", ".join(str(j) for j, _ in terms)
        named = f"step index {self._step_index} of the attached schedule reuses the output of {steps}"
        otherwise = "or attach a schedule without reused steps"
        if rescaled and not taken_whole(terms):
            raise ScheduleError(
                f"{named}, which the pipeline's guidance_rescale does not keep a line or parabola through; call the pipeline "
                f"without guidance_rescale, attach a schedule that reuses with {REUSES[0]} only, {otherwise}"
            )
        kept = [(self._kept.get((j, self._call)), weight) for j, weight in terms]
        found = [(values, weight) for values, weight in kept if values is not None]
        if len(found) < len(kept):
            raise ScheduleError(
                f"{named}, which this run has not computed in as many denoiser calls; begin the run at an earlier step, {otherwise}"
            )
        sizes = [len(values) for values, _ in found]
        if set(sizes) != {batch}:
            raise ScheduleError(
                f"{named}, made for batches of {', '.join(map(str, sizes))}, and is called with a batch of {batch}; keep guidance and "
                f"the number of pictures as they are during a run, {otherwise}"
            )
        return found[0][0] if taken_whole(terms) else weighted_sum(found)
