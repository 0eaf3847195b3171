"""The noise a picture starts from: the numbers that diffusers draws with one CPU generator of torch per picture.

`torch.randn` transforms pairs of uniform numbers of 24 bits (Box and Muller, 1958), eight pairs at once. Its logarithm,
sine and cosine are the polynomials of avx_mathfun, evaluated in float32 with fused multiply-adds. They are evaluated
here in the same order, so that every number has the same bits as on an x86 CPU with AVX2, and on any machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

_BLOCK = 16  # eight pairs: the first numbers of all, then the second ones
_BLOCKS_AT_ONCE = 1024  # so that what is in between stays in the CPU's cache
_TWO_PI = np.float32(2 * math.pi)
_FOUR_OVER_PI = np.float32(4 / math.pi)
_SQRT_HALF = np.float32(math.sqrt(0.5))
_LN2 = np.array([0.693359375, -2.12194440e-4], np.float32)  # in two parts, as is a quarter of pi, negated, in three
_QUARTER_PI = np.array([-0.78515625, -2.4187564849853515625e-4, -3.77489497744594108e-8], np.float32)
_LOG = np.array(
    [
        7.0376836292e-2,
        -1.1514610310e-1,
        1.1676998740e-1,
        -1.2420140846e-1,
        1.4249322787e-1,
        -1.6668057665e-1,
        2.0000714765e-1,
        -2.4999993993e-1,
        3.3333331174e-1,
    ],
    np.float32,
)
_COS = np.array([2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2], np.float32)
_SIN = np.array([-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1], np.float32)


def gaussian_noise(seeds: Sequence[int], shape: tuple[int, int, int]) -> Floats:
    """Standard normal noise, the same for a seed whatever is drawn beside it.

    Args:
        seeds: one per picture. As in torch, seeds that agree in their low 32 bits give the same noise.
        shape: (C, h, w) of one picture's latents.

    Returns:
        float32 [N, C, h, w], owned by the caller: for each seed the bytes of `torch.randn((1, C, h, w),
        generator=torch.Generator("cpu").manual_seed(seed))` on an x86 CPU with AVX2.
    """
    noise = np.empty((len(seeds), *shape), np.float32)
    for picture, seed in zip(noise.reshape(len(seeds), math.prod(shape)), seeds, strict=True):
        generator = np.random.RandomState(int(seed) & 0xFFFFFFFF)  # MT19937, seeded as torch seeds it
        if picture.size < _BLOCK:
            picture[:] = _few(generator, picture.size)
            continue
        rest = picture.size % _BLOCK
        whole = picture.size - rest
        bits = generator.randint(0, 1 << 24, picture.size + (_BLOCK if rest else 0), np.uint32)
        picture[:whole] = box_muller(bits[:whole])
        if rest:  # then the last 16 numbers are drawn anew
            picture[-_BLOCK:] = box_muller(bits[-_BLOCK:])
    return noise


def box_muller(bits: NDArray[np.uint32]) -> Floats:
    """Normal numbers float32 [n] of uniform integers [n] below 2^24, n a multiple of 16."""
    blocks = bits.reshape(-1, 2, _BLOCK // 2)
    normal = np.empty(blocks.shape, np.float32)
    for start in range(0, len(blocks), _BLOCKS_AT_ONCE):
        part = slice(start, start + _BLOCKS_AT_ONCE)
        uniform = blocks[part].astype(np.float32) * np.float32(2.0**-24)
        radius = np.sqrt(np.float32(-2) * _log(1 - uniform[:, 0]))
        cosine, sine = _cos_and_sin(_TWO_PI * uniform[:, 1])
        normal[part, 0] = radius * cosine
        normal[part, 1] = radius * sine
    normal += 0  # as torch adds the mean: no negative zeros
    return normal.reshape(-1)


def _log(x: Floats) -> Floats:
    """Natural logarithm of numbers in (0, 1]."""
    fraction, exponent = np.frexp(x)
    low = fraction < _SQRT_HALF
    x = np.where(low, fraction + fraction, fraction) - 1
    power = (exponent - low).astype(np.float32)
    square = x * x
    y = _fused(_horner(_LOG, x) * x, square, power * _LN2[1])
    return _fused(power, _LN2[0], x + (y - square * np.float32(0.5)))


def _cos_and_sin(angle: Floats) -> tuple[Floats, Floats]:
    """Cosine and sine of angles from 0 to 2 pi."""
    octant = ((angle * _FOUR_OVER_PI).astype(np.int32) + 1) & ~1
    turns = octant.astype(np.float32)
    x = angle
    for part in _QUARTER_PI:
        x = _fused(turns, part, x)
    square = x * x
    cosine = _fused(square, square * _horner(_COS, square), -square * np.float32(0.5)) + 1
    sine = _fused(x, square * _horner(_SIN, square), x)
    swapped = (octant & 2) != 0
    cosine, sine = np.where(swapped, sine, cosine), np.where(swapped, cosine, sine)
    return np.where((octant + 2) & 4, -cosine, cosine), np.where(octant & 4, -sine, sine)


def _horner(coefficients: Floats, x: Floats) -> Floats:
    """A polynomial, the coefficient of the highest power first."""
    y = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        y = _fused(y, x, coefficient)
    return y


def _fused(a: Floats, b: Floats | np.float32, c: Floats | np.float32) -> Floats:
    """a * b + c, rounded once.

    In float64 the product is exact and the sum is rounded; rounding it again to float32 could differ from rounding
    once, but does for none of the 2^24 numbers a logarithm, a sine or a cosine is taken of here.
    """
    return (np.multiply(a, b, dtype=np.float64) + c).astype(np.float32)


def _few(generator: np.random.RandomState, count: int) -> list[float]:
    """Fewer than 16 numbers: torch draws them pair by pair, in float64."""
    drawn: list[float] = []
    while len(drawn) < count:
        high, low, high2, low2 = (int(word) for word in generator.randint(0, 1 << 32, 4, np.uint32))
        first, second = (((a << 32 | b) & ((1 << 53) - 1)) * 2.0**-53 for a, b in ((high, low), (high2, low2)))
        radius, angle = math.sqrt(-2 * math.log1p(-second)), 2 * math.pi * first
        drawn += [radius * math.cos(angle), radius * math.sin(angle)]
    return drawn[:count]
