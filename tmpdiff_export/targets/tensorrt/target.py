"""Engines for TensorRT: plans built on this host's GPU from the exported graphs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any

from onnx import ModelProto

from engines.backends.cuda.gpu import current_gpu
from engines.backends.cuda.timing import latency_ms
from engines.backends.tensorrt.bindings import VERSION, version_tuple
from engines.backends.tensorrt.builder import build_plan, require_builder
from engines.backends.tensorrt.host import open_engine
from engines.backends.tensorrt.inspection import read_inspector, speed_warning, summarize
from engines.backends.tensorrt.plan_store import PlanFacts, PlanRequest, PlanStore, StoredPlan, plan_key
from engines.backends.tensorrt.preflight import (
    BuildEstimate,
    EngineMemory,
    require_build_memory,
    require_precision,
    require_runtime_memory,
)
from engines.backends.tensorrt.profiles import ShapeRange, profile, symbols_of
from engines.backends.tensorrt.profiling import layer_times
from engines.backends.tensorrt.timing_cache import timing_cache_path
from engines.documents import FileEntry
from engines.errors import BuildError
from engines.files import sha256_file
from engines.manifest import EngineEntry, TensorSpec
from engines.plan_entry import PlanEntry, Profile
from engines.precision import BITS_PER_WEIGHT, REFERENCE, Precision
from tmpdiff_export.memory import host_available_bytes
from tmpdiff_export.targets.exported import OnnxForm, plain_tensors, strong_graph, write_graph
from tmpdiff_export.targets.target import EngineJob, PreparedEngine, file_entry, tensor_specs
from tmpdiff_export.targets.tensorrt.settings import BATCH, HEIGHT, WIDTH, PlanSettings

Progress = Callable[[str, int, int], None]


class TensorRtTarget:
    """`tmpdiff_export.targets.target.Target`: plans for the current GPU, `engines/<name>.plan`.

    A plan has an optimization profile for each picture size, so that all sizes use its weights. It is built once per
    cache folder: an interrupted build goes on with the plans that it finished.
    """

    backend = "tensorrt"
    fixed_shapes = False

    def __init__(self, settings: PlanSettings, precisions: Sequence[Precision], progress: Progress) -> None:
        """Checks everything that can be checked before work begins.

        Args:
            settings: what the user asked for.
            precisions: the denoiser engines that will be made.
            progress: called with (stage, steps done, steps in all) while plans are built.

        Raises:
            BackendError: no GPU, no builder, or a precision that this GPU or TensorRT cannot have.
        """
        require_builder()
        self._gpu = current_gpu()
        self._settings = settings
        self._progress = progress
        self._precisions = tuple(precisions)
        for precision in precisions:
            require_precision(precision.value, self._gpu, version_tuple(), settings.options)
        self._cache = settings.cache or default_cache()
        self._store = PlanStore(self._cache)
        self._reference_ms: float | None = None

    def require_memory(self, parameters: int) -> None:
        """Estimates what building and running needs; see `Target.require_memory`."""
        # Every weight counts as quantized, which is the least a plan can take.
        weights = {precision.value: int(parameters * BITS_PER_WEIGHT[precision] / 8) for precision in self._precisions}
        workspace = self._settings.options.workspace_bytes or 0
        require_build_memory(
            {name: BuildEstimate(count, workspace) for name, count in weights.items()},
            self._gpu,
            host_available_bytes(),
        )
        streamed = self._settings.options.weight_streaming
        require_runtime_memory(
            {name: EngineMemory(count, 0, count if streamed else 0) for name, count in weights.items()},
            io_bytes=0,
            resident=1,
            gpu=self._gpu,
        )

    @property
    def key(self) -> dict[str, Any]:
        """See `Target.key`."""
        settings = self._settings
        return {
            "backend": self.backend,
            "version": VERSION,
            "device": self._gpu.described,
            "options": settings.options.canonical(),
            "batch": astuple(settings.batch),
            "shapes": {symbol: astuple(sizes) for symbol, sizes in sorted(settings.shapes.items())},
        }

    @property
    def form(self) -> OnnxForm:
        """See `Target.form`."""
        return OnnxForm()

    def prepare(self, job: EngineJob) -> PreparedEngine:
        """Exports the graph; see `Target.prepare`.

        Raises:
            BuildError: a range was asked for a symbol that the denoiser does not have, or one that leaves out a size.
        """
        graph = strong_graph(job)
        profiles = self._profiles(tensor_specs(graph.graph.input), job)
        return PreparedEngine(
            plain_tensors(job, graph, self.form),
            lambda folder, weights: partial(self._make, job, graph, profiles, folder, weights),
        )

    def _make(
        self,
        job: EngineJob,
        graph: ModelProto,
        profiles: tuple[Profile, ...],
        folder: Path,
        weights: Sequence[FileEntry],
    ) -> EngineEntry:
        """Builds the plan or finds it in the cache, loads it, runs it at every size, measures its SQNR and its layers."""
        specs = tensor_specs(graph.graph.input)
        engines = folder / "engines"
        onnx_file = engines / f"{job.name}.onnx"
        write_graph(graph, onnx_file, [folder / file.path for file in weights])
        try:
            onnx_sha256 = sha256_file(onnx_file)
            stored = self._plan(job, onnx_file, profiles)
        finally:
            onnx_file.unlink()  # a plan has its weights itself
        plan, inspector = engines / f"{job.name}.plan", engines / f"{job.name}.layers.json"
        shutil.copyfile(stored.path, plan)
        shutil.copyfile(stored.inspector, inspector)
        opt_shapes, *others = [{name: opt for name, (_, opt, _) in shapes.items()} for shapes in profiles]
        check, options = job.model.check, self._settings.options
        with open_engine(
            plan, version_compatible=options.version_compatible, weight_streaming=options.weight_streaming
        ) as (engine, loaded):
            batch_size = opt_shapes[specs[0].name][0]
            measured = check.sqnr_db(engine, batch_size)
            step_ms = latency_ms(engine, opt_shapes)
            times = layer_times(engine, loaded, opt_shapes)
            for shapes in others:
                latency_ms(engine, shapes)  # that it runs
        warnings = [*stored.facts.warnings]
        if job.name == REFERENCE.value:
            self._reference_ms = step_ms
        elif job.ranges and self._reference_ms is not None:
            slow = speed_warning(job.precision.value, step_ms, self._reference_ms)
            warnings = [slow, *warnings] if slow else warnings
        return EngineEntry(
            file=file_entry(folder, plan),
            backend=self.backend,
            backend_version=VERSION,
            device=self._gpu.described,
            lowering={},
            onnx_sha256=onnx_sha256,
            recipe=job.recipe,
            sqnr_db=round(measured, 2),
            sqnr_floor_db=job.floor_db,
            inputs=specs,
            outputs=tensor_specs(graph.graph.output),
            plan=PlanEntry(
                version_compatible=options.version_compatible,
                hardware_compatibility=options.hardware_compatibility,
                profiles=profiles,
                weight_streaming=options.weight_streaming,
                weights_bytes=stored.facts.weights_bytes,
                scratch_bytes=stored.facts.scratch_bytes,
                layers=summarize(read_inspector(inspector.read_text()), times),
                inspector=file_entry(folder, inspector),
                warnings=tuple(warnings),
            ),
        )

    def _profiles(self, specs: Sequence[TensorSpec], job: EngineJob) -> tuple[Profile, ...]:
        """The optimization profiles of an engine: one for each of the model's sizes that its inputs tell apart.

        Other symbols have the range that was asked for, else the sizes that the pipeline itself uses; so have height and
        width where a range was asked for.

        Raises:
            BuildError: a range was asked for a symbol that the denoiser does not have, or one that leaves out a size.
        """
        pictures, factor = self._settings.batch, job.model.batch_per_picture
        fixed = pictures.min == pictures.max
        batch = ShapeRange(
            # A range also takes calls without guidance, one sample per picture; a fixed size stays fixed.
            pictures.min * factor if fixed else pictures.min,
            pictures.opt * factor,
            pictures.max * factor,
        )
        symbols = symbols_of(specs)
        unknown = sorted(set(self._settings.shapes) - set(symbols))
        if unknown and job.name in self._precisions:
            raise BuildError(
                f"--shape names {', '.join(unknown)}, which no denoiser input has; its symbolic axes are {', '.join(symbols)}"
            )
        found: list[Profile] = []
        for size in [{HEIGHT: _only(height), WIDTH: _only(width)} for height, width in job.model.sizes] or [{}]:
            self._require_taken(size)
            ranges = {**_seen_sizes(specs, job), **size, **self._settings.shapes, BATCH: batch}
            shapes = profile(specs, {symbol: ranges[symbol] for symbol in symbols})
            if shapes not in found:
                found.append(shapes)
        return tuple(found)

    def _require_taken(self, size: Mapping[str, ShapeRange]) -> None:
        """Refuses ranges that were asked for and leave out a size of the latents."""
        for symbol, wanted in size.items():
            asked = self._settings.shapes.get(symbol, wanted)
            if not asked.min <= wanted.opt <= asked.max:
                raise BuildError(
                    f"--shape {symbol}={asked} leaves out latents of {symbol} {wanted.opt}, which a picture size of this "
                    "build has; widen it or leave it out"
                )

    def _plan(self, job: EngineJob, onnx_file: Path, profiles: tuple[Profile, ...]) -> StoredPlan:
        asked = PlanRequest(onnx_file, job.precision.value, profiles, self._settings.options, self._gpu)

        def build(target: Path) -> PlanFacts:
            return build_plan(
                asked,
                target,
                timing_cache=timing_cache_path(self._cache, VERSION, self._gpu),
                progress=lambda stage, done, total: self._progress(f"{job.name}: {stage}", done, total),
            )

        return self._store.put(plan_key(asked, VERSION), build)


def _only(size: int) -> ShapeRange:
    return ShapeRange(size, size, size)


def _seen_sizes(specs: Sequence[TensorSpec], job: EngineJob) -> dict[str, ShapeRange]:
    """The sizes of symbolic axes in the pipeline's own runs."""
    seen: dict[str, list[int]] = {}
    for batch in job.model.check.batches:
        arrays = dict(zip(job.model.check.names, batch, strict=True))
        for spec in specs:
            for symbol, size in zip(spec.shape, arrays[spec.name].shape, strict=True):
                if isinstance(symbol, str):
                    seen.setdefault(symbol, []).append(int(size))
    return {symbol: ShapeRange(min(sizes), max(sizes), max(sizes)) for symbol, sizes in seen.items()}


def default_cache() -> Path:
    """The user's folder of finished plans, `$XDG_CACHE_HOME/tmpdiff-export/plans` or under `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tmpdiff-export" / "plans"
