"""cache-dit on diffusers' denoiser: DBCache, with or without TaylorSeer, at settings that make a curve.

It is used as its documentation says: the denoiser is compiled as a whole after `enable_cache`, with a raised limit of
compilations. Both passes of classifier-free guidance are one batch, so that one cache sees every step once.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from engines.errors import BackendError
from engines.runtime import DenoiseRuntime
from tools.headline.methods import PEER, Batch, Denoise, Method
from tools.headline.peer import Peer

WORTH = (1.5, 1.9, 2.4, 3.1, 4.0)
"""All steps over computed ones: where a curve has its points."""
THRESHOLDS = (0.01, 0.999)
"""The range of the residual's relative difference; cache-dit's default is 0.08, and from 1 on it compares nothing."""
TRIALS = 4
"""Loops in which a threshold is looked for, a point."""
IN_A_ROW = (1, 2, 3, 4, 7)
"""Cached steps in a row; of 28 steps 15, 11, 9, 8 and 6 are computed."""
POLICIES = ("slow", "medium", "fast", "ultra")
"""cache-dit's own masks of computed steps: 18, 15, 11 and 8 of 28."""
SPARSE_SHARE = 0.21
"""Of the computed steps of a mask sparser than cache-dit's own, for the fast end: 6 of 28."""


@dataclass(frozen=True)
class Variant:
    """A way to use cache-dit.

    Attributes:
        name: of its curve.
        order: of TaylorSeer; 0 without.
        by: what makes its points: "threshold", "row" (cached steps in a row, whatever they differ) or "mask".
    """

    name: str
    order: int
    by: str


VARIANTS = (
    Variant("DBCache", 0, "threshold"),
    Variant("DBCache, TaylorSeer", 1, "threshold"),
    Variant("TaylorSeer, cached in a row", 1, "row"),
    Variant("TaylorSeer, steps mask", 1, "mask"),
)


class Cached:
    """cache-dit around a peer's denoiser, for one setting of a bundle."""

    def __init__(self, peer: Peer, runtime: DenoiseRuntime) -> None:
        os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")
        try:
            self._library: Any = importlib.import_module("cache_dit")
        except ImportError as error:
            raise BackendError("cache-dit is not installed; pip install cache-dit==1.5.3") from error
        self._peer, self._runtime = peer, runtime
        self._module = peer.twin()
        self._computed: list[int] = []

    def methods(self, group: str, variant: Variant, probe: Batch, points: int) -> Iterator[Method]:
        """Settings of a variant, the slowest first.

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
            yield Method(f"{label}, {name}", label, PEER, opened, self._mean_computed)

    def _settings(self, variant: Variant, probe: Batch, points: int) -> list[tuple[str, dict[str, Any]]]:
        num_steps = self._runtime.num_steps
        if variant.by == "mask":
            masks = {name: self._library.steps_mask(total_steps=num_steps, mask_policy=name) for name in POLICIES}
            masks["sparse"] = sparse_mask(num_steps)
            policy = {"steps_computation_policy": "static"}
            return [(name, policy | {"steps_computation_mask": masks[name]}) for name in list(masks)[-points:]]
        if variant.by == "row":
            return [
                (f"at most {count}", {"residual_diff_threshold": 1.0, "max_continuous_cached_steps": count})
                for count in IN_A_ROW[:points]
            ]

        def computed(threshold: float) -> int:
            with self._enabled(variant, {"residual_diff_threshold": threshold}) as denoise:
                denoise(probe)
            return self._computed[-1]

        wanted = [round(num_steps / times) for times in WORTH[:points]]
        return [
            (f"threshold {threshold:.3g}", {"residual_diff_threshold": threshold})
            for threshold in thresholds(computed, wanted, num_steps)
        ]

    @contextmanager
    def _enabled(self, variant: Variant, settings: dict[str, Any]) -> Iterator[Denoise]:
        library, module, runtime = self._library, self._module, self._runtime
        num_steps = runtime.num_steps

        def configured() -> dict[str, Any]:
            cache = library.DBCacheConfig(
                Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=max(2, num_steps // 8),
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
        compiled = torch.compile(module, backend=self._peer.compile_backend, dynamic=False)
        self._computed = []

        def call(**inputs: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                found: torch.Tensor = compiled(**inputs, return_dict=False)[0]
            return found

        def denoise(batch: Batch) -> np.ndarray:
            library.refresh_context(module, **configured())
            latents = self._peer.denoise(call, runtime.table, runtime.setting.guidance_scale, batch)
            self._computed.append(num_steps - len(library.summary(module, logging=False)[0].cached_steps))
            return latents

        try:
            yield denoise
        finally:
            library.disable_cache(module)

    def _mean_computed(self) -> float:
        """Thresholds cache other steps for other pictures."""
        return sum(self._computed) / len(self._computed)


def thresholds(computed: Callable[[float], int], wanted: list[int], num_steps: int) -> list[float]:
    """Thresholds that compute about as many steps as wanted, by bisection; ascending, no two of one number.

    Args:
        computed: steps that a threshold computes, falling with it.
        wanted: numbers of steps.
        num_steps: T; thresholds that cache nothing are left out.
    """
    known: dict[float, int] = {threshold: computed(threshold) for threshold in THRESHOLDS}
    for target in wanted:
        for _ in range(TRIALS):
            low = max((found for found, steps in known.items() if steps >= target), default=THRESHOLDS[0])
            high = min((found for found in known if found > low), default=THRESHOLDS[1])
            if abs(known[low] - target) <= num_steps // 28 or low == high or high / low < 1.01:
                break
            middle = float(np.sqrt(low * high))
            known[middle] = computed(middle)
    nearest = {min(known, key=lambda found: (abs(known[found] - target), found)) for target in wanted}
    chosen = {known[found]: found for found in sorted(nearest, reverse=True) if known[found] < num_steps}
    return sorted(chosen.values())


def sparse_mask(num_steps: int) -> list[int]:
    """A mask of few computed steps (1), as cache-dit's: the first ones, then with growing gaps, and the last one."""
    count = max(4, round(SPARSE_SHARE * num_steps))
    first = count // 2
    places = first + (num_steps - 1 - first) * np.linspace(0, 1, count - first + 1)[1:] ** 1.3
    computed = {*range(first), *np.round(places).astype(int).tolist()}
    return [int(step in computed) for step in range(num_steps)]
