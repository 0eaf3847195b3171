"""How far a run strayed from the reference run: latent error E, and PSNR and SSIM of pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from skimage.metrics import mean_squared_error, structural_similarity


def relative_error(latents: np.ndarray, reference: np.ndarray) -> float:
    """E of one sample: ||latents - reference||^2 / ||reference||^2, summed in float64.

    Args:
        latents: final latents, any shape.
        reference: final latents of the reference run, the same shape.

    Raises:
        ValueError: shapes differ, or the reference is all zero.
    """
    if latents.shape != reference.shape:
        raise ValueError(f"latents have shape {latents.shape}, the reference {reference.shape}; expected equal ones")
    exact = np.asarray(reference, dtype=np.float64)
    power = float(np.sum(exact**2))
    if power == 0:
        raise ValueError("the reference latents are all zero; a relative error is not defined")
    return float(np.sum((np.asarray(latents, dtype=np.float64) - exact) ** 2)) / power


LIMIT_MEDIANS = 10.0
"""No sample counts for more than so many times the median of all samples."""

DEPARTED = 0.05
"""Least E of a departure: below it a run still ends at nearly the same picture, whatever the others do."""


def limited(errors: np.ndarray) -> np.ndarray:
    """E of samples, none counting for more than `LIMIT_MEDIANS` medians: for means that one sample does not decide.

    E of a departure is hundreds of times that of the other samples, and errors of different steps no longer add up in it:
    what scores say about all others would drown. Winsorizing by the median (Tukey's term) leaves everything else as it is.

    Args:
        errors: float64 [..., S], non-negative.

    Returns:
        The same shape. Where the median is 0, nothing is limited.
    """
    medians = np.median(errors, axis=-1, keepdims=True)
    return np.minimum(errors, np.where(medians > 0, LIMIT_MEDIANS * medians, np.inf))


def mean(values: Sequence[float]) -> float:
    """Mean of an exactly rounded sum: does not depend on the order of the values."""
    return math.fsum(values) / len(values)


def typical_error(errors: Sequence[float]) -> float:
    """Mean of E over samples, `limited`. Scores and predictions are made of it."""
    return mean(limited(np.array(errors)).tolist())


def typical_errors(errors: np.ndarray) -> np.ndarray:
    """`typical_error` of many sets of samples at once, but for the last bits; float64 [..., S] -> [...]."""
    found: np.ndarray = limited(errors).mean(axis=-1)
    return found


def departed(errors: np.ndarray, median: float | None = None) -> np.ndarray:
    """Which samples departed, bool [S]: their runs ended elsewhere than the reference's.

    Now and then a small error decides early in the loop which picture is drawn, and E is then far above that of other
    samples, however small the error was.

    Args:
        errors: float64 [S].
        median: of samples drawn at random; None where these are.
    """
    usual = float(np.median(errors)) if median is None else median
    found: np.ndarray = errors > max(DEPARTED, LIMIT_MEDIANS * usual)
    return found


def picture_ssim(picture: np.ndarray, reference: np.ndarray) -> float:
    """Structural similarity (scikit-image's defaults) of two pictures, uint8 [H, W, 3], at least 7x7."""
    _check_pictures(picture, reference)
    return float(structural_similarity(reference, picture, channel_axis=-1, data_range=255))


def picture_mse(picture: np.ndarray, reference: np.ndarray) -> float:
    """Mean squared difference of two pictures, uint8 [H, W, 3], in squared grey levels."""
    _check_pictures(picture, reference)
    return float(mean_squared_error(reference, picture))


def picture_errors(picture: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """ "ssim" and "mse" of two pictures, uint8 [H, W, 3]."""
    return {"ssim": picture_ssim(picture, reference), "mse": picture_mse(picture, reference)}


def psnr_db(mses: Sequence[float]) -> float | None:
    """PSNR in dB of a set of pictures from their mean squared differences.

    The differences are averaged before the logarithm: one picture that comes out identical, with its
    infinite PSNR, then does not drown the others. None when all are identical.
    """
    squared = mean(mses)
    return 10 * math.log10(255**2 / squared) if squared > 0 else None


def _check_pictures(picture: np.ndarray, reference: np.ndarray) -> None:
    for name, array in (("picture", picture), ("reference picture", reference)):
        if array.dtype != np.uint8 or array.ndim != 3:
            raise ValueError(f"{name} is {array.dtype} {array.shape}, expected uint8 [H, W, 3]")
    if picture.shape != reference.shape:
        raise ValueError(f"picture has shape {picture.shape}, its reference {reference.shape}; expected equal ones")
