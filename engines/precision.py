"""The precisions an engine can be built at."""

from __future__ import annotations

from enum import StrEnum

from engines.errors import TmpDiffError


class Precision(StrEnum):
    """Weight and activation format of a denoiser engine.

    FP16: 16-bit weights and activations, the reference every error is measured against.
    FP8: E4M3 weights and activations (W8A8), static per-tensor scales.
    INT8: 8-bit weights (per-channel scales) and activations (static per-tensor scales), W8A8.
    INT4: 4-bit weights in blocks, 16-bit activations (weight-only).
    NVFP4: E2M1 weights and activations (W4A4) in blocks of 16, with an E4M3 scale per block and one FP32 scale
        per tensor; block scales of activations are dynamic. Tensor cores take it from Blackwell on.
    """

    FP16 = "fp16"
    FP8 = "fp8"
    INT8 = "int8"
    INT4 = "int4"
    NVFP4 = "nvfp4"


REFERENCE = Precision.FP16
# What is built unless other precisions are named; NVFP4 runs on one generation of GPUs only.
DEFAULT_PRECISIONS = (Precision.FP16, Precision.FP8, Precision.INT8, Precision.INT4)

BITS_PER_WEIGHT = {
    Precision.FP16: 16.0,
    Precision.FP8: 8.0,
    Precision.INT8: 8.0,
    Precision.INT4: 4.0 + 16 / 128,
    Precision.NVFP4: 4.0 + 8 / 16,
}
"""Of the stored weights of a quantized layer, with scales."""


def parse_precisions(text: str) -> tuple[Precision, ...]:
    """The precisions named in a comma-separated list, each once, the reference always among them.

    Raises:
        TmpDiffError: an unknown, repeated or missing name.
    """
    names = [name.strip().lower() for name in text.split(",") if name.strip()]
    known = [precision.value for precision in Precision]
    for name in names:
        if name not in known:
            raise TmpDiffError(f"unknown precision {name!r}; choose from {', '.join(known)}")
    if len(set(names)) != len(names):
        raise TmpDiffError(f"precision list {text!r} repeats a name; give each once")
    if REFERENCE not in names:
        raise TmpDiffError(
            f"precision list {text!r} lacks {REFERENCE.value}, the reference every error is measured against; add it"
        )
    return tuple(sorted((Precision(name) for name in names), key=known.index))
