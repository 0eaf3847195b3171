"""Which step of a bundle's loop a timestep belongs to, in a loop that somebody else drives."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from engines.errors import ScheduleError
from engines.sampler import SamplerTable


class StepFinder:
    """Finds the step index that belongs to a timestep, in a loop that somebody else drives.

    A timestep names its step index, so it does not matter where a loop starts or whether the last one was
    finished. Some schedulers hand the denoiser one timestep several times (Heun, PNDM, rounded timesteps):
    such a timestep means the first of its step indices that lies behind the last one found, and the first of
    them all where none does, which is a new run. The same timestep once more, after its last step index, is
    the same step again (a pipeline with two denoiser calls a step).
    """

    def __init__(self, table: SamplerTable) -> None:
        self._table = table
        self._last = -1

    def begin_run(self, start: int = 0) -> None:
        """Forgets the run so far; the next one begins at step index `start` or later."""
        self._last = start - 1

    def find(self, timestep: float, timesteps: ArrayLike | None = None) -> tuple[int, bool]:
        """The step index, and whether it is the first of a new run.

        Args:
            timestep: in the scheduler's units.
            timesteps: [T], the table's as that loop hands them over, None for as they are.

        Raises:
            ScheduleError: the table has no such timestep.
        """
        handed = self._table.timesteps if timesteps is None else timesteps
        known = [int(k) for k in np.flatnonzero(close(handed, timestep))]
        if not known:
            raise ScheduleError(
                f"timestep {timestep:g} is none of the {self._table.num_steps} timesteps of the bundle's loop "
                f"({listed(self._table.timesteps)}); {_how_to_call(self._table)}"
            )
        later = [k for k in known if k > self._last]
        again = not later and known[-1] == self._last
        if not again:
            known = later or known
            self._last = known[0]
        return self._last, not later and not again

    def offset(self, timesteps: ArrayLike) -> int:
        """Where a scheduler's timesteps begin in the table.

        Args:
            timesteps: [n], n <= T, of the loop that is about to run.

        Returns:
            The step index of the first one.

        Raises:
            ScheduleError: they are no contiguous part of the table's. A loop of fewer steps may well consist of
                timesteps of the table and yet be another discretization than the schedule was made for.
        """
        part = np.asarray(timesteps, np.float64)
        for start in range(self._table.num_steps - len(part) + 1):
            if close(self._table.timesteps[start : start + len(part)], part).all():
                return start
        raise ScheduleError(
            f"the pipeline's scheduler runs {len(part)} timesteps ({listed(part)}), which are not those of the "
            f"bundle's {self._table.num_steps} steps ({listed(self._table.timesteps)}) nor a contiguous part "
            f"of them; {_how_to_call(self._table)}"
        )


def close(timesteps: ArrayLike, other: ArrayLike) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Equal up to a few float32 roundings."""
    return np.isclose(timesteps, other, rtol=1e-6, atol=1e-6)


def listed(timesteps: ArrayLike) -> str:
    """Timesteps for a message: all of a few, else the first three and the last."""
    values = [f"{value:g}" for value in np.asarray(timesteps)]
    return ", ".join(values if len(values) <= 4 else [*values[:3], "...", values[-1]])


def _how_to_call(table: SamplerTable) -> str:
    return (
        f"call the pipeline with num_inference_steps={table.num_inference_steps} and the {table.scheduler} that the "
        "bundle was built with, or build a bundle with that many steps"
    )
