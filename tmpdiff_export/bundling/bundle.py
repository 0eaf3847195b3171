"""The build: one pipeline folder in, one bundle folder out."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import torch

from engines.bundle import MANIFEST_NAME
from engines.documents import canonical_json
from engines.errors import BuildError
from engines.files import atomic_write_text, sha256_bytes, staged_folder
from engines.manifest import (
    LATENTS,
    MODEL_OUTPUT,
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
from tmpdiff_export.bundling.engine import (
    BuiltEngine,
    StartedEngine,
    start_component,
    start_denoiser,
    with_larger_batch,
)
from tmpdiff_export.bundling.options import BuildOptions, require_buildable
from tmpdiff_export.devices import Batch
from tmpdiff_export.onnx_graphs.export import ExportInput, export_graph
from tmpdiff_export.onnx_graphs.shape_folding import fold_shapes
from tmpdiff_export.pipelines.families import DENOISER, VaeDecoder
from tmpdiff_export.pipelines.load import SourcePipeline, gather_batches, load_pipeline
from tmpdiff_export.pipelines.scheduler_table import sampler_table
from tmpdiff_export.quantization.ranges import spread
from tmpdiff_export.targets.accuracy import step_sizes
from tmpdiff_export.targets.choose import open_start, open_target, resolve_backend
from tmpdiff_export.targets.target import AccuracyCheck, Start, file_entry

if TYPE_CHECKING:
    from tmpdiff_export.targets.torch.attention import AttentionRange

Progress = Callable[[str, int, int], None]

# Prompts whose runs give the ranges, and one more whose run only checks the engines.
RANGE_PROMPTS = 3
RANGE_BATCHES = 24
CHECK_BATCHES = 6
_TEXT_ENCODER = "text_encoder"
_VAE_DECODER = "vae_decoder"


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
        BuildError: the pipeline cannot be exported, an engine missed its SQNR floor, or a worker process died.
        SamplerError: its scheduler cannot be compiled to a table.
        BackendError: the backend is not available.
        TmpDiffError: `out` exists and `force` is not set.
    """
    report = progress or (lambda stage, done, total: None)
    backend = resolve_backend(options.backend)
    out = Path(out)
    require_buildable(options, out, backend)
    stage = "load pipeline"

    def note(what: str, done: int, total: int) -> None:
        nonlocal stage
        stage = what
        report(what, done, total)

    target = open_target(backend, options.device, options.packages, options.plans, options.precisions, note)
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
                with open_start(target, options.workers) as start:
                    manifest = _Build(source, table, options, start, bundle, Path(scratch), note).run()
            except _MODEL_ERRORS as error:  # somebody else's model, run, traced and quantized by others' code
                first = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise BuildError(f"{source.denoiser_class}: {stage} failed: {type(error).__name__}: {first}") from error
            if options.onnx_dir is not None:
                _keep_onnx(Path(scratch) / "onnx", options.onnx_dir)
    return manifest


class _Build:
    """One build in progress; every method adds files to the staged bundle."""

    def __init__(
        self,
        source: SourcePipeline,
        table: SamplerTable,
        options: BuildOptions,
        start: Start,
        bundle: Path,
        scratch: Path,
        report: Progress,
    ) -> None:
        self.source = source
        self.table = table
        self.options = options
        self.start = start
        self.bundle = bundle
        self.scratch = scratch
        self.report = report
        self.started: dict[str, StartedEngine] = {}
        self.built: dict[str, BuiltEngine] = {}

    def run(self) -> Manifest:
        range_batches, check_batches = self._gather()
        sampler_path = self.bundle / "sampler.json"
        atomic_write_text(sampler_path, self.table.to_json())
        source, options = self.source, self.options
        # Quick to prepare, slow to compile: where workers compile, they have these while denoisers are quantized.
        texts = self._tokenizers()
        self._text_encoder(texts)
        self._vae(check_batches)
        start_denoisers = self._export_denoiser(range_batches, check_batches)
        start_denoisers(item for item in options.precisions if not (options.share_weights and item is REFERENCE))
        if options.share_weights:
            self._wait_for(options.share_weights.value)  # which of its variants is kept
            start_denoisers([REFERENCE])
        self._wait_for(*self.started)
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
            text_encoder=self.built[_TEXT_ENCODER].entry,
            vae_decoder=self.built[_VAE_DECODER].entry,
            denoisers={item.value: self.built[item.value].entry for item in options.precisions},
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

        batches = gather_batches(
            self.source, prompts, self.options.num_steps, self.options.seed, on_step, self.options.range_device
        )
        return spread(batches[:-steps], RANGE_BATCHES), spread(batches[-steps:], CHECK_BATCHES)

    def _add(self, name: str, engine: StartedEngine) -> None:
        """Takes note of an engine, and finishes those that are made."""
        self.started[name] = engine
        self._finish_ready()

    def _finish_ready(self) -> None:
        for name, engine in list(self.started.items()):
            if engine.ready():
                self.built[name] = engine.finish()
                del self.started[name]

    def _wait_for(self, *names: str) -> None:
        """Waits until these engines are finished; the first failure of any engine is raised."""
        total = len(self.options.precisions) + 2
        self._finish_ready()
        while any(name in self.started for name in names):
            self.report("finish engines", len(self.built), total)
            pending = [entry for engine in self.started.values() for entry in engine.entries if not entry.done()]
            if pending:
                wait(pending, return_when=FIRST_COMPLETED)
            self._finish_ready()

    def _export_denoiser(
        self, range_batches: Sequence[Batch], check_batches: Sequence[Batch]
    ) -> Callable[[Iterable[Precision]], None]:
        """Exports the denoiser; what is returned starts its engines."""
        family, source = self.source.family, self.source
        module = family.wrap(source.pipe, source.height, source.width).eval()
        total = len(self.options.precisions) + 1
        self.report("build denoisers", 0, total)
        inputs = family.export_inputs(range_batches[0])
        graph = self._export(module, inputs, {MODEL_OUTPUT: {0: "batch"}}, half=True)
        device = self.options.range_device
        sizes = spread(step_sizes(self.table).tolist(), CHECK_BATCHES)  # of the steps that the check's batches are from
        weights = [(torch.full((len(batch[0]),), size),) for batch, size in zip(check_batches, sizes, strict=True)]
        check = AccuracyCheck.of(
            module,
            list(family.inputs),
            MODEL_OUTPUT,
            with_larger_batch(check_batches),
            device,
            [rows.numpy() for (rows,) in with_larger_batch(weights)],
        )
        shared = self.options.share_weights
        attention: Mapping[str, AttentionRange] = {}
        if self.options.fp8_attention:
            from tmpdiff_export.targets.torch.attention import attention_ranges

            attention = attention_ranges(module, range_batches, device)

        def done() -> int:
            return 1 + sum(precision.value in self.built for precision in self.options.precisions)

        def start(precisions: Iterable[Precision]) -> None:
            for precision in precisions:
                self.report(f"build denoisers: {precision.value}", done(), total)
                engine = start_denoiser(
                    self.start,
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
                    weights_of=self.built[shared.value] if shared and precision is REFERENCE else None,
                    keep_layers=precision is shared,
                    attention=attention if precision in self.options.fp8_attention else None,
                    range_device=device,
                )
                self._add(precision.value, engine)
            self.report("build denoisers", done(), total)

        return start

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

    def _text_encoder(self, texts: Sequence[TextEntry]) -> None:
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
        engine = start_component(
            self.start, module, graph, _TEXT_ENCODER, check, self.bundle, self.scratch, batch_per_picture=2
        )
        self._add(_TEXT_ENCODER, engine)
        self.report("build text encoder", int(_TEXT_ENCODER in self.built), 1)

    def _vae(self, check_batches: Sequence[Batch]) -> None:
        self.report("build VAE decoder", 0, 1)
        module = VaeDecoder(self.source.pipe.vae).eval()
        latents = check_batches[-1][0][:1]  # of the last step kept, so close to a clean picture
        inputs = [ExportInput(LATENTS, latents, {0: "batch"})]
        graph = self._export(module, inputs, {"image": {0: "batch"}}, half=False)
        check = AccuracyCheck.of(module, [LATENTS], "image", with_larger_batch([(latents,)]))
        engine = start_component(
            self.start, module, graph, _VAE_DECODER, check, self.bundle, self.scratch, batch_per_picture=1
        )
        self._add(_VAE_DECODER, engine)
        self.report("build VAE decoder", int(_VAE_DECODER in self.built), 1)


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
