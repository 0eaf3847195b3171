"""FP32 runs on another device: what they leave of the weights."""

from __future__ import annotations

import torch

from tmpdiff_export.devices import placed


class Part:
    """Stands for a module; notes in which mode it was moved."""

    def __init__(self) -> None:
        self.moves: list[tuple[str, bool]] = []

    def to(self, device: str) -> None:
        self.moves.append((device, torch.is_inference_mode_enabled()))


def test_weights_are_moved_outside_of_inference_mode() -> None:
    """Inside, `to` would make inference tensors of them, which no export takes afterwards."""
    part = Part()
    with torch.inference_mode(), placed(part, "cuda"):
        assert torch.is_inference_mode_enabled()
    assert part.moves == [("cuda", False), ("cpu", False)]
    with placed(part, "cpu"):
        pass
    assert len(part.moves) == 2, "on the CPU it stays where it is"
