"""Float32 torch without float32 weights: each layer's are widened when the forward pass reaches it, and go after it."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tmpdiff_export.devices import CPU

Read = Callable[[str], torch.Tensor]
"""A parameter by name, in the dtype that it is stored in, on any device."""


def hollow(module: torch.nn.Module) -> None:
    """Takes the parameters of a module away, in place: what is left in their place has shapes, and needs no memory.

    The numbers are not-a-number, so that a parameter that is used outside of its layer shows. Every one has memory of
    its own, one element: exporters take tensors that share memory for one.
    """
    made: dict[int, torch.nn.Parameter] = {}  # tied parameters stay tied
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                made[id(parameter)] = torch.nn.Parameter(_nothing(parameter.shape, CPU), requires_grad=False)
            part._parameters[name] = made[id(parameter)]


def taken_weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters of a loaded module by name; it is hollow afterwards, its floating buffers are float32."""
    weights = {name: parameter.detach() for name, parameter in module.named_parameters(remove_duplicate=False)}
    hollow(module)
    for part in module.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                part._buffers[name] = buffer.float()
    return weights


def on_meta(module: torch.nn.Module) -> torch.nn.Module:
    """A copy of a module whose parameters and buffers are on the device "meta"."""
    empty: dict[int, object] = {id(item): item.to("meta") for item in module.buffers()}
    for parameter in module.parameters():
        empty[id(parameter)] = torch.nn.Parameter(
            torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"), requires_grad=False
        )
    return copy.deepcopy(module, empty)


class OnDevice:
    """Parameters that stay in the memory of a device once they are read, in the dtype that they are stored in."""

    def __init__(self, read: Read, device: str) -> None:
        """On "cpu" nothing stays: each is read anew."""
        self._read, self._device = read, device
        self._held: dict[str, torch.Tensor] = {}

    def __call__(self, name: str) -> torch.Tensor:
        """See `Read`."""
        if self._device == CPU:
            return self._read(name)
        if name not in self._held:
            self._held[name] = self._read(name).to(self._device)
        return self._held[name]

    def free(self) -> None:
        """Gives the memory back."""
        self._held.clear()
        if self._device != CPU:
            torch.cuda.empty_cache()


@contextmanager
def streamed(module: torch.nn.Module, read: Read, device: str) -> Iterator[None]:
    """Lets a hollow module compute in float32 on a device while the block runs.

    The parameters that a part of the module has itself are there from before its call, when hooks that are registered
    within the block run as well, until after its call. Products are of full float32.

    Args:
        module: from `hollow` or `taken_weights`; hollow again afterwards.
        read: its parameters, by their names in `module.named_parameters()`.
        device: "cpu" or "cuda".
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    users: Counter[int] = Counter()  # a part may be in use within another that has the same parameter
    handles = []

    def enter(part: torch.nn.Module, _: Any) -> None:
        for parameter in part._parameters.values():
            if parameter is None:
                continue
            if not users[id(parameter)]:
                parameter.data = read(names[id(parameter)]).to(device, torch.float32)
            users[id(parameter)] += 1

    def leave(part: torch.nn.Module, *_: Any) -> None:
        for parameter in part._parameters.values():
            if parameter is None:
                continue
            users[id(parameter)] -= 1
            if not users[id(parameter)]:
                parameter.data = _nothing(parameter.shape, device)

    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        _place(module, device)
        for part in module.modules():
            if any(parameter is not None for parameter in part._parameters.values()):
                handles.append(part.register_forward_pre_hook(enter))
                handles.append(part.register_forward_hook(leave, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        _place(module, CPU)
        torch.backends.cudnn.allow_tf32 = tf32
        if device != CPU:
            torch.cuda.empty_cache()


def _place(module: torch.nn.Module, device: str) -> None:
    with torch.inference_mode(False):  # in it, tensors are made that no export takes
        for parameter in module.parameters():
            parameter.data = _nothing(parameter.shape, device)
        for part in module.modules():
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = buffer.to(device)


def _nothing(shape: torch.Size, device: str) -> torch.Tensor:
    return (
        torch.full((1,) * max(len(shape), 1), math.nan, device=device).expand(shape if len(shape) else (1,)).view(shape)
    )
