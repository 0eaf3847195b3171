"""How long an engine takes on the device."""

from __future__ import annotations

import statistics
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.backends.cuda.engine import DeviceEngine
from engines.backends.cuda.memory import Event
from engines.backends.cuda.plan import DevicePlan, Shapes
from engines.errors import BackendError

WARM_UPS, REPEATS = 2, 20


def latency_ms(engine: DeviceEngine, shapes: Shapes) -> float:
    """Median device time in ms of one inference, as the denoising loop runs it (with its CUDA graph).

    Args:
        engine: a loaded engine at rest.
        shapes: of all inputs; they are filled with normal noise, integers with ones.

    Raises:
        BackendError: the plan does not take the shapes, or an inference failed.
    """
    plan, stream = engine.plan, engine.stream
    events: list[Event] = []
    try:
        context, _ = engine.upload(plan, sample_inputs(plan, shapes))
        events += [Event() for _ in range(REPEATS + 1)]
        for _ in range(WARM_UPS):
            context.enqueue(stream)
        events[0].record(stream)
        for event in events[1:]:
            context.enqueue(stream)
            event.record(stream)
        stream.synchronize()
        return 1000.0 * statistics.median(b.seconds_since(a) for a, b in pairwise(events))
    finally:
        stream.rest()
        for event in events:
            event.close()


def sample_inputs(plan: DevicePlan, shapes: Shapes) -> dict[str, NDArray[Any]]:
    """Inputs to time a plan with: normal noise, and ones for integers (a token that every vocabulary has).

    Raises:
        BackendError: `shapes` names other inputs than the plan has.
    """
    if set(shapes) != set(plan.inputs):
        raise BackendError(f"engine {plan.name} takes inputs {sorted(plan.inputs)}, received {sorted(shapes)}")
    random = np.random.default_rng(0)
    return {
        name: random.standard_normal(shapes[name]).astype(tensor.dtype)
        if np.issubdtype(tensor.dtype, np.floating)
        else np.ones(shapes[name], tensor.dtype)
        for name, tensor in plan.inputs.items()
    }
