"""An untrained pipeline that builds in seconds, for tests of the build rather than of pictures, and bundles of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from helpers.demo_build import linked_copy

from engines.manifest import LATENTS, TIMESTEP

if TYPE_CHECKING:
    from engines.runtime import DenoiseRuntime
    from tmpdiff_export.bundling.options import BuildOptions

PROMPTS = ("a red circle", "a small blue square in the center", "a green triangle")
UNSEEN = ("a large yellow ring", "a tiny white square at the top")


def save_tiny_pipeline(folder: Path, tokenizer: Path) -> None:
    """Writes a PixArtSigmaPipeline of 64 x 64 pictures and .5 M denoiser parameters.

    Args:
        folder: pipeline folder to make.
        tokenizer: a saved tokenizer to use.
    """
    from tools.acceptance.random_pipeline import save_random_pipeline

    save_random_pipeline(folder, tokenizer, heads=4, head_size=32, layers=2, latent_side=16)


def tiny_options(*precisions: str, num_steps: int = 4, backend: str = "onnxruntime", **changes: Any) -> BuildOptions:
    """Options to build it with; without precisions FP16 and INT8."""
    from engines.precision import Precision
    from tmpdiff_export.bundling.options import BuildOptions

    chosen = tuple(Precision(name) for name in precisions or ("fp16", "int8"))
    return BuildOptions(chosen, PROMPTS, **{"steps": (num_steps,), "backend": backend, **changes})


def calibrate_tiny(bundle: Path, copy: Path) -> None:
    """Makes a copy of a bundle of FP16 and INT8 and calibrates it; INT8 is said to be twice as fast."""
    from calibration import CalibrationOptions, HighSteps
    from engines.text import PromptFile
    from tmpdiff_export.calibrate.bundle import calibrate_bundle

    linked_copy(bundle, copy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tmpdiff_export.calibrate.bundle._latencies", lambda *arguments: {"fp16": 2.0, "int8": 1.0})
        calibrate_bundle(copy, PromptFile(PROMPTS, UNSEEN), CalibrationOptions(HighSteps(2)))


def build_torch_variants(pipeline: Path, out: Path) -> None:
    """Builds what `conftest.torch_variants` says."""
    from engines.precision import Precision
    from tmpdiff_export.bundling.bundle import build
    from tmpdiff_export.targets.torch import attention

    options = tiny_options(
        "fp16",
        "fp8",
        "nvfp4",
        backend="torch",
        device="cpu",
        share_weights=Precision.FP8,
        fp8_attention=(Precision.NVFP4,),
    )
    with pytest.MonkeyPatch.context() as patch:  # its attention is short and narrow
        patch.setattr(attention, "LEAST_TOKENS", 1)
        patch.setattr(attention, "HEAD_SIZES", (8, 16, 24, 32, 64))
        build(pipeline, out, options)


def denoiser_inputs(runtime: DenoiseRuntime, rows: int) -> dict[str, np.ndarray]:
    """Inputs for an engine of such a bundle, every row its own."""
    rng = np.random.default_rng(1)
    text = runtime.encode(list(PROMPTS)).guided
    whole = {name: np.concatenate([values, values])[:rows] for name, values in text.items()}
    shape = (rows, *runtime.setting.latents_shape)
    return {
        LATENTS: rng.standard_normal(shape, dtype=np.float32),
        TIMESTEP: np.full(rows, runtime.table.timesteps[1], np.float32),
        **whole,
    }
