"""Ahead-of-time compilation of a torch module: an AOTInductor package, and its weights in a safetensors file.

The weights are inputs of the package. So they are stored once and without pickle, lie where the runtime puts them, and
may be exchanged; embedded, they made compilation of large models very slow.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from engines.errors import BuildError


class EngineModule(torch.nn.Module):
    """A wrapper as an engine: floating inputs and outputs are float32, inside they are of one 16-bit type or float32."""

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


def compile_package(
    module: torch.nn.Module, inputs: Sequence[torch.Tensor], package: Path, weights: Path
) -> tuple[tuple[int, ...], ...]:
    """Compiles `module` for the device its tensors are on.

    Args:
        module: from `EngineModule`, in evaluation mode.
        inputs: examples; the package takes these shapes and dtypes only.
        package: the AOTInductor package to write.
        weights: the safetensors file to write: parameters and buffers by name, which the package takes in the order
            of their sorted names.

    Returns:
        The shapes of the outputs.

    Raises:
        BuildError: torch cannot export or compile the module.
    """
    state = {name: item.detach() for name, item in (*module.named_parameters(), *module.named_buffers())}
    names = sorted(state)
    arguments = (tuple(state[name] for name in names), tuple(inputs))
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(_Call(module, names), arguments, strict=False)
            shapes = tuple(tuple(item.shape) for item in module(*inputs))
            torch._inductor.aoti_compile_and_package(program, package_path=str(package))
    except Exception as error:  # whatever a compiler of somebody else's model may raise
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BuildError(f"torch cannot compile {package.stem}: {type(error).__name__}: {first}") from error
    save_file({name: state[name].cpu().contiguous() for name in names}, weights)
    shutil.copymode(package, weights)  # safetensors writes files that only their owner may read
    return shapes
