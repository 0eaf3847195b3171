"""FP8 attention through cuDNN's graph interface: an experiment beside the FP8 row, not part of the torch backend."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional as F

from engines.errors import BackendError
from tmpdiff_export.torch_codes import FP8
from tmpdiff_export.torch_flux import RotaryProcessor

LIMIT = 448.0
# Fixed: floating point codes keep their precision over a wide range, and the error of the row is measured.
INPUT_FACTOR = 16.0
WEIGHT_FACTOR = 256.0  # of the attention weights, at most 1
OUTPUT_FACTOR = 64.0
LEAST_TOKENS = 1024  # shorter attention is no cost
HEAD_SIZES = (64, 128)  # that cuDNN has kernels for


@contextmanager
def fp8_attention() -> Iterator[None]:
    """Attention without a mask and over as many keys as queries, at least `LEAST_TOKENS`, runs in FP8 in the block.

    Raises:
        BackendError: cuDNN's frontend is not installed.
    """
    _cudnn()
    original = F.scaled_dot_product_attention

    def attention(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: Any = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, **others: Any,
    ) -> torch.Tensor:  # fmt: skip
        fits = query.shape[2] == key.shape[2] >= LEAST_TOKENS and query.shape[3] in HEAD_SIZES
        if not fits or attn_mask is not None or is_causal or scale is not None:
            return original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **others)
        output = attention_op(_codes(query), _codes(key), _codes(value))
        return (output.to(query.dtype) * (1.0 / OUTPUT_FACTOR)).transpose(1, 2)

    F.scaled_dot_product_attention = attention  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


def fp8_rotary_processor() -> RotaryProcessor:
    """For FLUX.1: queries and keys leave their kernel in FP8."""

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = attention_op(query, key, _codes(value.transpose(1, 2)))
        return output.to(value.dtype) * (1.0 / OUTPUT_FACTOR)

    return RotaryProcessor(attend, FP8, INPUT_FACTOR)


def _codes(data: torch.Tensor) -> torch.Tensor:
    """[B, H, S, D] -> FP8 [B, S, H, D], contiguous."""
    return (data.transpose(1, 2).float() * INPUT_FACTOR).clamp(-LIMIT, LIMIT).to(FP8).contiguous()


@torch.library.custom_op("tmpdiff_bench::attention_fp8", mutates_args=())  # type: ignore[untyped-decorator]
def attention_op(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """FP8 [B, S, H, D] with factor `INPUT_FACTOR` -> FP8 [B, S, H, D] with factor `OUTPUT_FACTOR`."""
    output = torch.empty_like(query)
    _plan(tuple(query.shape), query.device.index)(query, key, value, output)
    return output


@attention_op.register_fake  # type: ignore[untyped-decorator]
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(query)


@functools.cache
def _plan(shape: tuple[int, int, int, int], device: int) -> Any:
    """A cuDNN plan for tensors [B, S, H, D] on a device, as (query, key, value, output) -> None."""
    cudnn = _cudnn()
    batch, tokens, heads, size = shape
    dim, stride = [batch, heads, tokens, size], [tokens * heads * size, size, heads * size, 1]
    fp8, single = cudnn.data_type.FP8_E4M3, cudnn.data_type.FLOAT
    handle = cudnn.create_handle()
    graph = cudnn.pygraph(
        io_data_type=fp8, intermediate_data_type=single, compute_data_type=single, handle=handle
    )  # fmt: skip
    inputs = [graph.tensor(name=name, dim=dim, stride=stride, data_type=fp8) for name in ("q", "k", "v")]
    names = ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o")
    factors = [graph.tensor(name=name, dim=[1] * 4, stride=[1] * 4, data_type=single) for name in names]
    output, _, *amaxes = graph.sdpa_fp8(
        *inputs, *factors, generate_stats=False, attn_scale=size**-0.5, use_causal_mask=False
    )
    output.set_output(True).set_dim(dim).set_stride(stride).set_data_type(fp8)
    for amax in amaxes:
        amax.set_output(True).set_dim([1] * 4).set_stride([1] * 4).set_data_type(single)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A])
    graph.check_support()
    graph.build_plans()
    place = torch.device("cuda", device)
    values = (*[1.0 / INPUT_FACTOR] * 3, 1.0 / WEIGHT_FACTOR, WEIGHT_FACTOR, OUTPUT_FACTOR)
    bound = {tensor: torch.full([1] * 4, value, device=place) for tensor, value in zip(factors, values, strict=True)}
    bound |= {amax: torch.zeros([1] * 4, device=place) for amax in amaxes}
    workspace = torch.empty(max(graph.get_workspace_size(), 1), device=place, dtype=torch.uint8)

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, result: torch.Tensor) -> None:
        cudnn.set_stream(handle, torch.cuda.current_stream(place).cuda_stream)
        tensors = {tensor: data.transpose(1, 2) for tensor, data in zip(inputs, (query, key, value), strict=True)}
        graph.execute({**tensors, output: result.transpose(1, 2), **bound}, workspace, handle=handle)

    return run


def _cudnn() -> Any:
    try:
        import cudnn
    except ImportError as error:
        raise BackendError(
            "FP8 attention needs the module cudnn, which is not installed; pip install nvidia-cudnn-frontend"
        ) from error
    return cudnn
