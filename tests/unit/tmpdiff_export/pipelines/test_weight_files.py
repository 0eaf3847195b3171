"""Weights of a pipeline folder are those of its models, by name and shape, in whichever variant they are stored."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small_pipelines import MAKERS, save_small_pipeline
from safetensors.torch import load_file, save_file

from engines.errors import BuildError
from tmpdiff_export.pipelines.load import open_pipeline
from tmpdiff_export.pipelines.settings import SettingRequest, resolve

UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
SaveOnce = Callable[[str], Path]


@pytest.fixture(scope="session")
def saved(made_once: Callable[[str, Callable[[Path], object]], Path]) -> SaveOnce:
    """A small pipeline's folder; do not write into it."""
    return lambda name: (
        made_once(f"small-{name}", lambda folder: save_small_pipeline(name, folder / "pipeline")) / "pipeline"
    )


@pytest.fixture
def folder(saved: SaveOnce, tmp_path: Path) -> Path:
    """A copy of the Stable Diffusion pipeline, to damage."""
    return Path(shutil.copytree(saved("sd"), tmp_path / "pipeline"))


def change(path: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Rewrites a safetensors file."""
    tensors = load_file(path)
    edit(tensors)
    save_file({name: item.clone().contiguous() for name, item in tensors.items()}, path, metadata={"format": "pt"})


@pytest.mark.parametrize("name", MAKERS)
def test_what_diffusers_saves_is_opened_and_loaded(saved: SaveOnce, name: str) -> None:
    source = open_pipeline(saved(name))
    for model in (source.family.component, *source.other_models):
        loaded, hollow = source.load(model), getattr(source.pipe, model)
        assert {n: p.shape for n, p in loaded.named_parameters()} == {n: p.shape for n, p in hollow.named_parameters()}


@pytest.mark.parametrize("stored", ["shared.weight", "encoder.embed_tokens.weight", "both"])
@pytest.mark.parametrize("tie", [True, False])  # T5 v1.1 says false, of the table that its decoder has at the end
def test_tied_embeddings_may_be_stored_under_either_name(
    saved: SaveOnce, tmp_path: Path, stored: str, tie: bool
) -> None:
    folder = Path(shutil.copytree(saved("pixart"), tmp_path / "pipeline"))
    config = folder / "text_encoder/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "tie_word_embeddings": tie}))
    expected = load_file(folder / TEXT)["shared.weight"]

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        table = tensors.pop("shared.weight")
        names = ["shared.weight", "encoder.embed_tokens.weight"] if stored == "both" else [stored]
        tensors.update({name: table.clone() for name in names})

    change(folder / TEXT, rename)
    assert torch.equal(open_pipeline(folder).load("text_encoder").shared.weight, expected)


def test_names_of_older_releases_are_read_as_the_libraries_read_them(folder: Path) -> None:
    expected = open_pipeline(folder).load("text_encoder").state_dict(), open_pipeline(folder).load("vae").state_dict()

    def as_saved_by_transformers_4(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            if not name.startswith("text_model."):
                tensors[f"text_model.{name}"] = tensors.pop(name)
        tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]

    def as_saved_by_diffusers_0_10(tensors: dict[str, torch.Tensor]) -> None:
        old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        for name in list(tensors):
            for new, before in old.items():
                if "mid_block.attentions" in name and f".{new}." in name:
                    tensors[name.replace(f".{new}.", f".{before}.")] = tensors.pop(name)

    change(folder / TEXT, as_saved_by_transformers_4)
    change(folder / VAE, as_saved_by_diffusers_0_10)
    assert "encoder.mid_block.attentions.0.query.weight" in load_file(folder / VAE)
    source = open_pipeline(folder)
    for name, wanted in zip(("text_encoder", "vae"), expected, strict=True):
        found = source.load(name).state_dict()
        assert all(torch.equal(found[key], item) for key, item in wanted.items())


def lose(tensors: dict[str, torch.Tensor]) -> None:
    for name in sorted(tensors)[:5]:
        del tensors[name]


def add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["odd.weight"] = torch.zeros(3)


def reshape(tensors: dict[str, torch.Tensor]) -> None:
    name = min(tensors)
    tensors[name] = tensors[name].reshape(-1)[:1]


@pytest.mark.parametrize("file", [UNET, TEXT, VAE])
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lose, r"5 missing \({first}, .* and 2 more\)"),
        (add, r"1 unexpected \(odd.weight\)"),
        (reshape, r"1 of another shape \({first} \[1\], expected \[\d+.*\]\)"),
    ],
)
def test_weights_of_another_model_are_refused_by_name(
    folder: Path, file: str, edit: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    first = min(load_file(folder / file))
    change(folder / file, edit)
    with pytest.raises(BuildError, match=message.format(first=first)) as refused:
        open_pipeline(folder)
    assert str(folder / file.partition("/")[0]) in str(refused.value)


@pytest.mark.parametrize("file", [UNET, TEXT])
@pytest.mark.parametrize("form", ["peft", "wrapped"])
def test_a_lora_that_is_not_fused_is_refused_with_how_to_fuse_it(folder: Path, file: str, form: str) -> None:
    def wrap(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in sorted(tensors) if name.endswith(("to_q.weight", "q_proj.weight")))
        stem, table = name.removesuffix(".weight"), tensors[name]
        if form == "wrapped":
            tensors[f"{stem}.base_layer.weight"] = tensors.pop(name)
        tensors[f"{stem}.lora_A.default.weight"] = table[:4]
        tensors[f"{stem}.lora_B.default.weight"] = table[:, :4]

    change(folder / file, wrap)
    with pytest.raises(BuildError, match=r"LoRA that is not fused: .*pipe\.fuse_lora\(\); pipe\.unload_lora_weights"):
        open_pipeline(folder)


# variants ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def halves(tmp_path: Path) -> Path:
    """Stable Diffusion as `save_pretrained(variant="fp16")` writes it."""
    save_small_pipeline("sd", tmp_path / "halves", variant="fp16")
    return tmp_path / "halves"


def names_of(source: Any, model: str) -> set[str]:
    return {path.name for path in source.stored(model).files if path.suffix == ".safetensors"}


@pytest.mark.parametrize("asked", [None, "fp16"])
def test_the_only_variant_is_found(halves: Path, saved: SaveOnce, asked: str | None) -> None:
    source, plain = open_pipeline(halves, variant=asked), open_pipeline(saved("sd"))
    assert names_of(source, "unet") == {"diffusion_pytorch_model.fp16.safetensors"}
    assert names_of(source, "text_encoder") == {"model.fp16.safetensors"}
    for model in ("unet", *source.other_models):
        expected = plain.load(model).state_dict()
        assert all(torch.equal(expected[name], item) for name, item in source.load(model).state_dict().items())


def test_shards_of_a_variant_are_found(tmp_path: Path, saved: SaveOnce) -> None:
    save_small_pipeline("sd", tmp_path / "shards", variant="fp16", max_shard_size="100KB")
    assert (tmp_path / "shards/unet/diffusion_pytorch_model.safetensors.index.fp16.json").exists()
    assert (tmp_path / "shards/text_encoder/model.safetensors.index.fp16.json").exists()
    source = open_pipeline(tmp_path / "shards")
    assert len(names_of(source, "unet")) > 1
    assert all(".fp16-0000" in name for name in names_of(source, "unet") | names_of(source, "text_encoder"))
    for model in ("unet", "text_encoder"):
        expected = open_pipeline(saved("sd")).load(model).state_dict()
        assert all(torch.equal(expected[name], item) for name, item in source.load(model).state_dict().items())


@pytest.mark.parametrize(("model", "file"), [("unet", "diffusion_pytorch_model"), ("text_encoder", "model")])
def test_of_shards_and_a_single_file_those_are_read_that_are_loaded(
    folder: Path, tmp_path: Path, model: str, file: str
) -> None:
    save_small_pipeline("sd", tmp_path / "shards", max_shard_size="100KB")
    for path in (tmp_path / "shards" / model).glob(f"{file}*"):
        shutil.copy(path, folder / model)
    change(folder / model / f"{file}.safetensors", lambda tensors: [item.fill_(7) for item in tensors.values()])
    source = open_pipeline(folder)
    for name, item in source.load(model).state_dict().items():
        if name in source.stored(model).places:
            assert torch.equal(source.stored(model).read(name), item)


def test_weights_without_a_variant_are_taken_unless_one_is_asked_for(folder: Path, halves: Path) -> None:
    shutil.copy(halves / "unet/diffusion_pytorch_model.fp16.safetensors", folder / "unet")
    change(folder / "unet/diffusion_pytorch_model.fp16.safetensors", lambda tensors: tensors["conv_in.bias"].fill_(7))
    plain, chosen = open_pipeline(folder), open_pipeline(folder, variant="fp16")
    assert names_of(plain, "unet") == {"diffusion_pytorch_model.safetensors"}
    assert names_of(chosen, "unet") == {"diffusion_pytorch_model.fp16.safetensors"}
    assert names_of(chosen, "vae") == {"diffusion_pytorch_model.safetensors"}  # as diffusers does
    assert chosen.load("unet").conv_in.bias[0] == 7 != plain.load("unet").conv_in.bias[0]
    assert chosen.weights.sha256() != plain.weights.sha256()


def test_of_two_variants_none_is_guessed(halves: Path) -> None:
    weights = halves / "unet/diffusion_pytorch_model.fp16.safetensors"
    shutil.copy(weights, weights.with_name("diffusion_pytorch_model.non_ema.safetensors"))
    with pytest.raises(BuildError, match="unet are there in the variants fp16, non_ema; choose one with --variant"):
        open_pipeline(halves)
    assert names_of(open_pipeline(halves, variant="non_ema"), "unet") == {"diffusion_pytorch_model.non_ema.safetensors"}


def test_a_variant_that_is_not_there_is_refused(halves: Path, folder: Path) -> None:
    with pytest.raises(BuildError, match=r"no weights of the variant 'bf16'; it has fp16$"):
        open_pipeline(halves, variant="bf16")
    with pytest.raises(BuildError, match="it has none and weights without a variant: leave --variant out"):
        open_pipeline(folder, variant="bf16")


# sizes ------------------------------------------------------------------------------------------------------------


def configured(folder: Path, **changes: object) -> None:
    path = folder / "unet/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_sample_size_of_two_numbers_is_height_and_width(folder: Path) -> None:
    configured(folder, sample_size=[8, 16])
    setting = resolve(open_pipeline(folder).facts, SettingRequest(4))
    assert (setting.height, setting.width, setting.latents_shape) == (64, 128, (4, 8, 16))


@pytest.mark.parametrize("size", [None, [8], "8", [8, 8, 8], 8.5])
def test_another_sample_size_asks_for_one(folder: Path, size: object) -> None:
    configured(folder, sample_size=size)
    facts = open_pipeline(folder).facts
    with pytest.raises(BuildError, match=r"names no picture size \(sample_size\); name one with --size"):
        resolve(facts, SettingRequest(4))
    assert resolve(facts, SettingRequest(4, (64, 72))).width == 72


@pytest.mark.parametrize(("name", "multiple"), [("sd", 8), ("sdxl", 8), ("pixart", 16), ("sd3", 16), ("flux", 16)])
def test_a_size_that_does_not_fit_is_refused_by_its_multiple(saved: SaveOnce, name: str, multiple: int) -> None:
    facts = open_pipeline(saved(name)).facts
    with pytest.raises(
        BuildError, match=f"height 100 does not fit this pipeline; give a positive multiple of {multiple},"
    ):
        resolve(facts, SettingRequest(4, (100, 64)))
    for absurd in (0, -8, 10**9):
        with pytest.raises(BuildError, match=f"width {absurd} is no size of a picture; name 1 to 65536 pixels"):
            resolve(facts, SettingRequest(4, (64, absurd)))


def test_a_multiple_that_only_the_pipeline_asks_for_counts(saved: SaveOnce) -> None:
    facts = replace(open_pipeline(saved("sd")).facts, size_step=4, pixels_per_latent=4)  # a VAE of fewer levels
    with pytest.raises(
        BuildError, match="height 100 does not fit this pipeline; give a positive multiple of 8, such as 96"
    ):
        resolve(facts, SettingRequest(4, (100, 64)))
