"""Where a trajectory stands between two loop iterations, for one sample or several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

History = tuple[tuple[int, NDArray[np.float32]], ...]
"""Arrays kept from earlier loop iterations: (step index j, array) in ascending order of j."""


@dataclass(frozen=True, eq=False)
class SamplerState:
    """Where a trajectory stands before loop iteration `step_index`; an immutable value.

    Attributes:
        step_index: k, 0..T; T means that the trajectory is finished.
        latents: x_k, float32 [..., C, H, W], read-only.
        past_samples: the x_j, j < k, that this or a later iteration needs; read-only arrays.
        past_outputs: the m_j, j < k, that this or a later iteration needs; read-only arrays.
        computed: the last m_j, j < k, at distinct timesteps that an engine computed, for steps that reuse them: at most as
            many as `SamplerTable.advance` was asked to keep; read-only arrays.
    """

    step_index: int
    latents: NDArray[np.float32]
    past_samples: History = ()
    past_outputs: History = ()
    computed: History = ()


def stacked(states: Sequence[SamplerState]) -> SamplerState:
    """States [N_k, C, H, W] of one table at one step, as one state of sum(N_k) samples.

    Raises:
        ValueError: they stand at different steps, or keep the computed outputs of different ones.
    """
    first = states[0]
    if any(state.step_index != first.step_index for state in states):
        raise ValueError(f"states stand at steps {[state.step_index for state in states]}, expected all at one step")
    kept = [[j for j, _ in state.computed] for state in states]
    if any(indices != kept[0] for indices in kept):
        raise ValueError(f"states keep the computed outputs of steps {kept}, expected the same steps in all")
    return SamplerState(
        first.step_index,
        _joined([state.latents for state in states]),
        *(
            tuple((j, _joined([dict(getattr(state, name))[j] for state in states])) for j, _ in getattr(first, name))
            for name in ("past_samples", "past_outputs", "computed")
        ),
    )


def row_of(state: SamplerState, row: int) -> SamplerState:
    """One sample of a state [N, C, H, W], as a state of its own; its arrays are views of the state's."""
    rows = slice(row, row + 1)
    return SamplerState(
        state.step_index,
        state.latents[rows],
        *(
            tuple((j, values[rows]) for j, values in history)
            for history in (state.past_samples, state.past_outputs, state.computed)
        ),
    )


def _joined(arrays: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    joined = np.concatenate(arrays)
    joined.setflags(write=False)
    return joined
