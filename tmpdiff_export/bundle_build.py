"""The build: one pipeline folder in, one bundle folder out."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx
import torch

from engines.bundle import MANIFEST_NAME
from engines.documents import canonical_json
from engines.errors import BuildError, TmpDiffError
from engines.files import atomic_write_text, sha256_bytes, staged_folder
from engines.manifest import (
    LATENTS,
    MODEL_OUTPUT,
    EngineEntry,
    Manifest,
    ModelEntry,
    RangeCalibrationEntry,
    SamplingEntry,
    TextEntry,
    manifest_identity,
)
from engines.precision import REFERENCE, Precision
from engines.sampler import SamplerTable
from engines.text import text_inputs
from engines.version import VERSION
from tmpdiff_export.engine_build import (
    AccuracyCheck,
    BuiltDenoiser,
    Target,
    build_component,
    build_denoiser,
    file_entry,
    with_larger_batch,
)
from tmpdiff_export.families import DENOISER, VaeDecoder
from tmpdiff_export.onnx_export import ExportInput, export_graph
from tmpdiff_export.pipelines import SourcePipeline, gather_batches, load_pipeline
from tmpdiff_export.plan_settings import PlanSettings
from tmpdiff_export.ranges import Batch, spread
from tmpdiff_export.scheduler_table import sampler_table
from tmpdiff_export.shape_folding import fold_shapes
from tmpdiff_export.targets import open_target, require_shareable, resolve_backend

Progress = Callable[[str, int, int], None]

# Prompts whose runs give the ranges, and one more whose run only checks the engines.
RANGE_PROMPTS = 3
RANGE_BATCHES = 24
CHECK_BATCHES = 6
# As many as schedulers are trained on; a table of more would only be slow to make.
MAX_STEPS = 1000


@dataclass(frozen=True)
class BuildOptions:
    """What a build is asked for.

    Attributes:
        precisions: engines to build, the reference among them.
        prompts: prompts for range calibration and the accuracy check; two at least.
        num_steps: `num_inference_steps` of the loop.
        seed: seed of the first calibration run.
        backend: "auto" or a backend name.
        guidance_scale: None for the pipeline's default.
        height: picture height in pixels, None for the pipeline's own.
        width: picture width in pixels, None for the pipeline's own.
        onnx_dir: keep the strongly typed `<precision>.onnx` files here, None to drop them.
        force: replace an existing bundle.
        plans: settings of TensorRT plans; refused by other backends unless left alone, but for the batch, which torch
            packages have too.
        share_weights: for torch packages: the quantized precision whose stored weights the reference is made of as well, so
            that both need one copy; None for weights of its own.
        device: "cuda" or "cpu", what engines of the torch and onnxruntime backends are for; None for the GPU with torch, for
            the CPU with ONNX Runtime, and for other backends.
    """

    precisions: tuple[Precision, ...]
    prompts: tuple[str, ...]
    num_steps: int = 20
    seed: int = 0
    backend: str = "auto"
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    onnx_dir: Path | None = None
    force: bool = False
    plans: PlanSettings = field(default_factory=PlanSettings)
    device: str | None = None
    share_weights: Precision | None = None


def build(pipeline: Path | str, out: Path | str, options: BuildOptions, progress: Progress | None = None) -> Manifest:
    """Builds a bundle from a diffusers pipeline folder.

    Nothing is left at `out` unless everything succeeded; `options.onnx_dir` is filled just before that.

    Args:
        pipeline: folder written by `save_pretrained`.
        out: bundle folder to make.
        options: see `BuildOptions`.
        progress: called with a stage name, units done and units in all.

    Returns:
        The manifest that was written.

    Raises:
        BuildError: the pipeline cannot be exported, or an engine missed its SQNR floor.
        SamplerError: its scheduler cannot be compiled to a table.
        BackendError: the backend is not available.
        TmpDiffError: `out` exists and `force` is not set.
    """
    report = progress or (lambda stage, done, total: None)
    backend = resolve_backend(options.backend)
    if len(options.prompts) < 2:
        raise BuildError(
            f"a build needs at least 2 calibration prompts (one checks what the others calibrate), got {len(options.prompts)}"
        )
    if not 1 <= options.num_steps <= MAX_STEPS:
        raise BuildError(f"number of steps is {options.num_steps}, expected 1 to {MAX_STEPS}")
    require_shareable(backend, options.share_weights, options.precisions)
    out = Path(out)
    _check_folders(out, options)
    stage = "load pipeline"

    def note(what: str, done: int, total: int) -> None:
        nonlocal stage
        stage = what
        report(what, done, total)

    target = open_target(backend, options.plans, options.precisions, note, options.device)
    note(stage, 0, 1)
    with staged_folder(out, replace=options.force) as bundle:
        source = load_pipeline(
            Path(pipeline), height=options.height, width=options.width, guidance_scale=options.guidance_scale
        )
        target.require_memory(sum(item.numel() for item in source.denoiser.parameters()))
        note(stage, 1, 1)
        table = sampler_table(source.pipe.scheduler, options.num_steps, **source.sampler_options(options.num_steps))
        with tempfile.TemporaryDirectory(prefix=".scratch-", dir=bundle) as scratch:
            try:
                manifest = _Build(source, table, options, target, bundle, Path(scratch), note).run()
            except _MODEL_ERRORS as error:  # somebody else's model, run, traced and quantized by others' code
                first = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise BuildError(f"{source.denoiser_class}: {stage} failed: {type(error).__name__}: {first}") from error
            if options.onnx_dir is not None:
                _keep_onnx(Path(scratch) / "onnx", options.onnx_dir)
    return manifest


def _check_folders(out: Path, options: BuildOptions) -> None:
    """Refuses before the work what could not be written, or should not be replaced, after it."""
    if options.force and out.is_dir() and any(out.iterdir()) and not (out / MANIFEST_NAME).exists():
        raise TmpDiffError(
            f"output folder {out} is no bundle (it holds no {MANIFEST_NAME}); --force replaces bundles only"
        )
    kept = options.onnx_dir
    if kept is None:
        return
    if kept.exists() and not kept.is_dir():
        raise TmpDiffError(f"--onnx-dir {kept} is a file; name a folder")
    if Path(os.path.abspath(kept)).is_relative_to(os.path.abspath(out)):
        raise TmpDiffError(f"--onnx-dir {kept} is inside the bundle {out}; name a folder beside it")


class _Build:
    """One build in progress; every method adds files to the staged bundle."""

    def __init__(
        self,
        source: SourcePipeline,
        table: SamplerTable,
        options: BuildOptions,
        target: Target,
        bundle: Path,
        scratch: Path,
        report: Progress,
    ) -> None:
        self.source = source
        self.table = table
        self.options = options
        self.target = target
        self.bundle = bundle
        self.scratch = scratch
        self.report = report

    def run(self) -> Manifest:
        range_batches, check_batches = self._gather()
        sampler_path = self.bundle / "sampler.json"
        atomic_write_text(sampler_path, self.table.to_json())
        denoisers = self._denoisers(range_batches, check_batches)
        texts = self._tokenizers()
        text_encoder = self._text_encoder(texts)
        vae_decoder = self._vae(check_batches)
        source, options = self.source, self.options
        data = Manifest.model_construct(
            created_with=f"tmpdiff-export {VERSION}",
            bundle_id="",
            model=ModelEntry(
                pipeline_class=type(source.pipe).__name__,
                denoiser_class=source.denoiser_class,
                denoiser_sha256=source.weights_sha256,
                parameters=sum(item.numel() for item in source.denoiser.parameters()),
            ),
            sampling=SamplingEntry(
                scheduler=self.table.scheduler,
                num_inference_steps=self.table.num_inference_steps,
                num_steps=self.table.num_steps,
                guidance_scale=source.guidance_scale,
                latents_shape=source.latents_shape,
                height=source.height,
                width=source.width,
            ),
            sampler=file_entry(self.bundle, sampler_path),
            text=texts[0],
            further_texts=tuple(texts[1:]),
            text_encoder=text_encoder,
            vae_decoder=vae_decoder,
            denoisers=denoisers,
            range_calibration=RangeCalibrationEntry(
                prompts_sha256=sha256_bytes(canonical_json(list(options.prompts))),
                num_prompts=len(self._range_prompts()),
                num_batches=len(range_batches),
                seed=options.seed,
            ),
        ).model_dump(mode="json")
        data["bundle_id"] = manifest_identity(data)
        manifest = Manifest.model_validate_json(json.dumps(data))
        atomic_write_text(self.bundle / MANIFEST_NAME, manifest.model_dump_json(indent=1) + "\n")
        return manifest

    def _range_prompts(self) -> tuple[str, ...]:
        return self.options.prompts[: min(RANGE_PROMPTS, len(self.options.prompts) - 1)]

    def _gather(self) -> tuple[list[Batch], list[Batch]]:
        """Denoiser inputs of real runs: some for the ranges, those of the last prompt for the check."""
        prompts = (*self._range_prompts(), self.options.prompts[-1])
        steps = self.table.num_steps
        seen = 0

        def on_step() -> None:
            nonlocal seen
            seen += 1
            self.report("run pipeline", seen, steps * len(prompts))

        batches = gather_batches(self.source, prompts, self.options.num_steps, self.options.seed, on_step)
        return spread(batches[:-steps], RANGE_BATCHES), spread(batches[-steps:], CHECK_BATCHES)

    def _denoisers(self, range_batches: Sequence[Batch], check_batches: Sequence[Batch]) -> dict[str, EngineEntry]:
        family, source = self.source.family, self.source
        module = family.wrap(source.pipe, source.height, source.width).eval()
        total = len(self.options.precisions) + 1
        self.report("build denoisers", 0, total)
        inputs = family.export_inputs(range_batches[0])
        graph = self._export(module, inputs, {MODEL_OUTPUT: {0: "batch"}}, half=True)
        check = AccuracyCheck.of(module, list(family.inputs), MODEL_OUTPUT, with_larger_batch(check_batches))
        built: dict[Precision, BuiltDenoiser] = {}
        shared = self.options.share_weights
        # The engine that the reference shares weights with comes before it.
        for done, precision in enumerate(sorted(self.options.precisions, key=lambda item: item is not shared), 1):
            self.report(f"build denoisers: {precision.value}", done, total)
            built[precision] = build_denoiser(
                self.target,
                module,
                DENOISER,
                graph,
                precision,
                range_batches,
                check,
                self.bundle,
                self.scratch,
                batch_per_picture=2 if source.doubled else 1,
                float32_inputs=family.float32_inputs,
                weights_of=built[shared] if shared and precision is REFERENCE else None,
            )
        self.report("build denoisers", total, total)
        return {precision.value: built[precision].entry for precision in self.options.precisions}

    def _export(
        self,
        module: torch.nn.Module,
        inputs: Sequence[ExportInput],
        outputs: Mapping[str, Mapping[int, str]],
        *,
        half: bool,
    ) -> onnx.ModelProto:
        graph = export_graph(module, inputs, outputs, self.scratch / "export.onnx", half=half)
        fold_shapes(graph, self.scratch / "shapes.onnx")
        return graph

    def _tokenizers(self) -> list[TextEntry]:
        """Writes `tokenizer.json`, `tokenizer_2.json` and so on."""
        texts = []
        for position, text in enumerate(self.source.texts):
            path = self.bundle / (f"tokenizer_{position + 1}.json" if position else "tokenizer.json")
            try:
                atomic_write_text(path, text.tokenizer.backend_tokenizer.to_str())
            except AttributeError:
                raise BuildError(
                    f"{text.part.tokenizer} {type(text.tokenizer).__name__} has no `tokenizers` form; load the pipeline "
                    "with a fast tokenizer"
                ) from None
            texts.append(
                TextEntry(
                    tokenizer=file_entry(self.bundle, path),
                    max_tokens=text.max_tokens,
                    pad_token_id=int(text.tokenizer.pad_token_id),
                    lowercase=self.source.family.lowercase,
                )
            )
        return texts

    def _text_encoder(self, texts: Sequence[TextEntry]) -> EngineEntry:
        """One engine of all text encoders, checked on the tokens that the pipeline's own tokenizers give."""
        self.report("build text encoder", 0, 1)
        family, source = self.source.family, self.source
        module = family.wrap_text(source.pipe, source.height, source.width).eval()
        prompts = [prompt.lower().strip() if family.lowercase else prompt for prompt in (*self.options.prompts[:3], "")]
        arrays: dict[str, torch.Tensor] = {}
        for position, (text, entry) in enumerate(zip(source.texts, texts, strict=True)):
            tokens = text.tokenizer(
                prompts, padding="max_length", max_length=entry.max_tokens, truncation=True, return_tensors="pt"
            )
            ids, mask = text_inputs(position)
            arrays[ids] = tokens.input_ids
            if text.part.masked:
                arrays[mask] = tokens.attention_mask
        batch = tuple(arrays.values())
        inputs = [ExportInput(name, tensor, {0: "batch"}) for name, tensor in arrays.items()]
        graph = self._export(module, inputs, family.text_outputs, half=False)
        single = tuple(tensor[:1] for tensor in batch)
        check = AccuracyCheck.of(module, tuple(arrays), next(iter(family.text_outputs)), [batch, single])
        engine = build_component(
            self.target, module, graph, "text_encoder", check, self.bundle, self.scratch, batch_per_picture=2
        )
        self.report("build text encoder", 1, 1)
        return engine

    def _vae(self, check_batches: Sequence[Batch]) -> EngineEntry:
        self.report("build VAE decoder", 0, 1)
        module = VaeDecoder(self.source.pipe.vae).eval()
        latents = check_batches[-1][0][:1]  # of the last step kept, so close to a clean picture
        inputs = [ExportInput(LATENTS, latents, {0: "batch"})]
        graph = self._export(module, inputs, {"image": {0: "batch"}}, half=False)
        check = AccuracyCheck.of(module, [LATENTS], "image", with_larger_batch([(latents,)]))
        entry = build_component(
            self.target, module, graph, "vae_decoder", check, self.bundle, self.scratch, batch_per_picture=1
        )
        self.report("build VAE decoder", 1, 1)
        return entry


def _keep_onnx(folder: Path, target: Path) -> None:
    """Moves the ONNX files into `target`, each under a temporary name first."""
    target.mkdir(parents=True, exist_ok=True)
    kept = sorted(folder.iterdir())
    staged = [(path, target / f".{path.name}.partial") for path in kept]
    try:
        for path, partial in staged:
            shutil.copyfile(path, partial)
        for path, partial in staged:
            os.replace(partial, target / path.name)
    finally:
        for _, partial in staged:
            partial.unlink(missing_ok=True)


_MODEL_ERRORS = (RuntimeError, AttributeError, LookupError, TypeError, ValueError, onnx.checker.ValidationError)
