"""The denoisers that are measured: published configurations with random weights, and their inputs at 1024x1024."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from engines.errors import BuildError

Inputs = dict[str, Any]
TOLERANCE = 0.02  # of the published number of stored elements
SANE_RMS = (1e-3, 1e3)
# Noise level of the two input sets; timesteps are 1000 times these. BF16 holds those exactly, as it does 1000 times
# FLUX.1's guidance: eager denoisers round them before their embeddings, and would be a worse reference than what is
# compared.
SIGMAS = (0.5, 0.125)


@dataclass(frozen=True)
class Sizes:
    """What the inputs of a denoiser depend on.

    Attributes:
        batch: pictures times two where classifier-free guidance needs it.
        side: latent height and width.
        text_tokens: length of the text condition.
    """

    batch: int
    side: int
    text_tokens: int


@dataclass(frozen=True, kw_only=True)
class BenchModel:
    """A denoiser to measure.

    Attributes:
        name: as on the command line.
        title: for tables.
        denoiser_class: of diffusers.
        config: the published configuration, where it differs from the class's defaults.
        tiny: a small configuration of the same class, for tests on a CPU.
        dtype: the family's 16-bit type.
        sizes: at 1024x1024.
        tiny_sizes: of the small configuration.
        published: stored elements (parameters and persistent buffers) of the published checkpoint.
        blocks: class names of the blocks that are compiled, each class on its own.
        inputs: makes keyword arguments from (configuration, sizes, sigma, random source).
    """

    name: str
    title: str
    denoiser_class: str
    config: Mapping[str, Any]
    tiny: Mapping[str, Any]
    dtype: torch.dtype
    sizes: Sizes
    tiny_sizes: Sizes
    published: float
    blocks: tuple[str, ...]
    inputs: Callable[[Any, Sizes, float, Source], Inputs]

    def build(self, device: torch.device, *, tiny: bool, seed: int = 0) -> torch.nn.Module:
        """The denoiser with random weights, made on `device` in `dtype`, channels last where it convolves.

        Raises:
            BuildError: its number of stored elements is not the published one.
        """
        import diffusers

        diffusers.utils.logging.set_verbosity_error()  # it warns of every cast, also where nothing is kept in FP32
        denoiser = getattr(diffusers, self.denoiser_class)
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        torch.manual_seed(seed)
        try:
            with torch.device(device):
                module: torch.nn.Module = denoiser(**(self.tiny if tiny else self.config))
        finally:
            torch.set_default_dtype(before)
        module = module.to(device=device, dtype=self.dtype, memory_format=torch.channels_last)
        module.eval().requires_grad_(False)
        randomize(module)
        found = stored_elements(module)
        if not tiny and abs(found / self.published - 1) > TOLERANCE:
            raise BuildError(
                f"{self.title} has {found:,} stored elements, expected {self.published:,.0f} within {TOLERANCE:.0%}; "
                f"the configuration in tools/gpu_bench/models.py does not fit this version of diffusers"
            )
        return module

    def input_sets(self, module: torch.nn.Module, device: torch.device, *, tiny: bool) -> list[Inputs]:
        """Two sets of random inputs, at different noise levels."""
        sizes = self.tiny_sizes if tiny else self.sizes
        return [
            self.inputs(module.config, sizes, sigma, Source(device, self.dtype, seed))
            for seed, sigma in enumerate(SIGMAS, start=1)
        ]


@dataclass(frozen=True)
class Source:
    """Random tensors of one type on one device."""

    device: torch.device
    dtype: torch.dtype
    seed: int

    def normal(self, *shape: int) -> torch.Tensor:
        """Unit normal, in the 16-bit type; different for every shape and seed."""
        generator = torch.Generator(self.device).manual_seed(1000 * self.seed + sum(shape))
        return torch.randn(*shape, generator=generator, device=self.device).to(self.dtype)

    def full(self, shape: tuple[int, ...], value: float, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A constant, as conditions such as timesteps are."""
        return torch.full(shape, value, device=self.device, dtype=dtype or self.dtype)

    def mask(self, batch: int, tokens: int) -> torch.Tensor:
        """Padding mask [batch, tokens] as pipelines pass it: an empty prompt, then one that fills half."""
        mask = torch.zeros(batch, tokens, device=self.device, dtype=self.dtype)
        mask[0, :1] = 1
        mask[-1, : tokens // 2] = 1
        return mask


def randomize(module: torch.nn.Module) -> None:
    """Weights that keep activations of unit size and leave no modulation at zero: normal with variance 1 / fan-in.

    Quantization errors then pass through every layer, as in a trained model; their size is that of random weights.
    """
    for layer in module.modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
            fan_in = layer.weight[0].numel()
            layer.weight.normal_(0.0, fan_in**-0.5)
            if layer.bias is not None:
                layer.bias.normal_(0.0, 0.02)


def stored_elements(module: torch.nn.Module) -> int:
    """Parameters and persistent buffers, as a checkpoint holds them."""
    return sum(item.numel() for item in module.state_dict().values())


def check_output(output: torch.Tensor, title: str) -> float:
    """Root mean square of an output.

    Raises:
        BuildError: it is not finite, or of a size that no trained denoiser has.
    """
    rms = float(output.float().square().mean().sqrt())
    if not SANE_RMS[0] <= rms <= SANE_RMS[1]:
        raise BuildError(
            f"{title}: the 16-bit output has RMS {rms}, expected {SANE_RMS[0]} to {SANE_RMS[1]}; "
            f"the random weights of tools/gpu_bench/models.py need another scale"
        )
    return rms
