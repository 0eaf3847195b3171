"""A schedule: which precision each step of the denoising loop runs at, and which steps reuse what others computed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from engines.documents import one_line, read_document, write_document
from engines.errors import ScheduleError
from engines.reuse import REUSES, engines_of, reused_steps
from engines.setting_entry import SettingEntry

SCHEDULE_VERSION: Final = 3  # 1 names no setting, 2 reuses nothing


class Schedule(BaseModel):
    """One choice per step index, bound to the bundle it was made for.

    Attributes:
        bundle_id: `Manifest.bundle_id` of the bundle the schedule belongs to.
        setting: name of the setting in the bundle; None in schedules of earlier releases, whose bundles have one.
        precisions: one choice per step index, length T: the precision of the engine that runs, or one of
            `engines.reuse.REUSES`, which runs none.
        origin: how it came about, for a reader ("bisection, --high-steps 8", "uniform:fp16").
        predicted_error: predicted E of the final latents, None where nothing was predicted.
        predicted_latency: mean step latency relative to the reference, None where not measured.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1, 2, 3] = SCHEDULE_VERSION
    bundle_id: str = Field(min_length=1)
    setting: str | None = None
    precisions: tuple[str, ...] = Field(min_length=1)
    origin: str
    predicted_error: float | None = Field(default=None, ge=0)
    predicted_latency: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _names_are_words(self) -> Schedule:
        for name in self.precisions:
            if not name.isalnum():
                raise ValueError(f"precision name {name!r} is not a plain word")
        return self

    @property
    def num_steps(self) -> int:
        """T, the number of loop iterations."""
        return len(self.precisions)

    @property
    def reused(self) -> tuple[int, ...]:
        """Step indices whose model output is not computed."""
        return reused_steps(self.precisions)

    @classmethod
    def uniform(cls, bundle_id: str, setting: SettingEntry, precision: str) -> Schedule:
        """Every step of a setting at one precision."""
        return cls(
            bundle_id=bundle_id,
            setting=setting.name,
            precisions=(precision,) * setting.num_steps,
            origin=f"uniform:{precision}",
        )

    @classmethod
    def load(cls, path: Path) -> Schedule:
        """Reads a schedule document.

        Raises:
            ScheduleError: the file is missing, not a schedule, altered, or of a newer version.
        """
        data = read_document(path, "schedule", SCHEDULE_VERSION, ScheduleError, oldest=1)
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ScheduleError(f"schedule {path} is malformed: {one_line(error)}") from error

    def save(self, path: Path) -> None:
        """Writes the document atomically."""
        write_document(path, self.model_dump(mode="json"))

    def check(self, *, bundle_id: str, setting: SettingEntry, precisions: Sequence[str]) -> None:
        """Refuses a schedule that does not fit a setting of a bundle.

        Whether enough is computed before a reused step rests on the setting's timesteps: `engines.reuse.reuse_terms`.

        Raises:
            ScheduleError: another bundle, setting or T, or a choice that is no precision of the bundle and no reuse.
        """
        if self.num_steps != setting.num_steps:
            raise ScheduleError(
                f"schedule has {self.num_steps} steps, the bundle's loop has {setting.num_steps} in its setting "
                f"{setting.name}; pick a setting of that many steps, or calibrate one with --steps"
            )
        if self.bundle_id != bundle_id:
            raise ScheduleError(
                f"schedule was made for bundle {self.bundle_id[:12]}, this one is {bundle_id[:12]}; "
                "run `tmpdiff-export calibrate` on this bundle"
            )
        if self.setting not in (None, setting.name):
            raise ScheduleError(
                f"schedule was made for setting {self.setting}, the one that runs is {setting.name}; pick that setting, or "
                "calibrate this one"
            )
        for name in engines_of(self.precisions):
            if name not in precisions:
                raise ScheduleError(
                    f"schedule asks for precision {name!r}; the bundle holds {', '.join(precisions)}, and a step that computes "
                    f"nothing is {', '.join(REUSES[:-1])} or {REUSES[-1]}"
                )
