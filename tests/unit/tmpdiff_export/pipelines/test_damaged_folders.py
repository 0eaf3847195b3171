"""Pipeline folders that are damaged or odd: each is refused in one line when it is opened, and none is waited for."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engines.errors import BuildError
from tmpdiff_export.pipelines.load import open_pipeline

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
LAYER = "proj_out.weight"
DEEP = '{"weight_map":' + "[" * 200_000

Damage = Callable[[Path], object]


@pytest.fixture
def folder(tiny_pipeline: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(tiny_pipeline, tmp_path / "pipeline"))


def stored(change: Callable[[torch.Tensor], torch.Tensor], file: str = WEIGHTS, name: str = LAYER) -> Damage:
    """One tensor as something else."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / file)
        save_file({**tensors, name: change(tensors[name])}, folder / file)

    return damage


def piped(file: str) -> Damage:
    """A pipe in place of a file."""

    def damage(folder: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        os.mkfifo(folder / file)

    return damage


def device(file: str) -> Damage:
    """A link to a device that never ends."""

    def damage(folder: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        (folder / file).symlink_to("/dev/zero")

    return damage


def configured(**changes: object) -> Damage:
    """The denoiser's configuration with other values."""

    def damage(folder: Path) -> None:
        path = folder / "transformer/config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            stored(lambda item: item[:1].clone()),
            r"1 of another shape \(proj_out.weight \[1, 128\], expected \[32, 128\]\)",
        ),
        (stored(lambda item: item.to(torch.int8)), "proj_out.weight in .* holds numbers of type torch.int8"),
        (
            stored(lambda item: item.reshape(-1)),
            r"1 of another shape \(proj_out.weight \[4096\], expected \[32, 128\]\)",
        ),
        (lambda folder: (folder / INDEX).write_text(DEEP), "index.json is not valid JSON: maximum recursion"),
        (lambda folder: (folder / INDEX).write_bytes(b"\xff\xfe"), "index.json is not valid JSON"),
        (
            lambda folder: (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "x\0y"}})),
            "index.json does not say where the weights are",
        ),
        (
            lambda folder: (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "lost.safetensors"}})),
            "transformer cannot be read: .*lost.safetensors: No such file",
        ),
        (lambda folder: (folder / "model_index.json").write_text(DEEP), "model_index.json is not valid JSON"),
        (lambda folder: (folder / "transformer/config.json").write_text(DEEP), "config.json is not valid JSON"),
        (lambda folder: (folder / "transformer/config.json").write_text("[]"), "config.json holds a JSON list"),
        (lambda folder: (folder / "transformer/config.json").unlink(), "config.json cannot be read: No such file"),
        (configured(num_layers=10**9), "config.json has num_layers 1000000000, and the weights beside it are"),
        *((piped(file), f"{file} is no plain file") for file in (WEIGHTS, INDEX, "model_index.json", "vae/odd.json")),
        *((device(file), f"{file} is no plain file") for file in (WEIGHTS, "transformer/odd.json")),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(folder: Path, damage: Damage, message: str) -> None:
    damage(folder)
    with pytest.raises(BuildError, match=message) as refused:
        open_pipeline(folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["text_encoder", "vae"])
def test_weights_that_are_missing_are_not_drawn_at_random(folder: Path, name: str) -> None:
    (file,) = (folder / name).glob("*.safetensors")
    tensors = load_file(file)
    lost = max(name for name in tensors if name.startswith(("encoder.block.0", "decoder.mid")))
    del tensors[lost]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(
        BuildError, match=rf"tensors in .*{name} are not those of .*: 1 missing \({lost}\); save the pipe"
    ):
        open_pipeline(folder)
