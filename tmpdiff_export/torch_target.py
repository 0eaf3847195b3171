"""Engines for the torch backend: AOTInductor packages compiled for this machine's GPU, or for its CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from engines.backends.torch.library import VERSION
from engines.engine import Engine, EngineHost
from engines.errors import BackendError, BuildError
from engines.files import sha256_file
from engines.manifest import EngineEntry, FileEntry, PackageEntry, TensorSpec
from engines.precision import Precision
from tmpdiff_export.accuracy import engine_sqnr_db
from tmpdiff_export.engine_build import EngineJob, file_entry, tensor_specs
from tmpdiff_export.families import DENOISER
from tmpdiff_export.torch_compile import EngineModule, compile_package
from tmpdiff_export.torch_layers import FP8_COMPUTE_CAPABILITY
from tmpdiff_export.torch_lowering import lower_for_torch

# Denoisers that are published in BF16, and whose activations overflow FP16, or come near to it.
_BFLOAT16 = frozenset({"FluxTransformer2DModel", "SD3Transformer2DModel", "SanaTransformer2DModel"})
# BF16 has three bits less than FP16, 18 dB; the reference's own floor is for FP16.
_BFLOAT16_FLOOR_DB = 30.0


class TorchTarget:
    """`tmpdiff_export.engine_build.Target`: `engines/<name>.pt2` and its weights, `engines/<name>.safetensors`."""

    backend = "torch"

    def __init__(self, device: str, pictures: int, precisions: Sequence[Precision]) -> None:
        """Checks what can be checked before work begins.

        Args:
            device: "cuda" or "cpu".
            pictures: how many at once the packages are compiled for.
            precisions: the denoiser engines that will be made.

        Raises:
            BackendError: no such device, or a precision that it cannot have.
        """
        if Precision.NVFP4 in precisions:
            raise BackendError(
                "backend 'torch' has no nvfp4; choose from fp16, fp8, int8, int4, or use --backend tensorrt on Blackwell"
            )
        self._device, self._pictures = device, pictures
        if device == "cpu":
            self._described = "cpu"
            return
        from engines.backends.torch.host import usable_gpu  # which needs cuda-bindings

        try:
            gpu = usable_gpu()
        except BackendError as error:
            raise BackendError(f"{error}; --device cpu compiles torch packages for this machine's CPU") from error
        if Precision.FP8 in precisions and gpu.compute_capability < FP8_COMPUTE_CAPABILITY:
            raise BackendError(
                f"precision fp8 needs compute capability 8.9, {gpu.name} has {'.'.join(map(str, gpu.compute_capability))}; "
                "leave it out of --precisions"
            )
        self._described = f"{gpu.architecture} {gpu.name}"
        self._memory_bytes = gpu.total_bytes

    def require_memory(self, parameters: int) -> None:
        """Refuses a denoiser whose 16-bit weights alone would not fit; see `Target.require_memory`."""
        if self._device != "cpu" and 2 * parameters > self._memory_bytes:
            raise BuildError(
                f"{parameters} parameters take {2 * parameters} bytes in 16 bit, the GPU has {self._memory_bytes}; "
                "use a GPU with more memory"
            )

    def make(self, job: EngineJob, folder: Path) -> EngineEntry:
        """Compiles the module, loads the package as the runtime would and measures its SQNR; see `Target.make`."""
        engines = folder / "engines"
        engines.mkdir(parents=True, exist_ok=True)
        package = engines / f"{job.name}.pt2"
        weights = package.with_suffix(".safetensors")
        dtype = _type_of(job)
        if job.half:
            shared = job.weights_of is not None
            lowered, counts = lower_for_torch(job.module, job.layers, dtype, sixteen_bit=shared)
        else:
            lowered, counts = job.module, {}
        kept = [not job.half or name in job.float32_inputs for name in job.check.names]
        module = EngineModule(lowered, dtype, kept).eval()
        batch = self._pictures * job.batch_per_picture
        examples = [_rows(item, batch).to(self._device) for item in job.check.batches[0]]
        try:
            shapes = compile_package(module.to(self._device), examples, package, weights)
        finally:
            module.to("cpu")  # the same module as `job.module` where nothing was lowered
        inputs = tensor_specs(job.graph.graph.input)
        outputs = tensor_specs(job.graph.graph.output)
        name: Literal["float16", "bfloat16", "float32"] = _NAMES[dtype]
        reference_floor = min(job.floor_db, _BFLOAT16_FLOOR_DB)  # also below the floor of shared weights
        entry = EngineEntry(
            file=file_entry(folder, package),
            weights=file_entry(folder, weights),
            backend=self.backend,
            backend_version=VERSION,
            device=self._described,
            lowering=counts,
            onnx_sha256=sha256_file(job.onnx_file),
            recipe=job.recipe,
            sqnr_db=0.0,
            sqnr_floor_db=reference_floor if dtype is torch.bfloat16 and job.quantized is None else job.floor_db,
            inputs=tuple(_spec(spec, tuple(item.shape)) for spec, item in zip(inputs, examples, strict=True)),
            outputs=tuple(_spec(spec, shape) for spec, shape in zip(outputs, shapes, strict=True)),
            package=PackageEntry(batch=batch, dtype=name, weights_bytes=weights.stat().st_size),
        )
        host = self._host()
        try:
            host.add(job.name, entry, package)
            measured = _sqnr_db(host.engine(job.name), job)
        finally:
            host.close()
        if job.weights_of is not None:
            entry = entry.model_copy(update={"weights": _shared_file(entry, job.weights_of)})
            weights.unlink()
        return entry.model_copy(update={"sqnr_db": round(measured, 2)})

    def _host(self) -> EngineHost:
        from engines.backends import open_host

        return open_host(self.backend, self._described)


def _shared_file(entry: EngineEntry, other: EngineEntry) -> FileEntry:
    """The weights file of another engine in place of an equal one.

    Raises:
        BuildError: it holds something else.
    """
    own, theirs = entry.weights, other.weights
    assert own is not None  # every package has one
    assert theirs is not None
    if own.sha256 != theirs.sha256:
        raise BuildError(
            f"engine {entry.file.path} needs other weights than {theirs.path} holds; build it without --share-weights, and "
            "report this as a bug"
        )
    return theirs


def _sqnr_db(engine: Engine, job: EngineJob) -> float:
    check = job.check
    return engine_sqnr_db(engine, check.names, check.output, check.batches, check.references)


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


def _rows(example: torch.Tensor, batch: int) -> torch.Tensor:
    """An example of `batch` rows, made of the rows that there are."""
    return example.repeat(-(-batch // len(example)), *[1] * (example.ndim - 1))[:batch].contiguous()


def _spec(spec: TensorSpec, shape: tuple[int, ...]) -> TensorSpec:
    """A package's input or output: floating ones are float32, and only the number of rows is free."""
    dtype = "float32" if np.dtype(spec.dtype).kind == "f" else spec.dtype
    return TensorSpec(name=spec.name, dtype=dtype, shape=("batch", *shape[1:]))
