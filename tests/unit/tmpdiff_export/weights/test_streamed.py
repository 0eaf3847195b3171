"""Hollow modules compute what whole ones do, with a layer's weights at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engines.errors import BuildError
from tmpdiff_export.weights.source import SourceWeights
from tmpdiff_export.weights.streamed import hollow, streamed, taken_weights


class Block(torch.nn.Module):
    """A part with a parameter of its own, a buffer, and a layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.randn(8))
        self.first = torch.nn.Linear(8, 8)
        self.second = torch.nn.Linear(8, 8, bias=False)
        self.second.weight = self.first.weight  # tied
        self.register_buffer("table", torch.randn(8).bfloat16())

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(data * self.scale + self.table.float()))) + self.first(data)


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(Block(), torch.nn.LayerNorm(8), Block()).eval().bfloat16()


def test_it_computes_in_float32_from_sixteen_bit_weights() -> None:
    whole = model().float()
    module, data = model(), torch.randn(5, 8)
    weights = taken_weights(module)
    assert {item.dtype for item in weights.values()} == {torch.bfloat16}
    with torch.inference_mode(), streamed(module, weights.__getitem__, "cpu"):
        found = module(data)
    with torch.inference_mode():
        assert torch.equal(found, whole(data))


def test_weights_are_there_within_their_layer_only() -> None:
    module = model()
    weights = taken_weights(module)
    here: list[tuple[int, int]] = []

    def bytes_held(*_: object) -> None:
        storages = {item.untyped_storage().data_ptr(): item.untyped_storage().nbytes() for item in module.parameters()}
        here.append((sum(storages.values()), len(storages)))

    with torch.inference_mode(), streamed(module, weights.__getitem__, "cpu"):
        for part in module.modules():
            if isinstance(part, torch.nn.Linear):
                part.register_forward_pre_hook(bytes_held)
                part.register_forward_hook(bytes_held)
        module(torch.zeros(1, 8))
    bytes_held()
    layer, scale, nothing = 8 * 8 * 4 + 8 * 4, 8 * 4, 4
    assert max(held for held, _ in here[:-1]) <= layer + scale + 8 * nothing
    assert here[-1][0] == len(list(module.parameters())) * nothing  # of tied ones, once
    assert all(torch.isnan(item).all() for item in module.parameters())
    assert module[0].first.weight is module[0].second.weight


def test_a_module_without_memory_for_parameters_is_hollow() -> None:
    with torch.device("meta"):
        module = torch.nn.Linear(1 << 20, 1 << 20)
    hollow(module)
    assert module.weight.shape == (1 << 20, 1 << 20)
    assert module.weight.untyped_storage().nbytes() == 4
    assert module.weight.untyped_storage().data_ptr() != module.bias.untyped_storage().data_ptr()


def test_it_is_hollow_again_after_an_error() -> None:
    module = model()
    weights = taken_weights(module)
    with (
        pytest.raises(RuntimeError, match="size of tensor"),
        torch.inference_mode(),
        streamed(module, weights.get, "cpu"),
    ):
        module(torch.zeros(1, 3))
    assert all(torch.isnan(item).all() for item in module.parameters())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def test_a_folder_of_one_file_and_of_several_are_the_same(tmp_path: Path) -> None:
    weights = {"a": torch.randn(3).half(), "b": torch.randn(2, 2)}
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    save_file(weights, tmp_path / "one" / "model.safetensors")
    for name, item in weights.items():
        save_file({name: item}, tmp_path / "two" / f"{name}.safetensors")
    (tmp_path / "two" / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}'
    )
    one, two = (SourceWeights.open(tmp_path / name) for name in ("one", "two"))
    assert one.parameters == two.parameters == 7
    assert one.dtype == two.dtype == torch.float32
    assert all(torch.equal(one.read(name), two.read(name)) for name in weights)
    assert one.sha256() != two.sha256()


@pytest.mark.parametrize(
    ("index", "said"),
    [
        (None, "holds none of diffusion_pytorch_model.safetensors, model.safetensors"),
        ('{"weight_map": {"a": "../a.safetensors"}}', "does not say where the weights are"),
        ('{"weight_map": 3}', "does not say where the weights are"),
        ('{"weight_map": {"a": "a.safetensors"}}', "cannot be read"),
    ],
)
def test_a_folder_without_weights_is_refused(tmp_path: Path, index: str | None, said: str) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    if index is not None:
        (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(BuildError, match=said):
        SourceWeights.open(tmp_path)
