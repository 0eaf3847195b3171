"""How long the layers of a plan take, and what TensorRT says they are."""

from __future__ import annotations

from engines.backends.cuda.engine import DeviceEngine
from engines.backends.cuda.plan import Shapes
from engines.backends.cuda.timing import sample_inputs
from engines.backends.tensorrt.bindings import LEAN, trt
from engines.backends.tensorrt.messages import LOG
from engines.backends.tensorrt.plan import Plan
from engines.errors import BackendError


def layer_times(engine: DeviceEngine, plan: Plan, shapes: Shapes, *, repeats: int = 10) -> dict[str, float]:
    """Mean device time in ms by layer name, in the order of execution.

    Layers are timed one by one, without the overlap that an inference may have.

    Args:
        engine: a loaded engine at rest.
        plan: its plan.
        shapes: as for `latency_ms`.
        repeats: inferences that count; one before them does not.

    Raises:
        BackendError: the plan does not take the shapes, an inference failed, or TensorRT reports no times.
    """
    stream = engine.stream
    try:
        engine.upload(plan, sample_inputs(plan, shapes))
        return plan.context(shapes, stream).layer_times(stream, repeats)
    finally:
        stream.rest()
        plan.close_contexts()  # a profiler cannot be taken off


def inspector_json(plan: Plan) -> str:
    """What TensorRT's engine inspector says of the layers; how much depends on the profiling verbosity of the build.

    Raises:
        BackendError: it says nothing, or only the lean runtime is installed, which has no inspector.
    """
    if LEAN:
        raise BackendError(
            "the engine inspector needs the full TensorRT, only the lean runtime is installed; pip install tensorrt"
        )
    inspector = plan.engine.create_engine_inspector()
    words = inspector.get_engine_information(trt.LayerInformationFormat.JSON) if inspector is not None else ""
    if not words:
        raise LOG.fail(f"engine {plan.name}: TensorRT's inspector says nothing", "build the plan again")
    return str(words)
