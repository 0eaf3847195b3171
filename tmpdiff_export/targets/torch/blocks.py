"""Compilation of a denoiser whose repeated blocks are compiled once, and called with their own weights.

A denoiser is mostly one or two kinds of block, dozens of times each. Blocks of a kind are found by their exported graphs,
compared without names. Every kind becomes a package, and so does what lies before, between and after the blocks; a
list of calls says which package takes which weights and values (`engines.package_entry.PackageCall`). A module without
blocks that repeat becomes one package.
"""

from __future__ import annotations

import operator
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from engines.errors import BuildError, first_line
from tmpdiff_export.targets.torch.compile import Call, EngineModule, arguments_of
from tmpdiff_export.targets.torch.segments import Block, Divided, cut

LEAST_BLOCKS = 4  # of a kind: fewer are compiled with what surrounds them
_TENSOR = object()


@dataclass(frozen=True)
class _Nest:
    """Nested arguments or results: which leaves are tensors, and what the others are.

    Attributes:
        spec: of the nest.
        leaves: `_TENSOR`, or what is there.
        shapes: shape, dtype and device of the tensors.
    """

    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]
    shapes: tuple[tuple[tuple[int, ...], torch.dtype, torch.device], ...]

    @classmethod
    def of(cls, data: Any) -> _Nest:
        """Takes `data` apart."""
        leaves, spec = pytree.tree_flatten(data)
        shapes = tuple((tuple(item.shape), item.dtype, item.device) for item in _tensors(data))
        return cls(spec, tuple(_TENSOR if isinstance(item, torch.Tensor) else item for item in leaves), shapes)

    def empty(self) -> list[torch.Tensor]:
        """Contiguous tensors of those shapes."""
        return [torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in self.shapes]

    def filled(self, tensors: Iterable[torch.Tensor]) -> Any:
        """With these tensors."""
        left = iter(tensors)
        return pytree.tree_unflatten([next(left) if item is _TENSOR else item for item in self.leaves], self.spec)


def _tensors(data: Any) -> list[torch.Tensor]:
    return [item for item in pytree.tree_leaves(data) if isinstance(item, torch.Tensor)]


@dataclass(frozen=True)
class _Site:
    """A block, as the module calls it: with (args, kwargs), and what it returns."""

    name: str
    block: torch.nn.Module
    arguments: _Nest
    results: _Nest


_SITES: list[_Site] = []  # what the operator below stands for while a module is divided


@torch.library.custom_op("tmpdiff_export::block", mutates_args=())  # type: ignore[untyped-decorator]
def _block(inputs: list[torch.Tensor], site: int) -> list[torch.Tensor]:
    """Stands for a block in the graph of what surrounds it; never runs."""
    raise NotImplementedError


@_block.register_fake  # type: ignore[untyped-decorator]
def _(inputs: list[torch.Tensor], site: int) -> list[torch.Tensor]:
    return _SITES[site].results.empty()


class _BlockCall(torch.nn.Module):
    """A block whose tensors are arguments, as `compile.Call`; what it returns is flat and contiguous."""

    def __init__(self, site: _Site, names: Sequence[str]) -> None:
        super().__init__()
        self.held = (site,)
        self.names = tuple(names)

    def forward(self, tensors: tuple[torch.Tensor, ...], inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Calls the block with `tensors` in place of its parameters and buffers."""
        (site,) = self.held
        args, kwargs = site.arguments.filled(inputs)
        state = dict(zip(self.names, tensors, strict=True))
        result = torch.func.functional_call(site.block, state, args, kwargs)
        return tuple(item.contiguous() for item in _tensors(result))


@dataclass(frozen=True)
class _Kind:
    """Blocks whose graphs are equal.

    Attributes:
        names: of a block's tensors, sorted.
        program: of one of them.
        sites: all of them.
    """

    names: tuple[str, ...]
    program: ExportedProgram
    sites: list[_Site]


def compile_blocks(module: EngineModule, device: str, inputs: Sequence[torch.Tensor], package: Path) -> Divided:
    """Compiles a module as `compile_package` does, but with blocks that repeat compiled once.

    Args:
        module: in evaluation mode.
        device: "cuda" or "cpu".
        inputs: examples; the packages take these shapes and dtypes only.
        package: the first package to write; others are `part_paths`.

    Raises:
        BuildError: torch cannot export or compile the module.
        torch.OutOfMemoryError: as named.
    """
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            divided = divide(module, device, inputs)
            for part, path in zip(divided.parts, part_paths(package, len(divided.parts)), strict=True):
                torch._inductor.aoti_compile_and_package(part, package_path=str(path))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler of somebody else's model may raise
        raise BuildError(
            f"torch cannot compile {package.stem} in blocks: {type(error).__name__}: {first_line(error)}; build with "
            "--compile whole"
        ) from error
    return divided


def part_paths(package: Path, parts: int) -> tuple[Path, ...]:
    """The packages of an engine: `<name>.pt2`, `<name>.1.pt2` and so on."""
    others = (package.with_name(f"{package.stem}.{number}{package.suffix}") for number in range(1, parts))
    return (package, *others)


def divide(module: EngineModule, device: str, inputs: Sequence[torch.Tensor]) -> Divided:
    """Divides a module into parts of which equal ones are there once; see `compile_blocks`."""
    call = Call(module)
    tensors, examples = arguments_of(module, device, inputs)
    state = dict(zip(call.names, tensors, strict=True))
    sites = _record(module, call, (tensors, examples))
    kinds = _kinds(module, sites, state, examples)
    positions = {name: number for number, name in enumerate(state)}
    blocks = [
        Block(number, tuple(positions[f"{site.name}.{name}"] for name in kind.names), len(site.results.shapes))
        for number, kind in enumerate(kinds)
        for site in kind.sites
    ]
    with _marked([site for kind in kinds for site in kind.sites]):
        outer = _export(call, tensors, examples)
    outer.graph.eliminate_dead_code()
    return cut(outer, len(state), torch.ops.tmpdiff_export.block.default, blocks, [kind.program for kind in kinds])


def _export(module: torch.nn.Module, *arguments: Any) -> ExportedProgram:
    return torch.export.export(module, arguments, strict=False)


def _candidates(module: torch.nn.Module, prefix: str = "") -> Iterator[tuple[str, torch.nn.Module]]:
    """Outermost modules that lie in a list with enough others of their class."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if not isinstance(child, torch.nn.ModuleList):
            yield from _candidates(child, f"{path}.")
            continue
        classes = Counter(type(item) for item in child)
        for number, item in child.named_children():
            if classes[type(item)] >= LEAST_BLOCKS:
                yield f"{path}.{number}", item
            else:
                yield from _candidates(item, f"{path}.{number}.")


def _record(module: torch.nn.Module, call: Call, arguments: Any) -> dict[torch.nn.Module, _Site]:
    """How an exported module calls its candidates, but for those that it calls more than once."""
    found: dict[torch.nn.Module, list[_Site]] = {}

    def noting(name: str, block: torch.nn.Module) -> Callable[..., Any]:
        inner = block.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            result = inner(*args, **kwargs)
            found.setdefault(block, []).append(_Site(name, block, _Nest.of((args, kwargs)), _Nest.of(result)))
            return result

        return forward

    with _replaced({block: noting(name, block) for name, block in _candidates(module)}):
        _export(call, *arguments)
    return {block: sites[0] for block, sites in found.items() if len(sites) == 1}


def _kinds(
    module: torch.nn.Module,
    sites: Mapping[torch.nn.Module, _Site],
    state: Mapping[str, torch.Tensor],
    inputs: tuple[torch.Tensor, ...],
) -> list[_Kind]:
    """The kinds of block that there are enough of.

    Blocks are exported from within a call of the module, because wrappers put functions of diffusers right for as long
    as they run. Not blocks that share tensors with others, hold constants or change inputs.
    """
    kinds: dict[str, _Kind] = {}

    def exporting(site: _Site) -> Callable[..., Any]:
        inner = site.block.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            site.block.forward = inner
            add(site)
            return inner(*args, **kwargs)

        return forward

    def add(site: _Site) -> None:
        names = tuple(sorted(name for name, _ in (*site.block.named_parameters(), *site.block.named_buffers())))
        if any(f"{site.name}.{name}" not in state for name in names):
            return
        own = tuple(state[f"{site.name}.{name}"] for name in names)
        program = _export(_BlockCall(site, names), own, tuple(site.arguments.empty()))
        if not program.constants and not program.graph_signature.user_inputs_to_mutate:
            form = "\n".join([*names, _form(program.graph_module)])
            kinds.setdefault(form, _Kind(names, program, [])).sites.append(site)

    with _replaced({block: exporting(site) for block, site in sites.items()}), inputs[0].fake_mode:
        torch.func.functional_call(module, dict(state), inputs)
    return [kind for kind in kinds.values() if len(kind.sites) >= LEAST_BLOCKS]


@contextmanager
def _replaced(forwards: Mapping[torch.nn.Module, Callable[..., Any]]) -> Iterator[None]:
    for block, forward in forwards.items():
        block.forward = forward
    try:
        yield
    finally:
        for block in forwards:
            vars(block).pop("forward", None)


def _form(module: GraphModule) -> str:
    """A graph as text, with the graphs that its operators take; the same for graphs that differ in names only."""
    numbers: dict[Node, int] = {}
    lines = []
    for node in module.graph.nodes:
        numbers[node] = len(numbers)
        target = "" if node.op in ("placeholder", "output") else str(node.target)
        if node.op == "get_attr" and isinstance(held := operator.attrgetter(target)(module), GraphModule):
            target = f"({_form(held)})"  # what is computed under autocast, and the like
        arguments = pytree.tree_map_only(Node, lambda item: f"%{numbers[item]}", (node.args, node.kwargs))
        values = [
            (tuple(item.shape), item.stride(), item.dtype, item.device) if isinstance(item, torch.Tensor) else item
            for item in pytree.tree_leaves(node.meta.get("val"))
        ]
        lines.append(f"{node.op} {target} {arguments} {values}")
    return "\n".join(lines)


@contextmanager
def _marked(sites: Sequence[_Site]) -> Iterator[None]:
    """Within it the blocks of `sites` do nothing but leave the operator's name, and their number, in a graph."""

    def marker(number: int, site: _Site) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            assert _Nest.of((args, kwargs)) == site.arguments, site.name  # an export is like another
            return site.results.filled(_block([item.contiguous() for item in _tensors((args, kwargs))], number))

        return forward

    _SITES[:] = sites
    try:
        with _replaced({site.block: marker(number, site) for number, site in enumerate(sites)}):
            yield
    finally:
        _SITES.clear()
