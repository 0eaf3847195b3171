"""Which engines are resident when: the plan of loads, and the slots of the history."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence

import numpy as np
import pytest

from engines.backends.cuda.residency import Load, plan_loads

SEED = 7


def random_cases(count: int, steps: int, names: int) -> list[tuple[tuple[str, ...], int, tuple[str, ...]]]:
    """(engine per step, limit, engines resident before) with every limit and any number resident."""
    random = np.random.default_rng(SEED)
    cases = []
    for _ in range(count):
        engines = tuple("ABCDE"[index] for index in random.integers(0, names, random.integers(1, steps + 1)))
        limit = int(random.integers(1, names + 1))
        held = random.permutation(list("ABCDE"[:names]))[: random.integers(0, limit + 1)]
        cases.append((engines, limit, tuple(map(str, held))))
    return cases


def fewest_loads(engines: Sequence[str], limit: int, resident: Sequence[str]) -> int:
    """By trying every choice of what gives way."""
    states = {frozenset(resident): 0}
    for engine in engines:
        following: dict[frozenset[str], int] = {}
        for held, loads in states.items():
            choices = [(held, loads)]
            if engine not in held:
                room = [held] if len(held) < limit else [held - {name} for name in held]
                choices = [(rest | {engine}, loads + 1) for rest in room]
            for after, count in choices:
                following[after] = min(count, following.get(after, sys.maxsize))
        states = following
    return min(states.values())


def check_timeline(engines: Sequence[str], limit: int, resident: Sequence[str], loads: Sequence[Load]) -> None:
    """Follows a plan with every load begun as early as it allows, and as late.

    A load takes its slot from the moment it begins; the engine is there from then on (early) or just before the
    step that needs it (late). Under both, every step must find its engine, and no more than `limit` be held.
    """
    for early in (True, False):
        held = set(resident)
        for step in range(-1, len(engines)):
            if step >= 0:
                for load in loads:
                    if not early and load.before_step == step:
                        held.add(load.engine)
                assert engines[step] in held, f"step {step} lacks {engines[step]}"
            for load in loads:
                if load.after_step == step:
                    if load.evicts is not None:
                        assert load.evicts in held
                        held.remove(load.evicts)
                    if early:
                        assert load.engine not in held, "loaded twice"
                        held.add(load.engine)
            loading = sum(load.after_step <= step < load.before_step for load in loads) if not early else 0
            assert len(held) + loading <= limit


@pytest.mark.parametrize(("steps", "names"), [(6, 2), (9, 3), (12, 4), (25, 5)])
def test_every_step_finds_its_engine_and_the_limit_holds(steps: int, names: int) -> None:
    for engines, limit, resident in random_cases(400, steps, names):
        loads = plan_loads(engines, limit, resident)
        check_timeline(engines, limit, resident, loads)
        assert all(load.after_step < load.before_step for load in loads)
        assert [load.before_step for load in loads] == sorted(load.before_step for load in loads)


def test_no_plan_has_fewer_loads() -> None:
    for engines, limit, resident in random_cases(300, 10, 4):
        assert len(plan_loads(engines, limit, resident)) == fewest_loads(engines, limit, resident)
    for engines in itertools.product("ABC", repeat=6):
        assert len(plan_loads(engines, 2)) == fewest_loads(engines, 2, ())


def test_engines_that_fit_are_loaded_before_the_loop_and_stay() -> None:
    loads = plan_loads("AABBCCA", 3)
    assert loads == (Load("A", None, -1, 0), Load("B", None, -1, 2), Load("C", None, -1, 4))
    assert plan_loads("AABBCCA", 3, ("C", "A", "B")) == ()


def test_the_next_engine_is_loaded_while_earlier_steps_run() -> None:
    # A is not needed after step 1, so C can be loaded while B runs steps 2 to 4.
    loads = plan_loads("AABBBC", 2)
    assert loads[-1] == Load("C", evicts="A", after_step=1, before_step=5)


def test_a_step_that_runs_no_engine_needs_none_and_frees_none() -> None:
    assert plan_loads(["A", None, "A", None, "B"], 1) == (Load("A", None, -1, 0), Load("B", "A", 2, 4))
    assert plan_loads(["A", "B", None, "A"], 2) == plan_loads("ABA", 2)
    assert plan_loads([None, None], 1) == ()


def test_a_limit_of_one_cannot_overlap() -> None:
    loads = plan_loads("AABBA", 1)
    assert [(load.engine, load.after_step, load.before_step) for load in loads] == [
        ("A", -1, 0),
        ("B", 1, 2),
        ("A", 3, 4),
    ]


def test_of_engines_that_are_done_the_one_idle_longest_gives_way() -> None:
    # B and A are both done at step 3; B has been idle longer, so the load can begin earlier.
    assert plan_loads("BAAC", 2)[-1] == Load("C", evicts="B", after_step=0, before_step=3)


def test_a_resident_engine_that_the_loop_does_not_use_gives_way_before_it_starts() -> None:
    assert plan_loads("AAB", 2, ("X", "A")) == (Load("B", "X", -1, 2),)


@pytest.mark.parametrize(("limit", "resident"), [(0, ()), (-1, ()), (1, ("A", "B"))])
def test_impossible_limits_are_refused(limit: int, resident: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="limit"):
        plan_loads("AB", limit, resident)
