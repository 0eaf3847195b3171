"""Ahead-of-time compilation of a torch module: an AOTInductor package whose weights are inputs.

So weights lie in files of their own, once for several engines and without pickle, and on the device where the runtime
puts them; embedded, they made compilation of large models very slow. Nothing is computed here and no weights are read:
the module is on the device "meta", and torch traces it with tensors that have shapes only.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from engines.errors import BuildError, first_line

Operator = Literal["attention_fp8"]


class EngineModule(torch.nn.Module):
    """A wrapper as an engine: floating inputs and outputs are float32, inside all is 16-bit of one type, or float32.

    Attributes:
        module: what computes; on the device "meta".
        dtype: of its floating inputs. With float32, floating weights may be stored in 16 bits: they are widened layer by
            layer.
        kept: for every input whether it stays as it is.
    """

    def __init__(self, module: torch.nn.Module, dtype: torch.dtype, kept: Sequence[bool]) -> None:
        """See the class."""
        super().__init__()
        self.module = module
        self.dtype = dtype
        self.kept = tuple(kept)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """What the package takes as weights, sorted by the names that they have in the weight files."""
        state = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        return {name: state[name].detach() for name in sorted(state)}

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Any shapes -> the module's outputs, floating ones in float32."""
        with _widened(self.module) if self.dtype is torch.float32 else contextlib.nullcontext():
            outputs = self.module(
                *(
                    item if kept or not item.is_floating_point() else item.to(self.dtype)
                    for item, kept in zip(inputs, self.kept, strict=True)
                )
            )
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return tuple(item.float() if item.is_floating_point() else item for item in outputs)


@contextmanager
def _widened(module: torch.nn.Module) -> Iterator[None]:
    """Each part's floating parameters are float32 while it is called; so are those of layers in it.

    T5 asks for the type of a layer's weight before it calls the layer.
    """

    def affected(part: torch.nn.Module) -> list[torch.nn.Module]:
        return [part, *(child for child in part.children() if not any(child.children()))]

    def enter(part: torch.nn.Module, _: Any) -> None:
        for item in affected(part):
            narrow.setdefault(item, []).append(dict(item._parameters))  # calls nest, also of one part
            for name, tensor in narrow[item][-1].items():
                if tensor is not None and tensor.is_floating_point():
                    item._parameters[name] = tensor.float()

    def leave(part: torch.nn.Module, *_: Any) -> None:
        for item in affected(part):
            item._parameters.update(narrow[item].pop())

    narrow: dict[torch.nn.Module, list[dict[str, Any]]] = {}
    handles = [
        handle
        for part in module.modules()
        for handle in (part.register_forward_pre_hook(enter), part.register_forward_hook(leave))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def without_capturing_hooks(module: torch.nn.Module) -> None:
    """Takes away the hooks that transformers puts into its models at their first call, and will put back.

    They are local functions, which cannot travel to another process.
    """
    for part in module.modules():
        if getattr(part, "_output_capturing_hooks_installed", False):
            part._output_capturing_hooks_installed = False
        for key, hook in list(part._forward_hooks.items()):
            if getattr(hook, "__module__", None) == "transformers.utils.output_capturing":
                del part._forward_hooks[key]


class Call(torch.nn.Module):
    """A module whose tensors are arguments; it is kept in a tuple, which hides it from torch.export."""

    def __init__(self, module: EngineModule) -> None:
        super().__init__()
        self.held = (module,)
        self.names = tuple(f"module.{name}" for name in module.tensors)

    def forward(self, tensors: tuple[torch.Tensor, ...], inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Calls the module with `tensors` in place of its parameters and buffers."""
        state = dict(zip(self.names, tensors, strict=True))
        return torch.func.functional_call(self.held[0], state, inputs)


def arguments_of(
    module: EngineModule, device: str, inputs: Sequence[torch.Tensor]
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """What `Call` takes, as tensors of one `FakeTensorMode`: torch traces with them, and they take no memory."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        tensors, examples = (
            tuple(torch.empty(item.shape, dtype=item.dtype, device=device) for item in items)
            for items in (module.tensors.values(), inputs)
        )
    return tensors, examples


class Compiled(NamedTuple):
    """A module that was compiled.

    Attributes:
        outputs: tensors that have the shapes and dtypes of the outputs, and no content.
        operators: see `operators_of`.
    """

    outputs: tuple[torch.Tensor, ...]
    operators: tuple[Operator, ...]


def operators_of(*programs: torch.export.ExportedProgram) -> tuple[Operator, ...]:
    """What packages of these programs call back into the process that runs them, as `PackageEntry` names it."""
    targets = {str(node.target) for program in programs for node in program.graph.nodes}
    return ("attention_fp8",) if "tmpdiff.attention_fp8_scaled.default" in targets else ()


def compile_package(module: EngineModule, device: str, inputs: Sequence[torch.Tensor], package: Path) -> Compiled:
    """Compiles a module, with its weights as inputs of the package, in the order of `EngineModule.tensors`.

    Args:
        module: in evaluation mode.
        device: "cuda" or "cpu".
        inputs: examples; the package takes these shapes and dtypes only.
        package: the AOTInductor package to write.

    Raises:
        BuildError: torch cannot export or compile the module.
        torch.OutOfMemoryError: as named.
    """
    arguments = arguments_of(module, device, inputs)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(Call(module), arguments, strict=False)
            torch._inductor.aoti_compile_and_package(program, package_path=str(package))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler of somebody else's model may raise
        raise BuildError(f"torch cannot compile {package.stem}: {type(error).__name__}: {first_line(error)}") from error
    (output,) = program.graph.find_nodes(op="output")
    return Compiled(tuple(node.meta["val"] for node in output.args[0]), operators_of(program))
