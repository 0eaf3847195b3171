"""Where the device loop keeps latents and model outputs: as few buffers as the sampler table allows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engines.backends.cuda.kernels import TERM
from engines.sampler import SamplerTable


@dataclass(frozen=True)
class HistoryLayout:
    """Slots of a pool of equal buffers, each for one [N, C, h, w] float32 array.

    Attributes:
        samples: slot of x_0..x_T.
        outputs: slot of m_0..m_{T-1}.
        num_slots: size of the pool.
    """

    samples: tuple[int, ...]
    outputs: tuple[int, ...]
    num_slots: int

    @classmethod
    def of(cls, table: SamplerTable) -> HistoryLayout:
        """The layout for a table: an array keeps its slot through the last loop iteration that names it."""
        steps = table.num_steps
        last_sample = [*range(steps), steps]  # x_k feeds the denoiser at k; x_T is the result
        last_output = list(range(steps))
        for k, row in enumerate(table.rows):
            for j, _ in row.samples:
                last_sample[j] = max(last_sample[j], k)
            for j, _ in row.outputs:
                last_output[j] = max(last_output[j], k)
        # x_k is written in iteration k - 1, m_k in iteration k.
        samples = assign_slots([k - 1 for k in range(steps + 1)], last_sample)
        outputs = assign_slots(list(range(steps)), last_output)
        num_samples = max(samples) + 1
        return cls(samples, tuple(num_samples + slot for slot in outputs), num_samples + max(outputs) + 1)


def assign_slots(written: Sequence[int], last_read: Sequence[int]) -> tuple[int, ...]:
    """Slots for values that are written at `written[i]` (ascending) and read up to `last_read[i]`, both included.

    No value gets the slot of one that is read when or after it is written; the number of slots is the least.
    """
    busy_until: list[int] = []
    slots = []
    for begin, end in zip(written, last_read, strict=True):
        slot = next((index for index, until in enumerate(busy_until) if until < begin), len(busy_until))
        if slot == len(busy_until):
            busy_until.append(end)
        else:
            busy_until[slot] = end
        slots.append(slot)
    return tuple(slots)


def term_table(table: SamplerTable, layout: HistoryLayout, slots: Sequence[int]) -> tuple[NDArray[np.void], list[int]]:
    """All rows of a sampler table as the kernels read them, in the order in which numpy sums them.

    Args:
        table: the sampler.
        layout: its layout.
        slots: device address of every slot.

    Returns:
        Terms of all rows one after the other, dtype `TERM`; and where each row begins, with the end (T + 1).
    """
    terms: list[tuple[int, float]] = []
    begins = [0]
    for row in table.rows:
        terms += [(slots[layout.samples[j]], coefficient) for j, coefficient in row.samples]
        terms += [(slots[layout.outputs[j]], coefficient) for j, coefficient in row.outputs]
        begins.append(len(terms))
    return np.array(terms, TERM), begins
