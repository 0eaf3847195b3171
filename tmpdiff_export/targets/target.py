"""What a target is: a backend that engines are built for. What it is given, and what it hands back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import onnx
import torch

from engines.errors import BuildError
from engines.files import sha256_file
from engines.manifest import EngineEntry, FileEntry, TensorSpec
from engines.precision import Precision
from tmpdiff_export.quantization.codes import AttentionRange, QuantizedLayer
from tmpdiff_export.targets.accuracy import AccuracyCheck

_DTYPES: dict[int, Literal["float32", "float16", "int64"]] = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.INT64: "int64",
}


@dataclass(frozen=True, eq=False)
class EngineJob:
    """One engine to make.

    Attributes:
        name: "fp16", "int8", ..., "text_encoder" or "vae_decoder"; stem of its files.
        graph: its ONNX graph with weights in memory; not changed.
        onnx_file: the same graph on disk, checked.
        recipe: quantization variant, "none" where nothing is quantized.
        quantized: precision of its quantized layers, None where nothing is quantized.
        check: inputs and references for its SQNR.
        floor_db: the least SQNR the build accepts.
        batch_per_picture: samples of an engine call for one picture; 2 where guidance doubles the batch.
        module: the float32 export wrapper that the graph was made from; not changed.
        layers: its quantized layers by name.
        half: whether the engine computes in a 16-bit type; text encoder and VAE decoder do not.
        float32_inputs: inputs that are not rounded to that type.
        weights_of: the engine whose weights file the reference reads, in which `layers` are; None where every engine
            has its own. Only the torch backend can do this.
        attention: by name, the attention layers that compute in FP8; only the torch backend can do this.
    """

    name: str
    graph: onnx.ModelProto
    onnx_file: Path
    recipe: str
    quantized: Precision | None
    check: AccuracyCheck
    floor_db: float
    batch_per_picture: int
    module: torch.nn.Module
    layers: Mapping[str, QuantizedLayer]
    half: bool
    float32_inputs: frozenset[str] = frozenset()
    weights_of: EngineEntry | None = None
    attention: Mapping[str, AttentionRange] = field(default_factory=dict)


class Target(Protocol):
    """A backend that engines are built for."""

    @property
    def backend(self) -> str:
        """Its key in `engines.backends.table.BACKENDS`."""
        ...

    def require_memory(self, parameters: int) -> None:
        """Refuses a denoiser that cannot be built here, before any work.

        Args:
            parameters: number of its parameters.

        Raises:
            BuildError: naming what would fit.
        """
        ...

    def make(self, job: EngineJob, folder: Path) -> EngineEntry:
        """Writes the engine under `folder`, loads it as the runtime would, and measures its SQNR.

        Args:
            job: what to make.
            folder: a bundle folder, or one that stands for it; files go to `engines/` in it.

        Raises:
            BackendError: the backend refuses the graph.
        """
        ...


Start = Callable[[EngineJob, Path], "Future[EngineEntry]"]
"""Begins what `Target.make` does; the entry is there at once, or comes from another process."""


def at_once(target: Target) -> Start:
    """Makes engines in this process, each before its start returns."""

    def start(job: EngineJob, folder: Path) -> Future[EngineEntry]:
        made: Future[EngineEntry] = Future()
        made.set_result(target.make(job, folder))
        return made

    return start


def require_weights_fit(parameters: int, gpu_bytes: int) -> None:
    """Refuses a denoiser whose 16-bit weights alone would not fit in the memory of the GPU.

    Raises:
        BuildError: saying what they take.
    """
    if 2 * parameters > gpu_bytes:
        raise BuildError(
            f"{parameters} parameters take {2 * parameters} bytes in 16 bit, the GPU has {gpu_bytes}; "
            "use a GPU with more memory"
        )


def file_entry(bundle: Path, path: Path) -> FileEntry:
    """The manifest entry of a file in a bundle."""
    return FileEntry(path=path.relative_to(bundle).as_posix(), sha256=sha256_file(path), bytes=path.stat().st_size)


def tensor_specs(values: Sequence[onnx.ValueInfoProto]) -> tuple[TensorSpec, ...]:
    """The specs of graph inputs or outputs."""
    return tuple(
        TensorSpec(
            name=value.name,
            dtype=_DTYPES[value.type.tensor_type.elem_type],
            shape=tuple(axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim),
        )
        for value in values
    )
