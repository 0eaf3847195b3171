"""The weights of a package, in one block of host or device memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from engines.backends.torch.library import SafetensorError, safe_open, torch
from engines.errors import BackendError, first_line
from engines.manifest import EngineEntry

_ALIGNMENT = 256  # of every tensor, as an allocation of its own would have


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in a block of bytes."""

    offset: int
    size_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def of(self, block: torch.Tensor) -> torch.Tensor:
        """The tensor, as a view."""
        return block[self.offset : self.offset + self.size_bytes].view(self.dtype).view(self.shape)


def weights_path(package: Path, entry: EngineEntry) -> Path:
    """The weights file of a package; `package.package_of` has checked the entry."""
    assert entry.weights is not None
    return package.with_name(PurePosixPath(entry.weights.path).name)


class Weights:
    """The weights file of one engine, and the block of memory that its content makes.

    Attributes:
        size_bytes: of the block, padding included.
    """

    def __init__(self, path: Path) -> None:
        """Reads the header of a safetensors file.

        Args:
            path: the file, whose hash has been checked.

        Raises:
            BackendError: the file cannot be read.
        """
        self._path = path
        with _reading(path), safe_open(path, framework="pt", device="cpu") as file:
            self._names = sorted(file.keys())
            places, end = [], 0
            for name in self._names:
                tensor = file.get_tensor(name)
                places.append(_Place(end, tensor.nbytes, tensor.dtype, tuple(tensor.shape)))
                end = -(-(end + tensor.nbytes) // _ALIGNMENT) * _ALIGNMENT
        self._places: Sequence[_Place] = places
        self.size_bytes = max(end, 1)

    def fill(self, block: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Reads everything from the file.

        Args:
            block: uint8, of `size_bytes` at least, in host or device memory.

        Returns:
            The tensors in the order of their names; views of `block`.

        Raises:
            BackendError: the file cannot be read.
        """
        tensors = self.tensors(block)
        with _reading(self._path), safe_open(self._path, framework="pt", device="cpu") as file:
            for name, tensor in zip(self._names, tensors, strict=True):
                tensor.copy_(file.get_tensor(name))
        return tensors

    def tensors(self, block: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The tensors of a block that holds them, in the order of their names; views of it."""
        return tuple(place.of(block) for place in self._places)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise BackendError(f"weights {path} cannot be read: {first_line(error)}; copy the bundle again") from error
