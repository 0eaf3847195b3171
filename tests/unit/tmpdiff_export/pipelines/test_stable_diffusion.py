"""Stable Diffusion and SDXL pipelines, small and untrained, from prompt to picture: CLIP tokens, UNet, guidance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.small_text import clip_tokenizer
from helpers.whole_pipeline import setting_of, whole_pipeline

from engines import DenoiseRuntime
from engines.documents import FileEntry
from engines.errors import BuildError, BundleError
from engines.precision import Precision
from engines.text import encode_texts, load_tokenizer
from engines.text_entry import TextEntry
from tmpdiff_export import attach
from tmpdiff_export.bundling.bundle import build
from tmpdiff_export.bundling.options import BuildOptions
from tmpdiff_export.pipelines.families.table import family_of
from tmpdiff_export.pipelines.load import SourcePipeline

PROMPTS = ("a red circle", "A small BLUE square, in the center!")
NUM_STEPS = 4


def make_pipeline(**changes):
    """A StableDiffusionPipeline of 64 x 64 pictures with every part random."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = clip_tokenizer()
    torch.manual_seed(0)
    parts = {
        "tokenizer": tokenizer,
        "text_encoder": CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2,
                num_attention_heads=4, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            )
        ),
        "unet": UNet2DConditionModel(
            sample_size=16, layers_per_block=1, block_out_channels=(64, 64), cross_attention_dim=128,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), attention_head_dim=4, norm_num_groups=16,
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ),
        "vae": AutoencoderKL(
            latent_channels=4, block_out_channels=(16, 16, 16), down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, norm_num_groups=8, sample_size=64,
        ),
        "scheduler": PNDMScheduler(
            skip_prk_steps=True, steps_offset=1, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
        ),
        "safety_checker": None,
        "feature_extractor": None,
    }  # fmt: skip
    return StableDiffusionPipeline(**{**parts, **changes}, requires_safety_checker=False)


def make_sdxl_pipeline():
    """A StableDiffusionXLPipeline of the parts of `make_pipeline`; its second tokenizer pads with another token."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    base, ids = make_pipeline(), 32
    config = CLIPTextConfig(
        vocab_size=base.text_encoder.config.vocab_size, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, projection_dim=64, bos_token_id=base.tokenizer.bos_token_id,
        eos_token_id=base.tokenizer.eos_token_id,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=16, layers_per_block=1, block_out_channels=(64, 64), cross_attention_dim=128 + 64,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=4, norm_num_groups=16,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True, addition_time_embed_dim=ids,
        addition_embed_type="text_time", projection_class_embeddings_input_dim=64 + 6 * ids,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=base.vae,
        text_encoder=base.text_encoder,
        text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer=base.tokenizer,
        tokenizer_2=clip_tokenizer("!"),
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            steps_offset=1,
            timestep_spacing="leading",
        ),
    )


@dataclass(frozen=True)
class Built:
    """A pipeline folder and its bundle, opened."""

    folder: Path
    runtime: DenoiseRuntime

    def source(self) -> SourcePipeline:
        """The pipeline, loaded anew."""
        return whole_pipeline(self.folder)


MAKERS = {"sd": make_pipeline, "sdxl": make_sdxl_pipeline}


@pytest.fixture(scope="module", params=MAKERS)
def built(request: pytest.FixtureRequest, made_once: Callable[[str, Callable[[Path], object]], Path]) -> Built:
    def make(folder: Path) -> None:
        MAKERS[request.param]().save_pretrained(folder / "pipeline")
        options = BuildOptions(
            precisions=(Precision.FP16, Precision.INT8), prompts=PROMPTS, steps=(NUM_STEPS,), backend="onnxruntime",
            sizes=((64, 96),),
        )  # fmt: skip
        build(folder / "pipeline", folder / "bundle", options)

    folder = made_once(request.param, make)
    return Built(folder / "pipeline", DenoiseRuntime.load(folder / "bundle", threads=1))


def theirs(built: Built, source: SourcePipeline, prompt: str, noise: np.ndarray, **more) -> np.ndarray:
    with torch.inference_mode():
        return source.pipe(
            prompt,
            num_inference_steps=NUM_STEPS,
            latents=torch.from_numpy(noise),
            output_type="latent",
            **source.call_options(setting_of(source, built.runtime.setting)),
            **more,
        ).images.numpy()


def relative(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def test_the_runtime_loop_equals_the_diffusers_pipeline(built: Built) -> None:
    runtime, source = built.runtime, built.source()
    noise = runtime.noise([3])
    for prompt in ("a red circle", "  The RED  ring's\tleft, 3 \u00fcber "):
        expected = theirs(built, source, prompt, noise)
        for precision, low, high in (("fp16", 0.0, 5e-3), ("int8", 1e-4, 0.2)):
            schedule = runtime.schedule(f"uniform:{precision}")
            ours = runtime.denoise(runtime.encode([prompt]), schedule, noise)
            assert low < relative(ours, expected) < high


@pytest.mark.parametrize("negative", [None, "", "a square!"])
def test_exclamation_marks_and_negative_prompts_are_read_as_by_the_pipeline(built: Built, negative: str | None) -> None:
    runtime, source = built.runtime, built.source()
    noise = runtime.noise([5])
    expected = theirs(source, "a red! ring !", noise, negative_prompt=negative)
    conditioning = runtime.encode(["a red! ring !"], negative)
    ours = runtime.denoise(conditioning, runtime.bundle.schedule("uniform:fp16"), noise)
    assert relative(ours, expected) < 1e-3
    absent = runtime.encode(["a red! ring !"])
    other = runtime.denoise(absent, runtime.bundle.schedule("uniform:fp16"), noise)
    same = negative is None or (negative == "" and not runtime.manifest.zero_absent_negative)
    assert (relative(other, expected) < 1e-3) is same


def test_pictures_come_out(built: Built) -> None:
    pictures = built.runtime.generate(
        list(PROMPTS), [1, 2], built.runtime.bundle.schedule(built.runtime.setting, "uniform:int8")
    )
    assert pictures.shape == (2, 64, 96, 3)
    assert pictures.std() > 0


def test_a_bundle_takes_the_unets_place(built: Built) -> None:
    runtime, source = built.runtime, built.source()
    noise = runtime.noise([4])
    # A picture that was cropped from a larger one: not what the bundle's own text encoder says.
    cropped = (
        {"original_size": (512, 700), "crops_coords_top_left": (10, 20)} if hasattr(source.pipe, "tokenizer_2") else {}
    )
    expected = theirs(built, source, PROMPTS[0], noise, **cropped)
    if cropped:
        assert relative(theirs(built, source, PROMPTS[0], noise), expected) > 1e-2
    attach(source.pipe, runtime, schedule="uniform:fp16")
    assert relative(theirs(built, source, PROMPTS[0], noise, **cropped), expected) < 5e-3
    assert len(source.pipe.unet.last_run) == runtime.num_steps
    with pytest.raises(ValueError, match="called with image_embeds, which the bundle's engines do not take"):
        source.pipe.unet(torch.from_numpy(noise), 1, added_cond_kwargs={"image_embeds": torch.zeros(1)})


def test_a_bundle_of_another_kind_of_unet_is_not_attached(built: Built) -> None:
    sdxl = hasattr(built.source().pipe, "tokenizer_2")
    other = make_pipeline() if sdxl else make_sdxl_pipeline()
    with pytest.raises(
        BundleError, match=r"does not fit the unet of this StableDiffusion.*: its addition_embed_type is"
    ):
        attach(other, built.runtime, schedule="uniform:fp16")


@pytest.mark.parametrize("pad_token", ["<|endoftext|>", "!</w>"])  # of Stable Diffusion 1 and 2
def test_prompts_become_the_tokens_of_the_clip_tokenizer(pad_token: str) -> None:
    tokenizer = clip_tokenizer(pad_token)
    text = TextEntry(
        tokenizer=FileEntry(path="tokenizer.json", sha256="0" * 64, bytes=1),
        max_tokens=77,
        pad_token_id=tokenizer.pad_token_id,
        lowercase=False,
    )
    prompts = ["a red circle", "", " It's  RED: 12 rings! "]
    ours = load_tokenizer(tokenizer.backend_tokenizer.to_str().encode())
    tokens = encode_texts(ours, prompts, text, text.positive, 77, 77)
    expected = tokenizer(prompts, padding="max_length", max_length=77, return_tensors="np")
    np.testing.assert_array_equal(tokens.input_ids, expected.input_ids)


def test_a_safety_checker_is_not_dropped_silently() -> None:
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=small, text_config=small, projection_dim=16))
    pipe = make_pipeline(safety_checker=checker, feature_extractor=CLIPImageProcessor())
    with pytest.raises(BuildError, match="this StableDiffusionPipeline cannot be built: it has a safety"):
        family_of(pipe)
