"""How much of a denoiser is quantized, against torch's own count of operations."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from engines.manifest import CoverageEntry
from engines.precision import Precision
from tmpdiff_export.pipelines.families.family import DENOISER
from tmpdiff_export.pipelines.families.table import DENOISERS
from tmpdiff_export.quantization.coverage import coverage, multiply_adds, warning
from tmpdiff_export.quantization.ranges import quantizable_layers
from tmpdiff_export.quantization.recipes import RECIPES
from tools.acceptance.miniatures import miniature


def covered(quantized: int, layers: int, share: float) -> CoverageEntry:
    return CoverageEntry(quantized_layers=quantized, layers=layers, quantized_share=share)


class Planted(torch.nn.Module):
    """One layer of each kind, and one that is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = torch.nn.Linear(8, 4)
        self.grouped = torch.nn.Conv2d(4, 6, 3, padding=1, stride=2, groups=2)
        self.twice = torch.nn.Linear(6, 6, bias=False)
        self.idle = torch.nn.Linear(1000, 1000)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        grouped = self.grouped(self.rows(latents).movedim(-1, 1))
        return self.twice(self.twice(grouped.movedim(1, -1)))


def test_multiply_adds_are_weights_times_rows_or_positions() -> None:
    counts = multiply_adds(Planted(), (torch.zeros(3, 10, 12, 8),))
    places = 3 * 5 * 6
    assert counts == {
        "rows": 3 * 10 * 12 * 8 * 4,
        "grouped": places * 6 * (4 // 2) * 9,
        "twice": 2 * places * 36,
        "idle": 0,
    }
    found = coverage(counts, {"twice", "idle", "of another model"})
    assert found == covered(2, 4, counts["twice"] / sum(counts.values()))


@pytest.mark.parametrize("key", DENOISERS)
def test_every_family_is_counted_without_computing_and_as_torch_counts(key: str) -> None:
    small = miniature(key)
    module, batch = small.wrap().eval(), small.batches(2, 0)[0]
    before = {name: item.clone() for name, item in module.state_dict().items()}
    counts = multiply_adds(module, batch)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*batch)
    theirs = {name: sum(flops.values()) for name, flops in counter.get_flop_counts().items()}
    assert {name: 2 * count for name, count in counts.items()} == {
        name: theirs[f"{type(module).__name__}.{name}"] for name in counts
    }
    assert all(torch.equal(item, before[name]) for name, item in module.state_dict().items())
    assert not any(part._forward_hooks for part in module.modules())
    layers = quantizable_layers(module, DENOISER, RECIPES[Precision.INT8])
    found = coverage(counts, layers)
    assert found.quantized_layers == len(layers) < found.layers
    assert 0 < found.quantized_share < 1


@pytest.mark.parametrize(("share", "warned"), [(0.0, True), (0.49, True), (0.5, False), (1.0, False)])
def test_less_than_half_is_warned_of_in_one_line(share: float, warned: bool) -> None:
    said = warning("int4", covered(1, 40, share))
    assert (said is not None) == warned
    if said is not None:
        assert said.startswith(f"int4: only 1 of 40 layers are quantized, with {share:.0%} of the multiply-adds")
        assert "\n" not in said


def test_an_engine_of_no_layers_has_no_share() -> None:
    assert coverage({}, ()) == covered(0, 0, 0.0)
