"""The manifest of a bundle: what it holds, where it came from, and the hash of every file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, Literal

from pydantic import (
    Field,
    PositiveInt,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from engines.documents import Document, FileEntry, Sha256, canonical_json
from engines.files import sha256_bytes
from engines.old_manifests import current_form, form_of_its_version
from engines.package_entry import PackageEntry
from engines.plan_entry import PlanEntry
from engines.precision import REFERENCE
from engines.text_entry import TextEntry

MANIFEST_VERSION: Final = 5
OLDEST_MANIFEST_VERSION: Final = 1  # knows no plans, 2 no torch packages, 3 no operators of theirs, 4 one weight file
LATENTS, TIMESTEP, MODEL_OUTPUT = "latents", "timestep", "model_output"
GUIDANCE = "guidance"  # input of denoisers that embed the guidance scale: float32 [B]


class TensorSpec(Document):
    """An engine input or output; axes are sizes or symbols such as "batch"."""

    name: str
    dtype: Literal["float32", "float16", "int64"]
    shape: tuple[int | str, ...]


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

    @model_validator(mode="after")
    def _calls_fit(self) -> EngineEntry:
        if self.package is not None:
            self.package.check_calls(self.file.path, len(self.inputs), len(self.outputs))
        return self

    def files(self) -> tuple[FileEntry, ...]:
        """The engine file, further packages that it is made of, and its weight files."""
        blocks = () if self.package is None else self.package.blocks
        return (self.file, *blocks, *self.weights)

    @property
    def bytes(self) -> int:
        """Size of the engine on disk; other engines may share some of it."""
        return sum(entry.bytes for entry in self.files())


class ModelEntry(Document):
    """Where the engines came from.

    Attributes:
        pipeline_class: diffusers class of the pipeline.
        denoiser_class: diffusers class of the denoiser.
        denoiser_sha256: hash of the denoiser's weight files.
        parameters: number of denoiser parameters.
    """

    pipeline_class: str
    denoiser_class: str
    denoiser_sha256: Sha256
    parameters: int


class SamplingEntry(Document):
    """How the loop runs by default; `T` is `num_steps`.

    The guidance scale is that of classifier-free guidance, or of the denoisers' input `guidance` where they have one.
    """

    scheduler: str
    num_inference_steps: int = Field(ge=1)
    num_steps: int = Field(ge=1)
    guidance_scale: float = Field(ge=0)
    latents_shape: tuple[PositiveInt, PositiveInt, PositiveInt]
    height: int = Field(ge=1)
    width: int = Field(ge=1)


class RangeCalibrationEntry(Document):
    """The prompts a build was given (their hash), and how many of them gave the scales."""

    prompts_sha256: Sha256
    num_prompts: int
    num_batches: int
    seed: int


class Manifest(Document):
    """`manifest.json`; `bundle_id` is the hash of everything else in it.

    Attributes:
        text: what the text encoder engine takes as `input_ids` and `attention_mask`.
        further_texts: what it takes as `input_ids_2`, `attention_mask_2`, `input_ids_3` and so on.
    """

    version: Literal[1, 2, 3, 4, 5] = MANIFEST_VERSION
    created_with: str
    bundle_id: str
    model: ModelEntry
    sampling: SamplingEntry
    sampler: FileEntry
    text: TextEntry
    further_texts: tuple[TextEntry, ...] = ()
    text_encoder: EngineEntry
    vae_decoder: EngineEntry
    denoisers: dict[str, EngineEntry]
    range_calibration: RangeCalibrationEntry

    @model_validator(mode="before")
    @classmethod
    def _read_old(cls, data: Any) -> Any:
        return current_form(data)

    @model_serializer(mode="wrap")
    def _write_old(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return form_of_its_version(handler(self))

    @model_validator(mode="after")
    def _whole(self) -> Manifest:
        if REFERENCE.value not in self.denoisers:
            raise ValueError(f"denoisers lack the reference precision {REFERENCE.value}")
        backends = {entry.backend for entry in self.denoisers.values()}
        if len(backends) > 1:
            raise ValueError(f"denoisers are of several backends ({', '.join(sorted(backends))}), expected one")
        named: dict[str, FileEntry] = {}
        for file in self._mentions():
            if named.setdefault(file.path, file) != file:
                raise ValueError(f"file {file.path} is named with two different hashes or sizes, expected the same")
        for name, engine in self.engines().items():
            if len({file.path for file in engine.files()}) < len(engine.files()):
                raise ValueError(f"{name} names one of its files twice, expected each once")
        if self.bundle_id != self.identity():
            raise ValueError("bundle_id does not match the manifest's content; the manifest was altered")
        return self

    def identity(self) -> str:
        """Hex SHA-256 of the canonical JSON of everything but `bundle_id`; fields that the file lacks do not count."""
        return manifest_identity(self.model_dump(mode="json", exclude_unset=True))

    @property
    def precisions(self) -> tuple[str, ...]:
        """Names of the denoiser engines, the reference first."""
        return tuple(self.denoisers)

    @property
    def texts(self) -> tuple[TextEntry, ...]:
        """How a prompt is read, for each text encoder in turn."""
        return (self.text, *self.further_texts)

    @property
    def embeds_guidance(self) -> bool:
        """Whether the guidance scale is an input of the denoisers; classifier-free guidance is off then."""
        return any(spec.name == GUIDANCE for entry in self.denoisers.values() for spec in entry.inputs)

    def engines(self) -> dict[str, EngineEntry]:
        """Every engine by a name for messages: the denoisers by precision, then the others."""
        return {
            **{f"denoiser {name}": entry for name, entry in self.denoisers.items()},
            "text encoder": self.text_encoder,
            "VAE decoder": self.vae_decoder,
        }

    def files(self) -> tuple[FileEntry, ...]:
        """Every file the manifest vouches for, each once."""
        return tuple({file.path: file for file in self._mentions()}.values())

    def _mentions(self) -> Iterator[FileEntry]:
        """Every file, as often as it is named."""
        yield self.sampler
        yield from (text.tokenizer for text in self.texts)
        for entry in self.engines().values():
            yield from entry.files()
        yield from (entry.plan.inspector for entry in self.engines().values() if entry.plan is not None)


def manifest_identity(data: dict[str, Any]) -> str:
    """The `bundle_id` that belongs to a manifest's JSON data."""
    return sha256_bytes(canonical_json({key: value for key, value in data.items() if key != "bundle_id"}))
