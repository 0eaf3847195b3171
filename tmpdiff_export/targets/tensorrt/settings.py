"""What a build may be asked about TensorRT plans, beyond the options of any build."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engines.backends.tensorrt.options import PlanOptions
from engines.backends.tensorrt.profiles import ShapeRange
from engines.errors import BackendError

BATCH = "batch"


@dataclass(frozen=True)
class PlanSettings:
    """Settings of a TensorRT build.

    Attributes:
        options: builder options.
        batch: pictures at once; the engines' own batches follow from it.
        shapes: sizes of the other symbolic axes of the exported graphs, by symbol.
        cache: folder of finished plans and timing caches, None for the user's cache folder.
    """

    options: PlanOptions = field(default_factory=PlanOptions)
    batch: ShapeRange = field(default_factory=lambda: ShapeRange(1, 1, 4))
    shapes: Mapping[str, ShapeRange] = field(default_factory=dict)
    cache: Path | None = None

    def require_unset(self, backend: str, allowed: Sequence[str] = ()) -> None:
        """Refuses settings that a backend would ignore.

        Args:
            backend: its name.
            allowed: settings that it does not ignore.

        Raises:
            BackendError: naming them.
        """
        default = PlanSettings()
        given = [
            name
            for name, mine, theirs in (
                ("--batch", self.batch, default.batch),
                ("--shape", self.shapes, default.shapes),
                ("--plan-cache", self.cache, default.cache),
                *(
                    (f"--{name.replace('_', '-')}", value, default.options.canonical()[name])
                    for name, value in self.options.canonical().items()
                ),
            )
            if mine != theirs and name not in allowed
        ]
        if given:
            raise BackendError(
                f"{', '.join(given)} are settings of TensorRT plans; backend {backend!r} does not have them"
            )
