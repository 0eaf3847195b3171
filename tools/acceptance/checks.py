"""The check of an engine against a module that is whole in memory, as small ones are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tmpdiff_export.devices import Batch
from tmpdiff_export.targets.accuracy import AccuracyCheck


def check_of(
    module: torch.nn.Module,
    names: Sequence[str],
    output: str,
    batches: Sequence[Batch],
    weights: Sequence[np.ndarray] | None = None,
) -> AccuracyCheck:
    """Runs a module, float32 on the CPU, for the references; arguments as of `AccuracyCheck`."""
    references = []
    with torch.inference_mode():
        for batch in batches:
            result = module(*batch)
            references.append((result[0] if isinstance(result, tuple) else result).float().numpy())
    return AccuracyCheck(
        tuple(names), output, tuple(batches), tuple(references), None if weights is None else tuple(weights)
    )
