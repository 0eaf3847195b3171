"""The denoiser's engines: weights stored once, layers quantized one after the other, engines made and compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from engines.precision import REFERENCE, Precision
from tmpdiff_export.bundling.engine import EngineName, StartedEngine, StoredFile, Trial, start_trial
from tmpdiff_export.bundling.observed import Ranges
from tmpdiff_export.bundling.site import Site
from tmpdiff_export.bundling.weights import ranges_digest, shared_tensors, store_codes, store_plain
from tmpdiff_export.quantization.codes import AttentionRange, LayerRange
from tmpdiff_export.quantization.low_rank import price_db, share_of_fp8
from tmpdiff_export.quantization.recipes import RECIPES
from tmpdiff_export.quantization.sixteen_bit import NO_RECIPE
from tmpdiff_export.targets.target import EngineJob, PreparedEngine, SourceModel


@dataclass(frozen=True, eq=False)
class _Variant:
    """A precision by one variant of its recipe; NO_RECIPE for the reference."""

    name: str
    job: EngineJob
    prepared: PreparedEngine
    ranges: Mapping[str, LayerRange]
    codes: StoredFile | None


class DenoiserEngines:
    """The engines of one denoiser; its weight files are written when this is made."""

    def __init__(
        self,
        site: Site,
        model: SourceModel,
        ranges: Ranges,
        attention: Mapping[str, AttentionRange],
        weight: Callable[[str], torch.Tensor],
    ) -> None:
        """Prepares every engine and stores its weights.

        Args:
            site: the build.
            model: the denoiser.
            ranges: of all precisions but the reference.
            attention: of the layers whose attention can be in FP8.
            weight: of a layer by the layer's name, on any device.

        Raises:
            BuildError: the denoiser cannot be exported, or a weight does not fit.
        """
        self._site, self._model = site, model
        self._ranges, self._attended = ranges, attention
        form, shared = site.target.form, site.options.share_weights
        self._variants: dict[Precision, list[_Variant]] = {}
        self._started: dict[Precision, list[_Variant]] = {}
        for precision in site.options.precisions:
            if precision is REFERENCE:
                continue
            self._variants[precision] = []
            for variant, found in ranges[precision].items():
                if self._share_of_fp8(found) >= 1:
                    continue  # FP8 would take no more bytes
                job, prepared = self._prepare(precision, precision, variant)
                codes = store_codes(site, form, job, site.denoiser_sha256, weight)
                self._variants[precision].append(_Variant(variant, job, prepared, found, codes))
        if shared is None:
            self._variants[REFERENCE] = [_Variant(NO_RECIPE, *self._prepare(REFERENCE, None, NO_RECIPE), {}, None)]
            of_reference = self._variants[REFERENCE][0].prepared
        else:  # which of its variants is kept is not known yet; what is not quantized is the same for all
            _, of_reference = self._prepare(REFERENCE, shared, self._variants[shared][0].name)
        engines = {
            item.value: (of_reference if item is REFERENCE else self._variants[item][0].prepared).tensors
            for item in site.options.precisions
        }
        self._plain = {
            readers: store_plain(site, form, model, readers, tensors, site.denoiser_sha256)
            for readers, tensors in shared_tensors(engines).items()
        }

    def start(self, precision: Precision, shared_variant: str | None = None) -> StartedEngine:
        """Starts an engine.

        Args:
            precision: of the engine.
            shared_variant: for the reference that shares weights, the variant of the other precision that was kept.
        """
        shared = self._site.options.share_weights
        if precision is REFERENCE and shared is not None:
            assert shared_variant is not None
            (other,) = (item for item in self._variants[shared] if item.name == shared_variant)
            job, prepared = self._prepare(REFERENCE, shared, shared_variant)
            variants = [replace(other, name=NO_RECIPE, job=job, prepared=prepared)]
        else:
            variants = self._variants[precision]
        self._started[precision] = variants
        return StartedEngine(
            precision.value, [self._trial(precision, item, self._model, precision.value) for item in variants]
        )

    def start_other(self, precision: Precision, recipe: str, model: SourceModel, name: str) -> StartedEngine:
        """Starts an engine of another picture size or text length, which reads the same weight files.

        Args:
            precision: of the engine; `start` was called for it.
            recipe: of the variant that was kept of it.
            model: the denoiser, with a check at that size and text length.
            name: of the engine.
        """
        (kept,) = (item for item in self._started[precision] if item.name == recipe)
        job = replace(kept.job, model=model, name=name)
        prepared = self._site.target.prepare(job)
        return StartedEngine(name, [self._trial(precision, replace(kept, prepared=prepared), model, name)])

    def _trial(self, precision: Precision, item: _Variant, model: SourceModel, name: str) -> Trial:
        plain = [file for readers, file in self._plain.items() if precision.value in readers]
        trial = start_trial(
            self._site,
            EngineName(name, item.name),
            item.prepared,
            [*plain, *([] if item.codes is None else [item.codes])],
            {
                "check": model.checked,
                "guided": model.batch_per_picture,
                "ranges": ranges_digest(item.ranges),
                "sixteen_bit": precision is REFERENCE,
                "attention": {layer: list(found.scales) for layer, found in self._attention(precision).items()},
            },
        )
        return replace(trial, price_db=price_db(self._share_of_fp8(item.ranges)))

    def _share_of_fp8(self, ranges: Mapping[str, LayerRange]) -> float:
        """See `low_rank.share_of_fp8`; branches of one variant have one rank."""
        rank = max((found.rank for found in ranges.values()), default=0)
        if not rank:
            return 0.0
        shapes = (self._model.module.get_submodule(name).weight.shape for name in ranges)
        return share_of_fp8(((width, depth) for width, depth in shapes), rank)

    def job(self, precision: Precision, coded: Precision | None, variant: str) -> EngineJob:
        """An engine whose layers have codes of a precision, by a variant of its recipe, or none."""
        return EngineJob(
            name=precision.value,
            model=self._model,
            recipe=NO_RECIPE if precision is REFERENCE else variant,
            precision=coded or REFERENCE,
            ranges={} if coded is None else self._ranges[coded][variant],
            floor_db=RECIPES[precision if coded is None else coded].sqnr_floor_db,
            sixteen_bit=precision is REFERENCE,
            attention=self._attention(precision),
        )

    def _prepare(self, precision: Precision, coded: Precision | None, variant: str) -> tuple[EngineJob, PreparedEngine]:
        job = self.job(precision, coded, variant)
        return job, self._site.target.prepare(job)

    def _attention(self, precision: Precision) -> Mapping[str, AttentionRange]:
        return self._attended if precision in self._site.options.fp8_attention else {}
