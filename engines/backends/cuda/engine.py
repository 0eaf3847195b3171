"""A plan in device memory as an engine: host arrays in and out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.backends.cuda.memory import SharedMemory, Stream, staged_bytes
from engines.backends.cuda.plan import DeviceContext, DevicePlan, Tensor
from engines.engine import Arrays
from engines.errors import BackendError


class DeviceEngine:
    """See `engines.engine.Engine`.

    Floating point inputs may be float32 or float16, whatever the plan takes, and are rounded to nearest even;
    floating point outputs are returned as float32. Other dtypes must be the plan's.
    """

    def __init__(self, plan_of: Callable[[], DevicePlan], memory: SharedMemory, stream: Stream) -> None:
        """
        Args:
            plan_of: gives the plan at every use; it may have to be loaded first.
            memory: device memory shared with other engines; owned by the caller.
            stream: where the engine runs; owned by the caller, at rest between calls.
        """
        self._plan_of = plan_of
        self._memory = memory
        self._stream = stream

    @property
    def plan(self) -> DevicePlan:
        """The loaded plan."""
        return self._plan_of()

    @property
    def stream(self) -> Stream:
        """Where the engine runs."""
        return self._stream

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """One inference, done when it returns; see `engines.engine.Engine`."""
        plan = self.plan
        try:
            context, addresses = self.upload(plan, inputs)
            context.enqueue(self._stream)
            results = {
                name: self._memory.pinned(context.output_shapes[name], tensor.dtype)
                for name, tensor in plan.outputs.items()
            }
            for name, result in results.items():
                self._stream.download(result, addresses[name])
            self._stream.synchronize()
        except BaseException:
            self._stream.rest()
            raise
        return {name: _returned(result) for name, result in results.items()}

    def upload(self, plan: DevicePlan, inputs: Arrays) -> tuple[DeviceContext, dict[str, int]]:
        """Enqueues copies of the inputs to the device.

        Returns:
            The bound context for their shapes, and the device address of every tensor.

        Raises:
            BackendError: as `run`.
        """
        unknown = {name: () for name in inputs if name not in plan.inputs}
        arrays = {
            name: host_array(plan.name, tensor, inputs[name]) for name, tensor in plan.inputs.items() if name in inputs
        }
        context = plan.context({**{name: array.shape for name, array in arrays.items()}, **unknown}, self._stream)
        addresses = context.bind(self._memory)
        self._memory.stage(
            sum(staged_bytes(array.nbytes) for array in arrays.values())
            + sum(staged_bytes(context.size_bytes(tensor)) for tensor in plan.outputs.values())
        )
        for name, array in arrays.items():
            self._memory.upload(plan.inputs[name].buffer, array)
        return context, addresses


def host_array(engine: str, tensor: Tensor, values: NDArray[Any]) -> NDArray[Any]:
    """`values` as the plan takes them: contiguous, of the tensor's dtype.

    Raises:
        BackendError: the dtype is another, and not both are floating point.
    """
    floating = np.issubdtype(values.dtype, np.floating) and np.issubdtype(tensor.dtype, np.floating)
    if values.dtype != tensor.dtype and not floating:
        raise BackendError(f"engine {engine}: input {tensor.name} must be {tensor.dtype}, received {values.dtype}")
    with np.errstate(over="ignore"):  # infinite, as on the device
        return np.ascontiguousarray(values, tensor.dtype)


def _returned(values: NDArray[Any]) -> NDArray[Any]:
    """A copy for the caller: floating point as float32."""
    return values.astype(np.float32 if np.issubdtype(values.dtype, np.floating) else values.dtype)
