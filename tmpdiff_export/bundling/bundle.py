"""The build: one pipeline folder in, one bundle folder out."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, wait
from pathlib import Path

import onnx
import torch

from engines.documents import canonical_json
from engines.errors import BuildError, first_line
from engines.files import sha256_bytes, staged_folder
from engines.manifest import Manifest, RangeCalibrationEntry
from engines.precision import REFERENCE
from tmpdiff_export.bundling.components import (
    TEXT_ENCODER,
    VAE_DECODER,
    start_text_encoder,
    start_vae_decoder,
    write_tokenizers,
)
from tmpdiff_export.bundling.denoiser import DenoiserEngines
from tmpdiff_export.bundling.engine import BuiltEngine, StartedEngine
from tmpdiff_export.bundling.estimates import BuildSize, activation_bytes, find_available, require_fit
from tmpdiff_export.bundling.manifest import write_manifest
from tmpdiff_export.bundling.observed import Runs, denoiser_model, find_all_ranges, gather
from tmpdiff_export.bundling.onnx_files import ModelJobs, keep_graphs
from tmpdiff_export.bundling.options import BuildOptions, require_buildable
from tmpdiff_export.bundling.preflight import Needs, compiler_processes, device_of, require_apart, require_modules
from tmpdiff_export.bundling.site import Progress, Site
from tmpdiff_export.bundling.stage_files import link
from tmpdiff_export.bundling.stages import Stages, open_stages
from tmpdiff_export.memory import return_large_blocks
from tmpdiff_export.pipelines.families.family import DENOISER
from tmpdiff_export.pipelines.load import SourcePipeline, open_pipeline
from tmpdiff_export.pipelines.scheduler_table import sampler_table
from tmpdiff_export.targets.choose import open_start, open_target, resolve_backend
from tmpdiff_export.weights.streamed import OnDevice


def build(
    pipeline: Path | str,
    out: Path | str,
    options: BuildOptions,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> Manifest:
    """Builds a bundle from a diffusers pipeline folder.

    Nothing is left at `out` unless everything succeeded; `options.onnx_dir` is filled just before that.

    Args:
        pipeline: folder written by `save_pretrained`.
        out: bundle folder to make.
        options: see `BuildOptions`.
        progress: called with a stage name, units done and units in all.
        say: called with a line for the user: what is gone on from, and what stays for the next run.

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
    require_apart(Path(pipeline), out, options.onnx_dir)
    stage = "load pipeline"

    def note(what: str, done: int, total: int) -> None:
        nonlocal stage
        stage = what
        report(what, done, total)

    target = open_target(backend, options.device, options.packages, options.plans, options.precisions, note)
    require_modules(Needs(backend, device_of(backend, options.device), bool(options.fp8_attention)))
    return_large_blocks()
    note(stage, 0, 1)
    source = open_pipeline(
        Path(pipeline),
        height=options.height,
        width=options.width,
        guidance_scale=options.guidance_scale,
        variant=options.variant,
    )
    target.require_memory(source.weights.parameters)
    table = sampler_table(source.pipe.scheduler, options.num_steps, **source.sampler_options(options.num_steps))
    note(stage, 1, 1)
    tell = say or (lambda line: None)
    with open_stages(out, tell, restart=options.restart, keep=options.keep_stages) as stages:
        available = find_available(out, options.onnx_dir, stages.used_bytes)
        tell(require_fit(build_size(source, options, backend), available).described(available))
        try:
            with compiler_cache(stages, backend), open_start(target, options.workers) as start:
                return _Build(Site(source, table, target, options, stages, start, note)).run(out)
        except _MODEL_ERRORS as error:  # somebody else's model, run, traced and quantized by others' code
            raise BuildError(
                f"{source.denoiser_class}: {stage} failed: {type(error).__name__}: {first_line(error)}"
            ) from error


@contextlib.contextmanager
def compiler_cache(stages: Stages, backend: str) -> Iterator[None]:
    """Torch's compiler, also that of workers, keeps what it made among the stages, unless the user has named a place."""
    if backend != "torch" or _COMPILER_CACHES[0] in os.environ:
        yield
        return
    before = {name: os.environ.get(name) for name in _COMPILER_CACHES}
    os.environ[_COMPILER_CACHES[0]] = str(stages.cache)
    try:
        yield
    finally:  # torch has set the second by the first
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def build_size(source: SourcePipeline, options: BuildOptions, backend: str) -> BuildSize:
    """What a build's memory and disk depend on."""
    others = [source.stored(name) for name in source.other_models]
    layers = [place for weights in (source.weights, *others) for place in weights.places.values()]
    largest = max(math.prod(place.shape) for place in layers)
    _, rows, columns = source.latents_shape
    patch = int(getattr(source.denoiser.config, "patch_size", 1) or 1) * source.family.packing
    tokens = rows * columns // patch**2 + sum(text.max_tokens for text in source.texts)
    samples = 2 * (2 if source.doubled else 1)  # one call of the check has twice the batch
    return BuildSize(
        backend=backend,
        device=device_of(backend, options.device),
        range_device=options.range_device,
        precisions=options.precisions,
        parameters=source.weights.parameters,
        component_parameters=sum(weights.parameters for weights in others),
        largest_layer=largest,
        activation_bytes=activation_bytes(tokens, samples, largest, source.height, source.width),
        workers=options.workers,
        keeps_onnx=options.onnx_dir is not None,
        compiler_processes=compiler_processes(backend, device_of(backend, options.device)),
    )


class _Build:
    """One build in progress."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.started: dict[str, StartedEngine] = {}
        self.built: dict[str, BuiltEngine] = {}

    def run(self, out: Path) -> Manifest:
        """Makes every engine, or finds it among the stages, and puts the bundle together."""
        site, options = self.site, self.site.options
        # Quick to prepare, slow to compile: where workers compile, they have these while the denoiser is prepared.
        text = start_text_encoder(site)
        self._add(text.engine)
        read = OnDevice(site.source.weights.read, options.range_device)
        module = site.source.family.wrap(site.source.pipe, site.source.height, site.source.width).eval()
        runs = gather(site, module, read)
        vae = start_vae_decoder(site, runs.checks[-1][0][:1])  # of the last step kept, so close to a clean picture
        self._add(vae.engine)
        model = denoiser_model(site, module, runs, read)

        def weight(layer: str) -> torch.Tensor:
            return read(f"{layer.removeprefix(f'{DENOISER}.')}.weight")

        ranges = find_all_ranges(site, runs, module, read)
        engines = DenoiserEngines(site, model, ranges, runs.attention, weight)
        read.free()
        shared = options.share_weights
        for precision in options.precisions:
            if shared is None or precision is not REFERENCE:
                self._report(precision.value)
                self._add(engines.start(precision))
        if shared is not None:
            self._wait_for(shared.value)  # which of its variants is kept
            self._add(engines.start(REFERENCE, self.built[shared.value].entry.recipe))
        self._wait_for(*self.started)
        if options.onnx_dir is not None:
            jobs = [
                engines.job(item, None if item is REFERENCE else item, self.built[item.value].entry.recipe)
                for item in options.precisions
            ]
            components = [ModelJobs([part.job], part.source, weight) for part in (text, vae)]
            keep_graphs(site, options.onnx_dir, [ModelJobs(jobs, site.denoiser_sha256, weight), *components])
            read.free()  # codes in ONNX's layout were made from the weights once more
        return self._put_together(out, runs)

    def _put_together(self, out: Path, runs: Runs) -> Manifest:
        site, options = self.site, self.site.options
        names = (TEXT_ENCODER, VAE_DECODER, *(item.value for item in options.precisions))
        files: dict[str, Path] = {}
        for name in names:
            entry = self.built[name].entry
            inspected = () if entry.plan is None else (entry.plan.inspector,)
            files |= {file.path: self.built[name].files[file.path] for file in (*entry.files(), *inspected)}
        with staged_folder(out, replace=options.force) as bundle:
            for path, source in files.items():
                link(source, bundle / path)
            return write_manifest(
                bundle,
                site,
                write_tokenizers(site.source, bundle),
                {name: self.built[name].entry for name in names},
                RangeCalibrationEntry(
                    prompts_sha256=sha256_bytes(canonical_json(list(options.prompts))),
                    num_prompts=runs.num_prompts,
                    num_batches=runs.num_batches,
                    seed=options.seed,
                ),
            )

    def _report(self, what: str) -> None:
        self.site.report(f"build engines: {what}", len(self.built), len(self.site.options.precisions) + 2)

    def _add(self, engine: StartedEngine) -> None:
        """Takes note of an engine, and finishes those that are made."""
        self.started[engine.name] = engine
        self._finish_ready()

    def _finish_ready(self) -> None:
        for name, engine in list(self.started.items()):
            if engine.ready():
                self.built[name] = engine.finish()
                del self.started[name]

    def _wait_for(self, *names: str) -> None:
        """Waits until these engines are finished; the first failure of any engine is raised."""
        self._finish_ready()
        while any(name in self.started for name in names):
            self._report(", ".join(self.started))
            pending = [made for engine in self.started.values() for made in engine.pending]
            if pending:
                wait(pending, return_when=FIRST_COMPLETED)
            self._finish_ready()


_COMPILER_CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
_MODEL_ERRORS = (RuntimeError, AttributeError, LookupError, TypeError, ValueError, onnx.checker.ValidationError)
