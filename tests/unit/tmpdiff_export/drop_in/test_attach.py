"""`attach`: the bundle inside the diffusers pipeline against the runtime, over every way a pipeline loops."""

import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from helpers.runtime_command import rewrite_manifest
from helpers.whole_pipeline import whole_pipeline

from engines import Bundle, DenoiseRuntime, Schedule
from engines.errors import BundleError, SamplerError, ScheduleError
from engines.files import sha256_bytes
from engines.manifest import LATENTS, MODEL_OUTPUT, TIMESTEP
from tmpdiff_export import attach, detach
from tmpdiff_export.pipelines.families.table import FAMILIES
from tmpdiff_export.pipelines.scheduler_table import sampler_table

PROMPT = "a large red circle at the left on a blue background"
ROUNDING = 1e-5  # relative, of latents: torch's float32 against the table's float64, and two text encoders
NUDGE = 1e-6  # relative: what the latents of a step differ by between torch and the table, or more


@pytest.fixture(scope="module", autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def runtime(demo_bundle):
    return DenoiseRuntime.load(demo_bundle, threads=2)


@pytest.fixture(scope="module")
def source(demo_pipeline):
    return whole_pipeline(demo_pipeline)


@pytest.fixture
def pipe(source):
    """The pipeline as loaded, with a fresh scheduler, and without a bundle afterwards."""
    pipe = source.pipe
    denoiser, scheduler = pipe.transformer, pipe.scheduler
    pipe.scheduler = type(scheduler).from_config(scheduler.config)
    yield pipe
    pipe.transformer, pipe.scheduler = denoiser, scheduler


@pytest.fixture(scope="module")
def mixed(runtime):
    """A schedule without any regularity, so that a shift by one shows."""
    low = [name for name in runtime.precisions if name in ("int8", "int4")]
    names = [(*low, "fp16")[(k * k + k // 3) % 3 % (len(low) + 1)] for k in range(runtime.num_steps)]
    assert len(set(names)) == len(low) + 1
    return Schedule(bundle_id=runtime.manifest.bundle_id, precisions=tuple(names), origin="test")


def steps_of(schedule, first=0):
    return list(enumerate(schedule.precisions))[first:]


def relative(got, expected):
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)


def call(pipe, runtime, noise, guidance_scale=None, output_type="latent", **more):
    """A plain call of the pipeline; returns latents, or pictures for output_type="np"."""
    sampling, text = runtime.setting, runtime.manifest.texts[0]
    options = {
        "num_inference_steps": sampling.num_inference_steps,
        "height": sampling.height,
        "width": sampling.width,
        "max_sequence_length": text.max_tokens,
        "guidance_scale": sampling.guidance_scale if guidance_scale is None else guidance_scale,
        "latents": torch.from_numpy(noise.copy()),
        **FAMILIES["PixArtSigmaPipeline"][0].call_options,
        **more,
    }
    images = pipe([PROMPT] * len(noise), output_type=output_type, **options).images
    return images.numpy() if output_type == "latent" else images


def by_hand(pipe, runtime, noise, start, stop, guided=True):
    """An img2img-style loop from step index `start`: the pipeline's scheduler, and its denoiser called as it does.

    Returns the denoiser's inputs and outputs of each step.
    """
    scheduler = pipe.scheduler
    scheduler.set_timesteps(runtime.setting.num_inference_steps)
    timesteps = scheduler.timesteps[start:]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    conditioning = runtime.encode([PROMPT] * len(noise)).batch(2.0 if guided else 1.0)
    text = {name: torch.from_numpy(values) for name, values in conditioning.items()}
    x = torch.from_numpy(noise.copy())
    seen = []
    for t in timesteps[: stop - start]:
        model_input = scheduler.scale_model_input(torch.cat([x, x]) if guided else x, t)
        output = pipe.transformer(model_input, timestep=t.expand(len(model_input)), return_dict=False, **text)[0]
        seen.append((model_input.numpy(), conditioning, output.numpy()))
        prediction = output[-len(x) :].chunk(2, dim=1)[0]
        x = scheduler.step(prediction, t, x, return_dict=False)[0]
    return seen


def rebuilt(bundle: Path, folder: Path, scheduler, num_inference_steps: int) -> Path:
    """A copy of a bundle with the table of another scheduler."""
    shutil.copytree(bundle, folder, ignore=shutil.ignore_patterns("schedule.json", "sensitivity.json"))
    table = sampler_table(scheduler, num_inference_steps)
    text = table.to_json().encode()

    def change(data):
        (setting,) = data["settings"]
        (folder / setting["sampler"]["path"]).write_bytes(text)
        setting["sampler"] |= {"sha256": sha256_bytes(text), "bytes": len(text)}
        setting |= {
            "scheduler": table.scheduler,
            "num_inference_steps": num_inference_steps,
            "num_steps": table.num_steps,
        }

    rewrite_manifest(folder, change)
    return folder


def alternating(runtime):
    """fp16, int8, fp16, ...: every step differs from its neighbours."""
    names = tuple("fp16" if k % 2 == 0 else "int8" for k in range(runtime.num_steps))
    return Schedule(bundle_id=runtime.manifest.bundle_id, precisions=names, origin="test")


# Against the runtime


def test_uniform_schedule_gives_the_runtimes_latents_and_picture(pipe, runtime):
    noise = runtime.noise([3])
    schedule = runtime.schedule("uniform:fp16")
    expected = runtime.denoise(runtime.encode([PROMPT]), schedule, noise)
    assert attach(pipe, runtime, schedule="uniform:fp16") is pipe
    latents = call(pipe, runtime, noise)
    assert relative(latents, expected) < ROUNDING
    assert pipe.transformer.calls == {"fp16": runtime.num_steps}
    picture = pipe.vae.decode(torch.from_numpy(latents) / pipe.vae.config.scaling_factor).sample
    picture = pipe.image_processor.postprocess(picture.detach(), output_type="np")
    levels = np.rint(picture * 255).astype(int) - runtime.decode(expected)
    assert abs(levels).max() <= 1


def test_calibrated_schedule_gives_the_runtimes_picture_on_every_call(pipe, runtime, demo_bundle):
    noise = runtime.noise([4])
    schedule = runtime.schedule()
    expected = runtime.denoise(runtime.encode([PROMPT]), schedule, noise)
    attach(pipe, demo_bundle)
    first = call(pipe, runtime, noise)
    assert pipe.transformer.last_run == steps_of(schedule)
    # Where activations are quantized, last bits flip roundings, and layer by layer and step by step these turn
    # into other quantization noise: as far apart as the runtime is from itself when its noise is nudged.
    nudged = runtime.denoise(runtime.encode([PROMPT]), schedule, noise * np.float32(1 + NUDGE))
    assert relative(first, expected) < max(ROUNDING, 3 * relative(nudged, expected))
    picture = call(pipe, runtime, noise, output_type="np")
    assert pipe.transformer.last_run == steps_of(schedule)
    levels = np.abs(np.rint(picture * 255).astype(int) - runtime.decode(first))
    assert levels.max() <= 1  # the second call's latents, decoded by the pipeline; the first's by the runtime
    pictures = [runtime.decode(item).astype(float) for item in (expected, nudged)]
    apart = np.mean(np.abs(pictures[1] - pictures[0]))
    assert np.mean(np.abs(np.rint(picture * 255) - pictures[0])) < max(0.5, 3 * apart)


@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
def test_loop_through_the_denoiser_equals_the_runtime_bit_for_bit(pipe, runtime, mixed, guidance_scale):
    """The runtime's own sampler around `pipe.transformer`: nothing but the engines decides the result."""
    attach(pipe, runtime, schedule=mixed)
    noise = runtime.noise([5, 6])
    conditioning = runtime.encode([PROMPT, "two small green squares"])
    text = {name: torch.from_numpy(values) for name, values in conditioning.batch(guidance_scale).items()}
    state = runtime.table.initial(noise)
    for k in range(6):
        x = runtime.table.model_input(state)
        x = torch.from_numpy(np.concatenate([x, x]) if guidance_scale > 1 else x.copy())
        timestep = torch.tensor(runtime.table.timesteps[k]).expand(len(x))
        output = pipe.transformer(x, timestep=timestep, **text).sample.numpy()[:, : x.shape[1]]
        if guidance_scale > 1:
            unconditional, conditional = np.split(output, 2)
            output = unconditional + np.float32(guidance_scale) * (conditional - unconditional)
        expected = runtime.step(state, mixed.precisions[k], conditioning.batch(guidance_scale), guidance_scale)
        state = runtime.table.advance(state, output)
        assert np.array_equal(state.latents, expected.latents)
    assert pipe.transformer.last_run == steps_of(mixed)[:6]


@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
def test_other_guidance_keeps_the_schedule(pipe, runtime, mixed, guidance_scale):
    attach(pipe, runtime, schedule=mixed)
    for _ in range(2 if guidance_scale == 1.0 else 1):
        call(pipe, runtime, runtime.noise([7]), guidance_scale)
        assert pipe.transformer.last_run == steps_of(mixed)


# Loops that start, stop and repeat


def test_interrupted_call_does_not_shift_the_next(pipe, runtime, mixed):
    attach(pipe, runtime, schedule=mixed)
    noise = runtime.noise([8])

    def interrupt(step_index, timestep, latents):
        if step_index == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call(pipe, runtime, noise, 1.0, callback=interrupt)
    assert pipe.transformer.last_run == steps_of(mixed)[:3]
    first = call(pipe, runtime, noise, 1.0)
    assert pipe.transformer.last_run == steps_of(mixed)
    assert np.array_equal(call(pipe, runtime, noise, 1.0), first)


def test_partial_run_uses_the_steps_it_runs(pipe, runtime, mixed):
    attach(pipe, runtime, schedule=mixed)
    noise = runtime.noise([9])
    by_hand(pipe, runtime, noise, 0, 2)  # given up early, and further down than where the next one starts
    half = runtime.num_steps // 2
    seen = by_hand(pipe, runtime, noise, half, runtime.num_steps)
    assert pipe.transformer.last_run == steps_of(mixed, half)
    for (model_input, conditioning, output), (k, precision) in zip(seen, steps_of(mixed, half), strict=True):
        timestep = np.full(len(model_input), runtime.table.timesteps[k], np.float32)
        arrays = {LATENTS: model_input, TIMESTEP: timestep, **conditioning}
        expected = runtime.denoiser(precision).run(arrays)[MODEL_OUTPUT]
        assert np.array_equal(output[:, : expected.shape[1]], expected)


def test_custom_timesteps_of_the_last_steps(pipe, demo_bundle, tmp_path):
    pipe.scheduler = diffusers.EulerDiscreteScheduler()
    runtime = DenoiseRuntime.load(rebuilt(demo_bundle, tmp_path / "bundle", pipe.scheduler, 7), threads=2)
    schedule = alternating(runtime)
    attach(pipe, runtime, schedule=schedule)
    noise = runtime.noise([1])
    last = [float(t) for t in runtime.table.timesteps[4:]]
    call(pipe, runtime, noise, 1.0, timesteps=last, num_inference_steps=None)
    assert pipe.transformer.last_run == steps_of(schedule, 4)
    with pytest.raises(ScheduleError, match="not those of the bundle's 7 steps"):
        call(pipe, runtime, noise, 1.0, timesteps=last[::2], num_inference_steps=None)


def test_second_order_scheduler(pipe, demo_bundle, tmp_path):
    """Heun hands the denoiser every timestep but the first twice: at the end of a step and at the next one's begin."""
    pipe.scheduler = diffusers.HeunDiscreteScheduler()
    runtime = DenoiseRuntime.load(rebuilt(demo_bundle, tmp_path / "bundle", pipe.scheduler, 4), threads=2)
    schedule = alternating(runtime)
    attach(pipe, runtime, schedule=schedule)
    noise = runtime.noise([1])
    for _ in range(2):
        call(pipe, runtime, noise, 1.0)
        assert pipe.transformer.last_run == steps_of(schedule)
    # img2img pipelines start at a multiple of scheduler.order: at the second occurrence of a timestep
    by_hand(pipe, runtime, noise, 0, 2, guided=False)
    by_hand(pipe, runtime, noise, 2, 7, guided=False)
    assert pipe.transformer.last_run == steps_of(schedule, 2)
    by_hand(pipe, runtime, noise, 1, 2, guided=False)
    by_hand(pipe, runtime, noise, 1, 7, guided=False)
    assert pipe.transformer.last_run == steps_of(schedule, 1)


# Refusals


@pytest.mark.parametrize("factor", [0.5, 1.25])
def test_wrong_number_of_steps_is_refused_even_where_timesteps_coincide(pipe, runtime, mixed, factor):
    attach(pipe, runtime, schedule=mixed)
    steps = round(factor * runtime.setting.num_inference_steps)
    with pytest.raises(ScheduleError, match=f"num_inference_steps={runtime.setting.num_inference_steps}"):
        call(pipe, runtime, runtime.noise([0]), num_inference_steps=steps)
    assert pipe.transformer.last_run == []


def test_timestep_that_is_not_in_the_table_is_refused(pipe, runtime, mixed):
    attach(pipe, runtime, schedule=mixed)
    inputs = by_hand_inputs(runtime, 2)
    inputs["timestep"] = torch.full((2,), float(runtime.table.timesteps[3]) + 0.5)
    with pytest.raises(ScheduleError, match=rf"timestep {inputs['timestep'][0]:g} is none of the {runtime.num_steps}"):
        pipe.transformer(**inputs)
    inputs["timestep"] = torch.tensor(runtime.table.timesteps[2:4])
    with pytest.raises(ValueError, match="in one batch"):
        pipe.transformer(**inputs)


def by_hand_inputs(runtime, size):
    """Arguments of one denoiser call at step index 0."""
    conditioning = runtime.encode([PROMPT] * size).batch(1.0)
    return {
        "hidden_states": torch.from_numpy(runtime.noise(range(size))),
        "timestep": torch.full((size,), float(runtime.table.timesteps[0])),
        **{name: torch.from_numpy(values) for name, values in conditioning.items()},
    }


def test_other_size_and_arguments_without_effect_are_refused(pipe, runtime, mixed):
    attach(pipe, runtime, schedule=mixed)
    sampling = runtime.setting
    with pytest.raises(ValueError, match=f"height={sampling.height}, width={sampling.width}"):
        pipe(
            PROMPT,
            height=sampling.height * 2,
            width=sampling.width,
            use_resolution_binning=False,
            clean_caption=False,
            num_inference_steps=sampling.num_inference_steps,
        )
    inputs = by_hand_inputs(runtime, 1)
    with pytest.raises(ValueError, match="cross_attention_kwargs"):
        pipe.transformer(**inputs, cross_attention_kwargs={"scale": 0.5})
    del inputs["encoder_attention_mask"]
    with pytest.raises(ValueError, match="encoder_attention_mask"):
        pipe.transformer(**inputs)


def test_other_scheduler_is_refused_when_attached_and_when_swapped_later(pipe, runtime):
    own = pipe.scheduler
    other = diffusers.UniPCMultistepScheduler.from_config(own.config)
    shifted = type(own).from_config(own.config, flow_shift=7.0)
    subtly = type(own).from_config(own.config, solver_order=1)  # the same timesteps
    denoiser = pipe.transformer
    for scheduler, message in ((other, "UniPCMultistep"), (shifted, "timesteps"), (subtly, "samples that are off")):
        pipe.scheduler = scheduler
        with pytest.raises(SamplerError, match=message):
            attach(pipe, runtime, schedule="uniform:fp16")
        assert pipe.transformer is denoiser
    pipe.scheduler = own
    attach(pipe, runtime, schedule="uniform:fp16")
    pipe.scheduler = subtly
    with pytest.raises(SamplerError, match="samples that are off"):
        call(pipe, runtime, runtime.noise([0]))


def test_pipeline_of_another_class_is_refused(pipe, runtime):
    class Other:
        transformer = None
        unet = diffusers.UNet2DConditionModel(
            block_out_channels=(32,),
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            cross_attention_dim=8,
            layers_per_block=1,
        )

    with pytest.raises(BundleError, match=r"unet of class UNet2DConditionModel.*PixArtTransformer2DModel"):
        attach(Other(), runtime, schedule="uniform:fp16")
    with pytest.raises(BundleError, match="neither a transformer nor a unet"):
        attach(object(), runtime, schedule="uniform:fp16")


def test_foreign_schedule_and_missing_engine_are_refused(pipe, runtime, mixed):
    denoiser = pipe.transformer
    foreign = mixed.model_copy(update={"bundle_id": "0" * 64})
    for schedule in (foreign, "uniform:bf16"):
        with pytest.raises(ScheduleError, match=r"bundle 0000|bf16"):
            attach(pipe, runtime, schedule=schedule)
    assert pipe.transformer is denoiser


# As a module


def test_module_looks_like_the_denoiser_it_replaces(pipe, runtime, demo_bundle):
    denoiser = pipe.transformer
    attach(pipe, Bundle.open(demo_bundle), schedule="uniform:fp16")
    module = pipe.transformer
    assert (module.config, module.dtype, module.device) == (denoiser.config, denoiser.dtype, denoiser.device)
    inputs = by_hand_inputs(runtime, 2)
    exact = module(**inputs).sample
    expected = denoiser(**inputs).sample
    assert exact.shape == expected.shape
    channels = denoiser.config.in_channels
    assert relative(exact[:, :channels].numpy(), expected[:, :channels].detach().numpy()) < 1e-2
    assert not exact[:, channels:].any()
    assert torch.equal(module(**inputs, return_dict=False)[0], exact)

    module.to(torch.float16)
    assert (module.dtype, denoiser.dtype) == (torch.float16, torch.float32)
    names = {"hidden_states", "encoder_hidden_states"}
    rounded = {name: value.half() if name in names else value for name, value in inputs.items()}
    got = module(**rounded).sample
    assert got.dtype == torch.float16
    again = module(**{name: value.float() for name, value in rounded.items()}).sample
    assert torch.equal(got, again.half())


def test_detach_restores_the_pipeline(pipe, runtime, tmp_path):
    few = {"num_inference_steps": 3}
    noise = runtime.noise([2])
    denoiser, config = pipe.transformer, dict(pipe.config)
    before = call(pipe, runtime, noise, **few)
    attach(pipe, runtime, schedule="uniform:int8")
    attach(pipe, runtime, schedule="uniform:fp16")  # the second one takes the place of the first
    assert set(pipe.transformer.schedule.precisions) == {"fp16"}
    assert detach(pipe) is pipe
    assert pipe.transformer is denoiser
    assert dict(pipe.config) == config
    assert np.array_equal(call(pipe, runtime, noise, **few), before)
    with pytest.raises(ValueError, match="no bundle attached"):
        detach(pipe)
