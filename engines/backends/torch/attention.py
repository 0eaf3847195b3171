"""The operator `tmpdiff::attention_fp8_scaled`: attention over FP8 codes, through cuDNN's graph interface on a GPU.

Importing this module registers it. A package that holds it calls back into this process for every attention, so that
the process needs Python and, for a GPU, cuDNN's frontend.
"""

from __future__ import annotations

import functools
from typing import Any

from engines.backends.torch.library import require_cudnn, torch

FP8 = torch.float8_e4m3fn
# A power of two: attention weights are at most 1, and floating point codes keep their precision over a wide range.
_WEIGHT_FACTOR = 256.0
LEAST_COMPUTE_CAPABILITY = (9, 0)  # that cuDNN has FP8 attention for


@torch.library.custom_op("tmpdiff::attention_fp8_scaled", mutates_args=())  # type: ignore[untyped-decorator]
def attention_fp8(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """softmax(Q K^T / sqrt(D)) V without a mask, all in FP8 E4M3.

    Args:
        query: codes, float8_e4m3fn [B, S, H, D], contiguous; what they stand for is code times scale.
        key: as `query`.
        value: as `query`.
        scales: from `scales_tensor`, on the device of the codes.

    On a CPU the same roundings in FP32 products, all weights of a query at once, where a GPU takes blocks of keys.

    Returns:
        Codes of the result, float8_e4m3fn [B, S, H, D]. Their scale is the values': no result is larger than the largest
        value.

    Raises:
        BackendError: cuDNN's frontend is not installed.
    """
    if not query.is_cuda:
        return _reference(query, key, value, scales[0, 0] * scales[1, 0])
    output = torch.empty_like(query)
    device = query.device
    query_scale, key_scale, value_scale, inverse = (scales[row, :1].view([1] * 4) for row in range(4))
    weight, inverse_weight = (_scalar(factor, device.index) for factor in (_WEIGHT_FACTOR, 1.0 / _WEIGHT_FACTOR))
    # In the order of the graph's tensors; a result is scaled as the values are.
    factors = [query_scale, key_scale, value_scale, inverse_weight, weight, inverse]
    _plan(tuple(query.shape), device.index)(query, key, value, output, factors)
    return output


@attention_fp8.register_fake  # type: ignore[untyped-decorator]
def _(query: torch.Tensor, *_others: object) -> torch.Tensor:
    return torch.empty_like(query)


def scales_tensor(query: float, key: float, value: float) -> torch.Tensor:
    """The scales of an attention layer as the operator takes them.

    Returns:
        float32 [4, 4] on the CPU: in rows, because cuDNN wants 16 bytes of alignment, the scales of query, key and value,
        and one over the values'.
    """
    return torch.tensor([query, key, value, 1.0 / value])[:, None].repeat(1, 4)


@torch.library.custom_op("tmpdiff::attention_fp8", mutates_args=())  # type: ignore[untyped-decorator]
def _with_numbers(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_scale: float,
    key_scale: float,
    value_scale: float,
) -> torch.Tensor:
    """`attention_fp8` as packages of bundles before manifest version 5 call it."""
    device = None if query.device.type == "cpu" else query.device.index
    result: torch.Tensor = attention_fp8(query, key, value, _kept_scales(query_scale, key_scale, value_scale, device))
    return result


@functools.cache
def _kept_scales(query: float, key: float, value: float, device: int | None) -> torch.Tensor:
    """Made at a first call, so before a CUDA graph is captured, and kept."""
    return scales_tensor(query, key, value).to("cpu" if device is None else torch.device("cuda", device))


def _reference(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, logit_scale: torch.Tensor) -> torch.Tensor:
    queries, keys, values = (item.transpose(1, 2).float() for item in (query, key, value))
    logits = queries @ keys.transpose(2, 3) * (logit_scale * query.shape[3] ** -0.5)
    weights = (logits - logits.amax(dim=3, keepdim=True)).exp()
    seen = (weights * _WEIGHT_FACTOR).to(FP8).float() / _WEIGHT_FACTOR
    result = seen @ values / weights.sum(dim=3, keepdim=True)
    limit = torch.finfo(FP8).max
    return result.clamp(-limit, limit).to(FP8).transpose(1, 2).contiguous()


@functools.cache
def _scalar(value: float, device: int) -> torch.Tensor:
    """float32 [1, 1, 1, 1] on a GPU. Made at a first call, so before a CUDA graph is captured, and kept."""
    return torch.full([1] * 4, value, device=torch.device("cuda", device))


@functools.cache
def _plan(shape: tuple[int, int, int, int], device: int) -> Any:
    """A cuDNN plan for tensors [B, S, H, D] on a GPU, as (query, key, value, result, factors) -> None.

    Its workspace is its own: calls have to follow one another on the device, as the steps of a loop do.
    """
    cudnn = require_cudnn()
    batch, tokens, heads, size = shape
    dim, stride = [batch, heads, tokens, size], [tokens * heads * size, size, heads * size, 1]
    fp8, single = cudnn.data_type.FP8_E4M3, cudnn.data_type.FLOAT
    handle = cudnn.create_handle()
    graph = cudnn.pygraph(io_data_type=fp8, intermediate_data_type=single, compute_data_type=single, handle=handle)
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
    unused = {amax: torch.zeros([1] * 4, device=place) for amax in amaxes}
    workspace = torch.empty(max(graph.get_workspace_size(), 1), device=place, dtype=torch.uint8)

    def run(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, result: torch.Tensor, values: list[torch.Tensor]
    ) -> None:
        cudnn.set_stream(handle, torch.cuda.current_stream(place).cuda_stream)
        tensors = {tensor: data.transpose(1, 2) for tensor, data in zip(inputs, (query, key, value), strict=True)}
        bound = dict(zip(factors, values, strict=True))
        graph.execute({**tensors, output: result.transpose(1, 2), **bound, **unused}, workspace, handle=handle)

    return run
