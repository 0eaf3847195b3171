"""safetensors files, written and read tensor by tensor, so that nothing has to hold all of them.

The format (github.com/huggingface/safetensors): the header's length, eight bytes, little endian; the header, JSON; the
tensors' bytes, little endian, in rows, one behind the other. An ONNX graph can refer straight into such a file.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from engines.backends.torch.weights import DTYPES
from engines.errors import BuildError

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Of the first tensor's place in the file; those behind it are ordered by the size of their numbers, largest first.
_ALIGNMENT = 64
_LARGEST_HEADER = 100 << 20  # what the library accepts


@dataclass(frozen=True)
class Place:
    """Where a tensor lies.

    Attributes:
        path: its file.
        offset: of its first byte in the file.
        size_bytes: of its content.
        dtype: of its numbers.
        shape: of the tensor.
    """

    path: Path
    offset: int
    size_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self) -> torch.Tensor:
        """The tensor, on the CPU, in memory of its own.

        Raises:
            BuildError: the file ends before it does.
            OSError: the file cannot be read.
        """
        data = torch.empty(self.size_bytes, dtype=torch.uint8)
        view = memoryview(data.numpy())
        with open(self.path, "rb", buffering=0) as stream:
            stream.seek(self.offset)
            done = 0
            while done < self.size_bytes:
                count = stream.readinto(view[done:])
                if not count:
                    raise BuildError(f"{self.path} ends within a tensor: it is damaged; write it again")
                done += count
        return data.view(self.dtype).view(self.shape)


def places(path: Path) -> dict[str, Place]:
    """The tensors of a safetensors file by name; reads its header only.

    Raises:
        BuildError: it is none, or is damaged.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 0 < length <= min(size - 8, _LARGEST_HEADER):
            raise BuildError(
                f"{path} is no safetensors file, or is damaged: its header would have {length} bytes; write it again"
            )
        header = stream.read(length)
    try:
        data = json.loads(header)
        return {
            name: _place(path, item, 8 + length, size - 8 - length)
            for name, item in data.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BuildError(f"{path} is no safetensors file, or is damaged: {error}; write it again") from error


class WeightFile:
    """A safetensors file in the making.

    The header is written first, from shapes and dtypes; the tensors come in any order. Leaving a `with` block without an
    error closes it.
    """

    def __init__(self, path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        """Makes the file, as large as it will be.

        Args:
            path: the file to make.
            tensors: what will be in it; only shapes and dtypes count, so the device may be "meta".

        Raises:
            OSError: it cannot be made, or the disk is full.
        """
        ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, tensor in ordered:
            begin, end = end, end + tensor.numel() * tensor.element_size()
            header[name] = {
                "dtype": _NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [begin, end],
            }
        data = json.dumps(header, separators=(",", ":")).encode()
        data += b" " * (-(8 + len(data)) % _ALIGNMENT)
        self.path = path
        self._missing = dict(tensors)
        self._begin = 8 + len(data)
        self._offsets = {name: item["data_offsets"][0] for name, item in header.items() if name != "__metadata__"}
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            self._put(len(data).to_bytes(8, "little") + data, 0)
            os.ftruncate(self._handle, self._begin + end)
        except BaseException:
            os.close(self._handle)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            os.close(self._handle)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Writes one tensor, from any device.

        Raises:
            ValueError: there is none of this name left to write, or its shape or dtype is another.
            OSError: the disk is full.
        """
        wanted = self._missing.get(name)
        if wanted is None or wanted.shape != tensor.shape or wanted.dtype != tensor.dtype:
            kept = "none" if wanted is None else f"{wanted.dtype} {tuple(wanted.shape)}"
            raise ValueError(f"tensor {name} is {tensor.dtype} {tuple(tensor.shape)}, {self.path.name} expects {kept}")
        del self._missing[name]
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        self._put(memoryview(data), self._begin + self._offsets[name])

    def close(self) -> None:
        """Makes the file durable.

        Raises:
            ValueError: a tensor was not written.
        """
        try:
            if self._missing:
                raise ValueError(
                    f"{self.path.name} lacks {len(self._missing)} tensors, first {next(iter(self._missing))}"
                )
            os.fsync(self._handle)
        finally:
            os.close(self._handle)

    def _put(self, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data)
        while view:
            count = os.pwrite(self._handle, view, offset)
            view, offset = view[count:], offset + count


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes tensors that are in memory to a safetensors file.

    Raises:
        OSError: it cannot be made, or the disk is full.
    """
    with WeightFile(path, tensors) as file:
        for name, tensor in tensors.items():
            file.write(name, tensor)


def _place(path: Path, item: dict[str, Any], begin: int, size: int) -> Place:
    dtype = DTYPES.get(item["dtype"])
    if dtype is None:
        raise ValueError(f"it holds numbers of type {item['dtype']}; known are {', '.join(DTYPES)}")
    shape, (first, last) = tuple(item["shape"]), item["data_offsets"]
    if any(type(number) is not int for number in (*shape, first, last)) or any(
        not 0 <= side < 1 << 63 for side in shape
    ):
        raise ValueError(f"a tensor of shape {list(shape)} at {first} to {last}")
    if not 0 <= first <= last <= size or math.prod(shape) * dtype.itemsize != last - first:
        raise ValueError(f"a tensor of shape {list(shape)} at {first} to {last} of {size} bytes")
    return Place(path, begin + first, last - first, dtype, shape)
