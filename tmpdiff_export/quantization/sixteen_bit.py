"""Which tensors of a module a 16-bit engine has in 16 bits."""

from __future__ import annotations

from collections.abc import Iterator

import torch


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
