"""The demo's pictures: one prompt a row, one schedule a column."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from calibration.measure.bundle_evaluator import VALIDATION_SEED_OFFSET
from engines.files import atomic_write_bytes
from engines.pictures import write_pictures
from engines.precision import REFERENCE
from engines.runtime import DenoiseRuntime

SCHEDULE = "schedule"
SHEET_NAME = "side_by_side.png"


class Gallery:
    """Validation prompts, drawn by a bundle from the noise they are measured with. Each picture is drawn once.

    Attributes:
        prompts: one a row.
        seeds: of their starting noise.
        drawn: pictures, uint8 [H, W, 3], by (index of the prompt, precision or "schedule").
    """

    def __init__(self, bundle: Path, folder: Path, prompts: Sequence[str], seed: int) -> None:
        """
        Args:
            bundle: bundle folder; calibrated by the time its schedule is asked for.
            folder: where pictures go.
            prompts: the first of the validation prompts.
            seed: that of the calibration.
        """
        self.prompts = tuple(prompts)
        self.seeds = tuple(seed + VALIDATION_SEED_OFFSET + index for index in range(len(prompts)))
        self.drawn: dict[tuple[int, str], np.ndarray] = {}
        self._bundle = bundle
        self._folder = folder

    def path(self, index: int, name: str) -> Path:
        """The file of a picture."""
        return self._folder / f"{index}-{name}.png"

    @property
    def sheet_path(self) -> Path:
        """The file of the pictures side by side."""
        return self._folder / SHEET_NAME

    def draw(self, names: Sequence[str], count: int, report: Callable[[str, int, int], None]) -> None:
        """Draws what is not drawn yet of the first `count` prompts.

        Args:
            names: precisions, for uniform schedules, and "schedule".
            count: prompts.
            report: called with (stage, done, total).
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        missing = [(index, name) for index in range(count) for name in names if (index, name) not in self.drawn]
        with DenoiseRuntime.load(self._bundle) as runtime:
            for done, (index, name) in enumerate(missing):
                report("pictures", done, len(missing))
                schedule = runtime.bundle.schedule(runtime.setting, None if name == SCHEDULE else f"uniform:{name}")
                pictures = runtime.generate([self.prompts[index]], [self.seeds[index]], schedule)
                write_pictures([self.path(index, name)], pictures)
                self.drawn[index, name] = pictures[0]
        report("pictures", len(missing), len(missing))

    def files(self) -> list[str]:
        """Names of the files in its folder, by prompt, the sheet last."""
        return [
            *(self.path(index, name).name for index, name in sorted(self.drawn, key=lambda key: key[0])),
            SHEET_NAME,
        ]

    def write_sheet(self, names: Sequence[str]) -> None:
        """Writes all prompts side by side, a column per name; all of them are drawn."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        rows, columns = len(self.prompts), len(names)
        figure, axes = pyplot.subplots(rows, columns, figsize=(1.9 * columns, 2.1 * rows), squeeze=False)
        for row, prompt in enumerate(self.prompts):
            for axis, name in zip(axes[row], names, strict=True):
                axis.imshow(self.drawn[row, name])
                axis.set_axis_off()
                if row == 0:
                    plain = name in (REFERENCE.value, SCHEDULE)
                    axis.set_title(name if plain else f"uniform {name}", fontsize=10)
            axes[row][0].annotate(
                prompt, (0, -0.06), xycoords="axes fraction", fontsize=7, va="top", annotation_clip=False
            )
        figure.subplots_adjust(left=0, right=1, bottom=0.02, top=0.96, wspace=0.03, hspace=0.14)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=100, bbox_inches="tight", pad_inches=0.05)
        pyplot.close(figure)
        atomic_write_bytes(self.sheet_path, buffer.getvalue())
