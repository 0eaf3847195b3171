"""Kernels of Sana's and UNets' blocks on a real GPU, against what the same functions give on a CPU."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest


def missing() -> str | None:
    """Why no such test can run here, or None."""
    for name in ("torch", "triton"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed"
    import torch

    if not torch.cuda.is_available():
        return "torch sees no GPU"
    return None if torch.cuda.get_device_capability() >= (8, 9) else "the GPU has no FP8"


pytestmark = pytest.mark.skipif(missing() is not None, reason=missing() or "")


def require_close(function: Any, arguments: list[Any], scale: float, noise: float = 0.0) -> None:
    """A kernel in 16 bit and with codes, on the GPU as on the CPU; a code beside a bound may fall to either side.

    `noise` of the largest result is what roundings inside of the kernel come to. The CPU then rounds to 16 bit before it
    makes codes, which moves some to their neighbour.
    """
    import torch

    on_gpu = [item.cuda() if isinstance(item, torch.Tensor) else item for item in arguments]
    expected, found = function(*arguments), function(*on_gpu).cpu()
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=2**-6, atol=2**-7 * float(expected.abs().max()))
    factor = torch.tensor(scale)
    for dtype in (torch.float8_e4m3fn, torch.int8):
        expected = function(*arguments, scale=factor, dtype=dtype).float()
        found = function(*on_gpu, scale=factor.cuda(), dtype=dtype).float().cpu()
        assert expected.unique().numel() > 20
        step = expected.abs() * 2**-3 if dtype is torch.float8_e4m3fn else 1.0
        far = (found - expected).abs() > step + noise * expected.abs().max()
        assert far.float().mean() < 1e-3
        assert (found != expected).float().mean() < (0.1 if noise else 0.05)


@pytest.mark.parametrize(
    ("batch", "height", "width", "channels"), [(2, 32, 32, 5600), (1, 13, 21, 72), (2, 5, 64, 320)]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_gate_between_sanas_products(batch: int, height: int, width: int, channels: int, dtype: str) -> None:
    import torch

    from tmpdiff_export.targets.torch.kernels.glu_convolution import glu_convolution

    generator, kind = torch.Generator().manual_seed(height), getattr(torch, dtype)
    data = torch.randn(batch, height, width, 2 * channels, generator=generator).to(kind)
    weight = (torch.randn(2 * channels, 1, 3, 3, generator=generator) / 3).to(kind)
    bias = torch.randn(2 * channels, generator=generator).to(kind)
    require_close(glu_convolution, [data, weight, bias], 0.04)


@pytest.mark.parametrize(("tokens", "columns"), [(1024, 5120), (4096, 2560), (77, 40)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_geglu(tokens: int, columns: int, dtype: str) -> None:
    import torch

    from tmpdiff_export.targets.torch.activations import Codes
    from tmpdiff_export.targets.torch.kernels.geglu import geglu

    generator = torch.Generator().manual_seed(tokens)
    data = torch.randn(2, tokens, 2 * columns, generator=generator).mul(2.0).to(getattr(torch, dtype))

    def made(data: Any, scale: Any = None, dtype: Any = None) -> Any:
        return geglu(data, None if scale is None else Codes(dtype, scale, None))

    require_close(made, [data], 0.02)


@pytest.mark.parametrize(("batch", "tokens", "heads", "size"), [(2, 1024, 70, 32), (1, 300, 3, 64), (2, 77, 5, 16)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_linear_attention(batch: int, tokens: int, heads: int, size: int, dtype: str) -> None:
    import torch

    from tmpdiff_export.targets.torch.kernels.linear_attention import linear_attention

    generator = torch.Generator().manual_seed(tokens)
    whole = torch.randn(batch, tokens, 3, heads, size, generator=generator).to(getattr(torch, dtype))
    query, key, value = whole.unbind(2)  # as one product of all three gives them
    require_close(linear_attention, [query, key, value], 0.002)


@pytest.mark.parametrize(
    ("batch", "tokens", "keys", "heads", "size"), [(2, 1024, 77, 20, 64), (2, 4096, 77, 10, 64), (1, 99, 9, 3, 16)]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_attention_to_few_keys(batch: int, tokens: int, keys: int, heads: int, size: int, dtype: str) -> None:
    import torch

    from tmpdiff_export.targets.torch.kernels.cross_attention import cross_attention

    generator, kind = torch.Generator().manual_seed(tokens), getattr(torch, dtype)
    query = torch.randn(batch, tokens, heads, size, generator=generator).to(kind)
    both = torch.randn(batch, keys, 2, heads, size, generator=generator).to(kind)
    # Keys and values lie as one product gives them.
    require_close(cross_attention, [query, *both.unbind(2)], 0.01, noise=2**-9)


@pytest.mark.parametrize(
    ("batch", "height", "width", "channels", "groups"),
    [(2, 128, 128, 320, 32), (2, 32, 32, 2560, 32), (1, 7, 9, 60, 6)],
)
@pytest.mark.parametrize("silu", [True, False])
def test_group_norm(batch: int, height: int, width: int, channels: int, groups: int, silu: bool) -> None:
    import torch

    from tmpdiff_export.targets.torch.kernels.group_norm import Norm, group_norm

    generator = torch.Generator().manual_seed(channels)
    data = (3 * torch.randn(batch, height, width, channels, generator=generator) + 5).half()
    weight, bias, added = (
        torch.randn(*shape, generator=generator).half() for shape in ((channels,),) * 2 + ((batch, channels),)
    )

    def normed(data: Any, weight: Any, bias: Any, added: Any, **codes: Any) -> Any:
        return group_norm(data, Norm(groups, weight, bias, 1e-5, silu), added, **codes)

    require_close(normed, [data, weight, bias, added], 0.03)
    require_close(normed, [data, weight, bias, None], 0.03)


@pytest.mark.parametrize(
    ("batch", "height", "width", "channels", "columns"),
    [(2, 32, 32, 1280, 1280), (2, 64, 64, 320, 640), (1, 13, 9, 48, 144), (2, 128, 128, 64, 320)],
)
def test_convolutions_in_fp8(batch: int, height: int, width: int, channels: int, columns: int) -> None:
    import torch

    from tmpdiff_export.targets.torch.kernels.convolution import convolution_fp8

    generator = torch.Generator().manual_seed(channels)
    codes = torch.randn(batch, height, width, channels, generator=generator).to(torch.float8_e4m3fn)
    weight = torch.randn(columns, 9 * channels, generator=generator).to(torch.float8_e4m3fn)
    scale, bias = torch.tensor(0.01), torch.randn(columns, generator=generator).half()
    expected = convolution_fp8(codes, weight, scale, bias, torch.float16)
    found = convolution_fp8(*(item.cuda() for item in (codes, weight, scale, bias)), torch.float16).cpu()
    noise = (found.float() - expected.float()).square().sum() / expected.float().square().sum()
    assert noise < 1e-4  # sums of FP8 products have 14 bits on a Hopper GPU
