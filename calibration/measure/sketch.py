"""Sketches of error vectors: as many numbers as inner products need, and no more.

A sketch is the vector itself where it has `SIZE` numbers at most. Of a longer one every component is added, with a sign, to
one of `SIZE` sums (a count sketch: Charikar, Chen and Farach-Colton, ICALP 2002). Either is kept as float16 of the vector
over its norm: 2 KiB per sample and measurement, 2.7 KiB as text.

Inner products of sketches are those of the vectors in the mean, with a standard deviation of at most sqrt(2 / SIZE) = 4.4 %
of the product of both norms; float16 adds less than a thousandth. Each sample has sums and signs of its own, so that a mean
over S samples is closer by sqrt(S). They follow from integer arithmetic alone: the same on every machine and in every
version of numpy, as a journal may move.
"""

from __future__ import annotations

import base64

import numpy as np

SIZE = 1024
_BUCKET_BITS = 10
_SEED = 0x9E3779B97F4A7C15


def direction(error: np.ndarray, sample: int) -> np.ndarray:
    """The sketch of an error vector over the vector's norm.

    Args:
        error: finite, any shape and memory layout; D numbers.
        sample: index of the sample, which says how sums and signs are laid out.

    Returns:
        float16 [min(D, SIZE)]; zeros for a vector of zeros.
    """
    flat: np.ndarray = np.ascontiguousarray(error, dtype=np.float64).reshape(-1)
    norm = float(np.sqrt(np.sum(flat**2)))
    if norm == 0:
        return np.zeros(min(len(flat), SIZE), dtype=np.float16)
    flat = flat / norm
    if len(flat) > SIZE:
        hashed = _hashed(len(flat), sample)
        signs = 1.0 - 2.0 * (hashed & np.uint64(1)).astype(np.float64)
        buckets = (hashed >> np.uint64(64 - _BUCKET_BITS)).astype(np.int64)
        flat = np.bincount(buckets, weights=flat * signs, minlength=SIZE)
    return flat.astype(np.float16)


def _hashed(count: int, sample: int) -> np.ndarray:
    """uint64 [count]: the splitmix64 sequence (Steele, Lea and Flood, OOPSLA 2014) that starts from a sample's number."""
    with np.errstate(over="ignore"):
        state = np.uint64(_SEED) * (np.arange(1, count + 1, dtype=np.uint64) + (np.uint64(sample) << np.uint64(32)))
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(state ^ (state >> np.uint64(31)))


def to_text(sketch: np.ndarray) -> str:
    """A sketch as a journal keeps it."""
    return base64.b64encode(sketch.astype("<f2").tobytes()).decode("ascii")


def from_text(text: str) -> np.ndarray:
    """`to_text` read back, float16 [K], read-only.

    Raises:
        ValueError: the text is no sketch: no base64, no whole numbers, none at all, or some that are not finite.
    """
    sketch = np.frombuffer(base64.b64decode(text, validate=True), dtype="<f2").astype(np.float16, copy=False)
    if not len(sketch):
        raise ValueError("a sketch holds no numbers")
    if not np.isfinite(sketch).all():
        raise ValueError("a sketch holds numbers that are not finite")
    return sketch
