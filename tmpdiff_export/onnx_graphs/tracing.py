"""What tracing a module for its graph needs: no weights, no large products, and a few operators written otherwise."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tmpdiff_export.quantization.sixteen_bit import sixteen_bit_tensors

_INFERENCE = "_jit_pass_onnx_graph_shape_type_inference"
_ATEN = torch.ops.aten
# What takes the time of a forward pass, and what copies large tensors although it is said to make views of them.
_COSTLY = frozenset(
    {
        _ATEN.linear.default,
        _ATEN.matmul.default,
        _ATEN.mm.default,
        _ATEN.addmm.default,
        _ATEN.bmm.default,
        _ATEN.baddbmm.default,
        _ATEN.convolution.default,
        _ATEN._convolution.default,
        _ATEN.scaled_dot_product_attention.default,
        _ATEN.contiguous.default,
        _ATEN.to.dtype,
        _ATEN.to.dtype_layout,
    }
)
# Tensors of fewer values are computed on: a module may look at what its inputs are.
_LARGE = 1 << 16


@contextlib.contextmanager
def traced_tensors(module: torch.nn.Module, *, half: bool) -> Iterator[None]:
    """Puts zeros of one element for all of a shape in the place of parameters; the module has its own again afterwards.

    With `half` parameters and buffers are in FP16, but for those that have to stay float32.
    """
    parameters = {id(item): item for item in module.parameters()}
    sixteen_bit = {id(item): item for item in (sixteen_bit_tensors(module) if half else ())}
    changed = parameters | sixteen_bit
    own = {key: item.data for key, item in changed.items()}
    try:
        for key, item in changed.items():
            dtype = torch.float16 if key in sixteen_bit else item.dtype
            item.data = _zeros(item.shape, dtype) if key in parameters else item.data.to(dtype)
        yield
    finally:
        for key, item in changed.items():
            item.data = own[key]


@contextlib.contextmanager
def without_arithmetic(module: torch.nn.Module) -> Iterator[None]:
    """Lets `module` be traced without computing on large tensors or with weights: results are zeros of the right shape."""
    own = module.forward
    with ThreadPoolExecutor(1) as thread:

        def forward(*args: Any, **kwargs: Any) -> Any:
            with _ShapesOnly(thread):
                return own(*args, **kwargs)

        module.forward = forward
        try:
            yield
        finally:
            del module.forward


class _ShapesOnly(TorchDispatchMode):
    """Computes shapes in the place of values. In another thread: what is done in the tracing one is recorded."""

    def __init__(self, thread: ThreadPoolExecutor) -> None:
        super().__init__()
        self._thread = thread

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        large = any(isinstance(item, torch.Tensor) and item.numel() >= _LARGE for item in tree_leaves((args, kwargs)))
        if large and func._schema.is_mutable:
            return args[0]
        if func in _COSTLY or (large and _makes_tensors(func)):
            return self._thread.submit(_zero_result, func, args, kwargs).result()
        return func(*args, **kwargs)


def _makes_tensors(func: Any) -> bool:
    """Whether what an operator returns are new tensors, neither views nor numbers."""
    returns = func._schema.returns
    return all(isinstance(item.type, torch.TensorType) and item.alias_info is None for item in returns)


def _zero_result(func: Any, args: Any, kwargs: Any) -> Any:
    given: dict[int, torch.Tensor] = {}  # what is returned as it was given stays the same tensor

    def shape_of(item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            shape = item.to("meta")
            given[id(shape)] = item
            return shape
        return torch.device("meta") if isinstance(item, torch.device) else item

    def zeros_for(item: Any) -> Any:
        if not isinstance(item, torch.Tensor):
            return item
        return given[id(item)] if id(item) in given else _zeros(item.shape, item.dtype)

    with torch.inference_mode():
        args, kwargs = tree_map(shape_of, (args, kwargs))
        return tree_map(zeros_for, func(*args, **kwargs))


def _zeros(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """In the memory of one element."""
    return torch.zeros((1,) * len(shape), dtype=dtype).expand(shape)


@contextlib.contextmanager
def plain_operators() -> Iterator[None]:
    """Has a few functions of torch record what the exporter can write, in all threads."""
    with (
        _patched(torch.Tensor, "squeeze", _squeeze(torch.Tensor.squeeze)),
        _patched(torch.Tensor, "movedim", _movedim(torch.Tensor.movedim)),
        _patched(torch.nn.RMSNorm, "forward", _rms_norm),
        _patched(functional, "conv2d", _conv2d(functional.conv2d)),
        # It copies and transposes the weights that it is given, one and all.
        _patched(torch._C, _INFERENCE, _without_weights(getattr(torch._C, _INFERENCE))),
    ):
        yield


@contextlib.contextmanager
def _patched(owner: Any, name: str, function: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _squeeze(original: Any) -> Any:
    """`squeeze(dim)` of a dimension other than 1 as the no-op it is.

    With symbolic axes the TorchScript exporter cannot know the size and writes an If whose Squeeze
    branch fails shape inference; the traced size decides here instead.
    """

    def squeeze(tensor: torch.Tensor, *dims: int) -> torch.Tensor:
        if len(dims) == 1 and isinstance(dims[0], int) and int(tensor.shape[dims[0]]) != 1:
            return tensor
        result: torch.Tensor = original(tensor, *dims)
        return result

    return squeeze


def _movedim(original: Any) -> Any:
    """`movedim` with axes counted from the first: the exporter takes -1 for the number of an axis."""

    def movedim(tensor: torch.Tensor, *axes: int | tuple[int, ...]) -> torch.Tensor:
        counted = [item % tensor.dim() if isinstance(item, int) else item for item in axes]
        result: torch.Tensor = original(tensor, *counted)
        return result

    return movedim


def _without_weights(original: Any) -> Any:
    return lambda graph, weights, opset: original(graph, {}, opset)


def _rms_norm(norm: torch.nn.RMSNorm, data: torch.Tensor) -> torch.Tensor:
    """`torch.nn.RMSNorm` as plain operations: at this opset the exporter has none for it.

    In FP32, as torch computes it for FP16 tensors.
    """
    axes = list(range(-len(norm.normalized_shape), 0))
    wide = data.float()
    eps = torch.finfo(data.dtype).eps if norm.eps is None else norm.eps
    result = wide * torch.rsqrt(wide.square().mean(axes, keepdim=True) + eps)
    return (result if norm.weight is None else result * norm.weight.float()).to(data.dtype)


def _conv2d(original: Any) -> Any:
    """Convolutions as the operator that the tracer records as one: `without_arithmetic` would hide its parts from it."""

    def pair(value: Any) -> tuple[int, ...]:
        return (value, value) if isinstance(value, int) else tuple(value)

    def conv2d(
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> torch.Tensor:
        if isinstance(padding, str) or torch._C._get_tracing_state() is None:
            result: torch.Tensor = original(input, weight, bias, stride, padding, dilation, groups)
            return result
        sizes = pair(stride), pair(padding), pair(dilation)
        return torch._convolution(input, weight, bias, *sizes, False, (0, 0), groups, False, False, True, True)

    return conv2d
