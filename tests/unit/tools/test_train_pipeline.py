"""The training tool, with counts so small that nothing is learnt: what it writes loads, runs and is reported on."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.commands import called, started
from helpers.experiments import command
from safetensors.torch import load_file

from tmpdiff_export.demo import pipeline_folder
from tmpdiff_export.demo.drawing import place
from tmpdiff_export.demo.scenes import held_out_captions, training_captions, vocabulary
from tools.demo.autoencoders import make_deep_vae, make_vae
from tools.demo.families import make_mmdit_family, make_sana_family, make_unet_family
from tools.demo.networks import MMDITS
from tools.demo.training import draw_batch, smaller_latents

TINY = (
    *("--size=128", "--device=cpu", "--threads=1", "--scenes=4", "--text-iterations=1", "--denoiser-iterations=2"),
    *("--denoiser-batch=2", "--evaluation-captions=1", "--save-minutes=0", "--vae-iterations=2", "--vae-batch=2"),
)
ABSENT = {"unet": {}, "mmdit": {"text_encoder_3": None, "tokenizer_3": None}, "sana": {}}
FAMILIES = {"unet": make_unet_family, "mmdit": make_mmdit_family, "sana": make_sana_family}
VAES = {"unet": make_vae, "mmdit": make_vae, "sana": make_deep_vae}
CLASSES = {
    "unet": ("StableDiffusionPipeline", "UNet2DConditionModel", "DDIMScheduler"),
    "mmdit": ("StableDiffusion3Pipeline", "SD3Transformer2DModel", "FlowMatchEulerDiscreteScheduler"),
    "sana": ("SanaPipeline", "SanaTransformer2DModel", "DPMSolverMultistepScheduler"),
}


def assert_of_its_family(name: str, pipeline: Any) -> None:
    parts = (pipeline, getattr(pipeline, "unet" if name == "unet" else "transformer"), pipeline.scheduler)
    assert tuple(type(part).__name__ for part in parts) == CLASSES[name]
    assert not pipeline.scheduler.config.get("clip_sample")  # the sampler table cannot hold clipping


def assert_every_word_is_one_token(tokenizer: Any) -> None:
    """Of CLIP's tokenizer, which writes where words end, or of a word-level one."""
    clip = tokenizer.bos_token == "<|startoftext|>"
    inner, end = (slice(1, -1), "</w>") if clip else (slice(1, None), "")
    assert [len(tokenizer.tokenize(word)) for word in vocabulary()] == [1] * len(vocabulary())
    for caption in held_out_captions("composed", 5, seed=0):
        words = re.findall(r"\w+|,", caption)
        ids = tokenizer.convert_tokens_to_ids([f"{word}{end}" for word in words])
        assert tokenizer(caption).input_ids[inner] == ids
        assert tokenizer.unk_token_id not in ids
    assert (tokenizer.unk_token_id not in tokenizer("zebra 7").input_ids[inner]) is clip


@pytest.mark.parametrize("name", FAMILIES)
def test_before_training_a_pipeline_is_of_its_family_and_every_word_one_token(name: str) -> None:
    family = FAMILIES[name](torch.device("cpu"), 128)
    assert_of_its_family(name, family.assemble(VAES[name]()))
    assert_every_word_is_one_token(family.tokenizer)


def test_sana_is_trained_on_what_its_pipeline_gives_the_denoiser() -> None:
    family = make_sana_family(torch.device("cpu"), 128)
    pipeline = family.assemble(make_deep_vae())
    captions = ["a large red circle in the top left", "", "a small blue square"]
    instruction = inspect.signature(type(pipeline).__call__).parameters["complex_human_instruction"].default
    with torch.no_grad():
        text, mask = family.embed(torch.tensor(family.token_ids(captions)))
        for row, caption in enumerate(captions):
            found = pipeline.encode_prompt(
                caption, device="cpu", max_sequence_length=family.caption_tokens,
                complex_human_instruction=instruction if caption else None, do_classifier_free_guidance=False,
            )  # fmt: skip
            torch.testing.assert_close(text[row : row + 1], found[0])
            torch.testing.assert_close(mask[row : row + 1], found[1])
    assert mask[1].sum() == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--size", "128"), "--size 128 is for the families unet, mmdit and sana"),
        (("--family", "unet", "--vae-out", "x"), "--vae-out is for the families pixart and sana"),
        (("--family", "unet", "--size", "512"), "--size 512 is for the family mmdit, not for unet"),
    ],
)
def test_options_of_another_family_are_refused(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    done = called("tools.demo.train_pipeline", "--out", tmp_path / "pipeline", *arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_smaller_latents_have_the_mean_positions_of_what_they_stand_for_and_as_many_zeros_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(MMDITS, 64, (1, 1))
    family = make_mmdit_family(torch.device("cpu"), 512)
    own = family.denoiser.pos_embed.pos_embed
    seen = []
    family.denoiser.context_embedder.register_forward_hook(lambda _, given, __: seen.append(given[0].shape[1]))
    text = family.embed(torch.tensor(family.token_ids(["a red circle"])))
    with torch.no_grad(), smaller_latents(family.denoiser, 32):
        small = family.denoiser.pos_embed.pos_embed
        torch.testing.assert_close(small[0, 17], own[0, [66, 67, 98, 99]].mean(0))  # row 1, column 1 of 16
        assert family.predict(family.denoiser, torch.zeros(1, 4, 32, 32), torch.ones(1), *text).shape[2:] == (32, 32)
    assert family.denoiser.pos_embed.pos_embed is own
    with torch.no_grad():
        family.predict(family.denoiser, torch.zeros(1, 4, 64, 64), torch.ones(1), *text)
    assert seen == [32 + 64, 32 + 256]


def test_a_larger_picture_shows_the_same_scene() -> None:
    arrays = {
        name: torch.as_tensor(array)
        for name, array in place([s for s, _ in training_captions(3, 1, seed=4)], 4).items()
    }
    small, large = (draw_batch(arrays, slice(0, 3), size) for size in (256, 512))
    assert large.shape == (3, 3, 512, 512)
    difference = (torch.nn.functional.avg_pool2d(large, 2) - small).abs()
    assert difference.mean() < 2e-3  # outlines are sharper


# A training


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, str]:
    """A family, the folder that the tool wrote, and what it printed."""
    folder = tmp_path_factory.mktemp(request.param) / "pipeline"
    words = ("--family", request.param, "--out", folder, *TINY)
    done = started("tools.demo.train_pipeline", *words, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr[-2000:]
    return request.param, folder, done.stdout


def load(trained: tuple[str, Path, str]) -> Any:
    from diffusers import DiffusionPipeline

    family, folder, _ = trained
    pipeline = DiffusionPipeline.from_pretrained(
        folder, local_files_only=True, torch_dtype=torch.float32, **ABSENT[family]
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.long
def test_the_folder_is_a_genuine_pipeline_of_its_family(trained: tuple[str, Path, str]) -> None:
    pipeline = load(trained)
    assert_of_its_family(trained[0], pipeline)
    options = FAMILIES[trained[0]](torch.device("cpu"), 128).call_options
    drawn = pipeline("a red circle", num_inference_steps=2, output_type="np", generator=torch.manual_seed(0), **options)
    picture = drawn.images
    assert picture.shape == (1, 128, 128, 3)
    assert np.isfinite(picture).all()
    assert picture.std() > 0


@pytest.mark.long
@pytest.mark.parametrize("trained", ["unet", "mmdit"], indirect=True)
def test_the_autoencoder_is_the_embedded_one(trained: tuple[str, Path, str]) -> None:
    name = "vae/diffusion_pytorch_model.safetensors"
    ours, embedded = (load_file(folder / name) for folder in (trained[1], pipeline_folder()))
    assert ours.keys() == embedded.keys()
    assert all(torch.equal(ours[key], embedded[key]) for key in ours)


@pytest.mark.long
def test_every_word_of_the_captions_is_one_token(trained: tuple[str, Path, str]) -> None:
    assert_every_word_is_one_token(load(trained).tokenizer)


@pytest.mark.long
def test_it_reports_what_reads_back_and_saves_on_the_way(trained: tuple[str, Path, str]) -> None:
    output = trained[2]
    assert output.count("saved to ") == 3  # after both iterations and at the end
    default = {"unet": "7.5", "mmdit": "7.0", "sana": "4.5"}[trained[0]]
    report = output[output.index(f"guidance_scale {default}, 20 steps") :]
    for kind in ("plain", "composed", "unusual"):
        assert re.search(rf"  {kind}: colour_and_position \d+\.\d%, .*shape \d+\.\d%", report)
    assert [entry.name for entry in trained[1].parent.iterdir()] == ["pipeline"]  # no scratch folder is left


@pytest.mark.long
def test_experiments_run_on_its_bundle(trained: tuple[str, Path, str], tmp_path: Path) -> None:
    from engines.precision import Precision
    from engines.runtime import DenoiseRuntime
    from tmpdiff_export.bundling.bundle import build
    from tmpdiff_export.bundling.options import BuildOptions

    captions = held_out_captions("composed", 4, seed=0)
    precisions = (Precision.FP16, Precision.INT8)
    options = BuildOptions(precisions=precisions, prompts=captions[:2], steps=(3,), backend="onnxruntime")
    build(trained[1], tmp_path / "bundle", options)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(["[calibration]", *captions[:2], "[validation]", *captions[2:]]))
    samples = ("--samples=2", "--validation-samples=2", "--threads=1")
    done = command("single_steps", tmp_path / "bundle", "--prompts", prompts, *samples, "--out", tmp_path / "steps")
    assert done.returncode == 0, done.stderr[-2000:]
    data = json.loads((tmp_path / "steps.json").read_text())["data"]["int8"]
    assert np.shape(data["downcast"]) == (2, 3)
    assert np.min(data["downcast"]) > 0
    with DenoiseRuntime.load(tmp_path / "bundle", threads=1) as runtime:
        pictures = runtime.generate([captions[0]], [0], runtime.schedule("uniform:int8"))
    assert pictures.shape == (1, 128, 128, 3)
