"""One engine of the torch backend: compile, load with its weights as the runtime would, measure its SQNR."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from engines.backends.choose import open_host
from engines.backends.torch.library import VERSION
from engines.documents import FileEntry
from engines.errors import BuildError
from engines.manifest import EngineEntry, TensorSpec
from engines.package_entry import PackageEntry
from tmpdiff_export.targets.accuracy import AccuracyCheck
from tmpdiff_export.targets.target import file_entry
from tmpdiff_export.targets.torch.blocks import compile_blocks, part_paths
from tmpdiff_export.targets.torch.compile import EngineModule, compile_package, operators_of
from tmpdiff_export.weights.files import write_tensors


@dataclass(frozen=True, eq=False)
class PackageTask:
    """What is left to do for an engine whose weights are stored, as plain data: any process can do it.

    Attributes:
        name: of the engine; stem of its files.
        folder: a bundle folder, or one that stands for it.
        module: what is compiled.
        weights: its weight files in the folder, which hold the module's tensors.
        device: "cuda" or "cpu".
        described: how the manifest calls the device.
        batch: rows that the package is compiled for.
        dtype: of its floating inputs inside.
        outputs: names of the module's outputs.
        check: inputs and references for its SQNR.
        lowering: see `EngineEntry`.
        attention: scales of its FP8 attention, by the names of their buffers; they go into a weight file of its own.
        blocks: whether blocks that repeat are compiled once.
        recipe: see `EngineEntry`.
        floor_db: the least SQNR the build accepts.
    """

    name: str
    folder: Path
    module: EngineModule
    weights: tuple[FileEntry, ...]
    device: str
    described: str
    batch: int
    dtype: Literal["float16", "bfloat16", "float32"]
    outputs: tuple[str, ...]
    check: AccuracyCheck
    lowering: Mapping[str, int]
    attention: Mapping[str, torch.Tensor]
    blocks: bool
    recipe: str
    floor_db: float

    def __call__(self) -> EngineEntry:
        """Writes the package beside the weights, and measures it.

        Raises:
            BuildError: torch cannot compile the module or the GPU's memory does not suffice, or this process sees a GPU
                of another kind.
            BackendError: the package cannot be loaded.
        """
        try:
            return self._make()
        except torch.OutOfMemoryError as error:
            raise BuildError(
                f"{self.name}: the GPU's memory does not suffice to compile and measure it; use fewer --workers, or end "
                "other processes on the GPU"
            ) from error

    def _make(self) -> EngineEntry:
        if self.device != "cpu":
            self._require_gpu()
        package = self.folder / "engines" / f"{self.name}.pt2"
        check = self.check
        examples = [_rows(item, self.batch) for item in check.batches[0]]
        weights = (*self.weights, *self._store_scales())
        outputs, parts = self._compile(examples, package)
        entry = EngineEntry(
            file=file_entry(self.folder, package),
            weights=weights,
            backend="torch",
            backend_version=VERSION,
            device=self.described,
            lowering=dict(self.lowering),
            onnx_sha256=None,
            recipe=self.recipe,
            sqnr_db=0.0,
            sqnr_floor_db=self.floor_db,
            inputs=tuple(_spec(name, item) for name, item in zip(check.names, examples, strict=True)),
            outputs=tuple(_spec(name, item) for name, item in zip(self.outputs, outputs, strict=True)),
            package=PackageEntry(
                batch=self.batch,
                dtype=self.dtype,
                weights_bytes=sum(file.bytes for file in weights),
                **parts,
            ),
        )
        host = open_host("torch", self.described)
        try:
            host.add(self.name, entry, package)
            engine = host.engine(self.name)
            measured = check.sqnr_db(engine)
        finally:
            host.close()
        return entry.model_copy(update={"sqnr_db": round(measured, 2)})

    def _compile(
        self, examples: Sequence[torch.Tensor], package: Path
    ) -> tuple[Sequence[torch.Tensor], dict[str, Any]]:
        """The outputs, without content, and what `PackageEntry` says of operators and blocks."""
        if not self.blocks:
            outputs, operators = compile_package(self.module, self.device, examples, package)
            return outputs, {"operators": operators}
        made = compile_blocks(self.module, self.device, examples, package)
        _, *others = part_paths(package, len(made.parts))
        blocks = tuple(file_entry(self.folder, path) for path in others)
        operators = operators_of(*made.parts)
        return made.outputs, {"operators": operators, "blocks": blocks, "calls": made.calls, "results": made.results}

    def _store_scales(self) -> tuple[FileEntry, ...]:
        if not self.attention:
            return ()
        path = self.folder / "engines" / f"{self.name}.attention.safetensors"
        write_tensors(path, self.attention)
        return (file_entry(self.folder, path),)

    def _require_gpu(self) -> None:
        from engines.backends.torch.host import usable_gpu  # which needs cuda-bindings

        gpu = usable_gpu()
        if gpu.described != self.described:
            raise BuildError(
                f"{self.name} is compiled for {self.described}, a worker process got {gpu.described}; "
                "name GPUs of one kind in CUDA_VISIBLE_DEVICES"
            )


def _rows(example: torch.Tensor, batch: int) -> torch.Tensor:
    """An example of `batch` rows, made of the rows that there are."""
    return example.repeat(-(-batch // len(example)), *[1] * (example.ndim - 1))[:batch].contiguous()


def _spec(name: str, tensor: torch.Tensor) -> TensorSpec:
    """A package's input or output: floating ones are float32, and only the number of rows is free."""
    dtype: Literal["float32", "int64"] = "float32" if tensor.is_floating_point() else "int64"
    return TensorSpec(name=name, dtype=dtype, shape=("batch", *tensor.shape[1:]))
