"""A graph in which blocks are marked, cut into what lies before, between and after them."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from engines.package_entry import PackageCall


@dataclass(frozen=True)
class Divided:
    """A module in parts, of which equal ones are there once.

    Attributes:
        parts: the programs to compile; each takes weights, and then values.
        calls: in the order of their execution. Values are numbered: the module's inputs, then what each call returns.
        results: the values that are the module's outputs.
        outputs: tensors that have the shapes and dtypes of the outputs, and no content.
    """

    parts: tuple[ExportedProgram, ...]
    calls: tuple[PackageCall, ...]
    results: tuple[int, ...]
    outputs: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Block:
    """A block that is compiled apart.

    Attributes:
        kind: number of its program.
        weights: positions among the module's tensors.
        outputs: how many tensors it returns.
    """

    kind: int
    weights: tuple[int, ...]
    outputs: int


def runs(positions: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Ascending numbers as [begin, end) of those that follow one another."""
    found: list[tuple[int, int]] = []
    for item in positions:
        if found and found[-1][1] == item:
            found[-1] = found[-1][0], item + 1
        else:
            found.append((item, item + 1))
    return tuple(found)


def cut(
    outer: ExportedProgram,
    tensors: int,
    mark: torch._ops.OpOverload,
    blocks: Sequence[Block],
    kinds: Sequence[ExportedProgram],
) -> Divided:
    """Cuts a graph at its marked blocks.

    Args:
        outer: takes the module's tensors, and then its inputs.
        tensors: how many tensors it has.
        mark: the operator (values, number of the block) that stands for a block.
        blocks: by number.
        kinds: their programs.

    Returns:
        What surrounds the blocks first, so that part 0 is there in any case.
    """
    return _Cut(outer, tensors, mark, blocks).divided(kinds)


class _Cut:
    """The calls and parts, as they are found."""

    def __init__(
        self, outer: ExportedProgram, tensors: int, mark: torch._ops.OpOverload, blocks: Sequence[Block]
    ) -> None:
        self._outer, self._mark, self._blocks = outer, mark, blocks
        self._weights: dict[Node, int] = {}
        self._constants: dict[Node, torch.Tensor] = {}
        self._values: dict[Node, int] = {}
        self._count = 0
        self._segments: list[ExportedProgram] = []
        self._calls: list[
            tuple[bool, PackageCall]
        ] = []  # whether it is of a block, whose kinds come behind the segments
        for node, spec in zip(outer.graph.find_nodes(op="placeholder"), outer.graph_signature.input_specs, strict=True):
            if spec.kind is not InputKind.USER_INPUT:
                self._constants[node] = outer.constants[str(spec.target)]
            elif len(self._weights) < tensors:
                self._weights[node] = len(self._weights)
            else:
                self._number(node)

    def divided(self, kinds: Sequence[ExportedProgram]) -> Divided:
        """The parts, and their calls."""
        segments: dict[int, list[Node]] = {}
        marks: dict[int, list[Node]] = {}
        levels: dict[Node, int] = {}  # how many blocks have to run before a node, one behind the other
        for node in self._outer.graph.nodes:
            level = levels[node] = max((levels[item] for item in node.all_input_nodes), default=0)
            if node.op != "call_function":
                continue
            if node.target is self._mark:
                marks.setdefault(level, []).append(node)
                levels[node] = level + 1
            elif not self._of_block(node):
                segments.setdefault(level, []).append(node)
        for level in range(max((*segments, *marks), default=-1) + 1):
            self._add_segment(segments.get(level, []))
            for node in marks.get(level, []):
                self._add_block(node)
        (output,) = self._outer.graph.find_nodes(op="output")
        results = pytree.tree_leaves(output.args)
        first_kind = len(self._segments)
        return Divided(
            parts=(*self._segments, *kinds),
            calls=tuple(
                call.model_copy(update={"package": call.package + first_kind}) if of_block else call
                for of_block, call in self._calls
            ),
            results=tuple(self._values[item] for item in results),
            outputs=tuple(item.meta["val"] for item in results),
        )

    def _number(self, node: Node) -> None:
        self._values[node] = self._count
        self._count += 1

    def _of_block(self, node: Node) -> bool:
        source = node.args[0] if node.target is operator.getitem else None
        return isinstance(source, Node) and source.target is self._mark

    def _add_block(self, node: Node) -> None:
        inputs, number = node.args
        assert isinstance(inputs, list | tuple)
        assert isinstance(number, int)
        block = self._blocks[number]
        for item in node.users:
            self._values[item] = self._count + int(item.args[1])
        self._count += block.outputs
        taken = tuple(self._values[item] for item in inputs if isinstance(item, Node))
        call = PackageCall(package=block.kind, weights=runs(block.weights), inputs=taken, outputs=block.outputs)
        self._calls.append((True, call))

    def _add_segment(self, nodes: Sequence[Node]) -> None:
        """A part of its own for `nodes`, and its call."""
        inside = set(nodes)
        outputs = [node for node in nodes if any(user not in inside for user in node.users)]
        if not outputs:
            return
        outside = list(dict.fromkeys(item for node in nodes for item in node.all_input_nodes if item not in inside))
        weights = sorted((item for item in outside if item in self._weights), key=self._weights.__getitem__)
        values = [item for item in outside if item in self._values]
        root, graph, copied = torch.nn.Module(), Graph(), {}
        for item in (*weights, *values):
            copied[item] = graph.placeholder(item.name)
        for item in outside:
            if item in self._constants:
                root.register_buffer(item.name, self._constants[item])
                copied[item] = graph.get_attr(item.name)
            elif item.op == "get_attr":  # a graph that an operator of this one takes
                setattr(root, str(item.target), getattr(self._outer.graph_module, str(item.target)))
                copied[item] = graph.get_attr(str(item.target))
        for node in nodes:
            copied[node] = graph.node_copy(node, copied.__getitem__)
        graph.output(tuple(copied[node] for node in outputs))
        examples = tuple(item.meta["val"] for item in (*weights, *values))
        self._segments.append(torch.export.export(GraphModule(root, graph), examples, strict=False))
        taken = tuple(self._values[item] for item in values)
        positions = runs(self._weights[item] for item in weights)
        call = PackageCall(package=len(self._segments) - 1, weights=positions, inputs=taken, outputs=len(outputs))
        self._calls.append((False, call))
        for node in outputs:
            self._number(node)
