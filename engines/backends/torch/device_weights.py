"""Weight files in device memory: a block each, shared by the engines that read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from engines.backends.cuda.memory import PinnedBuffer
from engines.backends.torch.library import torch
from engines.backends.torch.weights import Tensors, Weights, in_order, new_block
from engines.errors import BackendError


@dataclass(eq=False)
class _Block:
    """Device memory, and the file that it holds.

    Attributes:
        memory: uint8.
        path: of the file, None before the first one is there.
        tensors: its content, views of `memory`.
        engines: how many read it; 0 if it is free, and other content may take its place.
    """

    memory: torch.Tensor
    path: Path | None = None
    tensors: Tensors = field(default_factory=dict)
    engines: int = 0


class DeviceWeights:
    """The weight files of a bundle's engines on the current device. One thread at a time uses it.

    Where engines come and go, a file's content stays in page-locked host memory, so that it comes back at the rate of the
    link; and a block that no engine needs is kept for what comes next, so that nothing is allocated or freed while steps
    run. What has not been written over yet is there again at once: an exchange copies only files that the two engines do
    not share.
    """

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()  # of its own: steps may be running on the loop's
        self._blocks: list[_Block] = []
        self._locked: dict[Path, PinnedBuffer] = {}

    def take(self, name: str, files: Sequence[Weights], *, returning: bool) -> OwnedWeights:
        """The tensors of an engine's files, in the order of their names.

        Args:
            name: of the engine, for messages.
            files: its weight files, as `weights_of` gives them.
            returning: whether the engine may give way to others and come back.

        Raises:
            BackendError: a file cannot be read, or there is not enough memory for it.
        """
        taken: list[_Block] = []
        try:
            with torch.cuda.stream(self._stream):
                held = {block.path: block for block in self._blocks}
                missing = []
                for file in files:  # first what is there, so that nothing is written over it
                    if file.path in held:
                        held[file.path].engines += 1
                        taken.append(held[file.path])
                    else:
                        missing.append(file)
                for file in sorted(missing, key=lambda item: item.size_bytes, reverse=True):
                    block = self._block_for(name, file, returning)
                    block.path, block.engines = None, 1  # holds nothing whole until it is filled
                    taken.append(block)
                    block.tensors = self._upload(name, file, block.memory, returning)
                    block.path = file.path
            self._stream.synchronize()
        except BaseException:
            self._give_back(taken, keep=returning)
            raise
        return OwnedWeights(self, taken, returning)

    def clear(self) -> None:
        """Frees what no engine uses, page-locked memory too; work on it must have finished."""
        self._blocks = [block for block in self._blocks if block.engines]
        self._stream.synchronize()
        while self._locked:
            self._locked.popitem()[1].close()

    def _give_back(self, blocks: Sequence[_Block], *, keep: bool) -> None:
        for block in blocks:
            block.engines -= 1
        if not keep:
            self._blocks = [block for block in self._blocks if block.engines or block not in blocks]

    def _block_for(self, name: str, file: Weights, returning: bool) -> _Block:
        """For what comes and goes the smallest free block that is large enough; else a new one."""
        if returning:
            free = (block for block in self._blocks if not block.engines and block.memory.numel() >= file.size_bytes)
            if fitting := min(free, key=lambda block: block.memory.numel(), default=None):
                return fitting
            # Too small for anything that is to come back; a new one takes their place, not one beside them in torch's cache.
            used = [block for block in self._blocks if block.engines]
            if len(used) < len(self._blocks):
                self._blocks = used
                torch.cuda.empty_cache()
        self._blocks.append(_Block(new_block(name, file, "cuda")))
        return self._blocks[-1]

    def _upload(self, name: str, file: Weights, memory: torch.Tensor, returning: bool) -> Tensors:
        if not returning and file.path not in self._locked:
            return file.fill(memory)
        if file.path not in self._locked:
            self._locked[file.path] = _locked(name, file)
        memory[: file.size_bytes].copy_(_view(self._locked[file.path]), non_blocking=True)
        return file.tensors(memory)


class OwnedWeights:
    """The weights of one engine in device memory.

    Attributes:
        tensors: in the order of their names; empty once closed.
    """

    def __init__(self, store: DeviceWeights, blocks: Sequence[_Block], returning: bool) -> None:
        self.tensors = in_order(block.tensors for block in blocks)
        self._store, self._blocks, self._returning = store, blocks, returning

    def close(self) -> None:
        """Gives the blocks back, which others may still use; work of this engine must have finished."""
        self.tensors = ()
        blocks, self._blocks = self._blocks, ()
        self._store._give_back(blocks, keep=self._returning)


def _locked(name: str, file: Weights) -> PinnedBuffer:
    """A file's content in page-locked host memory of its size: torch's own allocator would take a power of two."""
    try:
        memory = PinnedBuffer(file.size_bytes)
    except BackendError as error:
        raise BackendError(
            f"cannot lock {file.size_bytes} bytes of host memory for {file.path.name} of engine {name}: {error}; let more "
            "engines be resident, or end other processes"
        ) from error
    try:
        file.fill(_view(memory))
    except BaseException:
        memory.close()
        raise
    return memory


def _view(memory: PinnedBuffer) -> torch.Tensor:
    return torch.from_numpy(memory.view(0, (memory.size_bytes,), np.dtype(np.uint8)))
