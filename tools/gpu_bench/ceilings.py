"""What the device reaches on the parts of a step, measured in the same run, and the floor that follows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from engines.errors import first_line
from tmpdiff_export.targets.torch.activations import FP8
from tmpdiff_export.targets.torch.kernels.int8 import int8_linear
from tools.gpu_bench.timing import best_seconds
from tools.gpu_bench.work import Shape, Work

# (M, N, K) of products; a ceiling is the best of them. Large, but short enough not to run into the power limit.
PRODUCTS = ((8192, 8192, 8192), (4096, 12288, 3072))
TINY_PRODUCTS = ((64, 64, 64),)
COPY_BYTES = 1 << 30
TINY_COPY_BYTES = 1 << 20


def measure_ceilings(work: Work, device: torch.device, dtype: torch.dtype, *, tiny: bool) -> dict[str, Any]:
    """Rates on random data.

    Returns:
        `product_flops` by "16-bit", "fp8", "int8" (operations per second, or None with the reason in `errors`),
        `attention_flops` by shape, `bandwidth` in bytes per second (read plus written by a copy), `errors`.
    """
    shapes = TINY_PRODUCTS if tiny else PRODUCTS
    found: dict[str, Any] = {"product_flops": {}, "attention_flops": {}, "errors": {}}
    for name, make in _PRODUCTS.items():

        def rate(make: Callable[..., Callable[[], object]] = make) -> float:
            return max(2.0 * m * n * k / best_seconds(make(m, n, k, device, dtype), device) for m, n, k in shapes)

        found["product_flops"][name] = _attempt(rate, found["errors"], f"product {name}")
    for shape, _ in sorted(work.attention.items(), key=lambda item: -item[1]):

        def attention_rate(shape: Shape = shape) -> float:
            batch, heads, queries, keys, size = shape
            operations = 4.0 * batch * heads * queries * keys * size
            return operations / best_seconds(_attention(shape, device, dtype), device)

        name = "x".join(map(str, shape))
        found["attention_flops"][name] = _attempt(attention_rate, found["errors"], f"attention {name}")
    found["bandwidth"] = _bandwidth(device, TINY_COPY_BYTES if tiny else COPY_BYTES)
    return found


def floor(
    work: Work, ceilings: dict[str, Any], quantized: tuple[str, ...], kind: str, weights_bytes: int
) -> dict[str, Any]:
    """The least time for a step's operations at the measured rates.

    Operations of the layers in `quantized` count at the rate of `kind`, all others at the 16-bit rate, attention
    at the rate of its own shape; normalisation, activation functions and quantizing count nothing. Of the memory
    traffic only reading the weights once counts.

    Returns:
        `floor_ms`, its parts and the operations; `floor_ms` None where a rate is missing.
    """
    at_kind = sum(counts[name] for counts in (work.linear, work.convolution) for name in quantized if name in counts)
    totals = work.totals()
    at_16 = totals["linear"] + totals["convolution"] + totals["other_products"] - at_kind
    rates = ceilings["product_flops"]
    attention_ms: float | None = 0.0
    for shape, operations in work.attention.items():
        rate = ceilings["attention_flops"]["x".join(map(str, shape))]
        attention_ms = None if rate is None or attention_ms is None else attention_ms + 1e3 * operations / rate
    parts = {
        "quantized_ms": _milliseconds(at_kind, rates[kind]),
        "high_precision_ms": _milliseconds(at_16, rates["16-bit"]),
        "attention_ms": attention_ms,
        "weights_ms": _milliseconds(weights_bytes, ceilings["bandwidth"]),
    }
    compute = [parts["quantized_ms"], parts["high_precision_ms"], parts["attention_ms"]]
    known = [value for value in compute if value is not None]
    whole = max(sum(known), parts["weights_ms"] or 0.0) if len(known) == len(compute) else None
    return {"floor_ms": whole, **parts, "quantized_flops": at_kind, "flops": sum(totals.values())}


def _milliseconds(amount: int, rate: float | None) -> float | None:
    if amount == 0:
        return 0.0
    return None if rate is None else 1e3 * amount / rate


def _attempt(measure: Callable[[], float], errors: dict[str, str], name: str) -> float | None:
    try:
        return measure()
    except Exception as error:  # a device without this product: the rows that need it say the same
        errors[name] = f"{type(error).__name__}: {first_line(error)}"
        return None


def _product_16(m: int, n: int, k: int, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    a, b = (torch.randn(*shape, device=device).to(dtype) for shape in ((m, k), (n, k)))
    return lambda: torch.mm(a, b.t())


def _product_fp8(m: int, n: int, k: int, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    a, b = (torch.randn(*shape, device=device).to(FP8) for shape in ((m, k), (n, k)))
    one = torch.ones((), device=device)
    return lambda: torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=dtype, use_fast_accum=True)


def _product_int8(m: int, n: int, k: int, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    a, b = (torch.randint(-127, 128, shape, device=device, dtype=torch.int8) for shape in ((m, k), (n, k)))
    scale = torch.full((n,), 1e-4, device=device)
    return lambda: int8_linear(a, b, scale, None, dtype)


_PRODUCTS = {"16-bit": _product_16, "fp8": _product_fp8, "int8": _product_int8}


def _attention(shape: Shape, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    batch, heads, queries, keys, size = shape
    query = torch.randn(batch, heads, queries, size, device=device).to(dtype)
    key, value = (torch.randn(batch, heads, keys, size, device=device).to(dtype) for _ in range(2))
    return lambda: F.scaled_dot_product_attention(query, key, value)


def _bandwidth(device: torch.device, size: int) -> float:
    source = torch.randint(0, 255, (size,), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2.0 * size / best_seconds(lambda: target.copy_(source), device)
