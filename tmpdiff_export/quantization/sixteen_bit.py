"""Which tensors of a module a 16-bit engine has in 16 bits."""

from __future__ import annotations

from collections.abc import Iterator

import torch

NO_RECIPE = "none"
"""Of an engine in which nothing is quantized."""

# Below this many values a weight of a float32 model is not worth a 16-bit form.
SMALL_TENSOR_VALUES = 4096


def narrow_type(shape: torch.Size, source: torch.dtype) -> torch.dtype:
    """What a weight of a model that computes in float32 is stored in.

    Args:
        shape: of the weight.
        source: what most of the model's numbers come in; of 16-bit ones nothing is lost.
    """
    if len(shape) <= 1 or shape.numel() < SMALL_TENSOR_VALUES:
        return torch.float32
    return source if source.itemsize == 2 else torch.float16


def sixteen_bit_tensors(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """The floating parameters and buffers of a module, but for the buffers that have to stay float32.

    A module names those in its attribute `float32_buffers`.
    """
    kept = {
        id(part.get_buffer(name))
        for part in module.modules()
        for name in getattr(part, "float32_buffers", ())
        if getattr(part, name) is not None
    }
    for item in (*module.parameters(), *module.buffers()):
        if item.is_floating_point() and id(item) not in kept:
            yield item
