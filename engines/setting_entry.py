"""What a manifest says of a setting: scheduler, number of steps, picture size, guidance scale and text length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath

from pydantic import Field, PositiveInt, field_validator

from engines.documents import Document, FileEntry
from engines.errors import BundleError
from engines.setting_choice import MAX_PIXELS, MAX_TOKENS, SettingChoice, size_text


class SettingEntry(Document):
    """What pictures are drawn with. T is `num_steps`; the sampler table has the rest.

    The guidance scale is that of classifier-free guidance, or of the denoisers' input `guidance` where they have one.

    Attributes:
        name: unique in its bundle.
        scheduler: class name.
        num_inference_steps: what the scheduler was asked for.
        num_steps: loop iterations.
        guidance_scale: unless another is asked for.
        latents_shape: (C, h, w) of one picture.
        height: of a picture, in pixels.
        width: of a picture, in pixels.
        text_length: of the text encoders whose length may vary, in tokens; None where none may.
        constants: denoiser inputs that are the same for every picture, one row of each.
        sampler: the table's file; schedule and scores lie beside it.
    """

    name: str = Field(default="default", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,119}$")
    scheduler: str
    num_inference_steps: int = Field(ge=1)
    num_steps: int = Field(ge=1)
    guidance_scale: float = Field(ge=0)
    latents_shape: tuple[PositiveInt, PositiveInt, PositiveInt]
    height: int = Field(ge=1, le=MAX_PIXELS)
    width: int = Field(ge=1, le=MAX_PIXELS)
    text_length: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
    constants: dict[str, tuple[float, ...]] = Field(default_factory=dict)
    sampler: FileEntry

    @field_validator("constants")
    @classmethod
    def _rows_are_not_empty(cls, rows: dict[str, tuple[float, ...]]) -> dict[str, tuple[float, ...]]:
        if not all(rows.values()):
            raise ValueError("a constant has no numbers, expected one at least")
        return rows

    @property
    def folder(self) -> str:
        """Where its files lie in the bundle, in POSIX form."""
        return PurePosixPath(self.sampler.path).parent.as_posix()

    @property
    def size(self) -> str:
        """Picture size as the command line has it, "1216x832": width, then height."""
        return size_text(self.height, self.width)

    def check_size(self, pixels_per_latent: int) -> None:
        """Refuses latents that are not those of its pictures.

        Raises:
            ValueError: naming both.
        """
        _, *size = self.latents_shape
        expected = [self.height // pixels_per_latent, self.width // pixels_per_latent]
        if size != expected:
            raise ValueError(
                f"setting {self.name} has latents {size_text(*size)} for pictures of {self.size}, expected {size_text(*expected)}"
            )

    @property
    def described(self) -> str:
        """In words, for messages and tables."""
        text = "" if self.text_length is None else f", {self.text_length} text tokens"
        return (
            f"{self.scheduler}, {self.num_inference_steps} steps, {self.size}, guidance {self.guidance_scale:g}{text}"
        )

    def fits(self, choice: SettingChoice) -> bool:
        """Whether it is meant."""
        return (
            choice.steps in (None, self.num_inference_steps)
            and choice.size in (None, (self.height, self.width))
            and choice.named in (None, self.name, self.scheduler)
        )


def choose_setting(settings: Sequence[SettingEntry], choice: SettingChoice) -> SettingEntry:
    """The first setting that is meant.

    Raises:
        BundleError: none is; the settings that there are are listed.
    """
    for entry in settings:
        if entry.fits(choice):
            return entry
    asked = choice.described.replace("--scheduler-setting", "--scheduler")
    listed = "; ".join(f"{entry.name} ({entry.described})" for entry in settings)
    raise BundleError(
        f"the bundle has no setting for {choice.described}; it has {listed}; add one with `tmpdiff-export calibrate BUNDLE "
        f"--prompts FILE {asked}`"
    )
