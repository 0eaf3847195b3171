"""SD3 and FLUX pipelines, small and untrained, from prompt to picture: several tokenizers, flow matching, guidance."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.runtime_command import rewrite_manifest
from helpers.small_text import clip_tokenizer, t5_tokenizer
from helpers.whole_pipeline import setting_of, whole_pipeline

from engines import DenoiseRuntime
from engines.errors import BuildError, BundleError, PromptError, SamplerError
from engines.precision import Precision
from tmpdiff_export import attach
from tmpdiff_export.bundling.bundle import build
from tmpdiff_export.bundling.options import BuildOptions
from tmpdiff_export.pipelines.families.flux import pack, unpack
from tmpdiff_export.pipelines.families.table import family_of
from tmpdiff_export.pipelines.load import SourcePipeline, open_pipeline
from tmpdiff_export.pipelines.settings import SettingRequest, resolve

PROMPTS = ("a red circle", "A small BLUE square!")
NUM_STEPS = 4
T5_TOKENS = 28
T5_WIDTH = 128
HEADS = {"num_attention_heads": 4, "attention_head_dim": 32}


def clip_config(width: int, **more: Any) -> Any:
    from transformers import CLIPTextConfig

    tokenizer = clip_tokenizer()
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3,
        num_attention_heads=4, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, **more,
    )  # fmt: skip


def make_t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(t5_tokenizer(T5_TOKENS)), d_model=T5_WIDTH, d_kv=32, d_ff=128, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    return T5EncoderModel(config)


def make_vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        latent_channels=16, block_out_channels=(16, 16, 16), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, norm_num_groups=8, sample_size=64,
        scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip


def make_sd3_pipeline(*, t5: bool) -> Any:
    """A StableDiffusion3Pipeline with every part random; its second tokenizer pads with another token."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection

    torch.manual_seed(0)
    denoiser = SD3Transformer2DModel(
        **HEADS, num_layers=3, sample_size=16, in_channels=16, out_channels=16, joint_attention_dim=T5_WIDTH,
        caption_projection_dim=128, pooled_projection_dim=32 + 64, pos_embed_max_size=24, dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=denoiser,
        # As SD3, and with the shift that depends on the picture's size.
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        if t5
        else FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=make_vae(),
        text_encoder=CLIPTextModelWithProjection(clip_config(32, projection_dim=32)),
        tokenizer=clip_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(clip_config(64, projection_dim=64)),
        tokenizer_2=clip_tokenizer("!</w>"),
        text_encoder_3=make_t5() if t5 else None,
        tokenizer_3=t5_tokenizer(T5_TOKENS) if t5 else None,
    )


def make_flux_pipeline(*, guidance_embeds: bool = True) -> Any:
    """A FluxPipeline with every part random."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel

    torch.manual_seed(0)
    denoiser = FluxTransformer2DModel(
        **HEADS, num_layers=2, num_single_layers=2, in_channels=64, joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=32, guidance_embeds=guidance_embeds, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=make_vae(),
        text_encoder=CLIPTextModel(clip_config(32)),
        tokenizer=clip_tokenizer(),
        text_encoder_2=make_t5(),
        tokenizer_2=t5_tokenizer(T5_TOKENS),
        transformer=denoiser,
    )


MAKERS: dict[str, Callable[[], Any]] = {
    "sd3": lambda: make_sd3_pipeline(t5=False),
    "sd3-t5": lambda: make_sd3_pipeline(t5=True),
    "flux": make_flux_pipeline,
    "flux-schnell": lambda: make_flux_pipeline(guidance_embeds=False),
}
GUIDED = ("sd3", "sd3-t5")


@dataclass(frozen=True)
class Built:
    """A pipeline folder and its bundle, opened."""

    name: str
    folder: Path
    runtime: DenoiseRuntime

    @property
    def packed(self) -> bool:
        return self.name.startswith("flux")

    def source(self) -> SourcePipeline:
        """The pipeline, loaded anew."""
        return whole_pipeline(self.folder)

    def theirs(self, source: SourcePipeline, prompt: str, noise: np.ndarray, **more: Any) -> np.ndarray:
        """Final latents [1, C, h, w] of the diffusers pipeline."""
        latents = torch.from_numpy(noise).to(source.pipe.dtype)
        with torch.inference_mode():
            found = source.pipe(
                prompt,
                num_inference_steps=NUM_STEPS,
                latents=pack(latents) if self.packed else latents,
                output_type="latent",
                **{**source.call_options(setting_of(source, self.runtime.setting)), **more},
            ).images.float()
        rows, columns = (size // 2 for size in noise.shape[2:])
        return (unpack(found, rows, columns) if self.packed else found).numpy()

    def ours(
        self, prompt: str, noise: np.ndarray, precision: str = "fp16", negative: str | None = None, **more: Any
    ) -> Any:
        """Final latents [1, C, h, w] of the runtime."""
        schedule = self.runtime.bundle.schedule(self.runtime.setting, f"uniform:{precision}")
        return self.runtime.denoise(self.runtime.encode([prompt], negative), schedule, noise, **more)


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
    return Built(request.param, folder / "pipeline", DenoiseRuntime.load(folder / "bundle", threads=1))


def relative(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def test_the_runtime_loop_equals_the_diffusers_pipeline(built: Built) -> None:
    source, noise = built.source(), built.runtime.noise([3])
    seen = []
    for prompt in ("a red circle", "  The RED  ring\tleft, \u00fcber "):
        expected = built.theirs(source, prompt, noise)
        for precision, low, high in (("fp16", 0.0, 5e-3), ("int8", 1e-4, 0.2)):
            assert low < relative(built.ours(prompt, noise, precision), expected) < high
        seen.append(expected)
    assert relative(*seen) > 2e-2  # far more than the engines' rounding: the prompt matters


def test_guidance_is_the_pipelines(built: Built) -> None:
    runtime, source, noise = built.runtime, built.source(), built.runtime.noise([5])
    defaults = {"sd3": 7.0, "sd3-t5": 7.0, "flux": 3.5, "flux-schnell": 1.0}
    assert runtime.setting.guidance_scale == defaults[built.name]
    more: dict[str, Any] = {"negative_prompt": "a square"} if built.name in GUIDED else {}
    if built.name == "flux-schnell":  # guided by a second prompt nevertheless, as the pipeline can be
        more = {"negative_prompt": "a square", "true_cfg_scale": 2.5}
    negative = more.get("negative_prompt")
    expected = built.theirs(source, PROMPTS[0], noise, guidance_scale=2.5, **more)
    measured = built.ours(PROMPTS[0], noise, negative=negative, guidance_scale=2.5)
    assert relative(measured, expected) < 5e-3
    assert relative(built.theirs(source, PROMPTS[0], noise), expected) > 1e-2
    if built.name == "flux":
        assert runtime.encode(list(PROMPTS)).select([1]).batch(2.5)["guidance"].tolist() == [2.5]
        with pytest.raises(PromptError, match="a negative prompt has no effect on this bundle"):
            runtime.encode([PROMPTS[0]], "a square")


def test_pictures_are_those_of_the_pipelines_decoder(built: Built) -> None:
    runtime, pipe = built.runtime, built.source().pipe
    pictures = runtime.generate(list(PROMPTS), [1, 2], runtime.schedule("uniform:int8"))
    assert pictures.shape == (2, 64, 96, 3)
    latents = runtime.noise([1, 2])
    with torch.inference_mode():
        decoded = pipe.vae.decode(torch.from_numpy(latents) / 1.5305 + 0.0609, return_dict=False)[0]
    expected = pipe.image_processor.postprocess(decoded, output_type="np") * 255
    assert expected.std() > 1
    assert np.abs(runtime.decode(latents) - expected).max() < 1.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bundle_takes_the_transformers_place(built: Built, dtype: torch.dtype) -> None:
    runtime, source, noise = built.runtime, built.source(), built.runtime.noise([4])
    expected = built.theirs(source, PROMPTS[0], noise)
    schedule = runtime.schedule("uniform:fp16")
    attach(source.pipe.to(dtype), runtime, schedule=schedule)
    measured = built.theirs(source, PROMPTS[0], noise)
    assert relative(measured, expected) < (5e-3 if dtype == torch.float32 else 5e-2)
    assert source.pipe.transformer.last_run == list(enumerate(schedule.precisions))


def test_a_pipeline_that_shifts_otherwise_is_not_attached(built: Built) -> None:
    pipe = built.source().pipe
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, use_dynamic_shifting=True, max_shift=3.0)
    with pytest.raises(SamplerError, match="is configured otherwise than the one the bundle was built with"):
        attach(pipe, built.runtime, schedule="uniform:fp16")


@pytest.mark.parametrize("built", ["flux", "flux-schnell"], indirect=True)
def test_a_bundle_of_another_kind_of_flux_is_not_attached(built: Built) -> None:
    other = make_flux_pipeline(guidance_embeds=built.name == "flux-schnell")
    with pytest.raises(BundleError, match=r"does not fit the transformer of this FluxPipeline: it has .* guidance"):
        attach(other, built.runtime, schedule="uniform:fp16")


@pytest.mark.parametrize("built", ["flux", "flux-schnell"], indirect=True)
def test_a_picture_to_edit_is_refused(built: Built) -> None:
    source = built.source()
    attach(source.pipe, built.runtime, schedule="uniform:fp16")
    ids = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])  # FLUX Kontext: the picture, and the one to edit
    text = {"encoder_hidden_states": torch.zeros(1, 4, T5_WIDTH), "pooled_projections": torch.zeros(1, 32)}
    more = {"guidance": torch.ones(1)} if built.name == "flux" else {}
    with pytest.raises(ValueError, match="2 image tokens at 1 x 1 positions"):
        source.pipe.transformer(
            torch.zeros(1, 2, 64), timestep=torch.ones(1), img_ids=ids, txt_ids=torch.zeros(4, 3), **text, **more
        )


def test_of_prompts_that_are_too_long_for_every_text_encoder_it_is_said_what_is_cut(built: Built) -> None:
    lengths = {"sd3": [77, 77], "sd3-t5": [77, 77, 256]}.get(built.name, [77, 512])
    assert [text.max_tokens for text in built.runtime.manifest.texts] == lengths
    prompts = ["x " * 75 + "y z", "red " * 30, "blue " * 600]
    cut = dict(built.runtime.encode(prompts).cut)
    if built.name == "sd3":
        assert cut == {prompts[0]: "y z", prompts[2]: ("blue " * 525).strip()}
    else:  # T5 reads more
        assert list(cut) == prompts[2:]
        assert set(cut[prompts[2]].split()) == {"blue"}


def test_every_tokenizer_is_vouched_for(built: Built, tmp_path: Path) -> None:
    files = [text.tokenizer.path for text in built.runtime.manifest.texts]
    parts = {"sd3": 2, "sd3-t5": 3, "flux": 2, "flux-schnell": 2}[built.name]
    assert files == ["tokenizer.json", "tokenizer_2.json", "tokenizer_3.json"][:parts]
    for name in files:
        folder = tmp_path / name
        shutil.copytree(built.runtime.bundle.folder, folder)
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)
        with DenoiseRuntime.load(folder, threads=1) as damaged:
            for check in (damaged.bundle.verify, lambda damaged=damaged: damaged.encode([PROMPTS[0]])):
                with pytest.raises(BundleError, match=f"bundle file {name} was altered"):
                    check()


def test_a_manifest_that_lacks_a_tokenizer_is_refused_in_words(built: Built, tmp_path: Path) -> None:
    shutil.copytree(built.runtime.bundle.folder, tmp_path / "bundle")
    rewrite_manifest(tmp_path / "bundle", lambda data: data["texts"].__delitem__(slice(1, None)))
    with DenoiseRuntime.load(tmp_path / "bundle", threads=1) as runtime:
        assert len(runtime.manifest.texts) == 1
        with pytest.raises(BundleError, match=r"the text encoder takes input_ids_2.*; the manifest has 1 tokenizers"):
            runtime.encode([PROMPTS[0]])


@pytest.mark.parametrize(
    ("make", "changes", "reason"),
    [
        (MAKERS["sd3-t5"], {"text_encoder": None, "tokenizer": None}, "its text_encoder is None"),
        (MAKERS["sd3-t5"], {"text_encoder_3": None}, "it has only one of text_encoder_3 and tokenizer_3"),
        (MAKERS["flux"], {"text_encoder_2": None}, "its text_encoder_2 is None"),
    ],
)
def test_pipelines_without_a_text_encoder_are_refused(make: Callable[[], Any], changes: dict, reason: str) -> None:
    pipe = make()
    for name, value in changes.items():
        setattr(pipe, name, value)
    with pytest.raises(BuildError, match=f"this {type(pipe).__name__} cannot be built: {reason}"):
        family_of(pipe)


def test_a_guidance_scale_without_effect_is_refused(tmp_path: Path) -> None:
    make_flux_pipeline(guidance_embeds=False).save_pretrained(tmp_path / "pipeline")
    facts = open_pipeline(tmp_path / "pipeline").facts
    with pytest.raises(BuildError, match=r"guidance scale 3\.5 would have no effect: .* has no guidance embedding"):
        resolve(facts, SettingRequest(size=(64, 96), guidance_scale=3.5))
    with pytest.raises(BuildError, match="height 68 does not fit this pipeline; give a positive multiple of 8"):
        resolve(facts, SettingRequest(size=(68, 96)))


def test_a_scheduler_without_a_shift_is_refused(tmp_path: Path) -> None:
    from diffusers import FlowMatchHeunDiscreteScheduler

    pipe = make_flux_pipeline()
    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    pipe.save_pretrained(tmp_path / "pipeline")
    options = BuildOptions(precisions=(Precision.FP16,), prompts=PROMPTS, steps=(2,), sizes=((64, 96),))
    with pytest.raises(SamplerError, match="FlowMatchHeunDiscreteScheduler takes no mu and no sigmas, which FLUX"):
        build(tmp_path / "pipeline", tmp_path / "bundle", options)
