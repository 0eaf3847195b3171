"""The one weight store of a bundle: every tensor once, in files named by the engines that read them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from engines.documents import canonical_json
from engines.errors import BuildError
from engines.files import sha256_bytes
from tmpdiff_export.bundling.engine import StoredFile
from tmpdiff_export.bundling.site import Site
from tmpdiff_export.onnx_graphs.stored import TRANSPOSED, plain_tensor
from tmpdiff_export.quantization.codes import LayerRange, quantize_layer
from tmpdiff_export.quantization.recipes import RECIPES
from tmpdiff_export.targets.target import EngineJob, Form, SourceModel, layer_on_meta
from tmpdiff_export.weights.files import WeightFile

Tensors = Mapping[str, torch.Tensor]


def shared_tensors(engines: Mapping[str, Tensors]) -> dict[tuple[str, ...], dict[str, torch.Tensor]]:
    """What is not quantized: tensors that the same engines read belong together.

    Args:
        engines: what each reads, by its name.

    Returns:
        For each set of readers, in the order of `engines`, its tensors on the device "meta".
    """
    readers: dict[tuple[str, torch.dtype, torch.Size], list[str]] = {}
    for engine, tensors in engines.items():
        for name, item in tensors.items():
            readers.setdefault((name, item.dtype, item.shape), []).append(engine)
    found: dict[tuple[str, ...], dict[str, torch.Tensor]] = {}
    for (name, dtype, shape), names in readers.items():
        found.setdefault(tuple(names), {})[name] = torch.empty(shape, dtype=dtype, device="meta")
    return found


def store_plain(
    site: Site, form: Form, model: SourceModel, readers: Sequence[str], tensors: Tensors, source: str
) -> StoredFile:
    """Writes what is not quantized, one tensor at a time, or finds it among the stages.

    Args:
        site: the build.
        form: of the engines that read it.
        model: what the tensors are of.
        readers: the engines, after which the file is named.
        tensors: from `shared_tensors`.
        source: hash of the files that the model comes from.

    Raises:
        BuildError: a weight does not fit the type that it is stored in.
    """
    stem = "+".join(readers)
    file, step = f"{stem}.safetensors", f"store weights of {', '.join(readers)}"

    def write(folder: Path) -> None:
        with WeightFile(folder / file, tensors) as written:
            for index, (name, wanted) in enumerate(tensors.items()):
                site.report(step, index, len(tensors))
                tensor = plain_tensor(name, model.read, wanted.dtype)
                if wanted.dtype is torch.float16 and not torch.isfinite(tensor).all():
                    raise BuildError(
                        f"weight {name} reaches {float(model.read(name.removesuffix(TRANSPOSED)).abs().max()):g}, and float16, in "
                        f"which {', '.join(readers)} would have it, ends at 65504; this model cannot be built for backend "
                        f"{site.target.backend}"
                    )
                written.write(name, tensor)
        site.report(step, len(tensors), len(tensors))

    key = site.key(source=source, form=form.name, tensors=_described(tensors))
    return StoredFile.of(site.stages.keep(f"weights-{stem}-{form.name}", key, write), file)


def store_codes(
    site: Site, form: Form, job: EngineJob, source: str, weight: Callable[[str], torch.Tensor]
) -> StoredFile:
    """Quantizes one layer after the other and writes its codes and scales, or finds them among the stages.

    Args:
        site: the build.
        form: of the engines that read them.
        job: one of these engines; the file is named after it, but for picture size and text length.
        source: hash of the files that the model comes from.
        weight: of a layer by the layer's name, on any device.
    """
    model, precision, ranges = job.model, job.precision, job.ranges
    stem = job.name.partition(".")[0]
    file = f"{stem}.codes.safetensors"
    step = f"quantize {stem}-{job.recipe}"

    def write(folder: Path) -> None:
        shapes = {
            name: item
            for layer, found in ranges.items()
            for name, item in form.codes(model, layer, layer_on_meta(model.module, layer, precision, found)).items()
        }
        with WeightFile(folder / file, shapes) as written:
            for index, (layer, found) in enumerate(ranges.items()):
                site.report(step, index, len(ranges))
                quantized = quantize_layer(weight(layer).flatten(1), found, precision, RECIPES[precision].block_size)
                for name, item in form.codes(model, layer, quantized).items():
                    written.write(name, item)
        site.report(step, len(ranges), len(ranges))

    key = site.key(source=source, form=form.name, precision=precision.value, ranges=ranges_digest(ranges))
    return StoredFile.of(site.stages.keep(f"codes-{stem}-{job.recipe}-{form.name}", key, write), file)


def ranges_digest(ranges: Mapping[str, LayerRange]) -> str:
    """Hash of ranges."""
    return sha256_bytes(
        canonical_json(
            {
                name: [
                    found.input_amax,
                    found.shared_weight_amax,
                    found.rank,
                    None if found.pre_quant_scale is None else sha256_bytes(found.pre_quant_scale.numpy().tobytes()),
                ]
                for name, found in ranges.items()
            }
        )
    )


def tensors_digest(batches: Sequence[Sequence[torch.Tensor]]) -> str:
    """Hash of tensors on the CPU."""
    digest = hashlib.sha256()
    for batch in batches:
        for item in batch:
            digest.update(f"{item.dtype} {tuple(item.shape)}".encode())
            digest.update(item.contiguous().numpy().data)
    return digest.hexdigest()


def _described(tensors: Tensors) -> dict[str, list[object]]:
    return {name: [str(item.dtype), *item.shape] for name, item in tensors.items()}
