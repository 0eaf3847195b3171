"""cache-dit on diffusers' denoiser: DBCache, with or without TaylorSeer, at thresholds that make a curve."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from engines.errors import BackendError
from engines.runtime import DenoiseRuntime
from tools.headline.methods import PEER, Batch, Denoise, Method
from tools.headline.peer import Peer

THRESHOLDS = (0.02, 0.03, 0.045, 0.07, 0.1, 0.15, 0.22, 0.33, 0.5, 0.75, 1.1, 1.6)
"""Of the residual's relative difference; cache-dit's default is 0.08."""
POLICIES = ("slow", "medium", "fast", "ultra")
"""cache-dit's own masks of computed steps."""


@dataclass(frozen=True)
class Variant:
    """A way to use cache-dit.

    Attributes:
        name: of its curve.
        first_blocks: that are always computed (Fn).
        order: of TaylorSeer; 0 without.
        masks: steps by `POLICIES` in place of thresholds.
    """

    name: str
    first_blocks: int
    order: int
    masks: bool = False


VARIANTS = (
    Variant("DBCache F1B0", 1, 0),
    Variant("DBCache F4B0", 4, 0),
    Variant("DBCache F1B0, TaylorSeer 1", 1, 1),
    Variant("DBCache F1B0, TaylorSeer 2", 1, 2),
    Variant("fixed masks, TaylorSeer 1", 1, 1, masks=True),
)


class Cached:
    """cache-dit around a peer's denoiser, for one setting of a bundle.

    Attributes:
        computed: steps of the last loop that were not taken from the cache.
        variants: that the denoiser has enough blocks for.
    """

    def __init__(self, peer: Peer, runtime: DenoiseRuntime) -> None:
        os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")
        try:
            self._library: Any = importlib.import_module("cache_dit")
        except ImportError as error:
            raise BackendError("cache-dit is not installed; pip install cache-dit==1.5.3") from error
        self._peer, self._runtime = peer, runtime
        self.computed = 0
        blocks = len(peer.module.transformer_blocks)
        self.variants = tuple(variant for variant in VARIANTS if variant.first_blocks < blocks)

    def methods(self, group: str, variant: Variant, probe: Batch, points: int) -> Iterator[Method]:
        """Settings of a variant, by the number of steps that they compute of a probe.

        Args:
            group: prefix of the names.
            variant: which.
            probe: what thresholds are tried on.
            points: most settings.
        """
        for name, settings in self._settings(variant, probe, points):

            @contextmanager
            def opened(settings: dict[str, Any] = settings) -> Iterator[Denoise]:
                with self._enabled(variant, settings) as denoise:
                    yield denoise

            label = f"{group} {variant.name}"
            yield Method(f"{label}, {name}", label, PEER, opened, lambda: self.computed)

    def _settings(self, variant: Variant, probe: Batch, points: int) -> list[tuple[str, dict[str, Any]]]:
        num_steps = self._runtime.num_steps
        if variant.masks:
            masks = {
                name: self._library.steps_mask(total_steps=num_steps, mask_policy=name) for name in POLICIES[-points:]
            }
            return [
                (name, {"steps_computation_mask": mask, "steps_computation_policy": "static"})
                for name, mask in masks.items()
            ]
        found: dict[int, float] = {}  # computed steps: least threshold
        for threshold in THRESHOLDS:
            with self._enabled(variant, {"residual_diff_threshold": threshold}) as denoise:
                denoise(probe)
            found.setdefault(self.computed, threshold)
        found.pop(num_steps, None)
        kept = spread(sorted(found), points)
        return [
            (f"threshold {found[computed]:g}", {"residual_diff_threshold": found[computed]})
            for computed in reversed(kept)
        ]

    @contextmanager
    def _enabled(self, variant: Variant, settings: dict[str, Any]) -> Iterator[Denoise]:
        library, module, runtime = self._library, self._peer.module, self._runtime
        num_steps = runtime.num_steps

        def configured() -> dict[str, Any]:
            cache = library.DBCacheConfig(
                Fn_compute_blocks=variant.first_blocks, Bn_compute_blocks=0, max_warmup_steps=max(2, num_steps // 8),
                num_inference_steps=num_steps, enable_separate_cfg=False, **settings,
            )  # fmt: skip
            found = {"cache_config": cache}
            if variant.order:  # the last block of an MMDiT has no text behind it, so that there is none to forecast
                found["calibrator_config"] = library.TaylorSeerCalibratorConfig(
                    taylorseer_order=variant.order, enable_encoder_calibrator=False
                )
            return found

        adapter = library.BlockAdapter(
            transformer=module,
            blocks=module.transformer_blocks,
            forward_pattern=library.ForwardPattern.Pattern_1,
            has_separate_cfg=False,
        )
        library.enable_cache(adapter, **configured())

        def denoise(batch: Batch) -> np.ndarray:
            library.refresh_context(module, **configured())
            latents = self._peer.denoise(self._peer.call, runtime.table, runtime.setting.guidance_scale, batch)
            self.computed = num_steps - len(library.summary(module, logging=False)[0].cached_steps)
            return latents

        try:
            yield denoise
        finally:
            library.disable_cache(module)


def spread(values: Sequence[int], count: int) -> list[int]:
    """At most `count` of ascending values, the ends among them, evenly spread by value."""
    if len(values) <= count:
        return list(values)
    wanted = np.linspace(values[0], values[-1], count)
    return sorted({min(values, key=lambda value: abs(value - target)) for target in wanted})
