"""The sampler kernels in numpy, for the fake `cuLaunchKernel`: what `kernels.cu` computes, on host addresses.

Each function takes grid and block (which the kernels stride over, so that any cover everything) and the
argument values in the order of the kernel's parameters. Importing this module registers them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fakes.fake_cuda import device_array, kernels

Dim = tuple[int, int, int]

_TERM = np.dtype([("address", "<u8"), ("coefficient", "<f8")])


def tmpdiff_model_input(grid: Dim, block: Dim, args: list[Any]) -> None:
    latents, scale, size, copies, model_latents, latents_half, timestep, samples, model_timestep, timestep_half = args
    source = _view(latents, size, np.float32)
    scaled = np.multiply(source, scale, dtype=np.float64).astype(np.float32)
    with np.errstate(over="ignore"):
        _view(model_latents, copies * size, _dtype(latents_half))[:] = np.tile(scaled, copies)
        _view(model_timestep, copies * samples, _dtype(timestep_half))[:] = np.float32(timestep)


def tmpdiff_guide(grid: Dim, block: Dim, args: list[Any]) -> None:
    model_output, half, size, guided, guidance_scale, output = args
    values = _view(model_output, (2 if guided else 1) * size, _dtype(half)).astype(np.float32)
    if guided:
        unconditional, conditional = values[:size], values[size:]
        values = unconditional + np.float32(guidance_scale) * (conditional - unconditional)
    _view(output, size, np.float32)[:] = values


def tmpdiff_combine(grid: Dim, block: Dim, args: list[Any]) -> None:
    terms, count, size, result = args
    total = np.zeros(size, np.float64)
    for address, coefficient in _view(terms, count, _TERM):
        total += np.multiply(_view(int(address), size, np.float32), coefficient, dtype=np.float64)
    _view(result, size, np.float32)[:] = total


def _view(address: int, count: int, dtype: Any) -> np.ndarray:
    return device_array(address, dtype, count)


def _dtype(half: int) -> Any:
    return np.float16 if half else np.float32


for _kernel in (tmpdiff_model_input, tmpdiff_guide, tmpdiff_combine):
    kernels[_kernel.__name__] = _kernel
