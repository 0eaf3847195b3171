"""The build: one pipeline folder in, one bundle folder out."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import onnx

from engines.errors import BuildError, first_line
from engines.manifest import Manifest
from tmpdiff_export.bundling.estimates import BuildSize, activation_bytes, find_available, require_fit
from tmpdiff_export.bundling.making import Making
from tmpdiff_export.bundling.options import BuildOptions, require_buildable
from tmpdiff_export.bundling.preflight import Needs, compiler_processes, device_of, require_apart, require_modules
from tmpdiff_export.bundling.site import Progress, Site
from tmpdiff_export.bundling.stages import Stages, open_stages
from tmpdiff_export.memory import return_large_blocks
from tmpdiff_export.pipelines.families.family import require_clip_skip
from tmpdiff_export.pipelines.load import SourcePipeline, open_pipeline
from tmpdiff_export.pipelines.settings import Setting, resolve
from tmpdiff_export.targets.choose import open_start, open_target, resolve_backend


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
    subject, stage = str(pipeline), "load pipeline"

    def note(what: str, done: int, total: int) -> None:
        nonlocal stage
        stage = what
        report(what, done, total)

    target = open_target(backend, options.device, options.packages, options.plans, options.precisions, note)
    require_modules(Needs(backend, device_of(backend, options.device), bool(options.fp8_attention)))
    return_large_blocks()
    note(stage, 0, 1)
    with _in_one_line(lambda: f"{subject}: {stage}"):
        source = open_pipeline(Path(pipeline), options.variant)
        subject = source.denoiser_class
        require_clip_skip(source.family, source.pipe, options.clip_skip)
        target.require_memory(source.weights.parameters)
        note("make sampler tables", 0, 1)
        settings = tuple(resolve(source.facts, request) for request in options.requests())
        note("compare sizes with memory and disk", 0, 1)
        tell = say or (lambda line: None)
        with open_stages(out, tell, restart=options.restart, keep=options.keep_stages) as stages:
            available = find_available(out, options.onnx_dir, stages.used_bytes)
            tell(require_fit(build_size(source, settings, options, backend), available).described(available))
            with compiler_cache(stages, backend), open_start(target, options.workers) as start:
                return Making(Site(source, settings, target, options, stages, start, note, tell)).run(out)


@contextlib.contextmanager
def _in_one_line(doing: Callable[[], str]) -> Iterator[None]:
    """Somebody else's model, loaded, run, traced and quantized by others' code: what that raises is said in one line.

    Args:
        doing: whose model it is, and what is being done with it.
    """
    try:
        yield
    except _MODEL_ERRORS as error:
        raise BuildError(f"{doing()} failed: {type(error).__name__}: {first_line(error)}") from error


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
    texts = (max(text.entry.length(setting.text_length) for setting in settings) for text in source.texts)
    tokens = (drawn.height // step) * (drawn.width // step) + sum(texts)
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


_COMPILER_CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
_MODEL_ERRORS = (
    RuntimeError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    onnx.checker.ValidationError,
)
