"""One denoiser step over fixed inputs: blocks compiled, the whole step replayed as a CUDA graph."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from tools.gpu_bench.models import Inputs

# Blocks of one class share their compiled code, but every row adds its own; all stay within these limits.
RECOMPILE_LIMIT = 512
WARM_UP_CALLS = 2


def map_tensors(data: Any, change: Any) -> Any:
    """Nested dictionaries with `change` applied to every tensor."""
    if isinstance(data, dict):
        return {key: map_tensors(value, change) for key, value in data.items()}
    return change(data) if isinstance(data, torch.Tensor) else data


def tensors_of(data: Any) -> list[torch.Tensor]:
    """The tensors of nested dictionaries, in their order."""
    if isinstance(data, dict):
        return [tensor for value in data.values() for tensor in tensors_of(value)]
    return [data] if isinstance(data, torch.Tensor) else []


def compile_blocks(module: torch.nn.Module, blocks: Sequence[str], backend: str) -> int:
    """Compiles every block whose class, or a base of it, is named, in place; code is made at the first call.

    Returns:
        The number of blocks.
    """
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    torch._dynamo.config.accumulated_recompile_limit = 8 * RECOMPILE_LIMIT
    found = [item for item in module.modules() if any(kind.__name__ in blocks for kind in type(item).__mro__)]
    for block in found:
        block.compile(fullgraph=True, dynamic=False, backend=backend)
        block._compiled_call_impl = _with_plain_strides(block._compiled_call_impl)
    return len(found)


def _with_plain_strides(call: Any) -> Any:
    """`call`, with arguments whose strides differ in dimensions of size 1 only made equal.

    FLUX's first block reads a tensor of its own, later ones a part of a larger tensor: at batch 1 the same memory
    layout, but the code would be compiled twice.
    """

    def plain(item: Any) -> Any:
        if not isinstance(item, torch.Tensor) or not item.is_contiguous():
            return item
        strides, size = [], 1
        for length in reversed(item.shape):
            strides.append(size)
            size *= max(length, 1)
        return item.as_strided(item.shape, strides[::-1])

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return call(*(plain(item) for item in args), **{name: plain(item) for name, item in kwargs.items()})

    return wrapped


def compiled_graphs() -> int:
    """Graphs that torch has compiled in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


class Step:
    """A denoiser with inputs of its own, into which one of the input sets is copied before a call.

    Attributes:
        launch_mode: "graph", or "stream" before `capture` and on a CPU.
    """

    def __init__(self, module: torch.nn.Module, input_sets: Sequence[Inputs]) -> None:
        self.module = module
        self.input_sets = input_sets
        self.launch_mode = "stream"
        self._static: Inputs = map_tensors(input_sets[0], torch.clone)
        self._targets = tensors_of(self._static)
        self._sources = [tensors_of(item) for item in input_sets]
        self._graph: Any = None
        self._output: torch.Tensor | None = None
        self.device = self._targets[0].device

    def load(self, index: int) -> None:
        """Copies input set `index` (modulo their number) to where the step reads it."""
        sources = self._sources[index % len(self._sources)]
        for target, source in zip(self._targets, sources, strict=True):
            target.copy_(source)

    def call(self) -> torch.Tensor:
        """Runs the module, kernel by kernel."""
        with torch.no_grad():
            output: torch.Tensor = self.module(**self._static, return_dict=False)[0]
        return output

    def launch(self) -> torch.Tensor:
        """Runs the step as it is timed; the result is valid until the next launch."""
        if self._graph is None:
            return self.call()
        self._graph.replay()
        assert self._output is not None
        return self._output

    def compile_now(self) -> float:
        """First call, which compiles; returns its seconds."""
        begin = time.perf_counter()
        self.call()
        self.synchronize()
        return time.perf_counter() - begin

    def capture(self) -> None:
        """Records the step as a CUDA graph, so that the cost of launching kernels is not measured."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_CALLS):
                self.call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._output = self.call()
        self._graph = graph
        self.launch_mode = "graph"

    def outputs(self) -> list[torch.Tensor]:
        """The result for every input set."""
        results = []
        for index in range(len(self.input_sets)):
            self.load(index)
            results.append(self.launch().clone())
        return results

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
