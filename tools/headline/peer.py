"""Diffusers' own denoiser in the loop of a bundle: 16 bit or torchao's FP8, blocks compiled, replayed as a CUDA graph."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from diffusers import SD3Transformer2DModel

from engines.runtime import DenoiseRuntime
from engines.sampler import SamplerTable
from tools.gpu_bench.peers import quantize_with_torchao
from tools.gpu_bench.step import WARM_UP_CALLS, compile_blocks
from tools.headline.methods import BASELINE, PEER, Batch, Method

BLOCKS = ("JointTransformerBlock",)
FP8 = "torchao-fp8-row"
"""Row of `tools.gpu_bench.peers`: a scale for every token, cache-dit's own default."""


class Peer:
    """A denoiser of diffusers with compiled blocks.

    Attributes:
        module: the denoiser.
        device: where it is.
        compile_backend: torch.compile's.
    """

    def __init__(self, pipeline: Path, device: torch.device, *, fp8: bool, compile_backend: str) -> None:
        """Loads and compiles the denoiser of a Stable Diffusion 3 pipeline folder, in BF16 (on a CPU FP32)."""
        self.device, self.compile_backend = device, compile_backend
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        module = SD3Transformer2DModel.from_pretrained(pipeline / "transformer", dtype=self.dtype)
        self.module = module.to(device).eval().requires_grad_(False)
        if fp8:
            quantize_with_torchao(self.module, FP8, recommended=False)
        compile_blocks(self.module, BLOCKS, compile_backend)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: dict[str, torch.Tensor] = {}
        self._output = torch.empty(0)

    def twin(self) -> SD3Transformer2DModel:
        """A copy that is not compiled and shares the weights, so that what is hooked into it leaves `module` alone."""
        tensors = [*self.module.parameters(), *self.module.buffers()]
        return copy.deepcopy(self.module, {id(tensor): tensor for tensor in tensors})

    def call(self, **inputs: torch.Tensor) -> torch.Tensor:
        """A denoiser call, kernel by kernel."""
        with torch.no_grad():
            found: torch.Tensor = self.module(**inputs, return_dict=False)[0]
        return found

    def replay(self, **inputs: torch.Tensor) -> torch.Tensor:
        """The same as a CUDA graph, recorded at its first call; the result is valid until the next one."""
        if self.device.type != "cuda":
            return self.call(**inputs)
        if self._graph is None:
            self._record(inputs)
        for name, value in inputs.items():
            self._inputs[name].copy_(value)
        assert self._graph is not None
        self._graph.replay()
        return self._output

    def _record(self, inputs: dict[str, torch.Tensor]) -> None:
        self._inputs = {name: value.clone() for name, value in inputs.items()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_CALLS):
                self.call(**self._inputs)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._output = self.call(**self._inputs)
        self._graph = graph

    def denoise(
        self, call: Callable[..., torch.Tensor], table: SamplerTable, guidance_scale: float, batch: Batch
    ) -> np.ndarray:
        """The loop of a sampler table with classifier-free guidance, in FP32 around the denoiser.

        Args:
            call: `call` or `replay`.
            table: of the sampler.
            guidance_scale: above 1.
            batch: what is drawn.
        """
        device = self.device
        arrays = batch.conditioning.batch(guidance_scale)
        given = {name: torch.from_numpy(values).to(device, self.dtype) for name, values in arrays.items()}
        timesteps = torch.tensor(table.timesteps, dtype=torch.float32, device=device)
        samples = {0: table.init_noise_sigma * torch.from_numpy(batch.noise).to(device)}
        outputs: dict[int, torch.Tensor] = {}
        for k, row in enumerate(table.rows):
            scaled = (float(table.input_scale[k]) * samples[k]).to(self.dtype)
            both = call(
                hidden_states=torch.cat([scaled, scaled]), timestep=timesteps[k].expand(2 * len(scaled)), **given
            ).float()
            without, guided = both.chunk(2)
            outputs[k] = torch.lerp(without, guided, guidance_scale)
            terms = [a * samples[j] for j, a in row.samples] + [b * outputs[j] for j, b in row.outputs]
            samples[k + 1] = torch.stack(terms).sum(0) if len(terms) > 2 else sum(terms[1:], terms[0])
        found: np.ndarray = samples[len(table.rows)].cpu().numpy()
        return found


def peer_method(peer: Peer, runtime: DenoiseRuntime, name: str, group: str) -> Method:
    """All steps of a setting, as CUDA graphs; of the group "baseline" it is what other peers are compared with."""
    table, scale = runtime.table, runtime.setting.guidance_scale

    def denoise(batch: Batch) -> np.ndarray:
        return peer.denoise(peer.replay, table, scale, batch)

    computed = table.num_steps
    return Method(name, group, PEER, lambda: nullcontext(denoise), lambda: computed, is_reference=group == BASELINE)
