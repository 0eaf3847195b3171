"""Settings: what a user asks for, resolved to a sampler table and shapes, from an open pipeline or from a bundle."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers

from engines.bundle import SAMPLER_NAME, SETTINGS
from engines.documents import FileEntry, canonical_json, read_json
from engines.errors import BuildError, first_line
from engines.files import atomic_write_text, sha256_bytes
from engines.sampler import SamplerTable
from engines.setting_choice import MAX_PIXELS, size_text
from engines.setting_entry import SettingEntry
from tmpdiff_export.pipelines.families.family import Family
from tmpdiff_export.pipelines.scheduler_table import sampler_table

_DEFAULTED = "_use_default_values"  # what diffusers does not take over into schedulers of other classes


@dataclass(frozen=True)
class SettingRequest:
    """What a user asks for; what is None is the pipeline's own.

    Attributes:
        num_steps: `num_inference_steps`.
        size: (height, width) in pixels.
        guidance_scale: of classifier-free guidance, or of the denoiser's input.
        text_length: of the text encoders whose length may vary, in tokens.
        scheduler: class name of a diffusers scheduler, made from the pipeline's configuration, or a
            `scheduler_config.json`.
        clip_skip: last layers that CLIP text encoders leave out; of all settings of a bundle.
    """

    num_steps: int = 20
    size: tuple[int, int] | None = None
    guidance_scale: float | None = None
    text_length: int | None = None
    scheduler: str | None = None
    clip_skip: int | None = None


@dataclass(frozen=True)
class PipelineFacts:
    """What settings depend on.

    Attributes:
        family: of the denoiser.
        scheduler: the pipeline's own, as `scheduler_form` writes it.
        size: (height, width) in pixels of its own, None where it has none.
        pixels_per_latent: side of the square of pixels that one latent stands for.
        size_step: height and width are multiples of it, in pixels.
        largest_side: most pixels that height or width may have, None for any number.
        latent_channels: C.
        guidance_scale: its own, 1 where it has none.
        takes_guidance_scale: whether another has an effect.
        text_length: of the text encoders whose length may vary; None where none may.
        longest_text: the longest text length that may be asked for; None where engines say it.
    """

    family: Family
    scheduler: Mapping[str, Any]
    size: tuple[int, int] | None
    pixels_per_latent: int
    size_step: int
    largest_side: int | None
    latent_channels: int
    guidance_scale: float
    takes_guidance_scale: bool
    text_length: int | None
    longest_text: int | None = None


@dataclass(frozen=True, eq=False)
class Setting:
    """A setting; fields are those of `SettingEntry`, with the sampler table itself, and `SettingRequest.clip_skip`."""

    name: str
    table: SamplerTable
    guidance_scale: float
    height: int
    width: int
    latents_shape: tuple[int, int, int]
    text_length: int | None
    constants: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    clip_skip: int | None = None

    @property
    def shape(self) -> tuple[tuple[int, int, int], int | None]:
        """What engines of fixed shapes are made for: the latents' shape and the text length."""
        return self.latents_shape, self.text_length


def scheduler_form(scheduler: Any) -> dict[str, Any]:
    """A scheduler as JSON data: class name and configuration, without infinite numbers, which are its class's defaults.

    Raises:
        BuildError: a number of its configuration is NaN.
    """
    config = {
        key: value
        for key, value in _finite(json.loads(scheduler.to_json_string())).items()
        if not key.startswith("_") or key == _DEFAULTED
    }
    if _DEFAULTED in config:  # from a set, in any order
        config[_DEFAULTED] = sorted(config[_DEFAULTED])
    return {"class": type(scheduler).__name__, "config": config}


def _finite(config: dict[str, Any]) -> dict[str, Any]:
    """A scheduler's configuration without the infinite numbers, such as the lambda_min_clipped of DPM-Solver.

    Raises:
        BuildError: one is no number.
    """
    for key, value in config.items():
        if isinstance(value, float) and math.isnan(value):
            raise BuildError(f"the scheduler's configuration has NaN for {key}; correct its scheduler_config.json")
    return {key: value for key, value in config.items() if not (isinstance(value, float) and math.isinf(value))}


def resolve(facts: PipelineFacts, request: SettingRequest) -> Setting:
    """The setting that is asked for.

    Raises:
        BuildError: a size, guidance scale, text length or scheduler that the pipeline cannot have.
        SamplerError: the scheduler cannot be compiled to a table.
    """
    size = request.size or facts.size
    if size is None:
        raise BuildError("the pipeline's configuration names no picture size (sample_size); name one with --size")
    height, width = size
    _require_size(facts, height, width)
    pixels = facts.pixels_per_latent
    rows, columns = height // pixels, width // pixels
    scheduler, chosen = _scheduler(facts.scheduler, request.scheduler)
    tokens = (height // facts.size_step) * (width // facts.size_step)
    table = sampler_table(
        scheduler, request.num_steps, **facts.family.sampler_options(scheduler, request.num_steps, tokens)
    )
    scale, text_length = _guidance_scale(facts, request), _text_length(facts, request)
    parts = [
        str(request.num_steps),
        size_text(height, width),
        chosen,
        f"g{_number_text(scale)}" if facts.takes_guidance_scale else "",
        "" if text_length is None else f"t{text_length}",
    ]
    return Setting(
        name="-".join(part for part in parts if part),
        table=table,
        guidance_scale=scale,
        height=height,
        width=width,
        latents_shape=(facts.latent_channels, rows, columns),
        text_length=text_length,
        constants={name: tuple(map(float, row)) for name, row in facts.family.constants(height, width).items()},
        clip_skip=request.clip_skip,
    )


def setting_entry(setting: Setting) -> SettingEntry:
    """What a manifest is to say of a setting."""
    table = setting.table.to_json().encode()
    return SettingEntry(
        name=setting.name,
        scheduler=setting.table.scheduler,
        num_inference_steps=setting.table.num_inference_steps,
        num_steps=setting.table.num_steps,
        guidance_scale=setting.guidance_scale,
        latents_shape=setting.latents_shape,
        height=setting.height,
        width=setting.width,
        text_length=setting.text_length,
        constants=dict(setting.constants),
        sampler=FileEntry(
            path=f"{SETTINGS}/{setting.name}/{SAMPLER_NAME}", sha256=sha256_bytes(table), bytes=len(table)
        ),
    )


def write_setting(bundle: Path, setting: Setting) -> SettingEntry:
    """Writes a setting's sampler table into a bundle; returns what the manifest is to say of the setting."""
    entry = setting_entry(setting)
    path = bundle / entry.sampler.path
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, setting.table.to_json())
    return entry


def _number_text(number: float) -> str:
    """A number as names have it: no two are the same, and none has a plus sign."""
    short = f"{number:g}"
    return (short if float(short) == number else repr(number)).replace("+", "")


def _require_size(facts: PipelineFacts, height: int, width: int) -> None:
    step = math.lcm(facts.size_step, facts.family.picture_multiple)
    for label, value in (("height", height), ("width", width)):
        if not 1 <= value <= MAX_PIXELS:
            raise BuildError(f"{label} {value} is no size of a picture; name 1 to {MAX_PIXELS} pixels with --size")
        if value % step:
            near = max(round(value / step), 1) * step
            raise BuildError(
                f"{label} {value} does not fit this pipeline; give a positive multiple of {step}, such as {near}"
            )
        if facts.largest_side is not None and value > facts.largest_side:
            raise BuildError(
                f"{label} {value} does not fit this pipeline: its position embedding ends at {facts.largest_side} pixels"
            )


def _guidance_scale(facts: PipelineFacts, request: SettingRequest) -> float:
    asked = request.guidance_scale
    if facts.takes_guidance_scale:
        return facts.guidance_scale if asked is None else asked
    if asked not in (None, 1.0):
        raise BuildError(
            f"guidance scale {asked:g} would have no effect: this {facts.family.denoiser_class} has no guidance embedding; "
            "leave the guidance scale out"
        )
    return 1.0


def _text_length(facts: PipelineFacts, request: SettingRequest) -> int | None:
    if request.text_length is None:
        return facts.text_length
    if facts.text_length is None:
        raise BuildError(
            f"text length {request.text_length} was asked for; the text encoders of this pipeline have a fixed length, "
            "leave it out"
        )
    if facts.longest_text is not None and not 1 <= request.text_length <= facts.longest_text:
        raise BuildError(
            f"text length {request.text_length} does not fit this pipeline; give 1 to {facts.longest_text} tokens"
        )
    return request.text_length


def _scheduler(own: Mapping[str, Any], asked: str | None) -> tuple[Any, str]:
    """The scheduler, and how the setting's name calls it: not at all where it is the pipeline's own."""
    if asked is None:
        form, called = own, ""
    elif Path(asked).suffix == ".json":
        form = _form_of_file(Path(asked))
        called = f"{form['class']}.{sha256_bytes(canonical_json(form))[:6]}"
    else:
        form, called = {"class": asked, "config": own["config"]}, asked
    kind: Any = getattr(diffusers, str(form["class"]), None)
    if kind is None or not hasattr(kind, "set_timesteps"):
        raise BuildError(
            f"scheduler {form['class']!r} is no scheduler of diffusers {diffusers.__version__}; give a class name such as "
            "EulerDiscreteScheduler, or a scheduler_config.json"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return kind.from_config(dict(form["config"])), called
    except Exception as error:  # whatever its configuration leads to
        raise BuildError(f"scheduler {form['class']} cannot be made: {first_line(error)}") from error


def _form_of_file(path: Path) -> dict[str, Any]:
    data = read_json(path, "scheduler configuration", BuildError, infinite=True)
    if not isinstance(data.get("_class_name"), str):
        raise BuildError(f"{path} is no scheduler_config.json: it names no _class_name")
    form = {
        "class": data["_class_name"],
        "config": {key: value for key, value in _finite(data).items() if not key.startswith("_")},
    }
    try:
        canonical_json(form)
    except (ValueError, RecursionError) as error:
        raise BuildError(f"scheduler configuration {path} cannot be used: {first_line(error)}") from None
    return form
