"""Weight files of torch packages: what is read, which files engines share in memory, and what an exchange copies.

There is no GPU here. Device memory is host memory, and copies are counted; what CUDA does is shown by `tests/gpu`.
"""

from __future__ import annotations

import contextlib
import tracemalloc
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from engines.backends.torch import device_weights, weights
from engines.backends.torch.device_weights import DeviceWeights, OwnedWeights
from engines.backends.torch.weights import Weights, in_order, new_block, weights_of
from engines.documents import FileEntry
from engines.errors import BackendError
from engines.manifest import EngineEntry

TYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.uint8, torch.int64]


def stored(path: Path, names: Sequence[str], elements: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Writes a weight file; tensors of all types in turn, sizes that no alignment divides, a scalar and an empty one."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for position, name in enumerate(names):
        shape = [(elements + position, 3), (), (0, 4)][position % 5 if position % 5 < 3 else 0]
        kind = TYPES[position % len(TYPES)]
        tensors[name] = torch.randint(0, 100, shape, generator=generator).to(kind)
    save_file(tensors, path)
    return tensors


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    kind = found.dtype, found.shape
    return kind == (expected.dtype, expected.shape) and torch.equal(
        found.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8)
    )


def entry_of(*files: Path) -> EngineEntry:
    named = [FileEntry(path=f"engines/{path.name}", sha256="0" * 64, bytes=1) for path in files]
    return EngineEntry(
        file=FileEntry(path="engines/fp16.pt2", sha256="0" * 64, bytes=1), weights=tuple(named), backend="torch",
        backend_version="1", device="cpu", lowering={}, onnx_sha256=None, recipe="none", sqnr_db=1.0, sqnr_floor_db=1.0,
        inputs=(), outputs=(),
    )  # fmt: skip


def test_an_engine_takes_the_tensors_of_all_its_files_sorted_by_name(tmp_path: Path) -> None:
    first = stored(tmp_path / "fp16.safetensors", ["b", "z.weight", "a", "k10", "k9", "\u00e4"], 70)
    second = stored(tmp_path / "fp16+fp8.safetensors", ["c", "A", "k1"], 50, seed=1)
    entry = entry_of(tmp_path / "fp16.safetensors", tmp_path / "fp16+fp8.safetensors")
    files = weights_of("fp16", tmp_path / "fp16.pt2", entry)
    found = in_order(file.fill(new_block("fp16", file, "cpu")) for file in files)
    everything = {**first, **second}
    assert len(found) == 9
    for tensor, name in zip(found, sorted(everything), strict=True):
        assert same(tensor, everything[name]), name
        assert tensor.data_ptr() % 64 == 0


def test_one_name_in_two_files_is_refused(tmp_path: Path) -> None:
    paths = [tmp_path / "fp16.safetensors", tmp_path / "fp8.safetensors"]
    stored(paths[0], ["a", "b"], 3)
    stored(paths[1], ["b", "c"], 3)
    with pytest.raises(BackendError, match=r"engine fp8: tensor b is in fp16\.safetensors and in fp8\.safetensors"):
        weights_of("fp8", tmp_path / "fp8.pt2", entry_of(*paths))


def test_a_block_may_be_filled_piece_by_piece(tmp_path: Path) -> None:
    """As it is for a GPU: wherever pieces end."""
    path = tmp_path / "w.safetensors"
    expected = stored(path, [f"t{position}" for position in range(23)], 41)
    file = Weights(path)
    for size in (1, 7, 100, 256, 1000, file.size_bytes):
        block = torch.full((file.size_bytes,), 255, dtype=torch.uint8)
        with open(path, "rb", buffering=0) as stream:
            for begin in range(0, file.size_bytes, size):
                file._read(stream, block[begin : begin + size], begin)
        found = file.tensors(block)
        assert set(found) == set(expected)
        assert all(same(found[name], expected[name]) for name in expected), size


def test_reading_holds_no_second_copy(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    stored(path, ["a", "b", "c"], 1 << 20)
    file = Weights(path)
    block = new_block("fp16", file, "cpu")
    tracemalloc.start()
    try:
        file.fill(block)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20 < file.size_bytes


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "cannot be read"),
        (lambda path: path.unlink(), "cannot be read"),
        (
            lambda path: save_file({"a": torch.zeros(2, dtype=torch.complex64)}, path),
            "tensor a is of type C64, expected",
        ),
    ],
)
def test_what_is_no_weight_file_is_refused(damage: Any, says: str, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    stored(path, ["a"], 10)
    damage(path)
    with pytest.raises(BackendError, match=says):
        Weights(path)


def test_a_file_that_ends_early_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    stored(path, ["a"], 10)
    file = Weights(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BackendError, match="it ends in the middle of tensor a"):
        file.fill(new_block("fp16", file, "cpu"))


def test_too_little_memory_says_how_much_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.safetensors"
    stored(path, ["a"], 10)
    file = Weights(path)
    file.size_bytes = 1 << 60
    with pytest.raises(
        BackendError, match=f"cannot allocate {1 << 60} bytes of host memory for w.safetensors of engine x"
    ):
        new_block("x", file, "cpu")


# In device memory


@dataclass
class Device:
    """What a fake GPU was asked for.

    Attributes:
        limit: its memory in bytes.
        allocated: sizes of all allocations so far.
        locked: sizes of page-locked host memory.
        copied: bytes that came from page-locked memory.
        read: names of files that were read, each time.
        emptied: how often what torch keeps of freed memory went back to the GPU.
    """

    limit: int = 1 << 40
    allocated: list[int] = field(default_factory=list)
    locked: list[int] = field(default_factory=list)
    copied: list[int] = field(default_factory=list)
    read: list[str] = field(default_factory=list)
    emptied: int = 0


class Locked:
    def __init__(self, device: Device, size_bytes: int) -> None:
        self._device, self.size_bytes = device, size_bytes
        self._data = np.zeros(size_bytes, np.uint8)
        device.locked.append(size_bytes)

    def view(self, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        assert (offset, shape, dtype) == (0, (self.size_bytes,), np.uint8)
        return self._data

    def close(self) -> None:
        self._device.locked.remove(self.size_bytes)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()
    fill = Weights.fill

    def allocate(name: str, file: Weights, where: str) -> torch.Tensor:
        assert where == "cuda"
        made.allocated.append(file.size_bytes)
        return torch.zeros(file.size_bytes, dtype=torch.uint8)

    def read(file: Weights, block: torch.Tensor) -> Any:
        made.read.append(file.path.stem)
        return fill(file, block)

    real_view = device_weights._view

    def view(memory: Any) -> torch.Tensor:
        made.copied.append(memory.size_bytes)
        return real_view(memory)

    stream = SimpleNamespace(synchronize=lambda: None)

    def empty() -> None:
        made.emptied += 1

    cuda = SimpleNamespace(Stream=lambda: stream, stream=lambda given: contextlib.nullcontext(), empty_cache=empty)
    monkeypatch.setattr(device_weights, "torch", SimpleNamespace(cuda=cuda, from_numpy=torch.from_numpy))
    monkeypatch.setattr(device_weights, "new_block", allocate)
    monkeypatch.setattr(device_weights, "PinnedBuffer", lambda size_bytes: Locked(made, size_bytes))
    monkeypatch.setattr(device_weights, "_view", view)
    monkeypatch.setattr(weights.Weights, "fill", read)
    return made


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Weights]:
    """Of different sizes, the shared one among them in the middle."""
    sizes = {"fp16": 900, "fp16+fp8": 500, "fp8": 300, "int8": 700, "text": 100}
    for seed, (name, elements) in enumerate(sizes.items()):
        stored(tmp_path / f"{name}.safetensors", [f"{name}.{kind}" for kind in "abcd"], elements, seed)
    return {name: Weights(tmp_path / f"{name}.safetensors") for name in sizes}


ENGINES = {"fp16": ("fp16", "fp16+fp8"), "fp8": ("fp8", "fp16+fp8"), "int8": ("int8",), "text": ("text",)}


def expected_of(files: dict[str, Weights], engine: str) -> list[torch.Tensor]:
    from safetensors.torch import load_file

    tensors = {key: item for name in ENGINES[engine] for key, item in load_file(files[name].path).items()}
    return [tensors[key] for key in sorted(tensors)]


def taken(store: DeviceWeights, files: dict[str, Weights], engine: str, *, returning: bool) -> OwnedWeights:
    owned = store.take(engine, [files[name] for name in ENGINES[engine]], returning=returning)
    assert all(map(same, owned.tensors, expected_of(files, engine)))
    assert len(owned.tensors) == len(expected_of(files, engine))
    return owned


def test_engines_share_a_block_until_the_last_one_closes(device: Device, files: dict[str, Weights]) -> None:
    store = DeviceWeights()
    first = taken(store, files, "fp16", returning=False)
    second = taken(store, files, "fp8", returning=False)
    assert sorted(device.read) == ["fp16", "fp16+fp8", "fp8"]
    assert sorted(device.allocated) == sorted(files[name].size_bytes for name in ("fp16", "fp16+fp8", "fp8"))
    shared = {item.data_ptr() for item in first.tensors if item.numel()} & {item.data_ptr() for item in second.tensors}
    assert len(shared) == 3  # of four, one is empty
    first.close()
    assert first.tensors == ()
    assert all(map(same, second.tensors, expected_of(files, "fp8")))
    second.close()
    assert store._blocks == []
    assert device.locked == []


def test_an_exchange_copies_what_differs_and_allocates_nothing(device: Device, files: dict[str, Weights]) -> None:
    store = DeviceWeights()
    for _ in range(3):  # one at a time is resident
        for engine in ("fp16", "fp8"):
            device.allocated.clear()
            device.copied.clear()
            device.read.clear()
            taken(store, files, engine, returning=True).close()
    assert device.allocated == []
    assert device.read == []
    assert device.emptied == 0
    assert device.copied == [files["fp8"].size_bytes]  # the shared file stays where it is
    assert sorted(device.locked) == sorted(files[name].size_bytes for name in ("fp16", "fp16+fp8", "fp8"))
    store.clear()
    assert device.locked == []
    assert store._blocks == []


def test_a_block_that_is_too_small_for_what_comes_goes_back_to_the_gpu(
    device: Device, files: dict[str, Weights]
) -> None:
    store = DeviceWeights()
    small, large = sorted(("fp8", "fp16"), key=lambda name: files[name].size_bytes)
    assert files[small].size_bytes < files[large].size_bytes
    for _ in range(3):
        for engine in (small, large):
            taken(store, files, engine, returning=True).close()
    assert device.emptied == 1
    assert sum(block.memory.numel() for block in store._blocks) == sum(
        files[name].size_bytes for name in ("fp16+fp8", large)
    )


def test_residents_keep_their_memory_while_others_come_and_go(device: Device, files: dict[str, Weights]) -> None:
    store = DeviceWeights()
    resident = {name: taken(store, files, name, returning=True) for name in ("fp16", "fp8")}
    text = taken(store, files, "text", returning=False)
    order = ["int8", "fp16", "fp8", "int8", "fp8", "fp16"] * 4
    for step, name in enumerate(order):
        if step == 12:
            device.allocated.clear()
        if name not in resident:
            victim = next(iter(resident))
            resident.pop(victim).close()
            resident[name] = taken(store, files, name, returning=True)
        resident[name] = resident.pop(name)
        for kept, owned in resident.items():
            assert all(map(same, owned.tensors, expected_of(files, kept)))
    assert device.allocated == []  # after a first round
    assert all(map(same, text.tensors, expected_of(files, "text")))
    assert files["text"].size_bytes not in device.locked  # it never gives way
    text.close()
    for owned in resident.values():
        owned.close()
    store.clear()
    assert store._blocks == []
    assert device.locked == []


def test_what_never_gives_way_takes_no_block_of_what_does(device: Device, files: dict[str, Weights]) -> None:
    store = DeviceWeights()
    taken(store, files, "fp16", returning=True).close()
    text = taken(store, files, "text", returning=False)
    device.allocated.clear()
    taken(store, files, "fp16", returning=True)
    assert device.allocated == []
    text.close()


def test_a_load_that_fails_gives_back_what_it_took(
    device: Device, files: dict[str, Weights], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DeviceWeights()
    kept = taken(store, files, "fp8", returning=False)
    allocate = device_weights.new_block

    def refuse(name: str, file: Weights, where: str) -> torch.Tensor:
        raise BackendError(f"cannot allocate {file.size_bytes} bytes")

    monkeypatch.setattr(device_weights, "new_block", refuse)
    with pytest.raises(BackendError, match=f"cannot allocate {files['fp16'].size_bytes} bytes"):
        store.take("fp16", [files["fp16+fp8"], files["fp16"]], returning=False)
    monkeypatch.setattr(device_weights, "new_block", allocate)
    assert [block.engines for block in store._blocks] == [1, 1]
    path = files["fp16"].path
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(BackendError, match="ends in the middle"):
        store.take("fp16", [files["fp16"], files["fp16+fp8"]], returning=True)
    path.write_bytes(content)
    taken(store, files, "fp16", returning=True).close()
    assert all(map(same, kept.tensors, expected_of(files, "fp8")))
    kept.close()
