"""A bundle's runtime whose engines are a pipeline's own denoiser, for tests of `attach` without a build."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from engines import DenoiseRuntime, Schedule
from engines.documents import FileEntry
from engines.manifest import MODEL_OUTPUT
from engines.setting_entry import SettingEntry
from tmpdiff_export.pipelines.families.table import family_of
from tmpdiff_export.pipelines.scheduler_table import sampler_table

PRECISION = "fp16"


class EagerRuntime(DenoiseRuntime):
    """What `attach` reads of a runtime, of a pipeline as it is; computes in float32."""

    def __init__(self, pipe: Any, num_steps: int, height: int, width: int) -> None:
        denoiser_class, family = family_of(pipe)
        config = getattr(pipe, family.component).config
        shape = (config.in_channels // family.packing**2, height // 8, width // 8)
        tokens = shape[1] * shape[2] // family.token_side(config) ** 2
        options = family.sampler_options(pipe.scheduler, num_steps, tokens)
        self.table = sampler_table(pipe.scheduler, num_steps, **options)
        self.setting = SettingEntry(
            scheduler=self.table.scheduler, num_inference_steps=num_steps, num_steps=self.table.num_steps,
            guidance_scale=1, latents_shape=shape, height=height, width=width,
            sampler=FileEntry(path="settings/default/sampler.json", sha256="0" * 64, bytes=1),
        )  # fmt: skip
        engine = SimpleNamespace(inputs=[SimpleNamespace(name=name, dtype="float32") for name in family.inputs])
        self.manifest: Any = SimpleNamespace(
            bundle_id="0" * 64,
            precisions=(PRECISION,),
            model=SimpleNamespace(pipeline_class=type(pipe).__name__, denoiser_class=denoiser_class),
            reference=engine,
            denoisers={PRECISION: (engine,)},
        )
        self.bundle: Any = SimpleNamespace(folder=Path("eager.bundle"))
        self._wrapper = family.wrap(pipe)

    @property
    def schedule(self) -> Schedule:
        """Every step by the one engine."""
        return Schedule.uniform(self.manifest.bundle_id, self.setting, PRECISION)

    def denoiser(self, precision: str) -> Any:
        return self

    @torch.inference_mode()
    def run(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """As an engine: inputs by name, in the order of the family."""
        return {MODEL_OUTPUT: self._wrapper(*map(torch.from_numpy, arrays.values())).numpy()}
