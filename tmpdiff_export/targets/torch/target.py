"""Engines for the torch backend: AOTInductor packages compiled for this machine's GPU, or for its CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from engines.backends.torch.attention import LEAST_COMPUTE_CAPABILITY
from engines.backends.torch.library import require_cudnn
from engines.errors import BackendError, BuildError
from engines.files import sha256_file
from engines.manifest import EngineEntry, FileEntry
from engines.precision import Precision
from tmpdiff_export.pipelines.families.family import DENOISER
from tmpdiff_export.targets.target import EngineJob, file_entry, require_weights_fit, tensor_specs
from tmpdiff_export.targets.torch.compile import EngineModule, store_weights
from tmpdiff_export.targets.torch.layers import FP8_COMPUTE_CAPABILITY
from tmpdiff_export.targets.torch.lowering import lower_for_torch
from tmpdiff_export.targets.torch.package import PackageTask

# Denoisers that are published in BF16, and whose activations overflow FP16, or come near to it.
_BFLOAT16 = frozenset({"FluxTransformer2DModel", "SD3Transformer2DModel", "SanaTransformer2DModel"})
# BF16 has three bits less than FP16, 18 dB; the reference's own floor is for FP16.
_BFLOAT16_FLOOR_DB = 30.0


class TorchTarget:
    """`tmpdiff_export.targets.target.Target`: `engines/<name>.pt2` and its weights, `engines/<name>.safetensors`.

    Attributes:
        device: what the packages are compiled for, "cuda" or "cpu".
    """

    backend = "torch"

    def __init__(
        self, device: str, pictures: int, precisions: Sequence[Precision], *, fp8_attention: bool = False
    ) -> None:
        """Checks what can be checked before work begins.

        Args:
            device: "cuda" or "cpu".
            pictures: how many at once the packages are compiled for.
            precisions: the denoiser engines that will be made.
            fp8_attention: whether any of them has its attention in FP8.

        Raises:
            BackendError: no such device, or a precision that it cannot have.
        """
        self.device, self._pictures = device, pictures
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
        if fp8_attention:
            require_cudnn()
            if gpu.compute_capability < LEAST_COMPUTE_CAPABILITY:
                raise BackendError(
                    f"--fp8-attention needs compute capability {'.'.join(map(str, LEAST_COMPUTE_CAPABILITY))}, {gpu.name} has "
                    f"{'.'.join(map(str, gpu.compute_capability))}; build without it"
                )
        self._described = gpu.described
        self._memory_bytes = gpu.total_bytes

    def require_memory(self, parameters: int) -> None:
        """Refuses a denoiser whose 16-bit weights alone would not fit; see `Target.require_memory`."""
        if self.device != "cpu":
            require_weights_fit(parameters, self._memory_bytes)

    def make(self, job: EngineJob, folder: Path) -> EngineEntry:
        """Compiles the module, loads the package as the runtime would and measures its SQNR; see `Target.make`."""
        return self.prepare(job, folder)()

    def prepare(self, job: EngineJob, folder: Path) -> PackageTask:
        """Lowers the module and writes its weights; what is returned does the rest of `make`, in any process.

        Raises:
            BuildError: the weights are to be another engine's, and are not equal to them.
        """
        (folder / "engines").mkdir(parents=True, exist_ok=True)
        weights = folder / "engines" / f"{job.name}.safetensors"
        dtype = _type_of(job)
        if job.half:
            shared = job.weights_of is not None
            lowered, counts = lower_for_torch(
                job.module, job.layers, dtype, sixteen_bit=shared, attention=job.attention
            )
        else:
            lowered, counts = job.module, {}
        kept = [not job.half or name in job.float32_inputs for name in job.check.names]
        module = store_weights(EngineModule(lowered, dtype, kept).eval(), weights)
        stored = file_entry(folder, weights)
        reference_floor = min(job.floor_db, _BFLOAT16_FLOOR_DB)  # also below the floor of shared weights
        return PackageTask(
            name=job.name,
            folder=folder,
            module=module,
            weights=stored,
            weights_of=None if job.weights_of is None else _shared_file(job.name, stored, job.weights_of),
            device=self.device,
            described=self._described,
            batch=self._pictures * job.batch_per_picture,
            dtype=_NAMES[dtype],
            inputs=tensor_specs(job.graph.graph.input),
            outputs=tensor_specs(job.graph.graph.output),
            check=job.check,
            lowering=counts,
            operators=("attention_fp8",) if job.attention else (),
            onnx_sha256=sha256_file(job.onnx_file),
            recipe=job.recipe,
            floor_db=reference_floor if dtype is torch.bfloat16 and job.quantized is None else job.floor_db,
        )


def _shared_file(name: str, own: FileEntry, other: EngineEntry) -> FileEntry:
    """The weights file of another engine in place of an equal one.

    Raises:
        BuildError: it holds something else.
    """
    (theirs,) = other.weights
    if own.sha256 != theirs.sha256:
        raise BuildError(
            f"engine {name} needs other weights than {theirs.path} holds; build it without --share-weights, and "
            "report this as a bug"
        )
    return theirs


_NAMES: dict[torch.dtype, Literal["float16", "bfloat16", "float32"]] = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
}


def _type_of(job: EngineJob) -> torch.dtype:
    if not job.half:
        return torch.float32
    denoiser = getattr(job.module, DENOISER, None)
    return torch.bfloat16 if type(denoiser).__name__ in _BFLOAT16 else torch.float16
