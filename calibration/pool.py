"""Measurements as data that can travel: what one is asked with, what comes back, and who may take it.

Calibration only knows the protocol `Pool`; who implements it, on which processes and devices, is no concern here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Request:
    """One measurement of one sample: the uniform run at `base`, or that run with its last steps at `rest` instead.

    Attributes:
        name: of the measurement, as the journal has it.
        sample: of its set of samples.
        base: a precision.
        rest: precisions of the last len(rest) steps, at most T; empty for the uniform run itself.
        pictures: also compare the decoded pictures, where there is a decoder.
        run: the run in words, for error messages.
    """

    name: str
    sample: int
    base: str
    rest: tuple[str, ...]
    pictures: bool
    run: str


@dataclass(frozen=True)
class Outcome:
    """What a measurement gave.

    Attributes:
        value: errors by name, see `calibration.measurements`.
        calls: denoiser calls that belong to it, per precision.
        recomputed: denoiser calls that repeated what was measured before, because its states were not kept.
    """

    value: dict[str, float]
    calls: Mapping[str, int]
    recomputed: Mapping[str, int]


class Pool(Protocol):
    """Takes measurements of sets of samples (by name: "calibration", "validation"), several at once.

    For every set it has a `calibration.measurements.Measurements` of its own in every worker, and calls
    `Measurements.perform` there. One sample should stay with one worker, which then has its states; a request that
    gets lost with its worker is performed again by another one.
    """

    def submit(self, samples: str, request: Request) -> None:
        """Asks for a measurement; returns at once. Requests of a sample are best performed in the order they came."""
        ...

    def finished(self, samples: str) -> list[tuple[Request, Outcome]]:
        """Waits until some of the measurements asked for are there; each is handed out once.

        Raises:
            TmpDiffError: what `Measurements.perform` raised, or a request cannot be performed by any worker.
        """
        ...

    def forget(self, samples: str, precision: str) -> None:
        """See `Measurements.forget`."""
        ...
