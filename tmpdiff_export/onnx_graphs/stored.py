"""What weight files hold for strongly typed graphs: tensors by the names and in the forms of their initializers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from engines.precision import Precision
from tmpdiff_export.quantization.codes import QuantizedLayer
from tmpdiff_export.quantization.packing import pack

TRANSPOSED = "^T"
CODES, SCALE, BLOCK_SCALE = "weight_codes", "weight_scale", "weight_block_scale"
LOW_RANK_DOWN, LOW_RANK_UP = "low_rank_down", "low_rank_up"


def plain_tensor(name: str, read: Callable[[str], torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """A tensor that is not quantized, as files have it for all backends.

    Args:
        name: that of a parameter or buffer, or `<name>^T` of its transpose, which only graphs read.
        read: gives parameters and buffers by name.
        dtype: of the result.
    """
    tensor = read(name.removesuffix(TRANSPOSED)).to(dtype)
    return tensor.T.contiguous() if name.endswith(TRANSPOSED) else tensor


def layer_tensors(name: str, layer: QuantizedLayer, weight_shape: Sequence[int]) -> dict[str, torch.Tensor]:
    """The initializers of a quantized layer, as `qdq.insert_qdq` has them; on "meta" where the layer is.

    Args:
        name: of the layer.
        layer: codes and scales.
        weight_shape: of its weight, [N, K] or [N, C, kh, kw].

    Returns:
        `<name>.weight_codes`: [K, N] as MatMul reads it, of a convolution [N, C, kh, kw]; four-bit ones packed, as
        `external.stored_form` says; of NVFP4 [N, K] before packing. `<name>.weight_scale`: [N], of INT4 [K / block, N],
        else []. `<name>.weight_block_scale` of NVFP4: [N, K / 16]. Of a branch, as `branch_tensors`.
    """
    codes, scale = layer.codes, layer.weight_scale
    found: dict[str, torch.Tensor] = {}
    if layer.block_scale is not None:
        codes = pack(codes).flatten()
        found[BLOCK_SCALE] = layer.block_scale
    elif layer.precision is Precision.INT4:
        codes = pack(codes.T.contiguous().flatten().view(torch.uint8) & 0xF)
        scale = scale.T
    else:
        codes = codes.reshape(tuple(weight_shape)) if len(weight_shape) > 2 else codes.T
    own = {f"{name}.{part}": item.contiguous() for part, item in {CODES: codes, SCALE: scale, **found}.items()}
    return own | branch_tensors(name, layer)


def branch_tensors(name: str, layer: QuantizedLayer) -> dict[str, torch.Tensor]:
    """The initializers of a layer's 16-bit branch, float16, as MatMul reads them; none where it has none.

    Returns:
        `<name>.low_rank_down`: [K, r]. `<name>.low_rank_up`: [r, N].
    """
    if layer.branch is None:
        return {}
    halves = {LOW_RANK_DOWN: layer.branch.down, LOW_RANK_UP: layer.branch.up}
    return {f"{name}.{part}": item.T.contiguous() for part, item in halves.items()}
