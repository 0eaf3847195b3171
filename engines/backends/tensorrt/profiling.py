"""How long the layers of a plan take."""

from __future__ import annotations

from engines.backends.cuda.engine import DeviceEngine
from engines.backends.cuda.plan import Shapes
from engines.backends.cuda.timing import sample_inputs
from engines.backends.tensorrt.plan import Plan

REPEATS = 10  # inferences that are averaged, after one that does not count


def layer_times(engine: DeviceEngine, plan: Plan, shapes: Shapes) -> dict[str, float]:
    """Mean device time in ms by layer name, in the order of execution.

    Layers are timed one by one, without the overlap that an inference may have.

    Args:
        engine: a loaded engine at rest.
        plan: its plan.
        shapes: as for `latency_ms`.

    Raises:
        BackendError: the plan does not take the shapes, an inference failed, or TensorRT reports no times.
    """
    stream = engine.stream
    try:
        engine.upload(plan, sample_inputs(plan, shapes))
        return plan.context(shapes, stream).layer_times(stream, REPEATS)
    finally:
        stream.rest()
        plan.close_contexts()  # a profiler cannot be taken off
