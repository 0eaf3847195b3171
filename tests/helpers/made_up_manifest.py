"""A manifest to go with a calibration that is made up."""

from __future__ import annotations

from typing import Any

from calibration.document import Sensitivity
from engines.documents import FileEntry
from engines.manifest import (
    MANIFEST_VERSION,
    EngineEntry,
    Manifest,
    ModelEntry,
    RangeCalibrationEntry,
    manifest_text,
)
from engines.setting_entry import SettingEntry
from engines.text_entry import TextEntry


def manifest(found: Sensitivity) -> Manifest:
    """The manifest of a bundle that was calibrated so; there are no files to it."""
    file = FileEntry(path="engines/one.onnx", bytes=1_000_000, sha256="d" * 64)
    engine = EngineEntry(
        file=file, backend="onnxruntime", backend_version="1.20", device="cpu", lowering={}, onnx_sha256="d" * 64,
        recipe="none", sqnr_db=40.0, sqnr_floor_db=20.0, inputs=(), outputs=(),
    )  # fmt: skip
    emulated = engine.model_copy(update={"lowering": {"emulated MatMul": 4}})
    parts: dict[str, Any] = {
        "version": MANIFEST_VERSION,
        "created_with": "tests",
        "model": ModelEntry(pipeline_class="PixArtSigmaPipeline", denoiser_class="D", denoiser_sha256="c" * 64, parameters=7),
        "settings": (
            SettingEntry(
                scheduler="DPMSolverMultistepScheduler", num_inference_steps=found.num_steps, num_steps=found.num_steps,
                guidance_scale=4.5, latents_shape=(4, 32, 32), height=256, width=256, sampler=file,
            ),
        ),
        "texts": (TextEntry(tokenizer=file, max_tokens=32, pad_token_id=0, lowercase=True),),
        "text_encoder": (engine,),
        "vae_decoder": (engine,),
        "denoisers": {name: (emulated if name in ("fp8", "nvfp4") else engine,) for name in found.precisions},
        "range_calibration": RangeCalibrationEntry(prompts_sha256="b" * 64, num_prompts=2, num_batches=2, seed=0),
    }  # fmt: skip
    data = Manifest.model_construct(bundle_id="", settings_sha256="", **parts).model_dump(
        mode="json", exclude_unset=True
    )
    return Manifest.model_validate_json(manifest_text(data))
