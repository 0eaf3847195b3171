"""The sampler kernels: loaded from the PTX that is shipped, launched with the driver API.

The driver compiles the PTX for the GPU at load time; neither NVRTC nor a CUDA toolkit is needed. `kernels.cu`
says what each kernel computes.
"""

from __future__ import annotations

import ctypes
from importlib import resources
from typing import Any

import numpy as np
from cuda.bindings import driver as api
from cuda.bindings import runtime

from engines.backends.cuda.gpu import cuda, driver
from engines.backends.cuda.memory import Stream
from engines.errors import BackendError

TERM = np.dtype([("address", "<u8"), ("coefficient", "<f8")])
"""One term of a sampler row, as the kernel reads it: device address of float32 values, and their factor."""

_PTX = "kernels.ptx"
_THREADS = 256
_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_longlong, ctypes.c_int
_FLOAT, _DOUBLE = ctypes.c_float, ctypes.c_double


class Kernels:
    """The kernels, loaded into the current device's primary context."""

    def __init__(self) -> None:
        """Loads them.

        Raises:
            BackendError: the driver cannot compile the PTX.
        """
        cuda(runtime.cudaFree(0))  # makes the primary context, which driver calls do not
        image = resources.files(__package__).joinpath(_PTX).read_bytes() + b"\0"
        try:
            self._module: Any = driver(api.cuModuleLoadData(image))
        except BackendError as error:
            raise BackendError(
                f"the GPU driver refuses the sampler kernels: {error}; they need a GPU of compute capability 7.5 or later "
                "and a driver for CUDA 12.0 or later"
            ) from error
        try:
            self._model_input = self._function(b"tmpdiff_model_input")
            self._guide = self._function(b"tmpdiff_guide")
            self._combine = self._function(b"tmpdiff_combine")
        except BackendError:
            self.close()
            raise

    def model_input(
        self,
        stream: Stream,
        *,
        latents: int,
        scale: float,
        size: int,
        copies: int,
        model_latents: int,
        latents_half: bool,
        timestep: float,
        samples: int,
        model_timestep: int,
        timestep_half: bool,
    ) -> None:
        """Enqueues: denoiser inputs from latents.

        Args:
            stream: where.
            latents: address of x_k, float32 [samples, C, h, w].
            scale: `SamplerTable.input_scale[k]`.
            size: number of elements of x_k.
            copies: 2 with guidance (both halves get the same latents), 1 without.
            model_latents: address of the result, [copies * samples, C, h, w].
            latents_half: whether it is float16 instead of float32.
            timestep: value for the whole batch.
            samples: N.
            model_timestep: address of the timesteps, [copies * samples].
            timestep_half: whether they are float16 instead of float32.
        """
        values = (
            *(latents, scale, size, copies, model_latents, int(latents_half)),
            *(timestep, samples, model_timestep, int(timestep_half)),
        )
        types = (_POINTER, _DOUBLE, _LONG, _INT, _POINTER, _INT, _FLOAT, _INT, _POINTER, _INT)
        self._launch(self._model_input, stream, size, values, types)

    def guide(
        self, stream: Stream, *, model_output: int, half: bool, size: int, guidance_scale: float | None, output: int
    ) -> None:
        """Enqueues: the guided model output m_k.

        Args:
            stream: where.
            model_output: address of the denoiser's output, [2 * N, C, h, w] with guidance, else [N, C, h, w].
            half: whether it is float16 instead of float32.
            size: number of elements of m_k.
            guidance_scale: None without guidance.
            output: address of m_k, float32 [N, C, h, w].
        """
        guided = guidance_scale is not None
        values = (model_output, int(half), size, int(guided), guidance_scale or 0.0, output)
        self._launch(self._guide, stream, size, values, (_POINTER, _INT, _LONG, _INT, _FLOAT, _POINTER))

    def combine(self, stream: Stream, *, terms: int, count: int, size: int, result: int) -> None:
        """Enqueues: x_{k+1} as the sum of a sampler row's terms.

        Args:
            stream: where.
            terms: address of `count` elements of type `TERM`.
            count: number of terms.
            size: number of elements of x_{k+1}.
            result: address of x_{k+1}, float32 [N, C, h, w]; none of the terms' arrays.
        """
        self._launch(self._combine, stream, size, (terms, count, size, result), (_POINTER, _INT, _LONG, _POINTER))

    def close(self) -> None:
        """Unloads the kernels; work that uses them must have finished."""
        if self._module is not None:
            module, self._module = self._module, None
            api.cuModuleUnload(module)

    def _function(self, name: bytes) -> Any:
        return driver(api.cuModuleGetFunction(self._module, name))

    def _launch(
        self, function: Any, stream: Stream, size: int, values: tuple[float, ...], types: tuple[Any, ...]
    ) -> None:
        blocks = max(-(-size // _THREADS), 1)
        driver(api.cuLaunchKernel(function, blocks, 1, 1, _THREADS, 1, 1, 0, int(stream.handle), (values, types), 0))
