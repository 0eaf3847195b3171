"""What the device loop needs of an engine: a plan in device memory, and its contexts at fixed shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from engines.backends.cuda.memory import SharedMemory, Stream
from engines.manifest import TensorSpec

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Tensor:
    """An input or output of a plan; `shape` has -1 for axes that vary."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, spec: TensorSpec) -> Tensor:
        """The tensor that the manifest describes."""
        return cls(spec.name, np.dtype(spec.dtype), tuple(-1 if isinstance(n, str) else n for n in spec.shape))

    @property
    def buffer(self) -> str:
        """Name of the buffer that every engine of a bundle binds for a tensor of this name and dtype."""
        return f"{self.name} {self.dtype}"


class DeviceContext(Protocol):
    """A plan at fixed shapes, over device memory that the caller owns.

    Attributes:
        output_shapes: by output name.
        note: why there is no CUDA graph although one was tried, else None.
    """

    output_shapes: dict[str, tuple[int, ...]]
    note: str | None

    def bind(self, memory: SharedMemory) -> dict[str, int]:
        """Makes the context use the shared buffers of its tensors, which grow as needed.

        Returns:
            Device address of every input and output.

        Raises:
            BackendError: there is not enough device memory.
        """
        ...

    def enqueue(self, stream: Stream) -> None:
        """Enqueues one inference over the bound buffers.

        Raises:
            BackendError: nothing is bound, or the backend refuses.
        """
        ...

    def size_bytes(self, tensor: Tensor) -> int:
        """Size of an input or output at the context's shapes."""
        ...


class DevicePlan(Protocol):
    """An engine in device memory.

    Attributes:
        name: for messages.
        inputs: by name.
        outputs: by name.
    """

    name: str
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]

    @property
    def note(self) -> str | None:
        """Why the engine runs without a CUDA graph at the shapes used last; None if it has or may get one."""
        ...

    def context(self, shapes: Shapes, stream: Stream) -> DeviceContext:
        """The context for these input shapes, made at first use.

        Args:
            shapes: of all inputs.
            stream: what the context will be used on; at rest, or running this plan at the same shapes only.

        Raises:
            BackendError: inputs are missing or unknown, or the plan does not take the shapes.
        """
        ...

    def close(self) -> None:
        """Frees graphs, contexts and weights; their work must have finished."""
        ...
