"""safetensors files written and read tensor by tensor; the library is the judge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from engines.errors import BuildError
from tmpdiff_export.weights.files import WeightFile, places

TENSORS = {
    "codes": torch.arange(15, dtype=torch.uint8).reshape(3, 5),
    "half": torch.randn(4, 3).half(),
    "wide": torch.randn(()),
    "brain": torch.randn(7).bfloat16(),
    "eight": torch.randn(2, 8).to(torch.float8_e4m3fn),
    "whole": torch.arange(3),
    "none": torch.zeros(0, 4),
}


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    return (
        first.dtype == second.dtype
        and first.shape == second.shape
        and bytes(first.contiguous().reshape(-1).view(torch.uint8))
        == bytes(second.contiguous().reshape(-1).view(torch.uint8))
    )


def test_the_library_reads_what_was_written_in_any_order(tmp_path: Path) -> None:
    with WeightFile(tmp_path / "a.safetensors", {name: item.to("meta") for name, item in TENSORS.items()}) as file:
        for name in reversed(TENSORS):
            file.write(name, TENSORS[name])
    with safe_open(tmp_path / "a.safetensors", framework="pt") as found:
        assert set(found.keys()) == set(TENSORS)
        assert all(same(found.get_tensor(name), item) for name, item in TENSORS.items())


def test_tensors_are_aligned_and_read_back(tmp_path: Path) -> None:
    with WeightFile(tmp_path / "a.safetensors", TENSORS) as file:
        for name, item in TENSORS.items():
            file.write(name, item.t() if item.ndim == 0 else item)
    found = places(tmp_path / "a.safetensors")
    assert all(place.offset % place.dtype.itemsize == 0 for place in found.values())
    assert min(place.offset for place in found.values()) % 64 == 0
    assert all(same(found[name].read(), item) for name, item in TENSORS.items())


def test_it_reads_what_the_library_writes(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors")
    found = places(tmp_path / "a.safetensors")
    assert all(same(found[name].read(), item) for name, item in TENSORS.items())


def test_a_tensor_of_another_shape_or_twice_is_refused(tmp_path: Path) -> None:
    file = WeightFile(tmp_path / "a.safetensors", {"a": torch.zeros(2), "b": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"a.safetensors expects torch.float32 \(2,\)"):
        file.write("a", torch.zeros(3))
    file.write("b", torch.ones(2))
    with pytest.raises(ValueError, match="expects none"):
        file.write("b", torch.ones(2))
    with pytest.raises(ValueError, match="lacks 1 tensors, first a"):
        file.close()


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"\xff" * 40,
        (8).to_bytes(8, "little") + b"not json",
        (2).to_bytes(8, "little") + b"[]",
        (100).to_bytes(8, "little") + b"{}",
        *(
            len(text).to_bytes(8, "little") + text + b"\0" * 16
            for text in (
                json.dumps({"a": item}).encode()
                for item in (
                    {"dtype": "F32", "shape": [4], "data_offsets": [0, 20]},
                    {"dtype": "F32", "shape": [5], "data_offsets": [0, 20]},
                    {"dtype": "F32", "shape": [4], "data_offsets": [-4, 12]},
                    {"dtype": "F12", "shape": [4], "data_offsets": [0, 16]},
                    {"dtype": "F32", "shape": "4", "data_offsets": [0, 16]},
                    {"shape": [4]},
                    3,
                )
            )
        ),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(damage)
    with pytest.raises(BuildError, match=r"^[^\n]*a\.safetensors is no safetensors file, or is damaged: [^\n]*$"):
        places(path)


def test_a_file_that_was_cut_meanwhile_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(100)}, path)
    place = places(path)["a"]
    with open(path, "r+b") as stream:
        stream.truncate(path.stat().st_size - 8)
    with pytest.raises(BuildError, match="ends within a tensor"):
        place.read()
