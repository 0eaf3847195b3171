"""What the layers of a running denoiser read: hooks that note magnitudes of inputs, and who reads what."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from engines.errors import BuildError
from tmpdiff_export.quantization.codes import largest


@dataclass(frozen=True, eq=False)
class LayerInput:
    """What a layer has read.

    Attributes:
        amax: largest magnitude.
        channel_amax: the same per channel, float32 [K] on the CPU; None for a convolution.
        channel_mean: mean magnitude per channel over the calls that were asked for, float32 [K] on the CPU; None for a
            convolution, and where no call was.
    """

    amax: float
    channel_amax: torch.Tensor | None
    channel_mean: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class Observed:
    """What layers have read.

    Attributes:
        inputs: by name of the layer.
        groups: two or more layers that read the very same tensor (a block's q, k and v).
    """

    inputs: Mapping[str, LayerInput]
    groups: tuple[tuple[str, ...], ...]

    def tensors(self) -> dict[str, torch.Tensor]:
        """All but the groups, for a file."""
        found = {}
        for name, item in self.inputs.items():
            found[f"{name}/amax"] = torch.tensor(item.amax, dtype=torch.float64)
            found |= {
                f"{name}/{kind}": values
                for kind, values in (("channel_amax", item.channel_amax), ("channel_mean", item.channel_mean))
                if values is not None
            }
        return found

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor], groups: Sequence[Sequence[str]]) -> Observed:
        """What `tensors` gave, with its groups."""
        names = [name.removesuffix("/amax") for name in tensors if name.endswith("/amax")]
        inputs = {
            name: LayerInput(
                float(tensors[f"{name}/amax"]), tensors.get(f"{name}/channel_amax"), tensors.get(f"{name}/channel_mean")
            )
            for name in names
        }
        return cls(inputs, tuple(tuple(group) for group in groups))

    def renamed(self, prefix: str) -> Observed:
        """The same with `prefix` before every name."""
        return Observed(
            {f"{prefix}{name}": item for name, item in self.inputs.items()},
            tuple(tuple(f"{prefix}{name}" for name in group) for group in self.groups),
        )

    def groups_of(self, names: Collection[str]) -> list[list[str]]:
        """The groups that two or more of these layers make."""
        groups = ([name for name in group if name in names] for group in self.groups)
        return [group for group in groups if len(group) > 1]


def observe(
    module: torch.nn.Module, names: Sequence[str], run: Callable[[], None], averaged: Collection[int] = ()
) -> Observed:
    """Runs a module once over its data; what is found serves every recipe.

    No weight is read. What is noted stays on the device of the data until the end.

    Args:
        module: float32 export wrapper.
        names: linear layers and convolutions, as in `module.named_modules()`.
        run: calls `module` for every batch, without gradients.
        averaged: which calls of `module`, counted from 0, count for `LayerInput.channel_mean`.

    Raises:
        BuildError: a layer was not called, or has read numbers that are not finite.
    """
    watchers = {name: _Watcher(module.get_submodule(name)) for name in names}
    groups: list[list[str]] = []
    call = -1

    def begin(*_: Any) -> None:
        nonlocal call
        call += 1

    def note(name: str, data: torch.Tensor) -> None:
        watchers[name].note(data.detach(), averaged=call in averaged)
        if call == 0:
            # Noted on the tensor itself, which then lives no longer than it would anyhow; one of the data may have the
            # note of an earlier observation.
            noted = getattr(data, "_tmpdiff_readers", None)
            if noted is None or noted[0] is not groups:
                readers: list[str] = []
                noted = data._tmpdiff_readers = (groups, readers)
                groups.append(readers)
            noted[1].append(name)

    handle = module.register_forward_pre_hook(begin)
    try:
        with reading(module, names, note):
            run()
    finally:
        handle.remove()
    inputs = {name: watcher.found(name) for name, watcher in watchers.items()}
    return Observed(inputs, tuple(tuple(group) for group in groups if len(group) > 1))


@contextmanager
def reading(module: torch.nn.Module, names: Sequence[str], note: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """While the block runs, `note` is called with a layer's name and input before every call of the layer."""

    def hook(name: str) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
        return lambda _, args: note(name, args[0])

    handles = [module.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()


class _Watcher:
    """Notes the inputs of one layer."""

    def __init__(self, layer: torch.nn.Module) -> None:
        self._by_channel = not isinstance(layer, torch.nn.Conv2d)
        self._amax: torch.Tensor | None = None
        self._total: torch.Tensor | None = None
        self._averaged = 0

    def note(self, data: torch.Tensor, *, averaged: bool) -> None:
        """Takes an input, [..., K] or that of a convolution."""
        rows = data.reshape(-1, data.shape[-1])
        amax = largest(rows, 0).float() if self._by_channel else largest(rows).float()
        self._amax = amax if self._amax is None else torch.maximum(self._amax, amax)
        if averaged and self._by_channel:
            mean = rows.abs().mean(0).float()
            self._total = mean if self._total is None else self._total + mean
            self._averaged += 1

    def found(self, name: str) -> LayerInput:
        """Everything so far."""
        if self._amax is None:
            raise BuildError(f"layer {name} was never called, so it has no range; this is a bug in the recipes")
        amax = float(self._amax.max())
        if not amax < float("inf"):
            raise BuildError(
                f"layer {name}: the largest magnitude of its input is {amax}, expected a finite number; "
                "the denoiser overflows in float32, or its weights are damaged"
            )
        return LayerInput(
            amax,
            self._amax.cpu().clone() if self._by_channel else None,
            None if self._total is None else (self._total / self._averaged).cpu(),
        )
