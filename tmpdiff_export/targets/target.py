"""What a target is: a backend that engines are built for. What it is given, and what it hands back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import onnx
import torch

from engines.documents import FileEntry
from engines.errors import BuildError
from engines.files import sha256_file
from engines.manifest import EngineEntry, TensorSpec
from engines.precision import Precision
from tmpdiff_export.onnx_graphs.export import ExportInput
from tmpdiff_export.quantization.codes import AttentionRange, LayerRange, QuantizedLayer, quantize_layer
from tmpdiff_export.quantization.recipes import RECIPES
from tmpdiff_export.targets.accuracy import AccuracyCheck
from tmpdiff_export.weights.streamed import Read

_DTYPES: dict[int, Literal["float32", "float16", "int64"]] = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.INT64: "int64",
}


@dataclass(frozen=True, eq=False)
class SourceModel:
    """A model of the pipeline, and how its engines are judged.

    Attributes:
        module: its export wrapper, hollow (`weights.streamed`), float32 on the CPU; not changed. With `DENOISER` an
            attribute of it where it is the denoiser's.
        read: its parameters and buffers by name, in the dtype that they are stored in.
        inputs: what it takes, with examples.
        outputs: what it returns, with their symbolic axes.
        check: inputs and references for the SQNR of its engines.
        checked: a digest of them.
        batch_per_picture: samples of an engine call for one picture; 2 where guidance doubles the batch.
        dtype: what most of its numbers are stored in.
        half: whether its engines compute in a 16-bit type. Text encoder and VAE decoder do not: of them, only weights are
            stored in 16 bits.
        sizes: (h, w) of the latents that its engines are to run, the default first; empty where it has none.
    """

    module: torch.nn.Module
    read: Read
    inputs: Sequence[ExportInput]
    outputs: Mapping[str, Mapping[int, str]]
    check: AccuracyCheck
    checked: str
    batch_per_picture: int
    dtype: torch.dtype
    half: bool
    sizes: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, eq=False)
class EngineJob:
    """One engine to make.

    Attributes:
        name: "fp16", "int8", ..., "text_encoder" or "vae_decoder", of further sizes and text lengths with what tells them
            apart behind a dot ("fp8.1216x832", "text_encoder.t256"); stem of its files.
        model: what it is made of.
        recipe: quantization variant, "none" where nothing is quantized.
        precision: of its quantized layers; the reference's where nothing is quantized.
        ranges: its quantized layers by name.
        floor_db: the least SQNR the build accepts.
        sixteen_bit: all products are in 16 bit: an engine of higher precision from the stored weights of a lower one. Only
            the torch backend can do this.
        attention: by name, the attention layers that compute in FP8; only the torch backend can do this.
    """

    name: str
    model: SourceModel
    recipe: str
    precision: Precision
    ranges: Mapping[str, LayerRange]
    floor_db: float
    sixteen_bit: bool = False
    attention: Mapping[str, AttentionRange] = field(default_factory=dict)


MakeTask = Callable[[Path, Sequence[FileEntry]], Callable[[], EngineEntry]]
"""What writes an engine to `engines/` in a folder, loads it as the runtime would, and measures its SQNR.

It is given a bundle folder, or one that stands for it, in which the weight files are already, and those that the engine
reads, relative to the folder. The result is to be called once, in any process; it raises BackendError where the backend
refuses the engine.
"""


@dataclass(frozen=True, eq=False)
class PreparedEngine:
    """An engine that is known as far as its weights need not be read for.

    Attributes:
        tensors: what its weight files have to hold, by name, but for the codes of its quantized layers; only shapes and
            dtypes count.
        task: see `MakeTask`.
    """

    tensors: Mapping[str, torch.Tensor]
    task: MakeTask


class Target(Protocol):
    """A backend that engines are built for."""

    @property
    def backend(self) -> str:
        """Its key in `engines.backends.table.BACKENDS`."""
        ...

    @property
    def key(self) -> dict[str, Any]:
        """Of JSON data, what of it shapes an engine: versions, device, options."""
        ...

    @property
    def form(self) -> Form:
        """How it stores quantized layers."""
        ...

    @property
    def fixed_shapes(self) -> bool:
        """Whether an engine runs one picture size and text length only."""
        ...

    def require_memory(self, parameters: int) -> None:
        """Refuses a denoiser that cannot be built here, before any work.

        Args:
            parameters: number of its parameters.

        Raises:
            BuildError: naming what would fit.
        """
        ...

    def prepare(self, job: EngineJob) -> PreparedEngine:
        """Begins an engine.

        Raises:
            BuildError: the model cannot be exported.
        """
        ...


class Form(Protocol):
    """How a kind of engines stores quantized layers; of what is not quantized they differ in names and dtypes only."""

    @property
    def name(self) -> str:
        """Of the form, for keys."""
        ...

    def codes(self, model: SourceModel, name: str, layer: QuantizedLayer) -> dict[str, torch.Tensor]:
        """What is stored of a quantized layer, by name.

        Args:
            model: what the layer is of.
            name: of the layer.
            layer: codes and scales; on the device "meta", what is returned is, too.
        """
        ...


Start = Callable[[str, Callable[[], EngineEntry]], "Future[EngineEntry]"]
"""Begins a task of `PreparedEngine`, given the engine's name; the entry is there at once, or comes from another process."""


def at_once(_: str, task: Callable[[], EngineEntry]) -> Future[EngineEntry]:
    """Makes an engine in this process, before it returns."""
    made: Future[EngineEntry] = Future()
    made.set_result(task())
    return made


def layer_on_meta(module: torch.nn.Module, name: str, precision: Precision, found: LayerRange) -> QuantizedLayer:
    """A quantized layer without content: what it will be made of, and in which shapes.

    Args:
        module: what the layer is of.
        name: of the layer.
        precision: of its codes.
        found: its range.
    """
    weight = torch.empty(module.get_submodule(name).weight.shape, device="meta").flatten(1)
    return quantize_layer(weight, found, precision, RECIPES[precision].block_size)


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
