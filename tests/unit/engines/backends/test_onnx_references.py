"""Which files ONNX graphs read, found without onnx and judged against graphs that onnx made."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, external_data_helper, helper, numpy_helper

from engines.backends import onnx_references
from engines.backends.onnx_references import Reference, references, require_listed
from engines.backends.session_host import SessionHost
from engines.documents import FileEntry
from engines.errors import BackendError
from engines.files import sha256_file
from engines.manifest import EngineEntry

DATA = np.arange(64, dtype=np.float32)


def outside(name: str, location: str = "fp16.safetensors", **numbers: Any) -> onnx.TensorProto:
    """A tensor of 4 floats whose content lies in another file."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, "offset": 0, "length": 16, **numbers}.items():
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    return tensor


def model_of(*tensors: onnx.TensorProto, nodes: Any = (), functions: Any = ()) -> onnx.ModelProto:
    """y = x + every tensor."""
    names = ["x", *(f"sum{position}" for position in range(1, len(tensors))), "y"]
    sums = [
        helper.make_node("Add", [names[position], tensor.name], [names[position + 1]])
        for position, tensor in enumerate(tensors)
    ] or [helper.make_node("Identity", ["x"], ["y"])]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [*sums, *nodes],
        "denoiser",
        [value("x", TensorProto.FLOAT, [4])],
        [value("y", TensorProto.FLOAT, [4])],
        list(tensors),
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 20)], functions=list(functions), ir_version=10
    )


def entry_of(folder: Path, *weights: str) -> EngineEntry:
    """The manifest entry of `fp16.onnx` in a folder that stands for `engines/`."""
    files = [
        FileEntry(path=f"engines/{name}", sha256=sha256_file(folder / name), bytes=(folder / name).stat().st_size)
        for name in ("fp16.onnx", *weights)
    ]
    return EngineEntry(
        file=files[0], weights=tuple(files[1:]), backend="onnxruntime", backend_version="1", device="cpu", lowering={},
        onnx_sha256=None, recipe="none", sqnr_db=1.0, sqnr_floor_db=1.0, inputs=(), outputs=(),
    )  # fmt: skip


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., tuple[EngineEntry, Path]]:
    """Writes a model beside a file of 256 bytes that its entry lists, and others that it does not."""

    def write(model: onnx.ModelProto | bytes, *weights: str) -> tuple[EngineEntry, Path]:
        path = tmp_path / "engines" / "fp16.onnx"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
        for target in ("engines/fp16.safetensors", "engines/other.safetensors", "outside.safetensors"):
            (tmp_path / target).write_bytes(DATA.tobytes())
        return entry_of(path.parent, *(weights or ("fp16.safetensors",))), path

    return write


def nested(tensor: onnx.TensorProto, depth: int) -> onnx.NodeProto:
    """A node whose subgraph holds a node, and so on, and at the end a tensor."""
    node = helper.make_node("Constant", [], ["c"], value=tensor)
    for _ in range(depth):
        graph = helper.make_graph([node], "g", [], [])
        node = helper.make_node("If", ["x"], ["z"], then_branch=graph, else_branch=graph)
    return node


def test_every_place_that_may_hold_a_tensor_is_walked() -> None:
    """By the descriptions of the messages themselves."""
    names = {
        "ModelProto": "model", "GraphProto": "graph", "TrainingInfoProto": "training", "FunctionProto": "function",
        "NodeProto": "node", "AttributeProto": "attribute", "SparseTensorProto": "sparse tensor", "TensorProto": "tensor",
    }  # fmt: skip
    messages = {}
    left = [onnx.ModelProto.DESCRIPTOR]
    while left:
        message = left.pop()
        if message.full_name not in messages:
            messages[message.full_name] = children = [item for item in message.fields if item.message_type is not None]
            left += [item.message_type for item in children]
    leading = {"onnx.TensorProto"}
    while more := {
        name
        for name, children in messages.items()
        if name not in leading and any(item.message_type.full_name in leading for item in children)
    }:
        leading |= more
    expected = {
        names[name.removeprefix("onnx.")]: {
            item.number: names[item.message_type.name]
            for item in messages[name]
            if item.message_type.full_name in leading
        }
        for name in leading - {"onnx.TensorProto"}
    }
    assert expected == onnx_references._CHILDREN
    fields = TensorProto.DESCRIPTOR.fields_by_name
    assert (fields["name"].number, fields["external_data"].number, fields["data_location"].number) == (8, 13, 14)
    assert onnx.NodeProto.DESCRIPTOR.fields_by_name["op_type"].number == onnx_references._OPERATOR


def test_references_are_what_onnx_wrote(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {f"w{position}": rng.standard_normal(4).astype(np.float32) for position in range(20)}
    model = model_of(*(numpy_helper.from_array(array, name) for name, array in arrays.items()))
    path = tmp_path / "fp16.onnx"
    onnx.save(model, path, save_as_external_data=True, location="fp16.onnx.data", size_threshold=0)
    found = {item.tensor: item for item in references(path)}
    written = onnx.load(path, load_external_data=False).graph.initializer
    assert len(found) == len(written) == 20
    for tensor in written:
        info = external_data_helper.ExternalDataInfo(tensor)
        assert found[tensor.name] == Reference(tensor.name, "fp16.onnx.data", info.offset or 0, info.length)
    require_listed("fp16", path, entry_of(tmp_path, "fp16.onnx.data"))


def test_a_graph_runs_from_the_files_of_its_entry(save: Callable[..., tuple[EngineEntry, Path]]) -> None:
    model = model_of(outside("a", offset=16), outside("b", "other.safetensors", offset=240))
    entry, path = save(model, "fp16.safetensors", "other.safetensors")
    host = SessionHost("onnxruntime", 1)
    host.add("fp16", entry, path)
    found = host.engine("fp16").run({"x": np.zeros(4, np.float32)})["y"]
    assert np.array_equal(found, DATA[4:8] + DATA[60:64])


def test_a_graph_that_holds_its_weights_needs_no_files(save: Callable[..., tuple[EngineEntry, Path]]) -> None:
    entry, path = save(model_of(numpy_helper.from_array(DATA[:4], "a")))
    require_listed("fp16", path, entry.model_copy(update={"weights": ()}))


TENSORS: dict[str, tuple[onnx.TensorProto, str]] = {
    "unlisted": (
        outside("a", "other.safetensors"),
        "lies in 'other.safetensors', expected a weight file that the mani",
    ),
    "above": (outside("a", "../outside.safetensors"), "lies in '../outside.safetensors', expected"),
    "absolute": (
        outside("a", f"{tempfile.gettempdir()}/x"),
        "expected a weight file that the manifest lists for it (fp1",
    ),
    "folder": (outside("a", "./fp16.safetensors"), "lies in './fp16.safetensors', expected"),
    "path": (outside("a", "engines/fp16.safetensors"), "expected a weight file"),
    "itself": (outside("a", "fp16.onnx"), "lies in 'fp16.onnx', expected"),
    "memory": (outside("a", "*/_ORT_MEM_ADDR_/*", offset=4096), "expected a weight file"),
    "empty": (outside("a", ""), "lies in '', expected"),
    "line": (outside("a", "fp16.safetensors\n"), r"lies in 'fp16.safetensors\n', expected"),
    "none": (outside("a", location=None), "named by ['offset', 'length'], expected"),
    "offset": (outside("a", offset=256), "tensor 'a' ends at byte 272 of fp16.safetensors, which has 256"),
    "length": (outside("a", length=257), "ends at byte 257"),
    "huge": (outside("a", offset=2**63 - 1), "ends at byte 9223372036854775823"),
    "negative": (outside("a", offset=-16), "has the offset or length '-16', expected a number"),
    "hex": (outside("a", offset="0x10"), "has the offset or length '0x10'"),
    "digits": (outside("a", offset="9" * 30), "has the offset or length"),
    "arabic": (outside("a", offset="\u0661"), "has the offset or length"),
    "prepacked": (outside("a", prepacked_0="x|0;16"), "named by ['location', 'offset', 'length', 'prepacked_0']"),
}


@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt-rtx"])
@pytest.mark.parametrize("name", TENSORS)
def test_another_place_is_refused_in_one_line_before_a_session(
    name: str, backend: str, save: Callable[..., tuple[EngineEntry, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a session was made")

    monkeypatch.setattr(onnxruntime, "InferenceSession", never)
    tensor, says = TENSORS[name]
    entry, path = save(model_of(tensor))
    host = SessionHost(backend, 1)
    host.add("fp16", entry, path)
    with pytest.raises(BackendError) as caught:
        host.engine("fp16")
    message = str(caught.value)
    assert says in message
    assert message.startswith("engine fp16: ")
    assert "\n" not in message


def test_two_locations_of_a_tensor_are_refused(save: Callable[..., tuple[EngineEntry, Path]]) -> None:
    tensor = outside("a")
    tensor.external_data.add(key="location", value="fp16.safetensors")
    entry, path = save(model_of(tensor))
    with pytest.raises(BackendError, match=r"named by .*'location', 'offset', 'length', 'location'"):
        require_listed("fp16", path, entry)


PLACES: dict[str, Callable[[onnx.TensorProto], onnx.ModelProto]] = {
    "initializer": lambda tensor: model_of(tensor),
    "constant": lambda tensor: model_of(nodes=[nested(tensor, 0)]),
    "subgraph": lambda tensor: model_of(nodes=[nested(tensor, 5)]),
    "list": lambda tensor: model_of(nodes=[helper.make_node("Z", [], ["z"], values=[tensor])]),
    "sparse": lambda tensor: model_of(
        nodes=[helper.make_node("Constant", [], ["z"], sparse_value=helper.make_sparse_tensor(tensor, tensor, [4]))]
    ),
    "function": lambda tensor: model_of(
        functions=[helper.make_function("d", "f", [], ["c"], [nested(tensor, 1)], [helper.make_opsetid("", 20)])]
    ),
    "training": lambda tensor: with_training(tensor),
}


def with_training(tensor: onnx.TensorProto) -> onnx.ModelProto:
    model = model_of()
    model.training_info.add().initialization.initializer.append(tensor)
    return model


@pytest.mark.parametrize("place", PLACES)
def test_it_is_found_wherever_it_is(place: str, save: Callable[..., tuple[EngineEntry, Path]]) -> None:
    entry, path = save(PLACES[place](outside("deep", "other.safetensors")))
    with pytest.raises(BackendError, match=r"tensor 'deep' lies in 'other\.safetensors'"):
        require_listed("fp16", path, entry)
    # Where a protobuf is read, a message that comes twice is one message; so are two files, one after the other.
    entry, path = save(model_of().SerializeToString() + PLACES[place](outside("deep", "..")).SerializeToString())
    with pytest.raises(BackendError, match=r"tensor 'deep' lies in '\.\.'"):
        require_listed("fp16", path, entry)


def test_an_operator_that_loads_a_compiled_model_is_refused(save: Callable[..., tuple[EngineEntry, Path]]) -> None:
    node = helper.make_node("EPContext", ["x"], ["z"], domain="com.microsoft", embed_mode=0, ep_cache_context="../x")
    entry, path = save(model_of(nodes=[node]))
    with pytest.raises(BackendError, match="EPContext operator, which loads a compiled model"):
        require_listed("fp16", path, entry)


def test_a_file_that_is_not_called_onnx_is_refused(save: Callable[..., tuple[EngineEntry, Path]]) -> None:
    entry, path = save(model_of())
    with pytest.raises(BackendError, match=r"fp16\.ort is no \.onnx file"):
        require_listed("fp16", path.with_suffix(".ort"), entry)


def field(number: int, content: bytes) -> bytes:
    """A message in a message."""
    size, length = len(content), b""
    while size > 127:
        length, size = length + bytes([size & 127 | 128]), size >> 7
    tag = number << 3 | 2
    head = bytes([tag]) if tag < 128 else bytes([tag & 127 | 128, tag >> 7])
    return head + length + bytes([size]) + content


def nested_deeply(depth: int) -> bytes:
    content = b""
    for position in range(depth):
        content = field((6, 5, 1)[position % 3], content)  # a node's attribute's graph
    return field(7, content)


MALFORMED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "malformed"),
    "text": (b"not an ONNX file", "a field has the unknown type 6"),
    "group": (b"\x3b\x3c", "unknown type 3"),
    "a length without content": (b"\x3a\x7f", "passes the end of its message"),
    "an inner length": (b"\x3a\x02\x2a\x7f", "passes the end of its message"),
    "an endless number": (b"\x08" + b"\xff" * 20, "more than ten bytes"),
    "half a number": (b"\x08\xff", "in the middle of a number"),
    "half a float": (b"\x0d\x00\x00", "passes the end"),
    "field 0": (b"\x02\x00", "number 0"),
    "a bomb": (nested_deeply(30_000), "nested more than 100 deep"),
    "a long name": (field(7, field(5, field(13, field(1, b"x" * 5000)))), "a name has 5000 bytes"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_what_is_no_onnx_file_is_refused(name: str, save: Callable[..., tuple[EngineEntry, Path]]) -> None:
    content, says = MALFORMED[name]
    entry, path = save(content)
    with pytest.raises(BackendError, match=f"engine fp16: cannot load .*malformed.*{says}" if content else says):
        require_listed("fp16", path, entry)


def test_work_is_bounded(save: Callable[..., tuple[EngineEntry, Path]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_references, "_MOST_FIELDS", 1000)
    entry, path = save(b"\x08\x0a" * 1001)
    with pytest.raises(BackendError, match="more than 1000 fields"):
        require_listed("fp16", path, entry)


def test_damaged_files_end_in_our_error_or_refer_to_what_onnx_sees(tmp_path: Path) -> None:
    """Every byte in turn changed, and every length cut: whatever onnx still reads, it reads no more than we found."""
    content = model_of(outside("a"), nodes=[nested(outside("b", "other.safetensors"), 1)]).SerializeToString()
    rng = np.random.default_rng(0)
    path = tmp_path / "fp16.onnx"
    damaged = [content[:end] for end in range(len(content))]
    for position in range(len(content)):
        data = bytearray(content)
        data[position] ^= int(rng.integers(1, 256))
        damaged.append(bytes(data))
    refused = 0
    for data in damaged:
        path.write_bytes(data)
        try:
            found = {item.location for item in references(path)}
        except BackendError:
            refused += 1
            continue
        model = onnx.ModelProto()
        try:
            model.ParseFromString(data)
        except Exception:  # it is stricter than we are
            continue
        assert locations(model) <= found, data
    assert 0 < refused < len(damaged)


def locations(message: Any) -> set[str]:
    """Every location in a message, as onnx has parsed it."""
    if isinstance(message, TensorProto):
        kept = message.data_location == TensorProto.EXTERNAL
        given = {item.value for item in message.external_data if item.key == "location"} if kept else set()
        return {item if isinstance(item, str) else item.decode(errors="backslashreplace") for item in given}
    found: set[str] = set()
    for description, value in message.ListFields():
        if description.message_type is not None:
            for item in value if description.is_repeated else [value]:
                found |= locations(item)
    return found


def test_a_large_file_is_walked_without_reading_its_tensors(tmp_path: Path) -> None:
    """A sparse file of 1.5 GiB: were its content read, this would take seconds and the memory."""
    size = 3 << 29
    tail = field(7, field(5, outside("a").SerializeToString()))
    # graph { initializer { raw_data (9): size } }, then the rest
    inner = b"\x4a" + varint(size)
    initializer = b"\x2a" + varint(len(inner) + size) + inner
    path = tmp_path / "fp16.onnx"
    with open(path, "wb") as stream:
        stream.write(b"\x3a" + varint(len(initializer) + size) + initializer)
        stream.seek(size, 1)
        stream.write(tail)
    assert [item.tensor for item in references(path)] == ["a"]


def varint(value: int) -> bytes:
    data = b""
    while value > 127:
        data, value = data + struct.pack("B", value & 127 | 128), value >> 7
    return data + struct.pack("B", value)
