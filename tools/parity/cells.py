"""Which combinations are tried: each axis alone around the default, and random ones."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from tools.parity.families import ParityFamily

COMBINED = "combined"
DEFAULT = "default"
# In place of "plain": what attached pipelines read themselves, over few prompts.
ATTACHED_PROMPTS = ("plain", "exclamation", "long", "emoji")


@dataclass(frozen=True)
class Cell:
    """One call of a pipeline; what the values mean is said by `ParityFamily`.

    Attributes:
        size: (height, width) in pixels.
        text_length: or None where it cannot vary.
        scheduler: key in the family's.
        steps: `num_inference_steps`.
        prompt: key in `ODD_PROMPTS`.
        negative: key in `NEGATIVES`.
        guidance_scale: None for the pipeline's own.
        guidance_rescale: 0 for none.
        clip_skip: None for what the pipeline does.
        batch: pictures; the second has another prompt, negative prompt and seed.
        attached: whether the bundle runs inside the pipeline.
    """

    size: tuple[int, int]
    text_length: int | None
    scheduler: str
    steps: int
    prompt: str
    negative: str
    guidance_scale: float | None
    guidance_rescale: float
    clip_skip: int | None
    batch: int
    attached: bool

    @classmethod
    def default(cls, family: ParityFamily) -> Cell:
        """The first value of every axis."""
        return cls(**{axis: values[0] for axis, values in family.axes.items()})


def cells(family: ParityFamily, *, combined: int, seed: str) -> Iterator[tuple[str, Cell]]:
    """What is tried of a family, with the axis that differs from the default.

    Args:
        family: with its axes.
        combined: how many random combinations of all axes are added.
        seed: of these.
    """
    default = Cell.default(family)
    yield DEFAULT, default
    for axis, values in family.axes.items():
        if axis == "attached":
            for prompt in ATTACHED_PROMPTS:
                yield axis, replace(default, attached=True, prompt=prompt)
            continue
        for value in values[1:]:
            changed: dict[str, Any] = {axis: value}
            yield axis, replace(default, **changed)
    chosen = random.Random(seed)
    for _ in range(combined):
        yield COMBINED, Cell(**{axis: chosen.choice(values) for axis, values in family.axes.items()})
