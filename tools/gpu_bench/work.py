"""Operations of a step, counted exactly while it runs once, and the ranges of activations seen on the way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tmpdiff_export.quantization.codes import AttentionRange
from tmpdiff_export.targets.torch.attention import watch_attention

Shape = tuple[int, int, int, int, int]


@dataclass
class Work:
    """Floating-point operations of one step; a multiply-add is two.

    Attributes:
        linear: by layer name.
        convolution: by layer name.
        attention: by shape (batch, heads, queries, keys, head size); 4 B H Sq Sk D, whatever a mask leaves out.
        other_products: batched products outside attention (Sana's linear attention).
        input_amax: by layer name, largest magnitude of the input of a linear layer or convolution over all steps seen,
            float32 [].
        attention_amax: by name of the attention layer, where attention can be in FP8.
        readers: names of linear layers that read the very same tensor, in groups; of every step seen.
    """

    linear: dict[str, int] = field(default_factory=dict)
    convolution: dict[str, int] = field(default_factory=dict)
    attention: dict[Shape, int] = field(default_factory=dict)
    other_products: int = 0
    input_amax: dict[str, torch.Tensor] = field(default_factory=dict)
    attention_amax: dict[str, AttentionRange] = field(default_factory=dict)
    readers: list[list[str]] = field(default_factory=list)

    def totals(self) -> dict[str, int]:
        """Operations by kind."""
        return {
            "linear": sum(self.linear.values()),
            "convolution": sum(self.convolution.values()),
            "attention": sum(self.attention.values()),
            "other_products": self.other_products,
        }


class _Products(TorchDispatchMode):
    """Counts batched products, but for those that an attention call or a linear layer is made of."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.work = work
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.bmm.default and not self.paused:
            batch, rows, depth = args[0].shape
            self.work.other_products += 2 * batch * rows * depth * args[1].shape[2]
        return result


@contextmanager
def watch_ranges(module: torch.nn.Module, work: Work) -> Iterator[None]:
    """Notes `input_amax` of every linear layer and convolution, who reads the same, and `attention_amax`."""

    def note(name: str) -> Any:
        def hook(layer: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            amax = args[0].detach().abs().amax().float()
            known = work.input_amax.get(name)
            work.input_amax[name] = amax if known is None else torch.maximum(known, amax)
            readers = getattr(args[0], "_readers", None)  # of the tensor, which later ones at its address are not
            if readers is None:
                readers = args[0]._readers = []
                work.readers.append(readers)
            readers.append(name)

        return hook

    handles = [
        layer.register_forward_pre_hook(note(name))
        for name, layer in module.named_modules()
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)
    ]
    try:
        with watch_attention(module, work.attention_amax):
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def count_operations(module: torch.nn.Module, work: Work) -> Iterator[None]:
    """Adds the operations of one eager call of `module` to `work`."""

    def count(name: str) -> Any:
        def hook(layer: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if isinstance(layer, torch.nn.Linear):
                counts, fan_in = work.linear, layer.in_features
            else:
                counts, fan_in = work.convolution, layer.weight[0].numel()
            counts[name] = counts.get(name, 0) + 2 * output.numel() * fan_in
            products.paused = False

        return hook

    def pause(layer: torch.nn.Module, args: Any) -> None:
        products.paused = True  # a transposed input makes a batched product of a linear layer

    products = _Products(work)
    handles = []
    for name, layer in module.named_modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
            handles += [layer.register_forward_pre_hook(pause), layer.register_forward_hook(count(name))]
    original = F.scaled_dot_product_attention

    def attention(query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        batch, heads, queries, size = query.shape
        shape = (batch, heads, queries, key.shape[-2], size)
        work.attention[shape] = work.attention.get(shape, 0) + 4 * batch * heads * queries * key.shape[-2] * size
        products.paused = True
        try:
            result: torch.Tensor = original(query, key, *args, **kwargs)
            return result
        finally:
            products.paused = False

    F.scaled_dot_product_attention = attention
    try:
        with products:
            yield
    finally:
        F.scaled_dot_product_attention = original
        for handle in handles:
            handle.remove()
