"""Floating point arrays as the sampler computes with them: products and sums in float64, rounded once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


def floating(values: ArrayLike, name: str) -> NDArray[np.floating[Any]]:
    """As a floating point array, not copied.

    Raises:
        TypeError: it is of another kind; the text calls it `name`.
    """
    array = np.asarray(values)
    if not np.issubdtype(array.dtype, np.floating):
        raise TypeError(f"{name} has dtype {array.dtype}, expected float16, float32 or float64")
    return array


def scaled(values: NDArray[np.floating[Any]], factor: float) -> NDArray[np.float64]:
    """`values * factor` in float64, whatever the dtype of `values`."""
    product: NDArray[np.float64] = np.multiply(values, factor, dtype=np.float64)
    return product


def weighted_sum(terms: Sequence[tuple[NDArray[np.float32], float]]) -> NDArray[np.float32]:
    """The sum of arrays, at least one, times a factor each: in float64, term by term, rounded once to float32; read-only."""
    shape = terms[0][0].shape
    total, term = np.zeros(shape, np.float64), np.empty(shape, np.float64)
    for values, factor in terms:
        total += np.multiply(values, factor, out=term, dtype=np.float64)
    return frozen(total, np.float32)


def frozen(values: NDArray[np.floating[Any]], dtype: type[np.floating[Any]]) -> NDArray[Any]:
    """A read-only copy."""
    copy = np.array(values, dtype=dtype, order="C")
    copy.setflags(write=False)
    return copy
