"""The weight files of packages: what is in them, and reading them into a block of host or device memory."""

from __future__ import annotations

import itertools
import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path, PurePosixPath

from engines.backends.torch.library import SafetensorError, safe_open, torch
from engines.errors import BackendError, first_line
from engines.manifest import EngineEntry

Tensors = Mapping[str, torch.Tensor]

_ALIGNMENT = 256  # of every tensor, as an allocation of its own would have
# Page-locked, of each of the two buffers by way of which a file gets to a GPU: 7.4 GB/s on an H200, with 32 MiB 5.8.
_STAGED_BYTES = 8 << 20
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""By the names that safetensors files have for them."""


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in its file, and in a block of bytes."""

    name: str
    in_file: int
    in_block: int
    size_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def of(self, block: torch.Tensor) -> torch.Tensor:
        """The tensor, as a view."""
        return block[self.in_block : self.in_block + self.size_bytes].view(self.dtype).view(self.shape)


class Weights:
    """A weight file, and the block of memory that its content makes.

    Attributes:
        path: the file.
        names: of its tensors.
        size_bytes: of the block, padding included.
    """

    def __init__(self, path: Path) -> None:
        """Reads the header of a safetensors file.

        Args:
            path: the file, whose hash has been checked.

        Raises:
            BackendError: the file cannot be read, or it has a tensor of a type that no package takes.
        """
        self.path = path
        places, end = [], 0
        for name, dtype, shape, begin, stop in _header(path):
            if dtype not in DTYPES:
                raise BackendError(
                    f"weights {path}: tensor {name} is of type {dtype}, expected one of {', '.join(DTYPES)}; build the "
                    "bundle again"
                )
            places.append(_Place(name, begin, end, stop - begin, DTYPES[dtype], shape))
            end = -(-(end + stop - begin) // _ALIGNMENT) * _ALIGNMENT
        self._places = tuple(places)  # in the order of the file, and of the block
        self.names = frozenset(place.name for place in places)
        self.size_bytes = max(end, 1)

    def fill(self, block: torch.Tensor) -> Tensors:
        """Reads everything from the file, with no other copy of it in memory.

        Args:
            block: uint8, of `size_bytes` at least, in host or device memory; a copy to a device is on its current stream.

        Returns:
            The tensors by name; views of `block`.

        Raises:
            BackendError: the file cannot be read.
        """
        with _reading(self.path), FileIO(self.path) as file:
            if block.device.type == "cpu":
                self._read(file, block[: self.size_bytes], 0)
            else:
                self._stage(file, block)
        return self.tensors(block)

    def tensors(self, block: torch.Tensor) -> Tensors:
        """The tensors of a block that holds them, by name; views of it."""
        return {place.name: place.of(block) for place in self._places}

    def _stage(self, file: FileIO, block: torch.Tensor) -> None:
        """Fills a block on a device: while one buffer is copied there, the other one is read."""
        size = min(_STAGED_BYTES, self.size_bytes)
        buffers = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        copied = [torch.cuda.Event(blocking=True) for _ in buffers]
        for begin, buffer, done in zip(
            range(0, self.size_bytes, size), itertools.cycle(buffers), itertools.cycle(copied), strict=False
        ):
            done.synchronize()
            piece = buffer[: self.size_bytes - begin]
            self._read(file, piece, begin)
            block[begin : begin + len(piece)].copy_(piece, non_blocking=True)
            done.record()
        for done in copied:
            done.synchronize()

    def _read(self, file: FileIO, target: torch.Tensor, begin: int) -> None:
        """Fills host memory with the bytes of a block from `begin` on; those between tensors stay as they are."""
        view = memoryview(target.numpy())
        end = begin + len(view)
        for place in self._places[max(bisect_right(self._places, begin, key=lambda place: place.in_block) - 1, 0) :]:
            if place.in_block >= end:
                return
            first, last = max(begin, place.in_block), min(end, place.in_block + place.size_bytes)
            file.seek(place.in_file + first - place.in_block)
            piece = view[first - begin : max(first, last) - begin]
            while piece:
                count = file.readinto(piece)
                if not count:
                    raise OSError(f"it ends in the middle of tensor {place.name}")
                piece = piece[count:]


def weights_of(name: str, package: Path, entry: EngineEntry) -> tuple[Weights, ...]:
    """The weight files of a package; `package.package_of` has checked the entry.

    Args:
        name: of the engine, for messages.
        package: the package, its weight files beside it; hashes have been checked.
        entry: its manifest entry.

    Raises:
        BackendError: a file cannot be read, or two have a tensor of the same name.
    """
    files = tuple(Weights(package.with_name(PurePosixPath(file.path).name)) for file in entry.weights)
    for one, other in itertools.combinations(files, 2):
        if common := one.names & other.names:
            raise BackendError(
                f"engine {name}: tensor {min(common)} is in {one.path.name} and in {other.path.name}, expected one of "
                "them; build the bundle again"
            )
    return files


def new_block(name: str, file: Weights, device: str) -> torch.Tensor:
    """Memory that a weight file fits into.

    Args:
        name: of the engine, for messages.
        file: what it is for.
        device: "cpu" or "cuda".

    Raises:
        BackendError: there is not enough.
    """
    try:
        return torch.empty(file.size_bytes, dtype=torch.uint8, device=device)
    except RuntimeError as error:  # torch.OutOfMemoryError is one; of the host torch raises no narrower class
        kind, advice = "host", "end other processes"
        if device != "cpu":
            kind, advice = "GPU", "limit the resident engines, or end other processes on the GPU"
        raise BackendError(
            f"cannot allocate {file.size_bytes} bytes of {kind} memory for {file.path.name} of engine {name}; {advice}"
        ) from error


def in_order(files: Iterable[Tensors]) -> tuple[torch.Tensor, ...]:
    """What a package takes: the tensors of all its files, in the order of their names."""
    tensors = {name: tensor for file in files for name, tensor in file.items()}
    return tuple(tensors[name] for name in sorted(tensors))


def _header(path: Path) -> list[tuple[str, str, tuple[int, ...], int, int]]:
    """Name, type, shape, and first and last byte of every tensor of a safetensors file, in the order of the file."""
    with _reading(path):
        with safe_open(path, framework="pt", device="cpu"):
            pass  # it has checked the header: sizes that fit types and shapes, no gaps, nothing beyond the file's end
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            described = json.loads(file.read(length))
    described.pop("__metadata__", None)
    found = [
        (name, item["dtype"], tuple(item["shape"]), *(8 + length + offset for offset in item["data_offsets"]))
        for name, item in described.items()
    ]
    return sorted(found, key=lambda item: item[3:])


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise BackendError(f"weights {path} cannot be read: {first_line(error)}; copy the bundle again") from error
