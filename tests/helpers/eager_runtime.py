"""A bundle's runtime whose engines are a pipeline's own denoiser, for tests of `attach` without a build."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from engines import DenoiseRuntime, Schedule
from engines.manifest import MODEL_OUTPUT
from tmpdiff_export.pipelines.families.table import family_of
from tmpdiff_export.pipelines.scheduler_table import sampler_table

PRECISION = "fp16"


class EagerRuntime(DenoiseRuntime):
    """What `attach` reads of a runtime, of a pipeline as it is; computes in float32."""

    def __init__(self, pipe: Any, num_steps: int, height: int, width: int) -> None:
        denoiser_class, family = family_of(pipe)
        channels = getattr(pipe, family.component).config.in_channels // family.packing**2
        shape = (channels, height // 8, width // 8)
        self.table = sampler_table(pipe.scheduler, num_steps, **family.sampler_options(pipe, num_steps, shape))
        inputs = [SimpleNamespace(name=name, dtype="float32") for name in family.inputs]
        self.manifest: Any = SimpleNamespace(
            bundle_id="0" * 64,
            precisions=(PRECISION,),
            model=SimpleNamespace(pipeline_class=type(pipe).__name__, denoiser_class=denoiser_class),
            denoisers={PRECISION: SimpleNamespace(inputs=inputs)},
            sampling=SimpleNamespace(
                num_inference_steps=num_steps, num_steps=self.table.num_steps, height=height, width=width,
                latents_shape=shape,
            ),
        )  # fmt: skip
        self.bundle: Any = SimpleNamespace(folder=Path("eager.bundle"))
        self._wrapper = family.wrap(pipe, height, width)

    @property
    def schedule(self) -> Schedule:
        """Every step by the one engine."""
        return Schedule.uniform(self.manifest.bundle_id, PRECISION, self.num_steps)

    def denoiser(self, precision: str) -> Any:
        return self

    @torch.inference_mode()
    def run(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """As an engine: inputs by name, in the order of the family."""
        return {MODEL_OUTPUT: self._wrapper(*map(torch.from_numpy, arrays.values())).numpy()}
