"""A denoising loop in device memory: its buffers, and the kernels around every denoiser call."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.backends.cuda.engine import host_array
from engines.backends.cuda.history import HistoryLayout, term_table
from engines.backends.cuda.kernels import Kernels
from engines.backends.cuda.memory import SharedMemory, Stream, staged_bytes
from engines.backends.cuda.plan import DeviceContext, DevicePlan, Shapes, Tensor
from engines.errors import BackendError
from engines.loop import Loop
from engines.manifest import LATENTS, MODEL_OUTPUT, TIMESTEP, EngineEntry
from engines.reuse import reuse_terms

_HALF, _SINGLE = np.dtype(np.float16), np.dtype(np.float32)


class DeviceLoop:
    """One loop, uploaded. Everything it enqueues is ordered by one stream; nothing waits before `result`.

    The arithmetic is that of `engines.loop.host_loop`, bit for bit.

    Attributes:
        shapes: of all denoiser inputs.
    """

    def __init__(
        self,
        loop: Loop,
        entries: Iterable[tuple[str, EngineEntry]],
        kernels: Kernels,
        memory: SharedMemory,
        stream: Stream,
    ) -> None:
        """Enqueues the upload of noise, conditioning and sampler table; the stream must be at rest.

        Args:
            loop: what to run.
            entries: the manifest entries of the engines it uses, by name: conditioning is uploaded in every dtype
                that one of them takes.
            kernels: the sampler kernels.
            memory: shared memory of the stream.
            stream: where the loop runs.

        Raises:
            BackendError: the engines take other inputs, or there is not enough device memory.
            ScheduleError: a reused step has too few computed outputs before it.
            ValueError: the loop is not of one piece: number of steps, batch.
        """
        self._kernels, self._memory, self._stream = kernels, memory, stream
        self._table = loop.table
        self._samples = len(loop.noise)
        self._copies = 2 if loop.guided else 1
        self._guidance_scale = loop.guidance_scale if loop.guided else None
        self._latents_shape = loop.noise.shape
        self._size = loop.noise.size
        batch = self._copies * self._samples
        self.shapes: Shapes = {
            LATENTS: (batch, *loop.noise.shape[1:]),
            TIMESTEP: (batch,),
            **{name: values.shape for name, values in loop.conditioning.items()},
        }
        if len(loop.precisions) != loop.table.num_steps:
            raise ValueError(f"{len(loop.precisions)} precisions for a table of {loop.table.num_steps} steps")
        for name, shape in self.shapes.items():
            if shape[:1] != (batch,):
                raise ValueError(f"conditioning {name} has shape {shape}, expected {batch} rows")
        conditioning = _conditioning(loop, entries)
        self._uploaded = set(conditioning)
        first = loop.table.initial(loop.noise).latents
        reused = reuse_terms(loop.table.timesteps.tolist(), loop.precisions)
        self._layout = HistoryLayout.of(loop.table, reused)
        slot_bytes = staged_bytes(first.nbytes)
        pool = memory.device("history", slot_bytes * self._layout.num_slots)
        self._slots = [pool + slot_bytes * index for index in range(self._layout.num_slots)]
        terms, self._rows, self._sums = term_table(loop.table, reused, self._layout, self._slots)
        self._term_bytes = terms.itemsize
        arrays = [first, terms, first, *conditioning.values()]  # the first again: room for the result
        memory.stage(sum(staged_bytes(array.nbytes) for array in arrays))
        for buffer, values in conditioning.items():
            memory.upload(buffer, values)
        self._terms = memory.upload("sampler table", terms)
        start = memory.pinned(first.shape, first.dtype)
        start[...] = first
        stream.upload(self._slots[self._layout.samples[0]], start)

    def prepare(self, plan: DevicePlan) -> DeviceContext:
        """The context of a denoiser for this loop, bound to the shared buffers.

        Raises:
            BackendError: the plan does not fit the loop, or there is not enough device memory.
        """
        for name, tensor in (*plan.inputs.items(), *plan.outputs.items()):
            if name in (LATENTS, TIMESTEP, MODEL_OUTPUT) and tensor.dtype not in (_HALF, _SINGLE):
                raise BackendError(f"engine {plan.name}: {name} is {tensor.dtype}, expected float32 or float16")
        for name, tensor in plan.inputs.items():
            if name not in (LATENTS, TIMESTEP) and tensor.buffer not in self._uploaded:
                raise BackendError(
                    f"engine {plan.name} takes {name} as {tensor.dtype}, which its manifest entry does not say; "
                    "build the bundle again"
                )
        context = plan.context(self.shapes, self._stream)
        if context.output_shapes.get(MODEL_OUTPUT) != self.shapes[LATENTS]:
            raise BackendError(
                f"engine {plan.name} returns {context.output_shapes}, expected {MODEL_OUTPUT} of shape "
                f"{self.shapes[LATENTS]}; build the bundle again"
            )
        context.bind(self._memory)
        return context

    def step(self, step_index: int, plan: DevicePlan, context: DeviceContext) -> None:
        """Enqueues loop iteration k: denoiser input, denoiser, guidance, sampler update.

        Args:
            step_index: k; steps are enqueued in order, each once.
            plan: the denoiser.
            context: what `prepare` returned for it.

        Raises:
            BackendError: the backend or CUDA refuses.
        """
        addresses = context.bind(self._memory)
        latents, timestep = plan.inputs[LATENTS], plan.inputs[TIMESTEP]
        model_output = plan.outputs[MODEL_OUTPUT]
        output = self._slots[self._layout.outputs[step_index]]
        self._kernels.model_input(
            self._stream,
            latents=self._slots[self._layout.samples[step_index]],
            scale=float(self._table.input_scale[step_index]),
            size=self._size,
            copies=self._copies,
            model_latents=addresses[LATENTS],
            latents_half=_is_half(latents),
            timestep=float(self._table.timesteps[step_index]),
            samples=self._samples,
            model_timestep=addresses[TIMESTEP],
            timestep_half=_is_half(timestep),
        )
        context.enqueue(self._stream)
        self._kernels.guide(
            self._stream,
            model_output=addresses[MODEL_OUTPUT],
            half=_is_half(model_output),
            size=self._size,
            guidance_scale=self._guidance_scale,
            output=output,
        )
        self._combine(self._rows[step_index], self._layout.samples[step_index + 1])

    def reuse(self, step_index: int) -> None:
        """Enqueues loop iteration k whose model output is not computed: its sum, where it is one, and the sampler update.

        Args:
            step_index: k; as in `step`.

        Raises:
            BackendError: CUDA refuses.
        """
        if self._sums[step_index]:
            self._combine(self._sums[step_index], self._layout.outputs[step_index])
        self._combine(self._rows[step_index], self._layout.samples[step_index + 1])

    def _combine(self, terms: range, slot: int) -> None:
        self._kernels.combine(
            self._stream,
            terms=self._terms + terms.start * self._term_bytes,
            count=len(terms),
            size=self._size,
            result=self._slots[slot],
        )

    def result(self) -> NDArray[np.float32]:
        """Waits for everything; the final latents, float32 [N, C, h, w], owned by the caller.

        Raises:
            BackendError: something failed on the device.
        """
        view = self._memory.pinned(self._latents_shape, _SINGLE)
        self._stream.download(view, self._slots[self._layout.samples[-1]])
        self._stream.synchronize()
        return view.copy()


def _conditioning(loop: Loop, entries: Iterable[tuple[str, EngineEntry]]) -> dict[str, NDArray[Any]]:
    """Host arrays by the name of the buffer they go to."""
    arrays: dict[str, NDArray[Any]] = {}
    for engine, entry in entries:
        given = {LATENTS, TIMESTEP, *loop.conditioning}
        wanted = {spec.name for spec in entry.inputs}
        if wanted != given:
            raise BackendError(f"engine {engine} takes inputs {sorted(wanted)}, received {sorted(given)}")
        for spec in entry.inputs:
            tensor = Tensor.of(spec)
            if spec.name in loop.conditioning and tensor.buffer not in arrays:
                arrays[tensor.buffer] = host_array(engine, tensor, loop.conditioning[spec.name])
    return arrays


def _is_half(tensor: Tensor) -> bool:
    return tensor.dtype == _HALF
