"""Which files an ONNX file reads tensors from, found without the onnx package, and the refusal of others.

An ONNX file is a protobuf message. Its fields are walked as they lie in the file, which is mapped: what holds no
reference is skipped, and nothing is copied.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from engines.errors import BackendError
from engines.manifest import EngineEntry

# Field numbers of onnx.proto: by message, the messages in it that may hold a tensor.
_CHILDREN: Final[dict[str, dict[int, str]]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse tensor"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse tensor", 23: "sparse tensor"},
    "sparse tensor": {1: "tensor", 2: "tensor"},
}
_OPERATOR: Final = 4  # of a node
_TENSOR_NAME, _EXTERNAL_DATA, _DATA_LOCATION = 8, 13, 14
_VARINT, _MESSAGE = 0, 2  # types of a field; strings are as messages
_FIXED: Final = {1: 8, 5: 4}  # bytes of others
_KEYS: Final = ("location", "offset", "length", "checksum")

# protobuf's own limit on nesting is 100; a graph of a denoiser has some hundred thousand fields.
_MOST_NESTED: Final = 100
_MOST_FIELDS: Final = 10_000_000
_MOST_TEXT: Final = 4096


@dataclass(frozen=True)
class Reference:
    """Where a tensor lies that is not in the ONNX file.

    Attributes:
        tensor: its name.
        location: of the file, as it is written.
        offset: of the first byte.
        size_bytes: None if the ONNX file leaves it to the tensor's shape.
    """

    tensor: str
    location: str
    offset: int
    size_bytes: int | None


class _Malformed(ValueError):
    pass


def references(path: Path) -> Iterator[Reference]:
    """The tensors of an ONNX file that lie in other files.

    Raises:
        BackendError: it is no ONNX file, it holds a reference that is no plain (file, offset, length), or an operator
            that loads a compiled model.
        OSError: it cannot be read.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield from _Walk(data).references()
    except ValueError as error:  # an empty file cannot be mapped
        raise BackendError(
            f"cannot load {path}: as an ONNX file it is malformed ({error}); build the bundle again"
        ) from error


def require_listed(name: str, path: Path, entry: EngineEntry) -> None:
    """Refuses a graph that reads anything but the files of its manifest entry.

    Args:
        name: of the engine, for messages.
        path: the ONNX file, its weight files beside it; hashes have been checked.
        entry: its manifest entry.

    Raises:
        BackendError: as `references`, a file that the entry does not list, or bytes outside of it.
    """
    if path.suffix != ".onnx":  # ONNX Runtime takes others for models in a format of its own
        raise BackendError(f"engine {name}: {path.name} is no .onnx file; build the bundle again")
    folder = PurePosixPath(entry.file.path).parent
    sizes = {
        PurePosixPath(file.path).name: file.bytes for file in entry.weights if PurePosixPath(file.path).parent == folder
    }
    try:
        found = tuple(references(path))
    except BackendError as error:
        raise BackendError(f"engine {name}: {error}") from error
    for item in found:
        if item.location not in sizes:
            raise BackendError(
                f"engine {name}: tensor {item.tensor!r} lies in {item.location!r}, expected a weight file that the manifest "
                f"lists for it ({', '.join(sizes) or 'there is none'}); build the bundle again"
            )
        end, size = item.offset + (item.size_bytes or 0), sizes[item.location]
        if end > size:
            raise BackendError(
                f"engine {name}: tensor {item.tensor!r} ends at byte {end} of {item.location}, which has {size}; "
                "build the bundle again"
            )


class _Walk:
    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._left = _MOST_FIELDS

    def references(self) -> Iterator[Reference]:
        messages = [("model", 0, len(self._data), 0)]
        while messages:
            kind, begin, end, depth = messages.pop()
            if kind == "tensor":
                yield from self._reference(begin, end)
                continue
            if depth > _MOST_NESTED:
                raise _Malformed(f"messages are nested more than {_MOST_NESTED} deep")
            children = _CHILDREN[kind]
            for number, wire, first, last in self._fields(begin, end):
                if wire != _MESSAGE:
                    continue
                if number in children:
                    messages.append((children[number], first, last, depth + 1))
                elif kind == "node" and number == _OPERATOR and self._text(first, last) == "EPContext":
                    raise _Malformed("it holds an EPContext operator, which loads a compiled model")

    def _reference(self, begin: int, end: int) -> Iterator[Reference]:
        name, pairs, elsewhere = "", [], False
        for number, wire, first, last in self._fields(begin, end):
            if (number, wire) == (_TENSOR_NAME, _MESSAGE):
                name = self._text(first, last)
            elif (number, wire) == (_EXTERNAL_DATA, _MESSAGE):
                pairs.append(self._pair(first, last))
            elif (number, wire) == (_DATA_LOCATION, _VARINT) and self._varint(first, last)[0] != 0:
                elsewhere = True
        if not (pairs or elsewhere):
            return
        given = dict(pairs)
        if len(given) < len(pairs) or "location" not in given or not set(given) <= set(_KEYS):
            raise _Malformed(
                f"tensor {name!r} lies in another file, named by {[key for key, _ in pairs]}, expected {_KEYS[:3]}"
            )
        size_bytes = _number(name, given["length"]) if "length" in given else None
        yield Reference(name, given["location"], _number(name, given.get("offset", "0")), size_bytes)

    def _pair(self, begin: int, end: int) -> tuple[str, str]:
        texts = {1: "", 2: ""}
        for number, wire, first, last in self._fields(begin, end):
            if number in texts and wire == _MESSAGE:
                texts[number] = self._text(first, last)
        return texts[1], texts[2]

    def _fields(self, begin: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """The fields of a message as (number, type, begin, end), the latter two of the content."""
        while begin < end:
            self._left -= 1
            if self._left < 0:
                raise _Malformed(f"it has more than {_MOST_FIELDS} fields")
            tag, begin = self._varint(begin, end)
            wire, number = tag & 7, (tag & 0xFFFFFFFF) >> 3  # protobuf cuts a tag to 32 bits
            if wire == _MESSAGE:
                size, begin = self._varint(begin, end)
                last = begin + size
            elif wire == _VARINT:
                last = self._varint(begin, end)[1]
            elif wire in _FIXED:
                last = begin + _FIXED[wire]
            else:
                raise _Malformed(f"a field has the unknown type {wire}")
            if number == 0 or last > end:
                raise _Malformed("a field passes the end of its message" if number else "a field has the number 0")
            yield number, wire, begin, last
            begin = last

    def _varint(self, begin: int, end: int) -> tuple[int, int]:
        value = 0
        for shift in range(0, 70, 7):
            if begin >= end:
                raise _Malformed("it ends in the middle of a number")
            byte = self._data[begin]
            begin += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, begin
        raise _Malformed("a number has more than ten bytes")

    def _text(self, begin: int, end: int) -> str:
        if end - begin > _MOST_TEXT:
            raise _Malformed(f"a name has {end - begin} bytes, expected {_MOST_TEXT} at most")
        return self._data[begin:end].decode(errors="backslashreplace")


def _number(tensor: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise _Malformed(f"tensor {tensor!r} has the offset or length {text!r}, expected a number of bytes")
    return int(text)
