"""The build: one pipeline folder in, one bundle folder out."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
import torch

from engines.documents import canonical_json
from engines.errors import BuildError, first_line
from engines.files import sha256_bytes, staged_folder
from engines.manifest import EngineEntry, Manifest, RangeCalibrationEntry
from engines.precision import REFERENCE
from engines.setting_choice import size_text
from tmpdiff_export.bundling.checked import Checks, denoiser_model
from tmpdiff_export.bundling.components import (
    TEXT_ENCODER,
    VAE_DECODER,
    StartedComponent,
    start_text_encoder,
    start_vae_decoder,
    write_tokenizers,
)
from tmpdiff_export.bundling.denoiser import DenoiserEngines
from tmpdiff_export.bundling.engine import BuiltEngine, StartedEngine
from tmpdiff_export.bundling.estimates import BuildSize, activation_bytes, find_available, require_fit
from tmpdiff_export.bundling.manifest import write_manifest
from tmpdiff_export.bundling.observed import Runs, find_all_ranges, gather, gather_checks, shape_name
from tmpdiff_export.bundling.onnx_files import ModelJobs, keep_graphs
from tmpdiff_export.bundling.options import BuildOptions, require_buildable
from tmpdiff_export.bundling.preflight import Needs, compiler_processes, device_of, require_apart, require_modules
from tmpdiff_export.bundling.site import Progress, Site
from tmpdiff_export.bundling.stage_files import link
from tmpdiff_export.bundling.stages import Stages, open_stages
from tmpdiff_export.memory import return_large_blocks
from tmpdiff_export.pipelines.families.family import DENOISER, require_clip_skip
from tmpdiff_export.pipelines.load import SourcePipeline, open_pipeline
from tmpdiff_export.pipelines.settings import Setting, resolve
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
    source = open_pipeline(Path(pipeline), options.variant)
    require_clip_skip(source.family, source.pipe, options.clip_skip)
    target.require_memory(source.weights.parameters)
    settings = tuple(resolve(source.facts, request) for request in options.requests())
    note(stage, 1, 1)
    tell = say or (lambda line: None)
    with open_stages(out, tell, restart=options.restart, keep=options.keep_stages) as stages:
        available = find_available(out, options.onnx_dir, stages.used_bytes)
        tell(require_fit(build_size(source, settings, options, backend), available).described(available))
        try:
            with compiler_cache(stages, backend), open_start(target, options.workers) as start:
                return _Build(Site(source, settings, target, options, stages, start, note)).run(out)
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


def build_size(source: SourcePipeline, settings: Sequence[Setting], options: BuildOptions, backend: str) -> BuildSize:
    """What a build's memory and disk depend on."""
    others = [source.stored(name) for name in source.other_models]
    layers = [place for weights in (source.weights, *others) for place in weights.places.values()]
    largest = max(math.prod(place.shape) for place in layers)
    drawn = max(settings, key=lambda setting: setting.height * setting.width)
    step = source.facts.size_step
    tokens = (drawn.height // step) * (drawn.width // step) + sum(text.max_tokens for text in source.texts)
    samples = 2 * (2 if any(map(source.doubled, settings)) else 1)  # one call of the check has twice the batch
    return BuildSize(
        backend=backend,
        device=device_of(backend, options.device),
        range_device=options.range_device,
        precisions=options.precisions,
        parameters=source.weights.parameters,
        component_parameters=sum(weights.parameters for weights in others),
        largest_layer=largest,
        activation_bytes=activation_bytes(tokens, samples, largest, drawn.height, drawn.width),
        workers=options.workers,
        keeps_onnx=options.onnx_dir is not None,
        compiler_processes=compiler_processes(backend, device_of(backend, options.device)),
    )


@dataclass(frozen=True)
class Made:
    """What an engine is made for.

    Attributes:
        name: of the engine.
        kind: a precision, "text_encoder" or "vae_decoder".
        size: (h, w) of the latents that it runs, None for any.
        text_length: that it runs, None for any.
    """

    name: str
    kind: str
    size: tuple[int, int] | None = None
    text_length: int | None = None


class _Build:
    """One build in progress."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.started: dict[str, StartedEngine] = {}
        self.built: dict[str, BuiltEngine] = {}
        self.made_for: dict[str, Made] = {}

    def run(self, out: Path) -> Manifest:
        """Makes every engine, or finds it among the stages, and puts the bundle together."""
        site, options = self.site, self.site.options
        fixed = site.target.fixed_shapes
        # Quick to prepare, slow to compile: where workers compile, they have these while the denoiser is prepared.
        texts = self._start_text_encoders()
        read = OnDevice(site.source.weights.read, options.range_device)
        module = site.source.family.wrap(site.source.pipe).eval()
        runs = gather(site, module, read)
        checks = [Checks(site.setting, runs.checks)]
        checks += [Checks(setting, gather_checks(site, setting, read)) for setting in site.shapes[1:]]
        vaes = self._start_vae_decoders(checks)
        together = [[item] for item in checks] if fixed else [checks]
        models = [denoiser_model(site, module, group, runs.search[0], read) for group in together]

        def weight(layer: str) -> torch.Tensor:
            return read(f"{layer.removeprefix(f'{DENOISER}.')}.weight")

        ranges = find_all_ranges(site, runs, module, read)
        engines = DenoiserEngines(site, models[0], ranges, runs.attention, weight)
        read.free()
        shared = options.share_weights
        for precision in options.precisions:
            if shared is None or precision is not REFERENCE:
                self._report(precision.value)
                self._add(engines.start(precision), self._made(precision.value, site.setting, fixed))
        if shared is not None:
            self._wait_for(shared.value)  # which of its variants is kept
            reference = engines.start(REFERENCE, self.built[shared.value].entry.recipe)
            self._add(reference, self._made(REFERENCE.value, site.setting, fixed))
        self._wait_for(*self.started)
        for group, model in zip(together[1:], models[1:], strict=True):
            setting = group[0].setting
            for precision in options.precisions:
                made = self._made(precision.value, setting, fixed)
                recipe = self.built[precision.value].entry.recipe
                self._add(engines.start_other(precision, recipe, model, made.name), made)
        self._wait_for(*self.started)
        if options.onnx_dir is not None:
            jobs = [
                engines.job(item, None if item is REFERENCE else item, self.built[item.value].entry.recipe)
                for item in options.precisions
            ]
            components = [ModelJobs([part.job], part.source, part.weight) for part in (texts[0], vaes[0])]
            keep_graphs(site, options.onnx_dir, [ModelJobs(jobs, site.denoiser_sha256, weight), *components])
            read.free()  # codes in ONNX's layout were made from the weights once more
        return self._put_together(out, runs)

    def _start_text_encoders(self) -> list[StartedComponent]:
        """One for every text length."""
        by_length = {setting.text_length: setting for setting in reversed(self.site.settings)}
        started = []
        for setting in sorted(by_length.values(), key=self.site.settings.index):
            made = self._made(TEXT_ENCODER, setting, False)
            if len(by_length) > 1:
                made = replace(made, text_length=setting.text_length)
            if setting.text_length != self.site.setting.text_length:
                made = replace(made, name=f"{TEXT_ENCODER}.t{setting.text_length}")
            started.append(start_text_encoder(self.site, setting, made.name))
            self._add(started[-1].engine, made)
        return started

    def _start_vae_decoders(self, checks: Sequence[Checks]) -> list[StartedComponent]:
        """One for every picture size, where engines have fixed shapes."""
        by_size = {item.setting.latents_shape: item for item in reversed(checks)}
        several = sorted(by_size.values(), key=checks.index)
        # of the last step kept, so close to a clean picture
        latents = [item.batches[-1][0][:1] for item in several]
        started = []
        for index, item in enumerate(several if self.site.target.fixed_shapes else several[:1]):
            fixed = self.site.target.fixed_shapes
            made = replace(self._made(VAE_DECODER, item.setting, fixed), text_length=None)
            if index:
                made = replace(made, name=f"{VAE_DECODER}.{size_text(item.setting.height, item.setting.width)}")
            started.append(start_vae_decoder(self.site, [latents[index]] if fixed else latents, made.name))
            self._add(started[-1].engine, made)
        return started

    def _made(self, kind: str, setting: Setting, fixed: bool) -> Made:
        suffix = shape_name(self.site, setting)
        name = f"{kind}.{suffix}" if suffix and fixed else kind
        _, *size = setting.latents_shape
        return Made(name, kind, (size[0], size[1]), setting.text_length) if fixed else Made(name, kind)

    def _put_together(self, out: Path, runs: Runs) -> Manifest:
        site, options = self.site, self.site.options
        files: dict[str, Path] = {}
        entries: dict[str, list[EngineEntry]] = {}
        for kind in (TEXT_ENCODER, VAE_DECODER, *(item.value for item in options.precisions)):
            for made in (item for item in self.made_for.values() if item.kind == kind):
                built = self.built[made.name]
                entry = built.entry.model_copy(update={"for_size": made.size, "for_text": made.text_length})
                inspected = () if entry.plan is None else (entry.plan.inspector,)
                files |= {file.path: built.files[file.path] for file in (*entry.files(), *inspected)}
                entries.setdefault(kind, []).append(entry)
        with staged_folder(out, replace=options.force) as bundle:
            for path, source in files.items():
                link(source, bundle / path)
            return write_manifest(
                bundle,
                site,
                write_tokenizers(site.source, bundle),
                entries,
                RangeCalibrationEntry(
                    prompts_sha256=sha256_bytes(canonical_json(list(options.prompts))),
                    num_prompts=runs.num_prompts,
                    num_batches=runs.num_batches,
                    seed=options.seed,
                ),
            )

    def _report(self, what: str) -> None:
        self.site.report(f"build engines: {what}", len(self.built), len(self.built) + max(len(self.started), 1))

    def _add(self, engine: StartedEngine, made: Made) -> None:
        """Takes note of an engine, and finishes those that are made."""
        self.started[engine.name] = engine
        self.made_for[made.name] = made
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
