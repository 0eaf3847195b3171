"""Plans with an optimization profile for each picture size.

TensorRT and CUDA are fakes (see `fakes`): what a real GPU computes, needs and takes in time is not shown here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fakes.install import Fakes
from helpers.small_loops import Opened, loop_of, same_bits, schedule
from helpers.small_plans import denoiser, entry, inputs, table

from engines.errors import BackendError
from engines.loop import Loop, host_loop

SQUARE, WIDE, TALL = (4, 4), (4, 6), (8, 4)
SIZES = (SQUARE, WIDE, TALL)


def loop(size: tuple[int, int], pattern: str = "h8h8", **options: Any) -> Loop:
    return loop_of(table(len(pattern), 2), schedule(pattern), size=size, **options)


def profiles_used(fakes: Fakes, start: int = 0) -> list[int]:
    return [call.args[0] for call in fakes.cuda.calls[start:] if call.name == "set_optimization_profile_async"]


@pytest.mark.parametrize("limit", [None, 1, 2])
@pytest.mark.parametrize("policy", ["younger_first", "older_first", "lazy"])
def test_sizes_take_turns(opened: Opened, fakes: Fakes, policy: str, limit: int | None) -> None:
    fakes.cuda.scheduler.policy = policy
    host = opened(limit, sizes=SIZES)
    expected = {size: host_loop(loop(size, "h8i4"), opened(sizes=SIZES).engine) for size in SIZES}
    for size in (SQUARE, WIDE, SQUARE, TALL, WIDE, TALL, SQUARE):
        assert same_bits(host.denoise(loop(size, "h8i4")), expected[size])


def test_each_size_equals_a_plan_for_it_alone(opened: Opened) -> None:
    several = opened(names=("fp16", "fp8"), sizes=SIZES)
    found = {size: several.denoise(loop(size)) for size in SIZES}
    for size in SIZES:
        alone = opened(names=("fp16", "fp8"), sizes=(size,))
        assert same_bits(found[size], alone.denoise(loop(size)))


def test_the_profile_is_chosen_once_per_engine_and_shape_before_the_shapes_are_set(
    opened: Opened, fakes: Fakes
) -> None:
    host = opened(names=("fp16",), sizes=SIZES)
    for size in (SQUARE, TALL, WIDE, SQUARE, TALL, WIDE):
        host.denoise(loop(size, "hhhh"))
    assert profiles_used(fakes) == [0, 2, 1]
    names = fakes.cuda.names()
    assert all(
        names[index + 1] == "set_input_shape"
        for index, name in enumerate(names)
        if name == "set_optimization_profile_async"
    )
    assert {call.args[1] for call in fakes.cuda.calls if call.name == "set_optimization_profile_async"} == {
        host.stream.number
    }


def test_every_size_keeps_its_graph_once_the_buffers_have_grown(opened: Opened, fakes: Fakes) -> None:
    host = opened(names=("fp16",), sizes=SIZES)
    for size in (TALL, WIDE, SQUARE):  # from the largest down
        host.denoise(loop(size, "hhhh"))
    start = len(fakes.cuda.calls)
    for size in (SQUARE, WIDE, TALL, SQUARE):
        host.denoise(loop(size, "hhhh"))
    names = fakes.cuda.names(start)
    assert names.count("cudaGraphLaunch") == 4 * 4
    assert not {"cudaGraphInstantiate", "execute_async_v3", "cudaMalloc", "create_execution_context"} & set(names)
    assert host.notes == {}


def test_a_larger_size_moves_the_buffers_and_old_graphs_are_not_used(opened: Opened, fakes: Fakes) -> None:
    host = opened(names=("fp16", "fp8"), sizes=SIZES)
    expected = host.denoise(loop(SQUARE))
    host.denoise(loop(SQUARE))
    assert same_bits(host.denoise(loop(TALL)), host_loop(loop(TALL), host.engine))
    assert same_bits(host.denoise(loop(SQUARE)), expected)


def test_a_plan_that_gave_way_runs_every_size_again(opened: Opened, fakes: Fakes) -> None:
    host = opened(1, sizes=SIZES)
    for size in (WIDE, SQUARE, WIDE):
        found = host.engine("fp16").run(inputs(size=size))
        host.engine("fp8").run(inputs(size=size))
        assert host.resident == ("fp8",)
        assert same_bits(host.engine("fp16").run(inputs(size=size))["model_output"], found["model_output"])
    assert fakes.cuda.count("deserialize_cuda_engine") > 4


@pytest.mark.parametrize(
    ("size", "batch"),
    [
        ((6, 6), 2),
        ((6, 4), 2),  # between two profiles, in none
        (WIDE, 5),
    ],
)
def test_a_size_of_no_profile_is_refused_with_all_that_there_are(
    opened: Opened, size: tuple[int, int], batch: int
) -> None:
    host = opened(names=("fp16",), sizes=SIZES)
    with pytest.raises(BackendError) as refused:
        host.engine("fp16").run(inputs(batch, size))
    assert str(refused.value) == (
        f"engine fp16: input latents has shape ({batch}, 3, {size[0]}, {size[1]}), "
        "optimization profile 0 takes (1, 3, 4, 4) to (4, 3, 4, 4), "
        "optimization profile 1 takes (1, 3, 4, 6) to (4, 3, 4, 6), "
        "optimization profile 2 takes (1, 3, 8, 4) to (4, 3, 8, 4); "
        "use a batch and size within one of them, or build the bundle for more"
    )
    assert host.engine("fp16").run(inputs(size=TALL))["model_output"].shape == (2, 3, *TALL)


def test_what_is_wrong_beside_the_size_is_named_for_its_profile(opened: Opened) -> None:
    host = opened(names=("fp16",), sizes=SIZES)
    given = inputs(size=WIDE)
    given["hidden_states"] = given["hidden_states"][:, :-1]
    with pytest.raises(
        BackendError, match=r"profile 0 takes .*profile 2 takes .*; input hidden_states has shape .*profile 1"
    ):
        host.engine("fp16").run(given)


def test_a_profile_that_tensorrt_refuses_ends_in_its_words(opened: Opened, fakes: Fakes) -> None:
    host = opened(names=("fp16",), sizes=SIZES)
    fakes.cuda.fail("set_optimization_profile_async", "no memory for the switch")
    with pytest.raises(
        BackendError, match=r"engine fp16: TensorRT refuses optimization profile 1: .*no memory for the"
    ):
        host.engine("fp16").run(inputs(size=WIDE))
    assert host.engine("fp16").run(inputs(size=WIDE))["model_output"].shape == (2, 3, *WIDE)


def test_a_plan_of_one_profile_runs_its_size_only(fakes: Fakes, opened: Opened, tmp_path: Path) -> None:
    host = opened(names=())
    host.add("fp16", *entry(fakes, denoiser(0, any_size=True), tmp_path, "old"))
    assert same_bits(host.denoise(loop(SQUARE, "hh")), host_loop(loop(SQUARE, "hh"), host.engine))
    with pytest.raises(
        BackendError, match=r"\(4, 3, 4, 6\), optimization profile 0 takes \(1, 3, 4, 4\) to \(4, 3, 4, 4\); use"
    ):
        host.denoise(loop(WIDE, "hh"))
