"""The denoiser with what its engines are checked against: FP32 torch on inputs that range calibration has not seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from engines.manifest import MODEL_OUTPUT
from tmpdiff_export.bundling.observed import CHECK_BATCHES, shape_name, wrapped
from tmpdiff_export.bundling.site import Site
from tmpdiff_export.bundling.weights import tensors_digest
from tmpdiff_export.devices import Batch
from tmpdiff_export.pipelines.families.family import LATENT_AXES
from tmpdiff_export.pipelines.settings import Setting
from tmpdiff_export.quantization.ranges import spread
from tmpdiff_export.targets.accuracy import AccuracyCheck, step_sizes, torch_outputs
from tmpdiff_export.targets.target import SourceModel
from tmpdiff_export.weights.streamed import OnDevice

_CHECK = "check.safetensors"


@dataclass(frozen=True)
class Checks:
    """Inputs at one size and text length.

    Attributes:
        setting: with that size and text length.
        batches: the inputs.
    """

    setting: Setting
    batches: list[Batch]


def denoiser_model(
    site: Site, module: torch.nn.Module, checks: Sequence[Checks], example: Batch, read: OnDevice
) -> SourceModel:
    """The denoiser with its check.

    FP32 torch says what it makes of the inputs. Samples count for as much as the steps that they are from move the
    latents; those at other sizes than the default one for as much as its do on average.

    Args:
        site: the build.
        module: the denoiser's export wrapper.
        checks: by size and text length; engines are to run them all.
        example: inputs that a graph is traced with.
        read: the denoiser's weights.
    """
    source, family = site.source, site.source.family
    weights = wrapped(read, module)
    batches, counts = [], []
    sizes = spread(step_sizes(site.setting.table).tolist(), CHECK_BATCHES)
    for item in checks:
        several = with_larger_batch(item.batches)
        if item.setting.shape == site.setting.shape:
            rows = [(torch.full((len(b[0]),), size),) for b, size in zip(item.batches, sizes, strict=True)]
            counts += [count.numpy() for (count,) in with_larger_batch(rows)]
        else:
            counts += [torch.full((len(b[0]),), sum(sizes) / len(sizes)).numpy() for b in several]
        batches += several

    def references(folder: Path) -> None:
        site.report("run FP32 denoiser", 0, 1)
        found = torch_outputs(module, weights, batches, site.options.range_device)
        check = AccuracyCheck(tuple(family.inputs), MODEL_OUTPUT, tuple(batches), tuple(found), tuple(counts))
        check.save(folder / _CHECK)

    name = shape_name(site, checks[0].setting)
    key = site.key(batches=tensors_digest(batches), source=site.denoiser_sha256, device=site.options.range_device)
    kept = site.stages.keep("check-denoiser" + (f"-{name}" if name else ""), key, references)
    return SourceModel(
        module=module,
        read=wrapped(source.weights.read, module),
        inputs=family.export_inputs(example),
        outputs={MODEL_OUTPUT: LATENT_AXES},
        check=AccuracyCheck.load(kept.folder / _CHECK, list(family.inputs), MODEL_OUTPUT),
        checked=kept.digest,
        batch_per_picture=2 if any(source.doubled(item.setting) for item in checks) else 1,
        dtype=source.weights.dtype,
        half=True,
        sizes=tuple(dict.fromkeys(item.setting.latents_shape[1:] for item in checks)),
    )


def with_larger_batch(batches: Sequence[Batch]) -> list[Batch]:
    """`batches` and one of twice the size: a batch size baked into a graph shows there."""
    first, last = batches[0], batches[-1]
    return [*batches, tuple(torch.cat(pair) for pair in zip(first, last, strict=True))]
