"""Quantization recipes as data: how scales are chosen, and what stays in high precision and why."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch

from engines.precision import Precision
from tmpdiff_export.quantization import nvfp4


@dataclass(frozen=True)
class SmoothQuant:
    """Scales that divide the range between input and weight: `weight^(1 - alpha) / input^alpha` of every channel."""

    alpha: float


@dataclass(frozen=True)
class Awq:
    """Scales `input^alpha / weight^(1 - alpha)` with the alpha of the least error of a layer's output.

    Attributes:
        alpha_step: from 0 to 1 in such steps.
    """

    alpha_step: float


@dataclass(frozen=True)
class Variant:
    """One way of choosing scales within a recipe; a build keeps the best SQNR, less the price of branches (`low_rank`).

    Attributes:
        name: how the manifest and the tables call it.
        smoothing: what scales channels of inputs and weights, None where ranges are taken as they are.
        rank: of a 16-bit branch beside NVFP4 codes (`low_rank`), 0 for none.
    """

    name: str
    smoothing: SmoothQuant | Awq | None = None
    rank: int = 0


@dataclass(frozen=True)
class Recipe:
    """How a precision is made.

    Attributes:
        precision: the precision it makes.
        opset: ONNX opset its graph needs (4-bit integers exist from opset 21 on, 4-bit floats from 23 on).
        variants: the alternatives tried at build time, empty for the reference.
        high_precision: patterns over module names that are not quantized, and why.
        sqnr_floor_db: a build whose engine is below this against FP32 torch fails.
        block_size: weights per scale along K, None where scales are per tensor or per channel.
        convolutions: the least number of channels, in and out, of plain 2-D convolutions that are quantized too, not only linear
            layers; None for no convolutions.
        weight_only: whether inputs stay as they are.
    """

    precision: Precision
    opset: int
    variants: tuple[Variant, ...]
    high_precision: tuple[tuple[str, str], ...]
    sqnr_floor_db: float
    block_size: int | None = None
    convolutions: int | None = None
    weight_only: bool = False


# Patterns over module names inside the denoiser, and why. Measured on a 16 M PixArt, keeping the modulation and the
# embedders out of W8A8 took the FP8 error from .027 to .007, and on a small Flux from .037 to .003.
_OUTPUT = (
    ("norm_out*", "output modulation: one row per sample, its error is the output's error"),
    ("proj_out*", "final projection to the latents: its error is the output's error"),
    ("conv_in*", "first convolution of a UNet: reads the latents directly"),
    ("conv_out*", "last convolution of a UNet: its error is the output's error"),
)
_ACTIVATION_OUTLIERS = (
    ("*embed*", "patch, time and position embedders: few operations, and their error enters every layer"),
    ("*adaln*", "adaptive layer norm modulation: one row per sample, its error scales whole feature maps"),
    ("*time*", "timestep projections: one row per sample, as above"),
    ("*.norm*", "modulation and normalisation projections inside blocks, as above"),
    ("caption_projection*", "text projection: runs on the few text tokens only"),
    ("*.conv_shortcut", "reads a UNet's residual stream without a norm before it: its range changes over the steps"),
    ("*samplers.*", "down- and upsampling convolutions: as above"),
    *_OUTPUT,
)

# The floors are set well below what trained denoisers give and well above what a wrong scale, a
# dropped layer or a miscompiled graph gives (an optimizer that drops a cast costs 15 dB or more).
RECIPES: dict[Precision, Recipe] = {
    Precision.FP16: Recipe(
        Precision.FP16,
        opset=20,
        variants=(),
        high_precision=(("*", "the reference"),),
        sqnr_floor_db=50.0,
    ),
    Precision.FP8: Recipe(
        Precision.FP8,
        opset=20,
        variants=(Variant("max"),),
        # FP8's few bits show in convolutions near the latents: at SDXL's size with random weights, all residual ones alone give
        # 27.1 dB, those that are left 36.3 (the linear layers 19.0), and are three fifths of them. Small UNets, which have no
        # others, fall from 33 and 29 to 24 and 21 dB, so that narrow convolutions stay as they are.
        high_precision=(
            *_ACTIVATION_OUTLIERS,
            ("down_blocks.[01].*.conv[12]", "first convolutions of a UNet: their error passes through all others"),
        ),
        sqnr_floor_db=22.0,
        convolutions=512,
    ),
    Precision.INT8: Recipe(
        Precision.INT8,
        opset=20,
        variants=(
            Variant("max"),
            Variant("smoothquant-0.5", SmoothQuant(alpha=0.5)),
        ),
        high_precision=_ACTIVATION_OUTLIERS,
        sqnr_floor_db=22.0,
        convolutions=1,
    ),
    Precision.INT4: Recipe(
        Precision.INT4,
        opset=21,
        variants=(
            Variant("round-to-nearest"),
            Variant("awq", Awq(alpha_step=0.25)),
        ),
        # Weight-only is chosen for its size, and 16-bit activations bear modulation and embedders: .7 dB on the
        # embedded pipeline (27.0 to 26.3) for a file smaller by 23 %.
        high_precision=_OUTPUT,
        sqnr_floor_db=14.0,
        block_size=128,
        weight_only=True,
    ),
    Precision.NVFP4: Recipe(
        Precision.NVFP4,
        opset=23,
        # Alone, no SmoothQuant: +.5 dB with one set of prompts on the embedded pipeline, -1.1 dB with another. A branch
        # takes what it moves into the weights.
        variants=(
            Variant("max"),
            *(Variant(f"rank{rank}", SmoothQuant(alpha=0.5), rank) for rank in (16, 32, 64)),
        ),
        # There, quantizing modulation and embedders too costs .9 and 1.2 dB for a file smaller by 22 %.
        high_precision=_ACTIVATION_OUTLIERS,
        sqnr_floor_db=12.0,  # 21.9 and 22.4 dB there, for two sets of prompts
        block_size=nvfp4.BLOCK_SIZE,
    ),
}


def stays_high_precision(module_name: str, recipe: Recipe) -> str | None:
    """The reason why a module of the denoiser is not quantized by `recipe`, or None if it is."""
    for pattern, reason in recipe.high_precision:
        if fnmatch(module_name, pattern):
            return reason
    return None
