"""One build in progress: engines are started, waited for, and put together as a bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from engines.documents import canonical_json
from engines.files import sha256_bytes, staged_folder
from engines.manifest import CoverageEntry, EngineEntry, Manifest, RangeCalibrationEntry
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
from tmpdiff_export.bundling.manifest import write_manifest
from tmpdiff_export.bundling.observed import Runs, find_all_ranges, gather, gather_checks, shape_name
from tmpdiff_export.bundling.onnx_files import ModelJobs, keep_graphs
from tmpdiff_export.bundling.site import Site
from tmpdiff_export.bundling.stage_files import link
from tmpdiff_export.pipelines.families.family import DENOISER
from tmpdiff_export.pipelines.settings import Setting
from tmpdiff_export.quantization.coverage import coverage, multiply_adds, warning
from tmpdiff_export.weights.streamed import OnDevice


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


class Making:
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
        covered = self._coverage(engines, multiply_adds(module, runs.search[0]))
        return self._put_together(out, runs, covered)

    def _coverage(self, engines: DenoiserEngines, counts: Mapping[str, int]) -> dict[str, CoverageEntry]:
        """How much of each quantized engine is; what is little is said."""
        found = {}
        for precision in self.site.options.precisions:
            if precision is not REFERENCE:
                job = engines.job(precision, precision, self.built[precision.value].entry.recipe)
                share = coverage(counts, job.ranges)
                found[precision.value] = share
                if line := warning(precision.value, share):
                    self.site.tell(f"warning: {line}")
        return found

    def _start_text_encoders(self) -> list[StartedComponent]:
        """One for every text length."""
        by_length = {setting.text_length: setting for setting in reversed(self.site.settings)}
        started = []
        for setting in sorted(by_length.values(), key=self.site.settings.index):
            made = replace(self._made(TEXT_ENCODER, setting, False), text_length=setting.text_length)
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

    def _put_together(self, out: Path, runs: Runs, covered: Mapping[str, CoverageEntry]) -> Manifest:
        site, options = self.site, self.site.options
        files: dict[str, Path] = {}
        entries: dict[str, list[EngineEntry]] = {}
        for kind in (TEXT_ENCODER, VAE_DECODER, *(item.value for item in options.precisions)):
            for made in (item for item in self.made_for.values() if item.kind == kind):
                built = self.built[made.name]
                entry = built.entry.model_copy(
                    update={"for_size": made.size, "for_text": made.text_length, "coverage": covered.get(kind)}
                )
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
