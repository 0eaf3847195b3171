"""A Sana pipeline, small and untrained, from prompt to picture: Gemma-2 with its instruction, AutoencoderDC, sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.needs_compiler import needs_compiler

from engines import DenoiseRuntime
from engines.errors import BuildError
from engines.precision import Precision
from engines.setting_entry import SettingChoice
from tmpdiff_export import attach
from tmpdiff_export.bundling.bundle import build
from tmpdiff_export.bundling.options import BuildOptions
from tmpdiff_export.pipelines.families.table import family_of
from tools.acceptance.odd_prompts import NEGATIVES, ODD_PROMPTS
from tools.acceptance.text_pipelines import TEXT_PIPELINES, gemma_encoder

STEPS = 3
SIZES = ((64, 96), (128, 64), (32, 160))
PRECISIONS = (Precision.FP16, Precision.FP8, Precision.INT8, Precision.INT4)
PARITY = 1e-3
"""Of FP16's latents, relative."""


@dataclass(frozen=True)
class Built:
    """A pipeline folder and its bundle, opened."""

    folder: Path
    runtime: DenoiseRuntime

    def at(self, size: tuple[int, int]) -> DenoiseRuntime:
        return self.runtime.at(SettingChoice(size=size))

    def pipe(self) -> Any:
        """The pipeline, loaded anew."""
        from diffusers import SanaPipeline

        pipe = SanaPipeline.from_pretrained(self.folder, local_files_only=True)
        pipe.set_progress_bar_config(disable=True)
        return pipe


def theirs(pipe: Any, prompt: str, size: tuple[int, int], **more: Any) -> np.ndarray:
    """Final latents [1, C, h, w] of the diffusers pipeline, with a seed of 3."""
    options = {"num_inference_steps": STEPS, "output_type": "latent", "use_resolution_binning": False, **more}
    generator = torch.Generator().manual_seed(3)
    return pipe(prompt, height=size[0], width=size[1], generator=generator, **options).images.numpy()


def ours(runtime: DenoiseRuntime, prompt: str, precision: str = "fp16", negative: str | None = None) -> np.ndarray:
    """The same of the runtime."""
    schedule = runtime.schedule(f"uniform:{precision}")
    return runtime.denoise(runtime.encode([prompt], negative), schedule, runtime.noise([3]))


def relative(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


@pytest.fixture(scope="module", params=["flow euler", "dpm flow"])
def built(request: pytest.FixtureRequest, made_once: Callable[[str, Callable[[Path], object]], Path]) -> Built:
    """With the two schedulers that Sana's pipelines come with."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    euler = request.param == "flow euler"

    def make(folder: Path) -> None:
        pipe = TEXT_PIPELINES["sana"]()
        if euler:
            pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        pipe.save_pretrained(folder / "pipeline")
        options = BuildOptions(
            precisions=PRECISIONS if euler else PRECISIONS[:1], prompts=("a red ring", "A small BLUE square!"),
            steps=(STEPS,), sizes=SIZES if euler else SIZES[:1], text_lengths=() if euler else (40,),
            backend="onnxruntime",
        )  # fmt: skip
        build(folder / "pipeline", folder / "bundle", options)

    folder = made_once(f"sana-{request.param.replace(' ', '-')}", make)
    return Built(folder / "pipeline", DenoiseRuntime.load(folder / "bundle", threads=1))


only_euler = pytest.mark.parametrize("built", ["flow euler"], indirect=True)


def test_the_runtime_equals_the_diffusers_pipeline_at_every_size(built: Built) -> None:
    pipe = built.pipe()
    for entry in built.runtime.manifest.settings:
        size = (entry.height, entry.width)
        length = {"max_sequence_length": entry.text_length}
        for prompt in ("  A RED ring ", "red " * 400):
            expected = theirs(pipe, prompt, size, **length)
            assert relative(ours(built.at(size), prompt), expected) < PARITY
        assert (
            relative(theirs(pipe, "blue", size, **length), expected) > 1e-2
        )  # far more than rounding: the prompt matters


@only_euler
@pytest.mark.parametrize("precision", ["fp8", "int8", "int4"])
def test_engines_of_lower_precision_stay_near(built: Built, precision: str) -> None:
    assert built.runtime.manifest.denoisers[precision][0].lowering
    expected = theirs(built.pipe(), "a red ring", SIZES[0])
    assert 1e-4 < relative(ours(built.at(SIZES[0]), "a red ring", precision), expected) < 0.2


@only_euler
def test_odd_prompts_draw_what_the_pipeline_draws(built: Built) -> None:
    pipe, runtime = built.pipe(), built.at(SIZES[2])
    for prompt in ODD_PROMPTS.values():
        assert relative(ours(runtime, prompt), theirs(pipe, prompt, SIZES[2])) < PARITY, prompt
    for negative in NEGATIVES.values():
        expected = theirs(pipe, "a red ring", SIZES[2], negative_prompt=negative or "")
        assert relative(ours(runtime, "a red ring", negative=negative), expected) < PARITY, negative


@only_euler
def test_pictures_are_those_of_the_pipelines_decoder(built: Built) -> None:
    pipe = built.pipe()
    for size in SIZES:
        runtime = built.at(size)
        latents = runtime.noise([1, 2])
        with torch.inference_mode():
            decoded = pipe.vae.decode(torch.from_numpy(latents) / pipe.vae.config.scaling_factor, return_dict=False)[0]
        expected = pipe.image_processor.postprocess(decoded, output_type="np") * 255
        pictures = runtime.decode(latents)
        assert pictures.shape == (2, *size, 3)
        assert expected.std() > 1
        assert np.abs(pictures - expected).max() < 1.5


def test_what_is_cut_of_a_prompt_is_told(built: Built) -> None:
    entry = built.runtime.manifest.settings[0]
    words = [f"ring{number}" for number in range(200)]
    ((prompt, cut),) = built.runtime.encode([" ".join(words)]).cut
    assert prompt == " ".join(words)
    assert prompt.endswith(cut)
    kept = len(prompt) - len(cut)  # a token is a letter here; a blank is one as well
    assert entry.text_length is not None
    assert 0 <= entry.text_length - kept <= 4


@only_euler
def test_the_manifest_says_how_prompts_are_framed(built: Built) -> None:
    (text,) = built.runtime.manifest.texts
    assert (text.max_tokens, text.variable, text.lowercase, text.padding_side) == (300, True, True, "right")
    assert text.positive.prefix.startswith("Given a user prompt, generate an 'Enhanced prompt'")
    assert text.positive.prefix.endswith("User Prompt: ")
    assert text.positive.extra_tokens > 300  # of single letters
    assert (text.positive.head, text.negative.prefix, text.negative.extra_tokens) == (1, "", 0)


@only_euler
def test_a_bundle_takes_the_transformers_place(built: Built) -> None:
    pipe, runtime = built.pipe(), built.at(SIZES[0])
    expected = theirs(pipe, "a red ring", SIZES[0], negative_prompt="blue")
    schedule = runtime.schedule("uniform:fp16")
    attach(pipe, runtime, schedule=schedule)
    assert relative(theirs(pipe, "a red ring", SIZES[0], negative_prompt="blue"), expected) < PARITY
    assert pipe.transformer.last_run == list(enumerate(schedule.precisions))


@needs_compiler
@pytest.mark.long
@only_euler
def test_packages_draw_the_same(built: Built, tmp_path: Path) -> None:
    """For the CPU, the denoiser in BF16."""
    options = BuildOptions(
        precisions=PRECISIONS[:1], prompts=("a red ring", "A small BLUE square!"), steps=(STEPS,), sizes=SIZES[:1],
        backend="torch", device="cpu", text_encoder_weights="int8",
    )  # fmt: skip
    manifest = build(built.folder, tmp_path / "bundle", options)
    assert manifest.text_encoder[0].recipe == "int8-weights"
    with DenoiseRuntime.load(tmp_path / "bundle", threads=1) as runtime:
        assert relative(ours(runtime, "a red ring"), theirs(built.pipe(), "a red ring", SIZES[0])) < 2e-2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            "logits",
            "its text encoder is a Gemma2ForCausalLM, which returns logits; save the pipeline with its Gemma2Model",
        ),
        ("none", "its text encoder is a NoneType, not a Gemma2Model"),
        ("other vae", "its VAE is a AutoencoderKL, not one of AutoencoderDC"),
        ("sprint", "it has a guidance embedding or scaled timesteps"),
    ],
)
def test_parts_that_sana_does_not_have_are_refused(changes: str, reason: str) -> None:
    from diffusers import AutoencoderKL
    from transformers import Gemma2ForCausalLM

    pipe = TEXT_PIPELINES["sana"]()
    if changes == "logits":
        pipe.text_encoder = Gemma2ForCausalLM(gemma_encoder(pipe.tokenizer, 128).config)
    elif changes == "none":
        pipe.text_encoder = None
    elif changes == "other vae":
        pipe.vae = AutoencoderKL(block_out_channels=(16,), norm_num_groups=8)
    else:
        pipe.transformer.register_to_config(guidance_embeds=True)
    with pytest.raises(BuildError, match=f"this SanaPipeline cannot be built: {reason}"):
        family_of(pipe)
