"""The embedded demo pipeline: what is shipped, how it loads, and whether its pictures show what captions say."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.demo_build import linked_copy
from helpers.paths import ROOT

from engines.precision import Precision
from engines.runtime import DenoiseRuntime
from engines.setting_choice import SettingChoice
from engines.text import read_prompts
from tmpdiff_export.bundling.bundle import build
from tmpdiff_export.bundling.options import BuildOptions
from tmpdiff_export.calibrate.settings import Wanted, open_setting
from tmpdiff_export.demo import pipeline_folder
from tmpdiff_export.demo.readback import judge, read_picture, score
from tmpdiff_export.demo.scenes import has_held_out_pair, held_out_captions, is_held_out, parse_caption

GUIDANCE_SCALE = 4.5
STEPS = 20
PROMPT_FOLDER = ROOT / "calibration" / "prompts"


@pytest.fixture(scope="module")
def pipeline() -> Any:
    """The shipped fp16 weights, computed with in fp32, as half arithmetic is slow on a CPU."""
    from diffusers import DiffusionPipeline

    loaded = DiffusionPipeline.from_pretrained(pipeline_folder(), torch_dtype=torch.float32, local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def generate(pipeline: Any, captions: list[str], **options: Any) -> list[np.ndarray]:
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(captions))]
    call = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE_SCALE, "max_sequence_length": 40, **options}
    return [np.asarray(image) for image in pipeline(captions, generator=generators, **call).images]


def test_the_folder_is_small_and_names_no_place() -> None:
    files = [f for f in pipeline_folder().rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 48_000_000
    assert {f.suffix for f in files} <= {".json", ".safetensors", ".md"}
    for document in (f for f in files if f.suffix == ".json"):
        values = json.loads(document.read_text())
        assert "_name_or_path" not in values, document
        assert not [v for v in values.values() if isinstance(v, str) and "/" in v and not v.startswith("<")], document


def test_weights_are_half_precision_on_disk() -> None:
    from safetensors import safe_open

    for file in pipeline_folder().rglob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"F16"}, file  # noqa: SIM118


def test_it_is_a_genuine_pixart_sigma_pipeline(pipeline: Any) -> None:
    classes = {name: type(part).__name__ for name, part in pipeline.components.items() if name != "tokenizer"}
    assert type(pipeline).__name__ == "PixArtSigmaPipeline"
    assert classes == {
        "text_encoder": "T5EncoderModel",
        "vae": "AutoencoderKL",
        "transformer": "PixArtTransformer2DModel",
        "scheduler": "DPMSolverMultistepScheduler",
    }
    denoiser = pipeline.transformer
    assert denoiser.dtype == torch.float32
    assert sum(p.numel() for p in denoiser.parameters()) >= 15_000_000
    assert (denoiser.config.sample_size // denoiser.config.patch_size) ** 2 >= 256


def test_the_default_call_draws_what_is_asked_for(pipeline: Any) -> None:
    image = pipeline("a red circle", generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (256, 256)
    verdict = judge(read_picture(np.asarray(image)), "a red circle")
    assert verdict.colour
    assert verdict.shape


def test_longer_padding_changes_nothing(pipeline: Any) -> None:
    captions = held_out_captions("composed", 2, seed=8)
    short, long = (
        pipeline(
            captions,
            num_inference_steps=6,
            guidance_scale=GUIDANCE_SCALE,
            generator=[torch.Generator().manual_seed(i) for i in (0, 1)],
            max_sequence_length=length,
            output_type="latent",
        ).images
        for length in (40, 300)
    )
    assert torch.linalg.norm(long - short) / torch.linalg.norm(short) < 1e-4


def test_text_encoder_activations_fit_fp16(pipeline: Any) -> None:
    extremes: list[float] = []
    hooks = [
        module.register_forward_hook(lambda _m, _i, out: extremes.append(out.abs().max().item()))
        for module in pipeline.text_encoder.modules()
        if isinstance(module, torch.nn.Linear)
    ]
    pipeline.encode_prompt(held_out_captions("unusual", 30, seed=0), max_sequence_length=40)
    for hook in hooks:
        hook.remove()
    assert extremes
    assert max(extremes) < 6000


def test_pictures_of_the_fp16_engine_read_back(demo_bundle: Path, tmp_path: Path) -> None:
    """A few; the gate below has a hundred."""
    captions = held_out_captions("plain", 2, seed=1) + held_out_captions("composed", 1, seed=1)
    setting = SettingChoice(steps=STEPS)
    open_setting(linked_copy(demo_bundle, tmp_path / "bundle"), Wanted(setting))
    runtime = DenoiseRuntime.load(tmp_path / "bundle", setting=setting)
    pictures = list(runtime.generate(captions, range(len(captions)), runtime.schedule("uniform:fp16")))
    assert score(pictures, captions)["colour_and_position"] == 1.0
    assert score(pictures, captions[1:] + captions[:1])["colour_and_position"] == 0.0


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_gate_pictures_of_unseen_captions_read_back(tmp_path: Path) -> None:
    """Through the FP16 engine and the runtime: the pipeline as users get it, and twice as fast here as FP32 torch."""
    captions = held_out_captions("plain", 50, seed=0) + held_out_captions("composed", 50, seed=0)
    prompts = ("a small red circle in the center", "a large blue square at the left")
    options = BuildOptions(precisions=(Precision.FP16,), prompts=prompts, steps=(STEPS,))
    build(pipeline_folder(), tmp_path / "bundle", options)
    runtime = DenoiseRuntime.load(tmp_path / "bundle")
    schedule = runtime.schedule("uniform:fp16")
    pictures = [runtime.generate([caption], [seed], schedule)[0] for seed, caption in enumerate(captions)]
    accuracies = score(pictures, captions)
    print("read back of 100 unseen captions:", {name: f"{value:.0%}" for name, value in accuracies.items()})
    assert accuracies["colour_and_position"] >= 0.90
    # The same pictures under the captions of others: agreement there would mean a reader that always agrees.
    assert score(pictures, captions[1:] + captions[:1])["colour_and_position"] <= 0.10


@pytest.mark.long
@pytest.mark.parametrize("kind", ["plain", "composed"])
def test_the_diffusers_pipeline_itself_draws_what_is_asked_for(pipeline: Any, kind: str) -> None:
    captions = held_out_captions(kind, 4, seed=1)
    accuracies = score(generate(pipeline, captions), captions)
    assert accuracies["colour_and_position"] == 1.0


@pytest.mark.parametrize("kind", ["plain", "composed", "unusual"])
def test_prompts_are_held_out_and_of_their_kind(kind: str) -> None:
    prompts = read_prompts(PROMPT_FOLDER / f"{kind}.txt")
    assert (len(prompts.calibration), len(prompts.validation)) == (24, 24)
    scenes = [parse_caption(prompt) for prompt in prompts.calibration + prompts.validation]
    assert len({frozenset(scene.objects) for scene in scenes}) == 48
    assert all(is_held_out(scene) for scene in scenes)
    assert all(has_held_out_pair(scene) == (kind == "unusual") for scene in scenes)
    counts = {"plain": {1}, "composed": {2}, "unusual": {1, 2}}
    assert {len(scene.objects) for scene in scenes} == counts[kind]


def test_prompt_sets_share_no_prompt() -> None:
    sets = [read_prompts(PROMPT_FOLDER / f"{kind}.txt") for kind in ("plain", "composed", "unusual")]
    for one, other in combinations(sets, 2):
        assert set(one.calibration + one.validation).isdisjoint(other.calibration + other.validation)
