"""Sketches of error vectors: inner products within what is stated, the same on every machine."""

from __future__ import annotations

import base64
import hashlib

import numpy as np
import pytest

from calibration.measure.sketch import SIZE, direction, from_text, to_text

BOUND = np.sqrt(2 / SIZE)


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.sqrt(np.sum(vector**2))


def product(a: np.ndarray, b: np.ndarray, sample: int) -> float:
    return float(direction(a, sample).astype(np.float64) @ direction(b, sample).astype(np.float64))


def misses(size: int, samples: int, pair) -> np.ndarray:
    """By how much inner products of sketches miss those of the vectors, over samples."""
    found = []
    for sample in range(samples):
        a, b = pair(np.random.default_rng((size, sample)), size)
        found.append(product(a, b, sample) - unit(a) @ unit(b))
    return np.array(found)


def oblique(random: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Two vectors at a random angle."""
    a, b = random.normal(size=(2, size))
    share = random.uniform(-1, 1)
    return a, share * a + np.sqrt(1 - share**2) * b


def alike(random: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    a = random.normal(size=size)
    return a, a


def sparse(_: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Two vectors of 32 components each, evenly spread; none in common."""
    a, b = np.zeros((2, size))
    a[:: size // 32], b[1 :: size // 32] = 1.0, 1.0
    return a, b


@pytest.mark.parametrize(("size", "samples"), [(4096, 1500), (262_144, 60)])
@pytest.mark.parametrize("pair", [oblique, alike, sparse])
def test_inner_products_are_right_in_the_mean_and_as_close_as_is_stated(size: int, samples: int, pair) -> None:
    found = misses(size, samples, pair)
    assert found.std() < BOUND * (1 + 3 / np.sqrt(2 * samples))
    assert abs(found.mean()) < 3.5 * BOUND / np.sqrt(samples)


def test_samples_have_sketches_of_their_own() -> None:
    a, b = oblique(np.random.default_rng(0), 4096)
    assert len({product(a, b, sample) for sample in range(20)}) == 20


@pytest.mark.parametrize("size", [1, 7, SIZE])
def test_short_vectors_are_kept_whole(size: int) -> None:
    a, b = oblique(np.random.default_rng(size), size)
    for sample in (0, 5):
        assert direction(a, sample).shape == (size,)
        np.testing.assert_array_equal(direction(a, sample), unit(a).astype(np.float16))
        assert product(a, b, sample) == pytest.approx(unit(a) @ unit(b), abs=1e-3)


@pytest.mark.parametrize("shape", [(3, 8, 8), (4, 32, 32)])
def test_memory_layout_dtype_and_length_do_not_matter(shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(3).normal(size=shape).astype(np.float32)
    expected = direction(values, 2).tobytes()
    padded = np.zeros((shape[0], shape[1], 2 * shape[2]), np.float32)
    padded[..., ::2] = values
    layouts = [values.astype(np.float64), np.asfortranarray(values), padded[..., ::2], values.reshape(-1)]
    assert all(direction(same, 2).tobytes() == expected for same in layouts)
    assert direction(values * np.float32(2.0**-40), 2).tobytes() == expected, "a power of two rounds nothing"


def test_a_sketch_is_the_same_on_every_machine() -> None:
    """A journal may move; the norm of this vector is 2 ** 7, so that no sum of it rounds."""
    vector = np.where(np.arange(4 * 64 * 64) % 3, 1.0, -1.0)
    found = b"".join(direction(vector, sample).astype("<f2").tobytes() for sample in (0, 1, 12345))
    assert hashlib.sha256(found).hexdigest()[:16] == "ce798fb2b51b599e"


def test_no_error_has_no_direction() -> None:
    for size in (12, 5000):
        found = direction(np.zeros((2, size // 2)), 0)
        assert found.dtype == np.float16
        assert found.shape == (min(size, SIZE),)
        assert not found.any()


def test_text_holds_a_sketch_bit_for_bit() -> None:
    for size in (5, 5000):
        found = direction(np.random.default_rng(1).normal(size=size), 0)
        again = from_text(to_text(found))
        assert again.dtype == np.float16
        assert again.tobytes() == found.tobytes()


@pytest.mark.parametrize(
    "text",
    ["a letter", to_text(np.array([1, np.nan], np.float16)), base64.b64encode(b"abc").decode()],
)
def test_what_is_no_sketch_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        from_text(text)
