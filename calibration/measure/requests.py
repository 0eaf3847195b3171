"""Measurements as data that can travel: what one is asked with, what comes back, and who may take it.

Calibration only knows the protocol `Pool`; who implements it, on which processes and devices, is no concern here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Run = tuple[str, tuple[str, ...], bool, bool, bool, str | None]
"""What requests of different samples have in common that can be performed together."""


@dataclass(frozen=True)
class Request:
    """One measurement of one sample: the uniform run at `base`, or that run with its last steps at `rest` instead.

    Attributes:
        name: of the measurement, as the journal has it.
        sample: of its set of samples.
        base: a precision.
        rest: choices of the last len(rest) steps, at most T, precisions or reuses (`engines.reuse`); empty for the uniform
            run itself.
        pictures: also compare the decoded pictures, where there is a decoder.
        run: the run in words, for error messages.
        vector: also keep the direction of the error of its final latents.
        nudged: starts from `Evaluator.start(sample, nudged=True)`; `rest` is then the whole run.
        shorter: the loop of fewer steps that runs instead, as `Evaluator.shorter` takes it; `rest` is then its whole run.
    """

    name: str
    sample: int
    base: str
    rest: tuple[str, ...]
    pictures: bool
    run: str
    vector: bool = False
    nudged: bool = False
    shorter: str | None = None

    @property
    def of_run(self) -> Run:
        """Its run, whatever the sample."""
        return self.base, self.rest, self.pictures, self.vector, self.nudged, self.shorter


@dataclass(frozen=True)
class Outcome:
    """What a measurement gave.

    Attributes:
        value: errors by name, see `calibration.measure.measurements`; where a vector was asked for also "direction", the
            text of its sketch (`calibration.measure.sketch`).
        calls: denoiser calls that belong to it, per precision.
        recomputed: denoiser calls that repeated what was measured before, because its states were not kept.
    """

    value: dict[str, Any]
    calls: Mapping[str, int]
    recomputed: Mapping[str, int]


class Samples(Protocol):
    """Sets of samples (by name: "calibration", "validation") as one process has them, with the states of their runs."""

    def perform(self, samples: str, requests: Sequence[Request]) -> list[Outcome]:
        """Takes measurements here and now.

        Args:
            samples: name of the set.
            requests: of one run (`Request.of_run`) and different samples.

        Raises:
            TmpDiffError: a run gave latents that are not finite.
        """
        ...

    def forget(self, samples: str, precision: str) -> None:
        """Frees the states of a precision that is no longer needed."""
        ...


class Pool(Protocol):
    """Takes measurements of sets of samples, several at once.

    Every worker of it has `Samples` of its own. One sample should stay with one worker, which then has its states; a
    request that gets lost with its worker is performed again by another one.
    """

    def submit(self, samples: str, request: Request) -> None:
        """Asks for a measurement; returns at once. Requests of a sample are best performed in the order they came."""
        ...

    def finished(self, samples: str) -> list[tuple[Request, Outcome]]:
        """Waits until some of the measurements asked for are there; each is handed out once.

        Raises:
            TmpDiffError: what `Samples.perform` raised, or a request cannot be performed by any worker.
        """
        ...

    def forget(self, samples: str, precision: str) -> None:
        """`Samples.forget`, in every worker."""
        ...
