"""Reused steps inside pipelines of every family, against pipelines whose own denoiser's outputs are extrapolated."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from helpers.eager_runtime import EagerRuntime
from helpers.small_pipelines import MAKERS

from engines.errors import ScheduleError
from engines.floating import weighted_sum
from engines.reuse import Terms, reuse_terms
from tmpdiff_export import attach
from tmpdiff_export.drop_in.past_outputs import PastOutputs

STEPS, SIDE = 7, 64
ROUNDING = 3e-5  # relative, of latents; an extrapolation multiplies rounding
CHOICES = ("fp16", "fp16", "reuse1", "fp16", "reuse0", "reuse2", "fp16")
MORE: dict[str, dict[str, Any]] = {
    "pixart": {"use_resolution_binning": False, "clean_caption": False},
    "sd3": {"max_sequence_length": 20},
    "flux": {"max_sequence_length": 20},
}


def made(name: str) -> Any:
    torch.manual_seed(0)
    pipe = MAKERS[name]()
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def attached(pipe: Any, choices: tuple[str, ...] = CHOICES) -> Any:
    runtime = EagerRuntime(pipe, STEPS, SIDE, SIDE)
    whole = choices + ("fp16",) * (runtime.table.num_steps - len(choices))
    return attach(pipe, runtime, schedule=runtime.schedule.model_copy(update={"precisions": whole}))


def component(pipe: Any) -> Any:
    return getattr(pipe, "unet", None) or pipe.transformer


def call(pipe: Any, name: str, **more: Any) -> torch.Tensor:
    options = {
        "height": SIDE,
        "width": SIDE,
        "num_inference_steps": STEPS,
        "output_type": "latent",
        **MORE.get(name, {}),
    }
    options |= {"generator": torch.Generator().manual_seed(0), "num_images_per_prompt": 2, **more}
    taken = inspect.signature(type(pipe).__call__).parameters
    return pipe("a red circle", **{key: value for key, value in options.items() if key in taken}).images


def extrapolating(pipe: Any, calls: int) -> Callable[[], None]:
    """Has a pipeline's own denoiser return extrapolations at the reused steps, `calls` calls a step; returns the undoing."""
    table = EagerRuntime(pipe, STEPS, SIDE, SIDE).table
    choices = CHOICES + ("fp16",) * (table.num_steps - len(CHOICES))
    terms, module = reuse_terms(table.timesteps.tolist(), choices), component(pipe)
    own, kept = module.forward, []

    def forward(*args: Any, **kwargs: Any) -> Any:
        step, place = divmod(len(kept), calls)
        found = terms[step % len(terms)]
        output = own(*args, **kwargs)[0].detach()
        if found is not None:
            total = sum(kept[j * calls + place].double() * weight for j, weight in found)
            output = torch.as_tensor(total).float()
        kept.append(output)
        if len(kept) == calls * len(terms):
            kept.clear()
        return (output,)

    module.forward = forward
    return lambda: module.__dict__.pop("forward")


def same(got: torch.Tensor, expected: torch.Tensor) -> bool:
    return float((got - expected).norm() / expected.norm()) < ROUNDING


CALLS: list[tuple[str, dict[str, Any], int]] = [
    *((name, {}, 1) for name in MAKERS),
    ("sd", {"guidance_scale": 1.0}, 1),
    ("flux", {"true_cfg_scale": 3.0, "negative_prompt": "blue"}, 2),
]


@pytest.mark.parametrize(("name", "more", "calls"), CALLS)
def test_a_reused_step_returns_the_extrapolation_of_past_outputs(name: str, more: dict[str, Any], calls: int) -> None:
    pipe = made(name)
    plain = call(pipe, name, **more)
    undo = extrapolating(pipe, calls)
    expected = call(pipe, name, **more)
    undo()
    assert not same(plain, expected)
    attached(pipe)
    for _ in range(2):
        assert same(call(pipe, name, **more), expected)
        module = component(pipe)
        choices = module.schedule.precisions
        assert module.last_run == [(k, choice) for k, choice in enumerate(choices) for _ in range(calls)]
        assert module.calls == {"fp16": (len(choices) - 3) * calls}
    assert not module._past._kept, "nothing is kept that no later step needs"


def test_a_second_order_scheduler_is_indexed_as_the_table_is() -> None:
    pipe = made("sd")
    pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    undo = extrapolating(pipe, 1)
    expected = call(pipe, "sd")
    undo()
    attached(pipe)
    assert same(call(pipe, "sd"), expected)
    assert [choice for _, choice in component(pipe).last_run[: len(CHOICES)]] == [*CHOICES]


def test_an_interrupted_run_leaves_no_outputs_to_the_next() -> None:
    pipe = attached(made("sd"))
    expected = call(pipe, "sd")

    def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 3:
            raise KeyboardInterrupt
        return tensors

    with pytest.raises(KeyboardInterrupt):
        call(pipe, "sd", callback_on_step_end=stop, generator=torch.Generator().manual_seed(1))
    assert torch.equal(call(pipe, "sd"), expected)


# Refusals


def test_a_schedule_that_reuses_too_much_is_not_attached() -> None:
    pipe = made("sd")
    own = pipe.unet
    with pytest.raises(ScheduleError, match="step index 1 is reuse1, which needs 2 model outputs"):
        attached(pipe, ("fp16", "reuse1"))
    assert pipe.unet is own


def test_a_run_that_begins_part_way_needs_what_it_reuses() -> None:
    picture = {"image": torch.linspace(0, 1, 3 * SIDE * SIDE).reshape(1, 3, SIDE, SIDE), "strength": 0.5}
    computed = ("fp16",) * STEPS
    for choices, starts in (((*computed[:5], "reuse0", "fp16"), True), (CHOICES, False)):
        whole = attached(made("sd"), choices)
        pipe = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(whole)
        pipe.set_progress_bar_config(disable=True)
        call(whole, "sd")  # its outputs are not those of the run that begins part-way
        if starts:
            call(pipe, "sd", **picture)
            assert pipe.unet.last_run == [
                (4, "fp16"),
                (5, "reuse0"),
                (6, "fp16"),
                (7, "fp16"),
            ]  # PNDM: a call more than steps
        else:
            with pytest.raises(ScheduleError, match=r"step index 4 .* this run has not computed"):
                call(pipe, "sd", **picture)


def test_rescaled_guidance_keeps_a_whole_output_and_no_line() -> None:
    pipe = attached(made("sd"))
    # step index 2 is at the timestep of index 1, whose output it takes as it is
    with pytest.raises(ScheduleError, match=r"step index 5 .* reuses .* 0, 1, 3, which .*guidance_rescale .*reuse0"):
        call(pipe, "sd", guidance_rescale=0.7)
    call(pipe, "sd", guidance_rescale=0.7, guidance_scale=1.0)
    pipe = attached(made("sd"), ("fp16", "reuse0", "fp16", "reuse0"))
    call(pipe, "sd", guidance_rescale=0.7)


@pytest.fixture
def past() -> PastOutputs:
    terms: list[Terms | None] = [None, None, ((0, -1.0), (1, 2.0)), ((1, 1.0),), None]
    return PastOutputs(terms)


def output(value: float, batch: int = 2) -> np.ndarray:
    return np.full((batch, 1, 2, 2), value, np.float32)


def test_each_call_of_a_step_extrapolates_from_the_calls_at_its_place(past: PastOutputs) -> None:
    for k in range(2):
        for place in range(2):
            past.enter(k)
            past.add(output(10 * place + k))
    for place in range(2):
        past.enter(2)
        expected = weighted_sum([(output(10 * place), -1.0), (output(10 * place + 1), 2.0)])
        assert np.array_equal(past.reused(2, rescaled=False), expected)
    past.enter(3)
    assert np.array_equal(past.reused(2, rescaled=True), output(1))
    past.enter(3)
    past.enter(3)
    with pytest.raises(ScheduleError, match="which this run has not computed in as many denoiser calls"):
        past.reused(2, rescaled=False)


def test_an_engine_s_buffer_may_be_written_again(past: PastOutputs) -> None:
    buffer = output(0)
    for k in range(2):
        past.enter(k)
        buffer[...] = k
        past.add(buffer)
    past.enter(2)
    assert np.array_equal(past.reused(2, rescaled=False), output(2))


@pytest.mark.parametrize("start", [1, 2, 3])
def test_a_run_that_begins_after_what_it_reuses_is_refused(past: PastOutputs, start: int) -> None:
    for k in range(2):  # of another run
        past.enter(k)
        past.add(output(k))
    past.begin_run()
    for k in range(start, 2):
        past.enter(k)
        past.add(output(k))
    past.enter(max(start, 2))
    with pytest.raises(ScheduleError, match=r"this run has not computed.*begin the run at an earlier step, or attach"):
        past.reused(2, rescaled=False)


def test_steps_that_are_left_out_end_a_run(past: PastOutputs) -> None:
    for k in (0, 1, 3):
        past.enter(k)
        if k < 2:
            past.add(output(k))
    with pytest.raises(
        ScheduleError, match=r"step index 3 .* reuses the output of step index 1, which this run has not"
    ):
        past.reused(2, rescaled=False)


def test_another_batch_than_that_of_the_outputs_is_refused(past: PastOutputs) -> None:
    for k in range(2):
        past.enter(k)
        past.add(output(k))
    past.enter(2)
    with pytest.raises(
        ScheduleError, match=r"made for batches of 2, 2, and is called with a batch of 1; keep guidance"
    ):
        past.reused(1, rescaled=False)


def test_a_schedule_without_reuse_keeps_nothing() -> None:
    past = PastOutputs([None] * 3)
    for k in range(3):
        past.enter(k)
        past.add(output(k))
    assert not past._kept
