"""The sampler table against the diffusers schedulers it is read from, and as a document and a value."""

import json
import math

import diffusers
import numpy as np
import pytest
import torch
from helpers.schedulers import DETERMINISTIC, FLOW_DPM, SD, ZERO_SNR, denoise, make, noise, relative

from engines.errors import SamplerError
from engines.sampler import SamplerRow, SamplerTable
from engines.sampler_state import SamplerState
from tmpdiff_export.pipelines.scheduler_table import sampler_table

# diffusers hands torch tensors to numpy functions in ways numpy 2 deprecates
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

STEPS = (4, 10, 20, 50)
TOLERANCE = 1e-5


def diffusers_run(scheduler, num_inference_steps, options, x):
    """The loop of a diffusers pipeline: every denoiser input and every sample, as float32 arrays."""
    scheduler.set_timesteps(num_inference_steps, **options)
    x = torch.from_numpy(x) * getattr(scheduler, "init_noise_sigma", 1.0)
    pairs = []
    for k, t in enumerate(scheduler.timesteps):
        i = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(torch.from_numpy(denoise(i.numpy(), k)), t, x, return_dict=False)[0]
        pairs.append((i.numpy(), x.numpy()))
    return pairs


def table_run(table, x, model=denoise):
    """Every state of a run of the table, initial and final included."""
    states = [table.initial(x)]
    for k in range(table.num_steps):
        states.append(table.advance(states[-1], model(table.model_input(states[-1]), k)))
    return states


def same_state(a, b):
    return (
        a.step_index == b.step_index
        and np.array_equal(a.latents, b.latents)
        and all(
            [j for j, _ in left] == [j for j, _ in right]
            and all(np.array_equal(u, v) for (_, u), (_, v) in zip(left, right, strict=True))
            for left, right in ((a.past_samples, b.past_samples), (a.past_outputs, b.past_outputs))
        )
    )


@pytest.mark.parametrize("num_inference_steps", STEPS)
@pytest.mark.parametrize("case", DETERMINISTIC)
def test_table_equals_diffusers_over_whole_trajectories(case, num_inference_steps):
    name, config, options, window = DETERMINISTIC[case]
    table = sampler_table(make(name, **config), num_inference_steps, **options)
    scheduler = make(name, **config)
    expected = diffusers_run(scheduler, num_inference_steps, options, noise())

    states = table_run(table, noise())
    assert table.num_steps == len(expected) == len(states) - 1
    assert table.timesteps.tolist() == scheduler.timesteps.double().tolist()
    for k, (model_input, sample) in enumerate(expected):
        assert table.model_input(states[k]).dtype == states[k + 1].latents.dtype == np.float32
        assert relative(table.model_input(states[k]), model_input) < TOLERANCE, f"input of step {k}"
        assert relative(states[k + 1].latents, sample) < TOLERANCE, f"output of step {k}"
    assert table.window <= window


def test_sigmas_and_shift_of_the_pipeline_are_followed():
    options = {"sigmas": np.linspace(1, 1 / 12, 12), "mu": 1.15}
    table = sampler_table(make("FlowMatchEulerDiscrete", use_dynamic_shifting=True), 12, **options)
    scheduler = make("FlowMatchEulerDiscrete", use_dynamic_shifting=True)
    expected = diffusers_run(scheduler, 12, options, noise())
    assert relative(table_run(table, noise())[-1].latents, expected[-1][1]) < TOLERANCE
    assert table.sigmas.tolist() == scheduler.sigmas.double().tolist()


@pytest.mark.parametrize(
    ("name", "config", "num_inference_steps", "num_steps"),
    [
        ("HeunDiscrete", SD, 10, 19),
        ("PNDM", SD | {"skip_prk_steps": True}, 20, 21),
        ("EulerDiscrete", SD, 1, 1),
    ],
)
def test_num_steps_counts_denoiser_calls(name, config, num_inference_steps, num_steps):
    table = sampler_table(make(name, **config), num_inference_steps)
    assert (table.num_inference_steps, table.num_steps) == (num_inference_steps, num_steps)
    assert table.sigmas.shape == (num_steps + 1,)


def test_sigmas_of_ddim_are_those_of_euler():
    leading = SD | {"timestep_spacing": "leading"}
    ddim = sampler_table(make("DDIM", **leading, clip_sample=False), 20)
    euler = sampler_table(make("EulerDiscrete", **leading), 20)
    np.testing.assert_array_equal(ddim.timesteps, euler.timesteps)
    np.testing.assert_allclose(ddim.sigmas, euler.sigmas, rtol=1e-5)
    assert ddim.sigmas[-1] == 0
    infinite = sampler_table(make("DDIM", **SD | ZERO_SNR, clip_sample=False, timestep_spacing="trailing"), 20)
    assert infinite.sigmas is None


@pytest.mark.parametrize(
    ("name", "config", "fix"),
    [
        ("EulerAncestralDiscrete", SD, "EulerDiscreteScheduler"),
        ("KDPM2AncestralDiscrete", SD, "DPMSolverMultistepScheduler"),
        ("DDPM", SD | {"clip_sample": False}, "DPMSolverMultistepScheduler"),
        ("DPMSolverMultistep", SD | {"algorithm_type": "sde-dpmsolver++"}, "algorithm_type='dpmsolver++'"),
        ("DPMSolverSinglestep", SD | {"algorithm_type": "sde-dpmsolver++"}, "algorithm_type='dpmsolver++'"),
        ("FlowMatchEulerDiscrete", {"stochastic_sampling": True}, "stochastic_sampling=False"),
        ("LCM", SD, "DPMSolverMultistepScheduler"),
        ("TCD", SD, "DPMSolverMultistepScheduler"),
        ("SASolver", SD, "DPMSolverMultistepScheduler"),
    ],
)
def test_a_scheduler_that_draws_noise_is_refused_by_name(name, config, fix):
    with pytest.raises(SamplerError, match=f"{name}Scheduler draws noise") as caught:
        sampler_table(make(name, **config), 10)
    assert fix in str(caught.value)
    assert "\n" not in str(caught.value)


class NoiseAtTheEnd(diffusers.EulerDiscreteScheduler):
    def step(self, model_output, timestep, sample, return_dict=True):
        (x,) = super().step(model_output, timestep, sample, return_dict=False)[:1]
        return (x + 1e-3 * torch.randn_like(x) if self.step_index == len(self.timesteps) else x,)


class SlightlyBent(diffusers.EulerDiscreteScheduler):
    def step(self, model_output, timestep, sample, return_dict=True):
        bent = model_output + 1e-3 * model_output**3
        return super().step(bent, timestep, sample, return_dict=False)


def test_planted_noise_and_nonlinearity_are_found():
    with pytest.raises(SamplerError, match="NoiseAtTheEnd draws noise"):
        sampler_table(NoiseAtTheEnd(**SD), 10)
    with pytest.raises(SamplerError, match="SlightlyBent is not linear"):
        sampler_table(SlightlyBent(**SD), 10)


LARGE = SD | ZERO_SNR | {"timestep_spacing": "trailing"}  # Euler's first sigma is 4096


@pytest.mark.parametrize("num_inference_steps", [1, 2, 4, 8])
def test_rounding_at_a_large_first_sigma_is_no_nonlinearity(num_inference_steps):
    table = sampler_table(make("EulerDiscrete", **LARGE), num_inference_steps)
    expected = diffusers_run(make("EulerDiscrete", **LARGE), num_inference_steps, {}, noise())
    assert table.sigmas[0] == pytest.approx(4096, rel=1e-3)
    bound = 2 * 2.0**-24 * 4096
    for state, (_, sample) in zip(table_run(table, noise())[1:], expected, strict=True):
        assert np.sqrt(np.mean((state.latents - sample) ** 2)) < bound


class BentAtTheStart(diffusers.EulerDiscreteScheduler):
    """Its first sample loses what thresholding would take, a hundredth of the model output's size."""

    def step(self, model_output, timestep, sample, return_dict=True):
        bent = model_output - 0.01 * torch.tanh(model_output) * (self.step_index is None or self.step_index == 0)
        return super().step(bent, timestep, sample, return_dict=False)


@pytest.mark.parametrize("num_inference_steps", [1, 2, 8])
def test_a_planted_nonlinearity_shows_at_a_large_sigma_too(num_inference_steps):
    with pytest.raises(SamplerError, match="BentAtTheStart is not linear"):
        sampler_table(BentAtTheStart(**LARGE), num_inference_steps)


@pytest.mark.parametrize(
    ("name", "config", "entry"),
    [
        ("DDIM", LARGE, "clip_sample"),
        ("DPMSolverMultistep", LARGE | {"thresholding": True}, "thresholding"),
        ("UniPCMultistep", LARGE | {"thresholding": True}, "thresholding"),
        ("DDIM", SD, "clip_sample"),
        ("DDIM", SD | {"clip_sample": False, "thresholding": True}, "thresholding"),
        ("DPMSolverMultistep", SD | {"thresholding": True}, "thresholding"),
    ],
)
def test_a_scheduler_that_is_not_linear_names_the_entry_to_change(name, config, entry):
    with pytest.raises(SamplerError, match=f"{name}Scheduler is not linear.* set {entry}=False"):
        sampler_table(make(name, **config), 10)


def test_arguments_that_do_not_fit_the_scheduler():
    with pytest.raises(SamplerError, match=r"use_dynamic_shifting=True.*pass mu"):
        sampler_table(make("FlowMatchEulerDiscrete", use_dynamic_shifting=True), 10)
    with pytest.raises(ValueError, match=r"mu was passed, but DDIMScheduler"):
        sampler_table(make("DDIM", **SD, clip_sample=False), 10, mu=0.5)
    with pytest.raises(ValueError, match="num_inference_steps is 0"):
        sampler_table(make("EulerDiscrete", **SD), 0)
    with pytest.raises(SamplerError, match="DDIMScheduler refused 2000 steps"):
        sampler_table(make("DDIM", **SD, clip_sample=False), 2000)
    with pytest.raises(SamplerError, match="CogVideoXDPMScheduler has no step"):
        sampler_table(make("CogVideoXDPM"), 10)
    with pytest.raises(SamplerError, match="not finite at 4 steps"):
        sampler_table(make("UniPCMultistep", **SD, predict_x0=False), 4)


def test_the_callers_scheduler_and_random_state_are_untouched():
    def half(scheduler, x, first, last):
        for k in range(first, last):
            t = scheduler.timesteps[k]
            x = scheduler.step(torch.from_numpy(denoise(x.numpy(), k)), t, x, return_dict=False)[0]
        return x

    finals = []
    for compile_between in (False, True):
        scheduler = make("UniPCMultistep", **FLOW_DPM, use_dynamic_shifting=True)
        config = dict(scheduler.config)
        scheduler.set_timesteps(10, mu=0.5)
        x = half(scheduler, torch.from_numpy(noise()), 0, 5)
        if compile_between:
            torch.rand(3)  # a state that no seed gives
            before = torch.get_rng_state()
            sampler_table(scheduler, 7, mu=0.9)
            assert torch.equal(torch.get_rng_state(), before)
            assert dict(scheduler.config) == config
        finals.append(half(scheduler, x, 5, 10))
    assert torch.equal(*finals)


def test_states_are_values_that_can_be_branched_bit_for_bit():
    table = sampler_table(make("UniPCMultistep", **SD, solver_order=3), 12)
    states = table_run(table, noise())
    copies = [SamplerState(s.step_index, s.latents.copy(), s.past_samples, s.past_outputs) for s in states]
    buffer = np.empty_like(states[0].latents)
    for start in (0, 1, 5, 11):
        table.advance(states[start], np.ones_like(buffer))  # a branch that goes elsewhere
        state = states[start]
        for k in range(start, table.num_steps):
            buffer[...] = denoise(table.model_input(state), k)
            state = table.advance(state, buffer)
            buffer[...] = np.nan  # an engine reuses its output buffer
            assert same_state(state, states[k + 1])
    assert all(same_state(s, c) for s, c in zip(states, copies, strict=True))
    for array in (
        states[4].latents,
        states[4].past_outputs[0][1],
        table.model_input(states[4]),
        table.timesteps,
    ):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0


@pytest.mark.parametrize("case", ["euler-karras", "dpm++3m-karras", "unipc", "pndm-prk"])
def test_a_batch_gives_each_sample_what_it_gets_alone_bit_for_bit(case):
    name, config, options, _ = DETERMINISTIC[case]
    table = sampler_table(make(name, **config), 10, **options)
    batch = noise((3, 4, 5, 7))
    together = table_run(table, batch)
    for n in range(3):
        alone = table_run(table, batch[n : n + 1])
        for a, b in zip(alone, together, strict=True):
            np.testing.assert_array_equal(a.latents[0], b.latents[n])


def test_a_state_keeps_only_what_later_steps_need():
    euler = sampler_table(make("EulerDiscrete", **SD), 10)
    assert all(s.past_samples == s.past_outputs == () for s in table_run(euler, noise()))
    multistep = sampler_table(make("DPMSolverMultistep", **SD), 10)
    states = table_run(multistep, noise())
    kept = [[j for j, _ in s.past_outputs] for s in states]
    assert kept == [[]] + [[k] for k in range(8)] + [[], []]  # the last step is first order


def test_wrong_arrays_are_refused():
    table = hand_made()
    state = table.initial(noise((1, 4, 8, 8)))
    with pytest.raises(ValueError, match=r"shape \(2, 4, 8, 8\), expected the latents' \(1, 4, 8, 8\)"):
        table.advance(state, noise())
    with pytest.raises(TypeError, match="noise has dtype int64"):
        table.initial(np.zeros((1, 4, 8, 8), np.int64))
    finished = table_run(table, noise())[-1]
    with pytest.raises(ValueError, match=r"step index 2, the loop has step indices 0\.\.1"):
        table.advance(finished, noise())
    with pytest.raises(ValueError, match="trajectory is finished"):
        table.model_input(finished)


def hand_made():
    return SamplerTable(
        scheduler="HandScheduler",
        num_inference_steps=2,
        timesteps=np.array([999.0, 1 / 3]),
        sigmas=np.array([2.0, 0.1, 0.0]),
        init_noise_sigma=2.0,
        input_scale=np.array([0.5, 1.0]),
        rows=(SamplerRow(((0, 1.0),), ((0, -0.1),)), SamplerRow(((1, 1.0),), ((0, 0.25), (1, -1e-17)))),
    )


GOLDEN = (
    '{"init_noise_sigma":2.0,"input_scale":[0.5,1.0],"num_inference_steps":2,"rows":[{"outputs":[[0,-0.1]],'
    '"samples":[[0,1.0]]},{"outputs":[[0,0.25],[1,-1e-17]],"samples":[[1,1.0]]}],"scheduler":"HandScheduler",'
    '"sigmas":[2.0,0.1,0.0],"timesteps":[999.0,0.3333333333333333],"version":1}'
)


def test_the_document_is_golden_and_exact():
    assert hand_made().to_json() == GOLDEN
    assert SamplerTable.from_json(GOLDEN).to_json() == GOLDEN
    assert hand_made().digest() == "ca6e218f23770c15d571ab4b8c36dd1622839f33f4216845e9dd84bc9ca25a1d"
    table = sampler_table(make("DPMSolverMultistep", **SD, solver_order=3, use_karras_sigmas=True), 50)
    again = SamplerTable.from_json(table.to_json().encode())
    assert again.rows == table.rows
    assert again.digest() == table.digest() != hand_made().digest()
    for a, b in ((again.timesteps, table.timesteps), (again.sigmas, table.sigmas)):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(table_run(again, noise()), table_run(table, noise()), strict=True):
        assert same_state(a, b)


def test_a_hand_made_table_does_what_it_says():
    x0, m0, m1 = (np.float32([[a]]) for a in (3.0, 0.5, 4.0))
    state = hand_made().initial(x0 / 2)
    assert hand_made().model_input(state) == 1.5
    state = hand_made().advance(state, m0)
    assert state.latents == np.float32(3.0 - 0.1 * 0.5)
    assert hand_made().model_input(state) == state.latents
    state = hand_made().advance(state, m1)
    assert state.latents == np.float32(np.float64(np.float32(2.95)) + 0.25 * 0.5)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("version",), 2, "format version 2, this release reads up to 1; upgrade"),
        (("version",), 0, "version"),
        (("version",), "1", "version"),
        (("timesteps",), [999.0], "input_scale has shape"),
        (("sigmas",), [2.0, 0.0], "sigmas has shape"),
        (("sigmas",), [2.0, math.inf, 0.0], "sigmas.1: .*finite"),
        (("input_scale", 0), math.nan, "input_scale.0: .*finite"),
        (("init_noise_sigma",), 0.0, "init_noise_sigma is 0.0, expected a positive number"),
        (("init_noise_sigma",), math.nan, "init_noise_sigma: .*finite"),
        (("num_inference_steps",), 0, "num_inference_steps"),
        (("num_inference_steps",), 2.5, "num_inference_steps"),
        (("rows",), [], "rows"),
        (("rows",), [{"samples": [[0, 1.0]], "outputs": []}], "rows has 1 rows, expected 2"),
        (("rows", 1), {"samples": [], "outputs": []}, "rows.1 is empty"),
        (
            ("rows", 0, "outputs"),
            [[1, 0.5]],
            r"rows.0.outputs has step indices \[1\], expected ascending ones in 0..0",
        ),
        (("rows", 1, "samples"), [[-1, 0.5]], r"rows.1.samples has step indices \[-1\]"),
        (("rows", 1, "outputs"), [[1, 0.5], [0, 0.5]], "rows.1.outputs has step indices"),
        (("rows", 1, "outputs"), [[1, 0.5], [1, 0.5]], "rows.1.outputs has step indices"),
        (("rows", 1, "outputs", 0, 1), math.nan, r"rows.1.outputs.0.1: .*finite"),
        (("rows", 1, "outputs", 0, 1), "0.5", r"rows.1.outputs.0.1: .*number"),
        (("rows", 1, "outputs", 0, 0), 0.5, r"rows.1.outputs.0.0: .*integer"),
        (("scheduler",), "", "scheduler name"),
        (("surprise",), 1, "surprise"),
    ],
)
def test_a_corrupt_document_is_refused_in_one_line(path, value, message):
    data = json.loads(GOLDEN)
    target = data
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    with pytest.raises(SamplerError, match=message) as caught:
        SamplerTable.from_json(json.dumps(data))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "null", "[1]", GOLDEN[:-20], GOLDEN.replace('"rows"', '"rews"'), b"\xff\xfe\x00"])
def test_text_that_is_no_table_is_refused_in_one_line(text):
    with pytest.raises(SamplerError, match="sampler table is malformed") as caught:
        SamplerTable.from_json(text)
    assert "\n" not in str(caught.value)
