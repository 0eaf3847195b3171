"""Reused steps with every scheduler there is a table of, against diffusers loops that are handed extrapolated outputs."""

import zlib

import numpy as np
import pytest
import torch
from helpers.schedulers import DETERMINISTIC, denoise, make, noise, relative
from scipy.interpolate import BarycentricInterpolator

from engines.errors import ScheduleError
from engines.loop import Loop, host_loop
from engines.manifest import LATENTS, MODEL_OUTPUT, TIMESTEP
from engines.reuse import REUSES, order_of, reuse_terms
from tmpdiff_export.pipelines.scheduler_table import sampler_table

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

TOLERANCE = 1e-4  # ten times that of runs without reuse: an extrapolation multiplies the rounding of what it rests on


def distinct(timesteps, computed):
    """Computed steps, the last one of every timestep, by timestep."""
    return dict(sorted((timesteps[j], j) for j in computed))


def choices_for(timesteps, case):
    """A schedule in which more than half the later steps are reused, at every order, also several in a row."""
    random = np.random.default_rng(zlib.crc32(case.encode()))
    choices = []
    for k in range(len(timesteps)):
        known = len(distinct(timesteps, [j for j in range(k) if choices[j] == "fp16"]))
        rarest = min(reversed(REUSES[:known]), key=choices.count, default="fp16")
        choices.append(rarest if k > 2 and random.random() < 0.6 else "fp16")
    return tuple(choices)


class Guided:
    """A denoiser of which both halves of a batch with guidance differ; it also reads an embedded guidance scale."""

    def __init__(self, timesteps):
        self.timesteps, self.calls = [float(np.float32(t)) for t in timesteps], 0

    def run(self, arrays):
        self.calls += 1
        x, own = arrays[LATENTS], arrays["text"][:, None, None, None]
        # a timestep that comes twice is told apart by nothing here, as in a real denoiser
        k = self.timesteps.index(float(arrays[TIMESTEP][0]))
        output = denoise(x, k) + np.float32(0.05) * own * np.cos(x)
        return {MODEL_OUTPUT: output if "guidance" not in arrays else output * arrays["guidance"][:, None, None, None]}


def diffusers_loop(scheduler, num_inference_steps, options, x, output_of):
    """Final latents of a pipeline's loop, which hands `output_of` the denoiser's input and k."""
    scheduler.set_timesteps(num_inference_steps, **options)
    x = torch.from_numpy(x) * getattr(scheduler, "init_noise_sigma", 1.0)
    for k, t in enumerate(scheduler.timesteps):
        i = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(torch.from_numpy(output_of(i.numpy(), k)), t, x, return_dict=False)[0]
    return x.numpy()


@pytest.mark.parametrize("guidance", ["none", "classifier-free", "embedded"])
@pytest.mark.parametrize("case", DETERMINISTIC)
def test_a_loop_with_reused_steps_equals_diffusers_with_extrapolated_outputs(case, guidance):
    name, config, options, _ = DETERMINISTIC[case]
    table = sampler_table(make(name, **config), 10, **options)
    timesteps = table.timesteps.tolist()
    choices, x = choices_for(timesteps, case), noise((3, 4, 8, 8))
    scale = 3.0 if guidance == "classifier-free" else 1.0
    text = np.linspace(-1, 1, len(x) * (2 if scale > 1 else 1), dtype=np.float32)
    conditioning = {"text": text}
    if guidance == "embedded":
        conditioning["guidance"] = np.full(len(x), 1.1, np.float32)
    computed = {}

    def output_of(model_input, k):
        if (order := order_of(choices[k])) is not None:
            nodes = list(distinct(timesteps, computed).values())
            nodes = sorted(nodes)[-order - 1 :]
            if order == 0 or timesteps[nodes[-1]] == timesteps[k]:
                return computed[nodes[-1]].astype(np.float32)
            line = BarycentricInterpolator([timesteps[j] for j in nodes], np.stack([computed[j] for j in nodes]))
            return np.asarray(line(timesteps[k]), np.float32)
        batch = np.concatenate([model_input, model_input]) if scale > 1 else model_input
        arrays = {LATENTS: batch, TIMESTEP: np.full(len(batch), timesteps[k], np.float32), **conditioning}
        output = Guided(timesteps).run(arrays)[MODEL_OUTPUT]
        if scale > 1:
            without, with_text = np.split(output, 2)
            output = without + np.float32(scale) * (with_text - without)
        computed[k] = output.astype(np.float64)
        return output

    expected = diffusers_loop(make(name, **config), 10, options, x, output_of)
    engine = Guided(timesteps)
    latents = host_loop(Loop(table, choices, conditioning, x, scale), lambda _: engine)
    assert relative(latents, expected) < TOLERANCE
    assert engine.calls == choices.count("fp16") == len(computed)
    assert {*REUSES} <= {*choices}, "the schedule tests little"


@pytest.mark.parametrize("case", ["heun", "flow-heun", "kdpm2", "pndm-prk", "pndm"])
def test_both_calls_of_a_step_of_second_order_may_be_reused(case):
    name, config, options, _ = DETERMINISTIC[case]
    timesteps = sampler_table(make(name, **config), 10, **options).timesteps.tolist()
    for k, terms in enumerate(reuse_terms(timesteps, ["fp16"] * 5 + ["reuse2"] * (len(timesteps) - 5))):
        if k < 5:
            assert terms is None
        else:
            times = [timesteps[j] for j, _ in terms]
            assert len(set(times)) == len(times)
            assert sum(weight for _, weight in terms) == pytest.approx(1.0, rel=1e-9)


def test_a_step_of_two_calls_at_one_timestep_counts_once():
    name, config, options, _ = DETERMINISTIC["heun"]
    timesteps = sampler_table(make(name, **config), 10, **options).timesteps.tolist()
    assert timesteps[1] == timesteps[2]
    choices = ["fp16", "fp16", "fp16", "reuse2", *["fp16"] * (len(timesteps) - 4)]
    with pytest.raises(ScheduleError, match=r"step index 3 is reuse2, which needs 3 .* there are 2"):
        reuse_terms(timesteps, choices)
