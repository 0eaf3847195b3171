"""Ranges of a module from batches, as a build finds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from engines.precision import Precision
from tmpdiff_export.bundling.observed import SEARCH_BATCHES, Ranges
from tmpdiff_export.devices import Batch
from tmpdiff_export.quantization.observers import observe
from tmpdiff_export.quantization.ranges import Weight, calibrate_ranges, spread


def found_ranges(
    module: torch.nn.Module, wanted: Mapping[Precision, Sequence[str]], batches: Sequence[Batch], weight: Weight
) -> Ranges:
    """One run over the batches, and one over those of the search where a variant searches."""
    searched = spread(range(len(batches)), SEARCH_BATCHES)

    def run() -> None:
        for batch in batches:
            module(*batch)

    def search() -> None:
        for index in searched:
            module(*batches[index])

    layers = sorted({name for names in wanted.values() for name in names})
    return calibrate_ranges(module, wanted, observe(module, layers, run, searched), search, weight)
