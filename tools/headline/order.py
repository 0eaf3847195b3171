"""What is measured, the most important first: a limit of time cuts the end."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial

import torch

from engines.runtime import DenoiseRuntime
from engines.schedule import Schedule
from tools.headline.caching import VARIANTS, Cached
from tools.headline.goals import CACHE_DIT
from tools.headline.methods import (
    BASELINE,
    Batch,
    Method,
    at_steps,
    fewer_steps,
    of_bundle,
    reuse_at_fixed_steps,
    uniform,
)
from tools.headline.peer import Peer, peer_method

FP8 = "fp8"


@dataclass(frozen=True)
class Part:
    """Methods that do without those of other parts, but for the references.

    Attributes:
        name: of the part.
        methods: makes them, which may take models and trial loops.
    """

    name: str
    methods: Callable[[], Iterator[Method]]


def parts(args: argparse.Namespace, runtime: DenoiseRuntime, probe: Batch) -> list[Part]:
    """All parts. The first two hold the baseline and the bundle's own reference.

    Args:
        args: of `measure`.
        runtime: of the setting.
        probe: what cache-dit's thresholds are tried on.
    """
    device = torch.device(args.device)
    reference, *low = runtime.precisions
    fast = FP8 if FP8 in low else (low or [reference])[0]

    @cache
    def peer(fp8: bool) -> Peer:
        return Peer(args.pipeline, device, fp8=fp8, compile_backend=args.compile_backend)

    @cache
    def cached(fp8: bool) -> Cached:
        return Cached(peer(fp8), runtime)

    found: list[Part] = []

    def add(name: str, make: Callable[[], Method]) -> None:
        found.append(Part(name, lambda: iter([make()])))

    def add_cached(fp8: bool, group: str) -> None:
        for variant in VARIANTS:
            methods = partial(lambda variant: cached(fp8).methods(group, variant, probe, args.points), variant)
            found.append(Part(f"{group} {variant.name}", methods))

    def compiled(fp8: bool, steps: int | None, name: str, group: str) -> Callable[[], Method]:
        # a graph is of a batch, whatever the number of steps
        return lambda: peer_method(peer(fp8), runtime if steps is None else at_steps(runtime, steps), name, group)

    add("16-bit compiled", compiled(False, None, "16-bit compiled", BASELINE))
    for precision in dict.fromkeys((reference, fast)):
        add(f"uniform {precision}", partial(uniform, runtime, precision))
    for path in args.schedules:
        add(path.stem, partial(lambda path: of_bundle(runtime, path.stem, "schedule", Schedule.load(path)), path))
    for steps in args.fewer:
        add(f"{steps} steps, {fast}", partial(fewer_steps, runtime, fast, steps))
    for steps in args.fewer:
        name = f"{steps} steps, 16-bit compiled"
        add(name, compiled(False, steps, name, "fewer steps, 16-bit compiled"))
    add_cached(False, CACHE_DIT)
    if device.type == "cuda":
        add("torchao FP8 compiled", compiled(True, None, "torchao FP8 compiled", "torchao FP8"))
        add_cached(True, f"{CACHE_DIT} and torchao FP8:")
    for precision in low:
        if precision != fast:
            add(f"uniform {precision}", partial(uniform, runtime, precision))
    for precision, orders in ((fast, (0, 1)), (reference, (1,))):
        name = f"reuse at fixed steps, {precision}"
        found.append(Part(name, partial(reuse_at_fixed_steps, runtime, precision, orders)))
    for steps in args.fewer:
        add(f"{steps} steps, {reference}", partial(fewer_steps, runtime, reference, steps))
    return found
