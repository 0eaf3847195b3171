"""Where the device loop keeps latents and model outputs: as few buffers as the sampler table allows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engines.backends.cuda.kernels import TERM
from engines.reuse import Terms, taken_whole
from engines.sampler import SamplerTable


@dataclass(frozen=True)
class HistoryLayout:
    """Slots of a pool of equal buffers, each for one [N, C, h, w] float32 array.

    Attributes:
        samples: slot of x_0..x_T.
        outputs: slot of m_0..m_{T-1}. A reused step that takes a computed output as it is has that one's slot.
        num_slots: size of the pool.
    """

    samples: tuple[int, ...]
    outputs: tuple[int, ...]
    num_slots: int

    @classmethod
    def of(cls, table: SamplerTable, reused: Sequence[Terms | None]) -> HistoryLayout:
        """The layout for a table: an array keeps its slot through the last loop iteration that names it.

        Args:
            table: the sampler.
            reused: of every step, from `engines.reuse.reuse_terms`.
        """
        steps = table.num_steps
        last_sample = [*range(steps), steps]  # x_k feeds the denoiser at k; x_T is the result
        last_output = list(range(steps))
        for k, row in enumerate(table.rows):
            for j, _ in row.samples:
                last_sample[j] = max(last_sample[j], k)
            for j, _ in row.outputs:
                last_output[j] = max(last_output[j], k)
        taken = {k: terms[0][0] for k, terms in enumerate(reused) if terms is not None and taken_whole(terms)}
        for k, terms in enumerate(reused):
            for j, _ in terms or ():
                last_output[j] = max(last_output[j], last_output[k] if k in taken else k)
        # x_k is written in iteration k - 1, m_k in iteration k.
        samples = assign_slots([k - 1 for k in range(steps + 1)], last_sample)
        written = [k for k in range(steps) if k not in taken]
        outputs = dict(zip(written, assign_slots(written, [last_output[k] for k in written]), strict=True))
        num_samples = max(samples) + 1
        return cls(
            samples,
            tuple(num_samples + outputs[taken.get(k, k)] for k in range(steps)),
            num_samples + max(outputs.values()) + 1,
        )


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


def term_table(
    table: SamplerTable, reused: Sequence[Terms | None], layout: HistoryLayout, slots: Sequence[int]
) -> tuple[NDArray[np.void], list[range], list[range]]:
    """All sums of a loop as the kernels read them, in the order in which numpy sums them.

    Args:
        table: the sampler.
        reused: of every step, from `engines.reuse.reuse_terms`.
        layout: of both.
        slots: device address of every slot.

    Returns:
        Terms of all sums, dtype `TERM`; which of them make each x_{k+1}; and which make each m_k, none where an engine
        computes it or where it is a computed output as it is.
    """
    terms: list[tuple[int, float]] = []

    def added(samples: Terms, outputs: Terms) -> range:
        begin = len(terms)
        terms.extend((slots[layout.samples[j]], coefficient) for j, coefficient in samples)
        terms.extend((slots[layout.outputs[j]], coefficient) for j, coefficient in outputs)
        return range(begin, len(terms))

    rows = [added(row.samples, row.outputs) for row in table.rows]
    sums = [added((), () if found is None or taken_whole(found) else found) for found in reused]
    return np.array(terms, TERM), rows, sums
