"""What is compared: a way to run whole loops, and those of a bundle."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import numpy as np

from engines.conditioning import Conditioning
from engines.reuse import computed_choices
from engines.runtime import DenoiseRuntime
from engines.schedule import Schedule
from engines.setting_choice import SettingChoice

BASELINE = "baseline"
OURS, PEER = "ours", "peer"
"""Whose 16-bit run of all steps a method is compared with."""


@dataclass(frozen=True)
class Batch:
    """Pictures that a loop makes at once.

    Attributes:
        conditioning: for N prompts.
        noise: unit normal, float32 [N, C, h, w].
    """

    conditioning: Conditioning
    noise: np.ndarray


Denoise = Callable[[Batch], np.ndarray]
"""A whole loop: final latents, float32 [N, C, h, w] on the host, so that nothing is left to wait for."""


@dataclass(frozen=True)
class Method:
    """A way to run the loop.

    Attributes:
        name: unique.
        group: of a curve, such as "schedule".
        reference: `OURS` or `PEER`.
        open: makes it ready, and undoes that.
        computed: steps at which the denoiser was computed, the mean over loops.
        choices: of every step, where they are known beforehand.
        is_reference: whether others are compared with it.
    """

    name: str
    group: str
    reference: str
    open: Callable[[], AbstractContextManager[Denoise]]
    computed: Callable[[], float]
    choices: tuple[str, ...] = ()
    is_reference: bool = False


def of_bundle(runtime: DenoiseRuntime, name: str, group: str, schedule: Schedule) -> Method:
    """A schedule of a bundle's setting."""

    def denoise(batch: Batch) -> np.ndarray:
        return runtime.denoise(batch.conditioning, schedule, batch.noise)

    computed = len(computed_choices(schedule.precisions))
    return Method(name, group, OURS, lambda: nullcontext(denoise), lambda: computed, schedule.precisions)


def uniform(runtime: DenoiseRuntime, precision: str) -> Method:
    """All steps at a precision; at the first one it is the reference of all others of the bundle."""
    found = of_bundle(runtime, f"uniform {precision}", "uniform", runtime.schedule(f"uniform:{precision}"))
    return replace(found, is_reference=precision == runtime.precisions[0])


def reuse_at_fixed_steps(runtime: DenoiseRuntime, precision: str, orders: Sequence[int]) -> Iterator[Method]:
    """Rules that need no calibration."""
    for name, choices in fixed_reuse(runtime.num_steps, precision, orders).items():
        yield of_bundle(runtime, name, f"reuse at fixed steps, {precision}", chosen(runtime, choices, name))


def at_steps(runtime: DenoiseRuntime, steps: int) -> DenoiseRuntime:
    """The same picture size in fewer steps, of which the bundle needs a setting."""
    return runtime.at(SettingChoice(steps=steps, size=(runtime.setting.height, runtime.setting.width)))


def fewer_steps(runtime: DenoiseRuntime, precision: str, steps: int) -> Method:
    """The scheduler's own loop of fewer steps."""
    shorter = at_steps(runtime, steps)
    schedule = shorter.schedule(f"uniform:{precision}")
    return of_bundle(shorter, f"{steps} steps, {precision}", f"fewer steps, {precision}", schedule)


def chosen(runtime: DenoiseRuntime, choices: Sequence[str], origin: str) -> Schedule:
    """A schedule of given choices."""
    manifest = runtime.manifest
    return Schedule(
        bundle_id=manifest.bundle_id, setting=runtime.setting.name, precisions=tuple(choices), origin=origin
    )


def fixed_reuse(num_steps: int, precision: str, orders: Sequence[int]) -> dict[str, tuple[str, ...]]:
    """Every n-th step reused, or only every n-th one computed, from a tenth of the loop on."""
    begin = max(-(-num_steps // 10), 1 + max(orders))
    found = {}
    for order in orders:
        for n, one_reused in ((4, True), (3, True), (2, True), (3, False), (4, False)):
            phases = [(k - begin) % n if k >= begin else None for k in range(num_steps)]
            reused = [phase is not None and (phase == 0 if one_reused else phase != n - 1) for phase in phases]
            word = "reused" if one_reused else "computed"
            name = f"one in {n} {word}, order {order}, {precision}"
            found[name] = tuple(f"reuse{order}" if again else precision for again in reused)
    return found
