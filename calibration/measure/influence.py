"""How much each model output counts in the final latents, from the sampler table alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engines.reuse import reuse_terms
from engines.sampler import SamplerTable


def output_influence(table: SamplerTable, choices: Sequence[str] | None = None) -> np.ndarray:
    """The factor with which each computed model output enters the final latents, all others held fixed: dx_T / dm_j.

    A step that reuses outputs hands its own factor on to those that it is extrapolated from, each times its weight.

    Args:
        table: the sampler.
        choices: of a schedule, one per step; None: every step is computed.

    Returns:
        float64 [T], 0 for reused steps.

    Raises:
        ScheduleError: a reused step has too few computed outputs before it.
    """
    num_steps = table.num_steps
    # dx_T / dx_k, from the last row backwards
    of_sample = np.zeros(num_steps + 1)
    of_sample[num_steps] = 1.0
    found = np.zeros(num_steps)
    for k in reversed(range(num_steps)):
        for j, coefficient in table.rows[k].outputs:
            found[j] += of_sample[k + 1] * coefficient
        for j, coefficient in table.rows[k].samples:
            of_sample[j] += of_sample[k + 1] * coefficient
    if choices is not None:
        for k, terms in enumerate(reuse_terms(table.timesteps.tolist(), choices)):
            if terms is not None:
                for j, weight in terms:
                    found[j] += found[k] * weight
                found[k] = 0.0
    return found
