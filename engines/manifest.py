"""The manifest of a bundle: what it holds, where it came from, and the hash of every file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Final, Literal

from pydantic import Field, PositiveInt, model_validator

from engines.documents import Document, FileEntry, Sha256, canonical_json
from engines.files import sha256_bytes
from engines.old_manifests import current_form
from engines.package_entry import PackageEntry
from engines.plan_entry import PlanEntry
from engines.precision import REFERENCE
from engines.setting_choice import size_text
from engines.setting_entry import SettingEntry
from engines.text_entry import TextEntry

MANIFEST_VERSION: Final = 6
# 1 knows no plans, 2 no torch packages, 3 no operators of theirs, 4 one weight file for an engine, 5 one setting.
OLDEST_MANIFEST_VERSION: Final = 1
LATENTS, TIMESTEP, MODEL_OUTPUT = "latents", "timestep", "model_output"
GUIDANCE = "guidance"  # input of denoisers that embed the guidance scale: float32 [B]


class TensorSpec(Document):
    """An engine input or output; axes are sizes or symbols such as "batch"."""

    name: str
    dtype: Literal["float32", "float16", "int64"]
    shape: tuple[int | str, ...]


class CoverageEntry(Document):
    """How much of a denoiser an engine has quantized.

    Attributes:
        quantized_layers: linear layers and convolutions that are.
        layers: all of them.
        quantized_share: part of their multiply-adds; products within attention are none of them.
    """

    quantized_layers: int = Field(ge=0)
    layers: int = Field(ge=0)
    quantized_share: float = Field(ge=0, le=1)


class EngineEntry(Document):
    """One engine.

    Attributes:
        file: the engine file.
        weights: the weight files beside it, other engines' among them: it reads each of them whole, and nothing else.
        backend: a key of `engines.backends.table.BACKENDS`.
        backend_version: version of the backend library that built or checked it.
        device: what it was built for: "cpu" or a GPU architecture.
        lowering: how the backend's graph differs from the ONNX file, as counts per rewrite.
        onnx_sha256: hash of the ONNX file it was lowered from, None if it was made without one.
        recipe: quantization variant, "none" for the reference.
        sqnr_db: SQNR of its output against FP32 torch on held-out real inputs, in dB.
        sqnr_floor_db: the least the build accepted.
        inputs: what `Engine.run` takes.
        outputs: what it returns.
        plan: for TensorRT plans only.
        package: for torch packages only.
        for_size: (h, w) of the latents that it runs, None for any that the denoiser can have.
        for_text: text length that it runs, None for any.
        coverage: of quantized denoisers; None in bundles of earlier releases.
    """

    file: FileEntry
    weights: tuple[FileEntry, ...] = ()
    backend: str
    backend_version: str
    device: str
    lowering: dict[str, int]
    onnx_sha256: Sha256 | None
    recipe: str
    sqnr_db: float
    sqnr_floor_db: float
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    plan: PlanEntry | None = None
    package: PackageEntry | None = None
    for_size: tuple[PositiveInt, PositiveInt] | None = None
    for_text: PositiveInt | None = None
    coverage: CoverageEntry | None = None

    @model_validator(mode="after")
    def _calls_fit(self) -> EngineEntry:
        if self.package is not None:
            self.package.check_calls(self.file.path, len(self.inputs), len(self.outputs))
        return self

    def files(self) -> tuple[FileEntry, ...]:
        """The engine file, further packages that it is made of, and its weight files."""
        blocks = () if self.package is None else self.package.blocks
        return (self.file, *blocks, *self.weights)

    def runs(self, setting: SettingEntry) -> bool:
        """Whether it is for a setting's picture size and text length."""
        if self.plan is not None and not self.plan.holds(LATENTS, setting.latents_shape):
            return False
        return self.for_size in (None, setting.latents_shape[1:]) and self.for_text in (None, setting.text_length)

    def shapes(self, pixels: int | None) -> str:
        """What it is for, in words; `pixels` is `ModelEntry.pixels_per_latent`."""
        if self.for_size is not None:
            height, width = self.for_size
            size = [
                f"latents {size_text(height, width)}" if pixels is None else size_text(pixels * height, pixels * width)
            ]
        else:
            sizes = () if self.plan is None else self.plan.sizes(LATENTS)
            size = [f"latents {' or '.join(sizes)}"] if sizes else []
        text = [] if self.for_text is None else [f"{self.for_text} text tokens"]
        return ", ".join(size + text) or "any size"

    @property
    def bytes(self) -> int:
        """Size of the engine on disk; other engines may share some of it."""
        return sum(entry.bytes for entry in self.files())


Engines = Annotated[tuple[EngineEntry, ...], Field(min_length=1)]


class ModelEntry(Document):
    """Where the engines came from.

    Attributes:
        pipeline_class: diffusers class of the pipeline.
        denoiser_class: diffusers class of the denoiser.
        denoiser_sha256: hash of the denoiser's weight files.
        parameters: number of denoiser parameters.
        pixels_per_latent: side of the square of pixels that one latent stands for; None in old bundles, as below.
        size_step: height and width of a picture are multiples of it.
        largest_side: most pixels that height or width may have, None for any number.
        rescales_guidance: whether the pipeline's call has a `guidance_rescale`.
    """

    pipeline_class: str
    denoiser_class: str
    denoiser_sha256: Sha256
    parameters: int
    pixels_per_latent: PositiveInt | None = None
    size_step: PositiveInt | None = None
    largest_side: PositiveInt | None = None
    rescales_guidance: bool = False


class RangeCalibrationEntry(Document):
    """The prompts a build was given (their hash), and how many of them gave the scales."""

    prompts_sha256: Sha256
    num_prompts: int
    num_batches: int
    seed: int


class Manifest(Document):
    """`manifest.json`.

    `bundle_id` is the hash of everything else in it but the settings, which have a hash of their own: a setting is added
    without changing what schedules of others are bound to.

    Attributes:
        settings: what pictures can be drawn with; the first is the default.
        settings_sha256: hash of `settings`.
        scheduler: the pipeline's, for tables of further settings; None in bundles of earlier releases, which have one.
        texts: what the text encoder engines take as `input_ids` and `attention_mask`, then as `input_ids_2`,
            `attention_mask_2` and so on.
        zero_absent_negative: whether zeros stand for a negative prompt that is not given, in place of the empty one.
        text_encoder: engines by text length.
        vae_decoder: engines by picture size.
        denoisers: by precision, the reference first, engines by picture size and text length.
    """

    version: Literal[6] = MANIFEST_VERSION
    created_with: str
    bundle_id: str
    settings_sha256: str
    model: ModelEntry
    settings: tuple[SettingEntry, ...] = Field(min_length=1)
    scheduler: FileEntry | None = None
    texts: tuple[TextEntry, ...] = Field(min_length=1)
    zero_absent_negative: bool = False
    text_encoder: Engines
    vae_decoder: Engines
    denoisers: dict[str, Engines]
    range_calibration: RangeCalibrationEntry

    @model_validator(mode="before")
    @classmethod
    def _as_it_is_written(cls, data: Any) -> Any:
        """Hashes are of what the file says, in the form of its version."""
        if isinstance(data, dict) and isinstance(data.get("bundle_id"), str):
            if data["bundle_id"] != manifest_identity(data):
                raise ValueError("bundle_id does not match the manifest's content; the manifest was altered")
            if "settings" in data and data.get("settings_sha256") != settings_identity(data["settings"]):
                raise ValueError("settings_sha256 does not match the manifest's settings; the manifest was altered")
        return current_form(data)

    @model_validator(mode="after")
    def _whole(self) -> Manifest:
        if REFERENCE.value not in self.denoisers:
            raise ValueError(f"denoisers lack the reference precision {REFERENCE.value}")
        backends = {entry.backend for entries in self.denoisers.values() for entry in entries}
        if len(backends) > 1:
            raise ValueError(f"denoisers are of several backends ({', '.join(sorted(backends))}), expected one")
        named: dict[str, FileEntry] = {}
        for file in self._mentions():
            if named.setdefault(file.path, file) != file:
                raise ValueError(f"file {file.path} is named with two different hashes or sizes, expected the same")
        for name, engine in self.engines().items():
            if len({file.path for file in engine.files()}) < len(engine.files()):
                raise ValueError(f"{name} names one of its files twice, expected each once")
        for what in ("name", "folder"):
            if len({getattr(entry, what) for entry in self.settings}) < len(self.settings):
                raise ValueError(f"two settings have the same {what}, expected different ones")
        if self.model.pixels_per_latent is not None:
            for entry in self.settings:
                entry.check_size(self.model.pixels_per_latent)
        return self

    @property
    def precisions(self) -> tuple[str, ...]:
        """Names of the denoiser engines, the reference first."""
        return tuple(self.denoisers)

    @property
    def embeds_guidance(self) -> bool:
        """Whether the guidance scale is an input of the denoisers; classifier-free guidance is off then."""
        return any(spec.name == GUIDANCE for spec in self.reference.inputs)

    @property
    def reference(self) -> EngineEntry:
        """The denoiser engine of the reference precision, for the default setting."""
        return self.denoisers[self.precisions[0]][0]

    def engines(self) -> dict[str, EngineEntry]:
        """Every engine by a name for messages: the denoisers by precision, then the others."""
        named = {f"denoiser {name}": entries for name, entries in self.denoisers.items()}
        named |= {"text encoder": self.text_encoder, "VAE decoder": self.vae_decoder}
        return {
            name if len(entries) == 1 else f"{name} ({entry.shapes(self.model.pixels_per_latent)})": entry
            for name, entries in named.items()
            for entry in entries
        }

    def files(self) -> tuple[FileEntry, ...]:
        """Every file the manifest vouches for, each once."""
        return tuple({file.path: file for file in self._mentions()}.values())

    def _mentions(self) -> Iterator[FileEntry]:
        """Every file, as often as it is named."""
        yield from (setting.sampler for setting in self.settings)
        if self.scheduler is not None:
            yield self.scheduler
        yield from (text.tokenizer for text in self.texts)
        for entry in self.engines().values():
            yield from entry.files()
        yield from (entry.plan.inspector for entry in self.engines().values() if entry.plan is not None)


def engine_for(entries: Engines, setting: SettingEntry) -> EngineEntry | None:
    """The one of several engines that runs a setting; None where none does."""
    return next((entry for entry in entries if entry.runs(setting)), None)


def manifest_identity(data: dict[str, Any]) -> str:
    """The `bundle_id` that belongs to a manifest's JSON data."""
    own = {"bundle_id", "settings", "settings_sha256"}
    return sha256_bytes(canonical_json({key: value for key, value in data.items() if key not in own}))


def settings_identity(settings: list[dict[str, Any]]) -> str:
    """The `settings_sha256` that belongs to the JSON data of settings."""
    return sha256_bytes(canonical_json(settings))


def manifest_text(data: dict[str, Any]) -> str:
    """The file of a manifest's JSON data, whose hashes are set anew."""
    whole = {**data, "bundle_id": manifest_identity(data), "settings_sha256": settings_identity(data["settings"])}
    return json.dumps(whole, indent=1, allow_nan=False) + "\n"
