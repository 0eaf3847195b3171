"""Ahead-of-time compilation of a torch module: an AOTInductor package, and its weights in a safetensors file.

The weights are inputs of the package. So they are stored once and without pickle, lie where the runtime puts them, and
may be exchanged; embedded, they made compilation of large models very slow.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from engines.errors import BuildError, first_line


class EngineModule(torch.nn.Module):
    """A wrapper as an engine: floating inputs and outputs are float32, inside all is 16-bit of one type, or float32."""

    def __init__(self, module: torch.nn.Module, dtype: torch.dtype, kept: Sequence[bool]) -> None:
        """
        Args:
            module: what computes.
            dtype: of its floating inputs.
            kept: for every input whether it stays as it is.
        """
        super().__init__()
        self.module = module
        self.dtype = dtype
        self.kept = tuple(kept)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Any shapes -> the module's outputs, floating ones in float32."""
        outputs = self.module(
            *(
                item if kept or not item.is_floating_point() else item.to(self.dtype)
                for item, kept in zip(inputs, self.kept, strict=True)
            )
        )
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return tuple(item.float() if item.is_floating_point() else item for item in outputs)


class _Call(torch.nn.Module):
    """A module whose tensors are arguments; it is kept in a tuple, which hides it from torch.export."""

    def __init__(self, module: torch.nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.held = (module,)
        self.names = tuple(names)

    def forward(self, tensors: tuple[torch.Tensor, ...], inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Calls the module with `tensors` in place of its parameters and buffers."""
        state = dict(zip(self.names, tensors, strict=True))
        return torch.func.functional_call(self.held[0], state, inputs)


def store_weights(module: EngineModule, weights: Path) -> EngineModule:
    """Writes the parameters and buffers of a module to a file.

    Args:
        module: on the CPU; not changed.
        weights: the safetensors file to write, tensors by name.

    Returns:
        A copy of the module without them, whose parameters and buffers are on the device "meta": small, whatever the
        size of the model.
    """
    state = {name: item.detach() for name, item in (*module.named_parameters(), *module.named_buffers())}
    stored: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for name in sorted(state):
        item = state[name].contiguous()
        storage = item.untyped_storage().data_ptr()
        stored[name] = item.clone() if storage in storages else item  # safetensors refuses memory that two share
        storages.add(storage)
    save_file(stored, weights)
    empty: dict[int, object] = {id(item): item.to("meta") for item in module.buffers()}
    for parameter in module.parameters():
        empty[id(parameter)] = torch.nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    return _without_capturing_hooks(copy.deepcopy(module, empty))


def _without_capturing_hooks(module: EngineModule) -> EngineModule:
    """Takes away the hooks that transformers puts into its models at their first call, and will put back.

    They are local functions, which cannot travel to another process.
    """
    for part in module.modules():
        if getattr(part, "_output_capturing_hooks_installed", False):
            part._output_capturing_hooks_installed = False
        for key, hook in list(part._forward_hooks.items()):
            if getattr(hook, "__module__", None) == "transformers.utils.output_capturing":
                del part._forward_hooks[key]
    return module


def compile_package(
    module: EngineModule, weights: Path, device: str, inputs: Sequence[torch.Tensor], package: Path
) -> tuple[tuple[int, ...], ...]:
    """Compiles a module, with its weights as inputs of the package.

    Args:
        module: from `store_weights`, in evaluation mode.
        weights: its weights file; the package takes the tensors in the order of their sorted names.
        device: "cuda" or "cpu".
        inputs: examples on that device; the package takes these shapes and dtypes only.
        package: the AOTInductor package to write.

    Returns:
        The shapes of the outputs.

    Raises:
        BuildError: torch cannot export or compile the module.
        torch.OutOfMemoryError: as named.
    """
    with safe_open(weights, framework="pt") as file:
        names = sorted(file.keys())
        # Copies, aligned as allocations are; on a CPU these would be views of the file.
        tensors = tuple(file.get_tensor(name).to(device, copy=True) for name in names)
    call, arguments = _Call(module, names), (tensors, tuple(inputs))
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(call, arguments, strict=False)
            shapes = tuple(tuple(item.shape) for item in call(*arguments))
            torch._inductor.aoti_compile_and_package(program, package_path=str(package))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler of somebody else's model may raise
        raise BuildError(f"torch cannot compile {package.stem}: {type(error).__name__}: {first_line(error)}") from error
    return shapes
