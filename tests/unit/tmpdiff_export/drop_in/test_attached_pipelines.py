"""An attached pipeline of every family: what works as before, and what is refused by name."""

from __future__ import annotations

import copy
import gc
import inspect
import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import diffusers
import pytest
import torch
from helpers.eager_runtime import EagerRuntime
from helpers.small_pipelines import MAKERS

from tmpdiff_export import attach, detach
from tmpdiff_export.drop_in.denoiser import BundleDenoiser
from tmpdiff_export.drop_in.refusals import REFUSED_METHODS, AttachedError

NUM_STEPS = 4
ROUNDING = 1e-5  # relative, of latents
SIDE = 64
UNETS = ("sd", "sdxl")
WITH_LORA = ("sd", "sdxl", "sd3", "flux")
CALLS: dict[str, dict[str, Any]] = {
    "sd": {},
    "sdxl": {},
    "pixart": {"use_resolution_binning": False, "clean_caption": False},
    "sd3": {"max_sequence_length": 20},
    "flux": {"max_sequence_length": 20},
}
FROM_PICTURES = {
    "sd": "StableDiffusionImg2ImgPipeline",
    "sdxl": "StableDiffusionXLImg2ImgPipeline",
    "sd3": "StableDiffusion3Img2ImgPipeline",
    "flux": "FluxImg2ImgPipeline",
}


@pytest.fixture(params=MAKERS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def made(name: str) -> Any:
    """The small pipeline of a family, the same at every call."""
    torch.manual_seed(0)
    pipe = MAKERS[name]()
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def attached(pipe: Any) -> Any:
    runtime = EagerRuntime(pipe, NUM_STEPS, SIDE, SIDE)
    return attach(pipe, runtime, schedule=runtime.schedule)


def component_of(name: str) -> str:
    return "unet" if name in UNETS else "transformer"


def denoiser_of(pipe: Any) -> Any:
    return getattr(pipe, "unet", None) or pipe.transformer


def call(pipe: Any, name: str, **more: Any) -> torch.Tensor:
    """Final latents of a plain call."""
    options = {"height": SIDE, "width": SIDE, "num_inference_steps": NUM_STEPS, "output_type": "latent", **CALLS[name]}
    options |= {"generator": torch.Generator().manual_seed(0), **more}
    taken = inspect.signature(type(pipe).__call__).parameters
    return pipe("a red circle", **{key: value for key, value in options.items() if key in taken}).images


def same(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Up to rounding: an export wrapper computes positions in float32."""
    return float((got - expected).norm() / expected.norm()) < ROUNDING


def refused(asked: str, component: str) -> Any:
    return pytest.raises(
        AttachedError, match=rf"{asked}.* own {component}, .*call tmpdiff_export\.detach\(pipe\) first$"
    )


# As before


def test_an_attached_pipeline_draws_what_its_denoiser_draws(name: str) -> None:
    pipe = made(name)
    expected, config = call(pipe, name), dict(pipe.config)
    attached(pipe)
    assert isinstance(denoiser_of(pipe), BundleDenoiser)
    assert same(call(pipe, name), expected)
    assert dict(pipe.config) == config
    pipe.enable_group_offload("cpu", offload_type="leaf_level")
    assert same(call(pipe, name), expected)


def test_dtype_and_device_are_moved_and_the_vae_keeps_its_options(name: str) -> None:
    pipe = attached(made(name))
    pipe.to(torch.float64)
    assert pipe.dtype == denoiser_of(pipe).dtype == next(denoiser_of(pipe).parameters()).dtype == torch.float64
    assert denoiser_of(pipe).original.dtype == torch.float32
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling()
    pipe.maybe_free_model_hooks()
    assert set(pipe.components) >= {"vae", component_of(name)}


@pytest.mark.parametrize(
    ("name", "more"),
    [
        *((name, {"guidance_scale": 1.0, "num_images_per_prompt": 2}) for name in MAKERS),
        *((name, {"guidance_rescale": 0.7, "negative_prompt": "blue"}) for name in UNETS),
        ("sdxl", {"denoising_end": 0.5}),
        ("flux", {"true_cfg_scale": 2.0, "negative_prompt": "blue"}),
        ("sdxl", {"clip_skip": 1}),
        ("sd3", {"clip_skip": 1}),
    ],
    indirect=["name"],
)
def test_what_happens_around_the_denoiser_works(name: str, more: dict[str, Any]) -> None:
    pipe = made(name)
    plain, expected = call(pipe, name), call(pipe, name, **more)
    assert plain.shape != expected.shape or not same(plain, expected)
    assert same(call(attached(pipe), name, **more), expected)


def test_save_pretrained_writes_the_denoiser_that_was_replaced(name: str, tmp_path: Path) -> None:
    pipe = made(name)
    expected = call(pipe, name)
    attached(pipe).save_pretrained(tmp_path / "pipeline")
    index = json.loads((tmp_path / "pipeline" / "model_index.json").read_text())
    own = denoiser_of(pipe).original
    assert index[component_of(name)] == ["diffusers", type(own).__name__]
    again = type(pipe).from_pretrained(tmp_path / "pipeline", local_files_only=True)
    again.set_progress_bar_config(disable=True)
    assert type(denoiser_of(again)) is type(own)
    assert same(call(again, name), expected)
    assert denoiser_of(pipe).state_dict().keys() == own.state_dict().keys()


# from_pipe


@pytest.mark.parametrize("name", FROM_PICTURES, indirect=True)
def test_a_pipeline_made_from_an_attached_one_runs_the_engines(name: str, tmp_path: Path) -> None:
    """Also after the first one is gone: it starts part-way, and other steps are refused."""
    kind = getattr(diffusers, FROM_PICTURES[name])
    picture = {"image": torch.linspace(0, 1, 3 * SIDE * SIDE).reshape(1, 3, SIDE, SIDE), "strength": 0.5}
    drawn = []
    for own in (True, False):
        pipe = kind.from_pipe(made(name) if own else attached(made(name)))
        gc.collect()
        pipe.set_progress_bar_config(disable=True)
        drawn.append(call(pipe, name, **picture))
    assert same(*drawn)
    denoiser = denoiser_of(pipe)
    assert 0 < len(denoiser.last_run) < denoiser.runtime.num_steps
    with pytest.raises(Exception, match=f"num_inference_steps={NUM_STEPS}"):
        call(pipe, name, **picture, num_inference_steps=2 * NUM_STEPS)
    pipe.save_pretrained(tmp_path / "pipeline")
    again = kind.from_pretrained(tmp_path / "pipeline", local_files_only=True)
    assert type(denoiser_of(again)) is type(denoiser.original)
    with refused("set_attn_processor", component_of(name)):
        denoiser.set_attn_processor(None)
    assert denoiser_of(detach(pipe)) is denoiser.original


# Refused


def test_methods_that_load_before_they_ask_are_refused_at_once(name: str) -> None:
    pipe = attached(made(name))
    found = [method for method in REFUSED_METHODS if hasattr(type(pipe), method)]
    assert bool(found) == (name in WITH_LORA)
    for method in found:
        with refused(f"{type(pipe).__name__}.{method}", component_of(name)):
            getattr(pipe, method)("folder")
    detach(pipe)
    assert not set(vars(pipe)) & set(REFUSED_METHODS)


@pytest.mark.parametrize("name", UNETS, indirect=True)
def test_methods_that_ask_the_unet_are_refused(name: str) -> None:
    pipe = attached(made(name))
    for method, arguments, asked in (
        ("enable_freeu", (1.0, 1.0, 1.2, 1.4), "enable_freeu"),
        ("disable_freeu", (), "disable_freeu"),
        ("fuse_qkv_projections", (), "fuse_qkv_projections"),
        ("enable_attention_slicing", (), "set_attention_slice"),
    ):
        with refused(asked, "unet"):
            getattr(pipe, method)(*arguments)


def test_what_needs_the_denoisers_layers_is_refused(name: str) -> None:
    pipe = attached(made(name))
    component, denoiser = component_of(name), denoiser_of(pipe)
    with refused("set_use_memory_efficient_attention_xformers", component):
        pipe.enable_xformers_memory_efficient_attention()
    for asked in ("set_attn_processor", "attn_processors", "enable_gradient_checkpointing", "enable_layerwise_casting"):
        with refused(f"{asked} of the {component}", component):
            getattr(denoiser, asked)
        with refused(f"{asked} of the {component}", component):  # what diffusers passes over where it is absent
            hasattr(denoiser, asked)
    for asked, run in {
        "load_state_dict": lambda: denoiser.load_state_dict({}, strict=False),
        "compile": denoiser.compile,
        "a new conv_in": lambda: setattr(denoiser, "conv_in", torch.nn.Identity()),
        "a pickle or deep copy": lambda: pickle.dumps(denoiser),
    }.items():
        with refused(f"{asked} of the {component}", component):
            run()
    with refused("a pickle or deep copy", component):
        copy.deepcopy(pipe)
    assert denoiser_of(copy.copy(pipe)) is denoiser


def test_absence_and_plain_values_are_the_replaced_denoisers(name: str) -> None:
    pipe = made(name)
    own = denoiser_of(pipe)
    denoiser = denoiser_of(attached(pipe))
    with pytest.raises(AttributeError, match=f"'{type(own).__name__}' object has no attribute 'no_such_thing'"):
        denoiser.no_such_thing  # noqa: B018
    assert not hasattr(denoiser, "_hf_hook")
    for plain in ("encoder_hid_proj", "is_gradient_checkpointing", "config_name"):
        assert getattr(denoiser, plain, "absent") == getattr(own, plain, "absent")


@pytest.mark.parametrize(
    ("name", "more", "error", "message"),
    [
        ("sd", {"ip_adapter_image_embeds": [torch.zeros(2, 1, 32)]}, ValueError, "called with image_embeds"),
        ("sdxl", {"ip_adapter_image_embeds": [torch.zeros(2, 1, 32)]}, ValueError, "called with image_embeds"),
        ("sd3", {"ip_adapter_image": torch.zeros(1, 3, 8, 8)}, AttachedError, "attn_processors of the transformer"),
        ("sd3", {"joint_attention_kwargs": {"scale": 0.5}}, ValueError, "called with joint_attention_kwargs"),
        ("sd3", {"skip_guidance_layers": [0], "skip_layer_guidance_stop": 1.0}, ValueError, "called with skip_layers"),
        ("flux", {"joint_attention_kwargs": {"scale": 0.5}}, ValueError, "called with joint_attention_kwargs"),
        ("sd", {"cross_attention_kwargs": {"any": 1}}, ValueError, "called with cross_attention_kwargs"),
        ("sdxl", {"cross_attention_kwargs": {"any": 1}}, ValueError, "called with cross_attention_kwargs"),
    ],
    indirect=["name"],
)
def test_arguments_that_engines_do_not_take_are_refused(
    name: str, more: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(attached(made(name)), name, **more)


# What a denoiser has beside its weights


def test_a_denoiser_with_freeu_is_not_attached() -> None:
    pipe = made("sd")
    pipe.enable_freeu(0.9, 0.2, 1.2, 1.4)
    with pytest.raises(
        AttachedError, match=r"unet .*StableDiffusionPipeline has FreeU, .*pipe\.disable_freeu\(\) before"
    ):
        attached(pipe)
    pipe.disable_freeu()
    attached(pipe)


def test_a_denoiser_with_adapters_hooks_or_a_cache_is_not_attached() -> None:
    pipe = made("flux")
    runtime = EagerRuntime(pipe, NUM_STEPS, SIDE, SIDE)
    pipe.transformer.peft_config = {"style": SimpleNamespace()}
    with pytest.raises(AttachedError, match=r"has LoRA adapters, .*pipe\.unload_lora_weights\(\) before"):
        attach(pipe, runtime, schedule=runtime.schedule)
    pipe.transformer.peft_config = {}
    pipe.transformer.encoder_hid_proj = torch.nn.Identity()
    with pytest.raises(AttachedError, match=r"has an IP adapter, .*pipe\.unload_ip_adapter\(\) before"):
        attach(pipe, runtime, schedule=runtime.schedule)
    pipe.transformer.encoder_hid_proj = None
    accelerate.cpu_offload(pipe.transformer, "cpu")
    with pytest.raises(AttachedError, match=r"has sequential offloading, .*pipe\.remove_all_hooks\(\) before"):
        attach(pipe, runtime, schedule=runtime.schedule)
    pipe.remove_all_hooks()
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig())
    with pytest.raises(AttachedError, match=r"has a cache, .*pipe\.transformer\.disable_cache\(\) before"):
        attach(pipe, runtime, schedule=runtime.schedule)
    pipe.transformer.disable_cache()
    attach(pipe, runtime, schedule=runtime.schedule)


def test_a_denoiser_without_weights_is_attached() -> None:
    pipe = made("pixart")
    expected, runtime = call(pipe, "pixart"), EagerRuntime(made("pixart"), NUM_STEPS, SIDE, SIDE)
    pipe.transformer.to("meta")
    attach(pipe, runtime, schedule=runtime.schedule).to("cpu")
    assert same(call(pipe, "pixart"), expected)


def test_a_pipeline_is_offloaded_before_or_after_a_bundle_is_attached() -> None:
    for before in (True, False):
        pipe = made("sd3")
        expected, runtime = call(pipe, "sd3"), EagerRuntime(made("sd3"), NUM_STEPS, SIDE, SIDE)
        if before:
            pipe.enable_model_cpu_offload(device="cpu")
        attach(pipe, runtime, schedule=runtime.schedule)
        if not before:
            pipe.enable_model_cpu_offload(device="cpu")
        for _ in range(2):
            assert same(call(pipe, "sd3"), expected)
        assert same(call(detach(pipe), "sd3"), expected)


def test_torch_compile_around_either_denoiser_is_looked_through() -> None:
    pipe = made("pixart")
    expected, own = call(pipe, "pixart"), pipe.transformer
    runtime = EagerRuntime(pipe, NUM_STEPS, SIDE, SIDE)
    pipe.transformer = torch.compile(own)
    attach(pipe, runtime, schedule=runtime.schedule)
    pipe.transformer = torch.compile(pipe.transformer)
    assert same(call(pipe, "pixart"), expected)
    assert detach(pipe).transformer is own
