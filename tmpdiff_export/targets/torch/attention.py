"""Attention in FP8 for the `torch` backend: ranges of its inputs, and attention layers that use codes of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from engines.backends.torch.attention import scales_tensor
from engines.errors import BuildError
from tmpdiff_export.quantization.codes import AttentionRange
from tmpdiff_export.targets.torch.activations import FP8, static_codes
from tmpdiff_export.targets.torch.kernels.attention import attend_codes
from tmpdiff_export.targets.torch.layers import takes_fp8

# Buffers of a layer whose attention is in FP8. The values' scale is also in a tensor of its own: Inductor up to torch 2.13
# takes the scale of a product that is a part of a tensor for the whole tensor.
SCALES = "fp8_scales"
VALUE_SCALE = "fp8_value_scale"
LEAST_TOKENS = 256  # shorter attention is no cost
HEAD_SIZES = (64, 128)  # that cuDNN's FP8 attention was run with; others up to the largest are padded to the next one
_TORCHS = F.scaled_dot_product_attention


class Fp8Processor:
    """Wraps diffusers' attention processor of one layer: attention that cuDNN can do in FP8 is done so.

    Attributes:
        inner: the processor.
    """

    def __init__(self, inner: Callable[..., Any]) -> None:
        self.inner = inner

    def __call__(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """As the processor it wraps."""
        scales = layer.get_buffer(SCALES)
        with _Replaced(lambda query, key, value: attend_fp8(query, key, value, scales)):
            return self.inner(layer, *args, **kwargs)


def scales_of(layer: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a layer whose attention is in FP8: what the operator takes, and float32 [], the scale of values and results."""
    return layer.get_buffer(SCALES), layer.get_buffer(VALUE_SCALE)


def attend_fp8(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Attention [B, H, S, D] in a 16-bit type or float32 -> the same; with 1 / sqrt(D), without a mask."""
    size = query.shape[3]
    query_codes, key_codes = (
        static_codes(padded(item.transpose(1, 2)), scales[row, 0], FP8).contiguous()
        for row, item in enumerate((query.float() * query_factor(size), key))
    )
    result = attend_codes(query_codes, key_codes, padded(value.transpose(1, 2)), scales)
    return result_of(result[..., :size], scales[2, 0], query.dtype).transpose(1, 2)


def padded(heads: torch.Tensor) -> torch.Tensor:
    """[..., D] -> the same with zeros behind it, up to the next of `HEAD_SIZES`."""
    more = _taken(heads.shape[-1]) - heads.shape[-1]
    return F.pad(heads, (0, more)) if more else heads


def query_factor(size: int) -> float:
    """What queries of head size `size` are multiplied by: the operator divides by the root of the padded size."""
    return float(_taken(size) / size) ** 0.5


def _taken(size: int) -> int:
    return next(item for item in HEAD_SIZES if item >= size)


def attend_heads(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scales: torch.Tensor | None
) -> torch.Tensor:
    """Attention without a mask, in FP8 where there are scales, of head size 64 or 128 then.

    Args:
        query: [B, S, H, D], in a 16-bit type or float32; codes or not where there are scales.
        key: as `query`.
        value: [B, S, H, D] in a 16-bit type or float32.
        scales: buffer of a layer in FP8, or None.

    Returns:
        [B, S, H, D], codes where there are scales: see `result_of` and `project`.
    """
    if scales is None:
        parts = (item.transpose(1, 2) for item in (query, key, value))
        return F.scaled_dot_product_attention(*parts).transpose(1, 2)
    return attend_codes(query, key, value, scales)


def project(
    heads: torch.Tensor, value_scale: torch.Tensor | None, layer: torch.nn.Module, dtype: torch.dtype
) -> torch.Tensor:
    """The output projection of what `attend_heads` returned, [B, S, H, D] -> [B, S, N] in `dtype`.

    Without a scale it is no codes.

    A layer in FP8 multiplies the codes as they are: they have the values' scale, and are rounded once.
    """
    rows = heads.flatten(2).contiguous()
    if value_scale is not None and takes_fp8(layer):
        return layer.from_codes(rows.flatten(0, 1), value_scale).unflatten(0, rows.shape[:2])
    result: torch.Tensor = layer(result_of(rows, value_scale, dtype))
    return result


def result_of(heads: torch.Tensor, value_scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """What the result of `attend_heads` stands for, any shape."""
    return heads if value_scale is None else (heads.float() * value_scale).to(dtype)


@contextmanager
def watch_attention(module: torch.nn.Module, found: dict[str, AttentionRange]) -> Iterator[None]:
    """Range calibration of attention: widens `found` by what attention takes while the module runs in the block.

    Args:
        module: float32 export wrapper; called in the block, on any device.
        found: amax of query, key and value by name of the attention layer, for those whose attention can be in FP8:
            head size 64 to 128, no mask, as many keys as queries and at least `LEAST_TOKENS`. The query's is that of the
            query times `query_factor`.
    """
    layers = {name: layer for name, layer in module.named_modules() if callable(getattr(layer, "processor", None))}
    originals = {name: layer.processor for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.processor = _Watched(originals[name], name, found)
    try:
        yield
    finally:
        for name, layer in layers.items():
            layer.processor = originals[name]


def require_ranges(module: torch.nn.Module, found: Mapping[str, AttentionRange]) -> None:
    """Refuses FP8 attention for a module in which `watch_attention` has found no layer for it.

    Raises:
        BuildError: saying what it takes.
    """
    if not found:
        raise BuildError(
            f"{type(module).__name__}: no attention layer can be in FP8; that takes head size {HEAD_SIZES[0]} to "
            f"{HEAD_SIZES[-1]}, no mask, and as many keys as queries, {LEAST_TOKENS} at least"
        )


def use_fp8_attention(module: torch.nn.Module, ranges: Mapping[str, AttentionRange]) -> None:
    """Attention layers of `ranges` compute in FP8 from now on; in place.

    Their scales are buffers, as other weights are: so layers that compute the same are the same program.
    """
    device = next(itertools.chain(module.parameters(), module.buffers())).device
    for name, item in attention_tensors(ranges).items():
        owner, _, buffer = name.rpartition(".")
        module.get_submodule(owner).register_buffer(buffer, item.to(device))
    for name in ranges:
        layer = module.get_submodule(name)
        layer.float32_buffers = (SCALES, VALUE_SCALE)
        layer.processor = Fp8Processor(layer.processor)


def attention_tensors(ranges: Mapping[str, AttentionRange]) -> dict[str, torch.Tensor]:
    """The buffers that `use_fp8_attention` gives a module, by name, on the CPU; see `scales_tensor`."""
    tensors = {}
    for name, limits in ranges.items():
        scales = scales_tensor(*limits.scales)
        tensors.update({f"{name}.{SCALES}": scales, f"{name}.{VALUE_SCALE}": scales[2, 0].clone()})
    return tensors


class _Watched:
    """A processor that notes what its attention takes."""

    def __init__(self, inner: Callable[..., Any], name: str, found: dict[str, AttentionRange]) -> None:
        self._inner, self._name, self._found = inner, name, found

    def __call__(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _Replaced(self._note):
            return self._inner(layer, *args, **kwargs)

    def _note(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        amaxes = [float(item.detach().abs().amax()) for item in (query, key, value)]
        seen = AttentionRange(amaxes[0] * query_factor(query.shape[3]), *amaxes[1:])
        known = self._found.get(self._name)
        self._found[self._name] = seen if known is None else known.joined(seen)
        return _TORCHS(query, key, value)


class _Replaced(TorchFunctionMode):
    """Within it, attention that can be in FP8 is what `attend` makes of query, key and value [B, H, S, D]."""

    def __init__(self, attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self._attend = attend

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _TORCHS and _fits(*args, **kwargs):
            return self._attend(*_inputs(*args, **kwargs))
        return func(*args, **kwargs)


def _fits(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> bool:
    """Whether a call of torch's attention, whose arguments these are, can be in FP8."""
    same = query.ndim == 4 and query.shape == key.shape == value.shape
    plain = attn_mask is None and dropout_p == 0.0 and not is_causal and not enable_gqa
    if not same or not plain or not HEAD_SIZES[0] <= query.shape[3] <= HEAD_SIZES[-1] or query.shape[2] < LEAST_TOKENS:
        return False
    return scale is None or abs(scale * float(query.shape[3]) ** 0.5 - 1.0) < 1e-6


def _inputs(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return query, key, value
