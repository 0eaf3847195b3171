"""The build: one pipeline folder in, one bundle folder out."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from pathlib import Path

import onnx
import torch

from engines.documents import canonical_json
from engines.errors import BuildError, first_line
from engines.files import sha256_bytes, staged_folder
from engines.manifest import MODEL_OUTPUT, Manifest, RangeCalibrationEntry
from engines.precision import REFERENCE, Precision
from engines.sampler import SamplerTable
from tmpdiff_export.bundling.components import (
    TEXT_ENCODER,
    VAE_DECODER,
    export_text_encoder,
    export_vae_decoder,
    write_tokenizers,
)
from tmpdiff_export.bundling.engine import (
    BuiltEngine,
    DenoiserJob,
    StartedEngine,
    Workplace,
    start_component,
    start_denoiser,
)
from tmpdiff_export.bundling.exported import ExportedModel, export_denoiser, with_larger_batch
from tmpdiff_export.bundling.manifest import write_manifest
from tmpdiff_export.bundling.options import BuildOptions, require_buildable
from tmpdiff_export.devices import Batch, on, placed
from tmpdiff_export.pipelines.load import SourcePipeline, gather_batches, load_pipeline
from tmpdiff_export.pipelines.scheduler_table import sampler_table
from tmpdiff_export.quantization.codes import AttentionRange
from tmpdiff_export.quantization.ranges import spread
from tmpdiff_export.targets.accuracy import AccuracyCheck, step_sizes
from tmpdiff_export.targets.choose import open_start, open_target, resolve_backend

Progress = Callable[[str, int, int], None]

# Prompts whose runs give the ranges, and one more whose run only checks the engines.
RANGE_PROMPTS = 3
RANGE_BATCHES = 24
CHECK_BATCHES = 6


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
                    place = Workplace(start, bundle, Path(scratch))
                    manifest = _Build(source, table, options, place, note).run()
            except _MODEL_ERRORS as error:  # somebody else's model, run, traced and quantized by others' code
                raise BuildError(
                    f"{source.denoiser_class}: {stage} failed: {type(error).__name__}: {first_line(error)}"
                ) from error
            if options.onnx_dir is not None:
                _keep_onnx(Path(scratch) / "onnx", options.onnx_dir)
    return manifest


class _Build:
    """One build in progress; every method adds files to the staged bundle."""

    def __init__(
        self, source: SourcePipeline, table: SamplerTable, options: BuildOptions, place: Workplace, report: Progress
    ) -> None:
        self.source = source
        self.table = table
        self.options = options
        self.place = place
        self.report = report
        self.started: dict[str, StartedEngine] = {}
        self.built: dict[str, BuiltEngine] = {}

    def run(self) -> Manifest:
        range_batches, check_batches = self._gather()
        options = self.options
        # Quick to prepare, slow to compile: where workers compile, they have these while denoisers are quantized.
        texts = write_tokenizers(self.source, self.place.bundle)
        self._text_encoder()
        self._vae(check_batches)
        start_denoisers = self._export_denoiser(range_batches, check_batches)
        start_denoisers(item for item in options.precisions if not (options.share_weights and item is REFERENCE))
        if options.share_weights:
            self._wait_for(options.share_weights.value)  # which of its variants is kept
            start_denoisers([REFERENCE])
        self._wait_for(*self.started)
        names = (TEXT_ENCODER, VAE_DECODER, *(item.value for item in options.precisions))
        return write_manifest(
            self.place.bundle,
            self.source,
            self.table,
            texts,
            {name: self.built[name].entry for name in names},
            RangeCalibrationEntry(
                prompts_sha256=sha256_bytes(canonical_json(list(options.prompts))),
                num_prompts=len(self._range_prompts()),
                num_batches=len(range_batches),
                seed=options.seed,
            ),
        )

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
        device = self.options.range_device
        model = ExportedModel(
            module,
            export_denoiser(module, family, range_batches[0], self.place.scratch),
            self._denoiser_check(module, check_batches),
            batch_per_picture=2 if source.doubled else 1,
            half=True,
            float32_inputs=family.float32_inputs,
        )
        shared = self.options.share_weights
        attention: dict[str, AttentionRange] = {}
        if self.options.fp8_attention:
            # it registers an operator with torch, which other backends do not need
            from tmpdiff_export.targets.torch.attention import require_ranges, watch_attention

            with torch.inference_mode(), placed(module, device), watch_attention(module, attention):
                for batch in range_batches:
                    module(*on(batch, device))
            require_ranges(module, attention)

        def done() -> int:
            return 1 + sum(precision.value in self.built for precision in self.options.precisions)

        def start(precisions: Iterable[Precision]) -> None:
            for precision in precisions:
                self.report(f"build denoisers: {precision.value}", done(), total)
                job = DenoiserJob(
                    precision,
                    range_batches,
                    device,
                    weights_of=self.built[shared.value] if shared and precision is REFERENCE else None,
                    keep_layers=precision is shared,
                    attention=attention if precision in self.options.fp8_attention else {},
                )
                self._add(precision.value, start_denoiser(self.place, model, job))
            self.report("build denoisers", done(), total)

        return start

    def _denoiser_check(self, module: torch.nn.Module, batches: Sequence[Batch]) -> AccuracyCheck:
        """Samples count for as much as the steps that they are from move the latents."""
        sizes = spread(step_sizes(self.table).tolist(), CHECK_BATCHES)
        weights = [(torch.full((len(batch[0]),), size),) for batch, size in zip(batches, sizes, strict=True)]
        return AccuracyCheck.of(
            module,
            list(self.source.family.inputs),
            MODEL_OUTPUT,
            with_larger_batch(batches),
            self.options.range_device,
            [rows.numpy() for (rows,) in with_larger_batch(weights)],
        )

    def _text_encoder(self) -> None:
        self.report("build text encoder", 0, 1)
        model = export_text_encoder(self.source, self.options.prompts, self.place.scratch)
        self._add(TEXT_ENCODER, start_component(self.place, model, TEXT_ENCODER))
        self.report("build text encoder", int(TEXT_ENCODER in self.built), 1)

    def _vae(self, check_batches: Sequence[Batch]) -> None:
        self.report("build VAE decoder", 0, 1)
        latents = check_batches[-1][0][:1]  # of the last step kept, so close to a clean picture
        model = export_vae_decoder(self.source, latents, self.place.scratch)
        self._add(VAE_DECODER, start_component(self.place, model, VAE_DECODER))
        self.report("build VAE decoder", int(VAE_DECODER in self.built), 1)


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
