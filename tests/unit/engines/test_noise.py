"""Noise against torch itself: the same bytes wherever torch runs its AVX2 kernel, with AVX-512 too."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from engines.noise import box_muller, gaussian_noise

SEEDS = (0, 1, 7, 12345, 2**31, 2**32 - 1, 2**32, 2**32 + 7, 2**40 + 5, 2**63 - 1)
SHAPES = [
    *((channels, size, size) for channels in (4, 16, 32) for size in (4, 8, 32, 64)),
    *((4, height, width) for height, width in ((65, 47), (47, 65), (5, 7), (63, 64), (96, 160), (4, 256), (256, 5))),
    *((16, height, width) for height, width in ((128, 128), (9, 13), (4, 5))),
    *((32, height, width) for height, width in ((16, 31), (32, 56))),
    *((1, 1, count) for count in (*range(1, 20), 31, 33, 47, 49)),
]
STATE = 624  # words of the generator, of which 608 are 38 blocks of 16 numbers
DRAWN = 608
RADIUS_ONE = 6601320  # the uniform number whose radius is 1
ACROSS_CPUS = 4e-6  # a sine of torch's other kernel differs by up to 5e-7, and is multiplied by up to 5.8

needs_avx2 = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="torch has no AVX2 kernel to run here"
)


def drawn(seed: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """What diffusers draws for a picture."""
    return torch.randn((1, *shape), generator=torch.Generator("cpu").manual_seed(seed)).numpy()


@needs_avx2
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_noise_has_the_bytes_of_torch(shape: tuple[int, int, int]) -> None:
    noise = gaussian_noise(SEEDS, shape)
    assert noise.dtype == np.float32
    assert noise.shape == (len(SEEDS), *shape)
    assert noise.tobytes() == b"".join(drawn(seed, shape).tobytes() for seed in SEEDS)


@needs_avx2
def test_three_hundred_seeds_have_the_bytes_of_torch() -> None:
    seeds = [int(seed) for seed in np.random.default_rng(0).integers(0, 2**63, 300)]
    noise = gaussian_noise(seeds, (4, 17, 13))
    assert noise.tobytes() == b"".join(drawn(seed, (4, 17, 13)).tobytes() for seed in seeds)


def test_a_picture_does_not_depend_on_those_beside_it() -> None:
    noise = gaussian_noise([5, 3, 5, 2**63 - 1], (4, 9, 11))
    assert gaussian_noise([], (4, 9, 11)).shape == (0, 4, 9, 11)
    assert all(
        noise[index].tobytes() == gaussian_noise([seed], (4, 9, 11)).tobytes()
        for index, seed in enumerate((5, 3, 5, 2**63 - 1))
    )
    assert (noise[0] != noise[1]).any()


@pytest.mark.parametrize(
    ("seed", "shape", "first", "digest"),
    [
        (
            0,
            (4, 64, 64),
            ["-0x1.20370ap+0", "-0x1.270114p+0", "-0x1.0097acp-2"],
            "24efac55b39e95b2d74d8fb5b3a8e8a8e808bd04129f260c4cdbb225bb952a4d",
        ),
        (
            2**32 + 42,
            (16, 65, 47),
            ["0x1.ed4a52p+0", "0x1.7cbea6p+0", "0x1.cd2acep-1"],
            "13a67947a72cc59baec78a2b940f1b08cb18ebbb1071cb9c87cb9ab691393907",
        ),
        (
            2**63 - 1,
            (32, 4, 5),
            ["-0x1.5507b4p+1", "-0x1.174ef6p+0", "0x1.ce483cp-2"],
            "2cd21db7dc05fba5d907d79fa927675f196acbf71621a3a73d65fd5dafc95396",
        ),
        (
            3,
            (1, 1, 7),
            ["0x1.9b47p-1", "0x1.660f0cp-3", "0x1.6c744cp-4"],
            "7a2a9ec593c6087d5930cc99a5e47de24f38535c1e3685219e7b9b82c4924f8e",
        ),
    ],
)
def test_noise_is_what_it_was(seed: int, shape: tuple[int, int, int], first: list[str], digest: str) -> None:
    noise = gaussian_noise([seed], shape)
    assert noise.reshape(-1)[: len(first)].tolist() == [float.fromhex(value) for value in first]
    assert hashlib.sha256(noise.astype("<f4").tobytes()).hexdigest() == digest


@needs_avx2
@pytest.mark.parametrize("part", ["radius", "angle"])
def test_every_uniform_number_becomes_what_torch_makes_of_it(part: str) -> None:
    """All 2^24 of them: so that rounding twice, in a fused multiply-add through float64, never shows."""
    each = np.resize(np.arange(1 << 24, dtype=np.uint32), -(-(1 << 25) // DRAWN) * DRAWN // 2)
    fixed = np.full_like(each, 0 if part == "radius" else RADIUS_ONE)
    pair = (each, fixed) if part == "radius" else (fixed, each)
    bits = np.stack([numbers.reshape(-1, 8) for numbers in pair], axis=1).reshape(-1)
    generator = torch.Generator("cpu").manual_seed(0)
    torch.randn(16, generator=generator)  # so that its state is in use
    state = generator.get_state()
    header = state.numpy()
    header[8:12].view(np.int32)[:] = STATE  # words left
    header[16:24].view(np.uint64)[:] = 0  # the next word
    words = state.numpy()[24 : 24 + 8 * STATE].view(np.uint64)
    made = torch.empty((len(bits) // DRAWN, DRAWN))
    for row, chosen in zip(made, untempered(bits).reshape(-1, DRAWN), strict=True):
        words[:DRAWN] = chosen
        generator.set_state(state)
        torch.randn(DRAWN, generator=generator, out=row)
    np.testing.assert_array_equal(box_muller(bits).view(np.uint32), made.numpy().reshape(-1).view(np.uint32))


def untempered(numbers: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The words of a Mersenne twister's state that come out as these numbers."""
    numbers = numbers ^ (numbers >> 18)
    numbers = numbers ^ ((numbers << 15) & 0xEFC60000)
    word = numbers
    for _ in range(4):
        word = numbers ^ ((word << 7) & 0x9D2C5680)
    numbers = word
    for _ in range(2):
        word = numbers ^ (word >> 11)
    return word


@pytest.mark.parametrize(("capability", "bound"), [("avx2", 0.0), ("default", ACROSS_CPUS)])
def test_other_cpus_draw_the_same_but_for_rounding(capability: str, bound: float) -> None:
    program = """
import sys, torch
noise = [torch.randn((1, 4, 65, 47), generator=torch.Generator("cpu").manual_seed(seed)) for seed in range(8)]
sys.stdout.buffer.write(torch.cat(noise).numpy().tobytes())
print(torch.backends.cpu.get_cpu_capability(), file=sys.stderr)
"""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment, check=True)
    if capability == "avx2" and done.stderr.split()[-1] != b"AVX2":
        pytest.skip("torch has no AVX2 kernel to run here")
    noise = gaussian_noise(range(8), (4, 65, 47))
    assert np.abs(noise - np.frombuffer(done.stdout, np.float32).reshape(noise.shape)).max() <= bound
