"""How long a plan takes: as a whole, and layer by layer; and what TensorRT says its layers are."""

from __future__ import annotations

import statistics
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.backends.tensorrt.bindings import LEAN, trt
from engines.backends.tensorrt.context import Shapes
from engines.backends.tensorrt.engine import TensorRtEngine
from engines.backends.tensorrt.memory import Event
from engines.backends.tensorrt.messages import LOG
from engines.backends.tensorrt.plan import Plan
from engines.errors import BackendError


def latency_ms(engine: TensorRtEngine, shapes: Shapes, *, repeats: int = 20) -> float:
    """Median device time in ms of one inference, as the denoising loop runs it (with its CUDA graph).

    Args:
        engine: a loaded engine at rest.
        shapes: of all inputs; they are filled with normal noise, integers with ones.
        repeats: inferences that count; two before them do not.

    Raises:
        BackendError: the plan does not take the shapes, or an inference failed.
    """
    plan, stream = engine.plan, engine.stream
    events: list[Event] = []
    try:
        context, _ = engine.upload(plan, sample_inputs(plan, shapes))
        events += [Event() for _ in range(repeats + 1)]
        for _ in range(2):
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


def layer_times(engine: TensorRtEngine, shapes: Shapes, *, repeats: int = 10) -> dict[str, float]:
    """Mean device time in ms by layer name, in the order of execution.

    Layers are timed one by one, without the overlap that an inference may have.

    Args:
        engine: a loaded engine at rest.
        shapes: as for `latency_ms`.
        repeats: inferences that count; one before them does not.

    Raises:
        BackendError: the plan does not take the shapes, an inference failed, or TensorRT reports no times.
    """
    plan, stream = engine.plan, engine.stream
    try:
        context, _ = engine.upload(plan, sample_inputs(plan, shapes))
        return context.layer_times(stream, repeats)
    finally:
        stream.rest()
        plan.close_contexts()  # a profiler cannot be taken off


def inspector_json(engine: TensorRtEngine) -> str:
    """What TensorRT's engine inspector says of the layers; how much depends on the profiling verbosity of the build.

    Raises:
        BackendError: it says nothing, or only the lean runtime is installed, which has no inspector.
    """
    plan = engine.plan
    if LEAN:
        raise BackendError(
            "the engine inspector needs the full TensorRT, only the lean runtime is installed; pip install tensorrt"
        )
    inspector = plan.engine.create_engine_inspector()
    words = inspector.get_engine_information(trt.LayerInformationFormat.JSON) if inspector is not None else ""
    if not words:
        raise LOG.fail(f"engine {plan.name}: TensorRT's inspector says nothing", "build the plan again")
    return str(words)


def sample_inputs(plan: Plan, shapes: Shapes) -> dict[str, NDArray[Any]]:
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
