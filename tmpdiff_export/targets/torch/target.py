"""Engines for the torch backend: AOTInductor packages compiled for this machine's GPU, or for its CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from engines.backends.torch.attention import LEAST_COMPUTE_CAPABILITY
from engines.backends.torch.library import VERSION, require_cudnn
from engines.documents import FileEntry
from engines.errors import BackendError
from engines.precision import Precision
from tmpdiff_export.pipelines.families.family import DENOISER
from tmpdiff_export.quantization.codes import QuantizedLayer
from tmpdiff_export.quantization.sixteen_bit import NO_RECIPE, narrow_type
from tmpdiff_export.targets.target import EngineJob, PreparedEngine, SourceModel, layer_on_meta, require_weights_fit
from tmpdiff_export.targets.torch.attention import attention_tensors
from tmpdiff_export.targets.torch.compile import EngineModule, without_capturing_hooks
from tmpdiff_export.targets.torch.layers import FP8_COMPUTE_CAPABILITY
from tmpdiff_export.targets.torch.lowering import lower_for_torch, place_codes, torch_tensors
from tmpdiff_export.targets.torch.package import PackageTask
from tmpdiff_export.targets.torch.settings import PackageSettings
from tmpdiff_export.weights.streamed import on_meta

# Denoisers that are published in BF16, and whose activations overflow FP16, or come near to it.
_BFLOAT16 = frozenset({"FluxTransformer2DModel", "SD3Transformer2DModel", "SanaTransformer2DModel"})
# BF16 has three bits less than FP16, 18 dB; the reference's own floor is for FP16.
_BFLOAT16_FLOOR_DB = 30.0


class TorchTarget:
    """`tmpdiff_export.targets.target.Target`: `engines/<name>.pt2`, which takes its weights as inputs.

    Attributes:
        device: what the packages are compiled for, "cuda" or "cpu".
    """

    backend = "torch"
    fixed_shapes = True

    def __init__(self, device: str, pictures: int, precisions: Sequence[Precision], packages: PackageSettings) -> None:
        """Checks what can be checked before work begins.

        Args:
            device: "cuda" or "cpu".
            pictures: how many at once the packages are compiled for.
            precisions: the denoiser engines that will be made.
            packages: how they are made.

        Raises:
            BackendError: no such device, or a precision that it cannot have.
        """
        self.device, self._pictures, self._blocks = device, pictures, packages.compile == "blocks"
        if device == "cpu":
            self._described = "cpu"
            return
        from engines.backends.torch.host import usable_gpu  # which needs cuda-bindings

        try:
            gpu = usable_gpu()
        except BackendError as error:
            raise BackendError(f"{error}; --device cpu compiles torch packages for this machine's CPU") from error
        # NVFP4's block scales are FP8.
        with_fp8 = [item.value for item in precisions if item in (Precision.FP8, Precision.NVFP4)]
        if with_fp8 and gpu.compute_capability < FP8_COMPUTE_CAPABILITY:
            raise BackendError(
                f"precision {with_fp8[0]} needs compute capability 8.9, {gpu.name} has "
                f"{'.'.join(map(str, gpu.compute_capability))}; leave it out of --precisions"
            )
        if packages.fp8_attention:
            require_cudnn()
            if gpu.compute_capability < LEAST_COMPUTE_CAPABILITY:
                raise BackendError(
                    f"--fp8-attention needs compute capability {'.'.join(map(str, LEAST_COMPUTE_CAPABILITY))}, {gpu.name} has "
                    f"{'.'.join(map(str, gpu.compute_capability))}; build without it"
                )
        self._described = gpu.described
        self._memory_bytes = gpu.total_bytes

    @property
    def key(self) -> dict[str, Any]:
        """See `Target.key`."""
        return {
            "backend": self.backend,
            "version": VERSION,
            "device": self._described,
            "pictures": self._pictures,
            "blocks": self._blocks,
        }

    @property
    def form(self) -> TorchForm:
        """See `Target.form`."""
        return TorchForm()

    def require_memory(self, parameters: int) -> None:
        """Refuses a denoiser whose 16-bit weights alone would not fit; see `Target.require_memory`."""
        if self.device != "cpu":
            require_weights_fit(parameters, self._memory_bytes)

    def prepare(self, job: EngineJob) -> PreparedEngine:
        """Lowers a copy of the module on the device "meta"; see `Target.prepare`."""
        model = job.model
        module, codes = on_meta(model.module), set[str]()
        without_capturing_hooks(module)
        dtype = _type_of(model) if model.half else torch.float32
        layers = {name: layer_on_meta(model.module, name, job.precision, found) for name, found in job.ranges.items()}
        for name, layer in layers.items():
            codes.update(torch_tensors(name, layer, model.module.get_submodule(name), dtype))
        if model.half:
            module, counts = lower_for_torch(
                module, layers, dtype, sixteen_bit=job.sixteen_bit, attention=job.attention, ranges=job.ranges
            )
        else:
            counts = place_codes(module, layers, dtype, sixteen_bit=True)  # they are weight-only
            for parameter in module.parameters():
                parameter.data = parameter.data.to(narrow_type(parameter.shape, model.dtype))
        scales = attention_tensors(job.attention)
        kept = [not model.half or item.keep_dtype for item in model.inputs]
        engine = EngineModule(module, dtype, kept).eval()
        low_floor = dtype is torch.bfloat16 and job.recipe == NO_RECIPE  # also below the floor of shared weights
        batch, floor_db = self._pictures * model.batch_per_picture, job.floor_db

        def task(folder: Path, weights: Sequence[FileEntry]) -> PackageTask:
            return PackageTask(
                name=job.name,
                folder=folder,
                module=engine,
                weights=tuple(weights),
                device=self.device,
                described=self._described,
                batch=batch,
                dtype=_NAMES[dtype],
                outputs=tuple(model.outputs),
                check=model.check,
                lowering=counts,
                attention=scales,
                blocks=self._blocks,
                recipe=job.recipe,
                floor_db=min(floor_db, _BFLOAT16_FLOOR_DB) if low_floor else floor_db,
            )

        own = codes | set(scales)
        return PreparedEngine({name: item for name, item in engine.tensors.items() if name not in own}, task)


class TorchForm:
    """`tmpdiff_export.targets.target.Form`: tensors as the lowered module has them, under the names of its layers."""

    name = "torch"

    def codes(self, model: SourceModel, name: str, layer: QuantizedLayer) -> dict[str, torch.Tensor]:
        """See `Form.codes`."""
        return torch_tensors(name, layer, model.module.get_submodule(name), _type_of(model))


_NAMES: dict[torch.dtype, Literal["float16", "bfloat16", "float32"]] = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
}


def _type_of(model: SourceModel) -> torch.dtype:
    return torch.bfloat16 if type(getattr(model.module, DENOISER, None)).__name__ in _BFLOAT16 else torch.float16
