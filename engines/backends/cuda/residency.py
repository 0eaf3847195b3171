"""Which engines are in device memory when: a plan made before the loop starts.

Belady's rule on a known future: the engine to give way is the one whose next use is furthest away, which gives
the fewest loads possible. Pure; `host` carries the plan out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Load:
    """One engine to bring into device memory.

    Attributes:
        engine: its name.
        evicts: the engine that gives way, None where there is room.
        after_step: loading may begin when this step has been enqueued: the last one, before the load is needed,
            that uses the engine that gives way. -1: before the loop.
        before_step: the step that needs the engine.
    """

    engine: str
    evicts: str | None
    after_step: int
    before_step: int


def plan_loads(engines: Sequence[str | None], limit: int, resident: Sequence[str] = ()) -> tuple[Load, ...]:
    """The loads a loop needs, in the order in which they are needed.

    Each load may run while the steps between `after_step` and `before_step` do; however the loads overlap, no
    more than `limit` engines are resident. With a limit of 1 a load cannot overlap anything.

    Args:
        engines: name of the engine of every step, None for a step that runs none.
        limit: most engines resident at once, at least 1.
        resident: engines that are resident before the loop, at most `limit`.

    Raises:
        ValueError: the limit is below 1, or below the number of engines that are resident.
    """
    if limit < 1:
        raise ValueError(f"the limit on resident engines is {limit}, expected 1 at least")
    if len(set(resident)) > limit:
        raise ValueError(f"{len(set(resident))} engines are resident, the limit is {limit}")
    last_use = dict.fromkeys(resident, -1)  # of every resident engine
    loads = []
    for step, engine in enumerate(engines):
        if engine is None:
            continue
        if engine not in last_use:
            evicts, after_step = None, -1
            if len(last_use) == limit:
                evicts = _furthest(last_use, engines[step:])
                after_step = last_use.pop(evicts)
            loads.append(Load(engine, evicts, after_step, step))
        last_use[engine] = step
    return tuple(loads)


def _furthest(last_use: dict[str, int], future: Sequence[str | None]) -> str:
    """The resident engine that is needed last; of several that are not needed again, the one idle the longest."""

    def key(name: str) -> tuple[int, int]:
        next_use = future.index(name) if name in future else len(future)
        return next_use, -last_use[name]

    return max(last_use, key=key)
