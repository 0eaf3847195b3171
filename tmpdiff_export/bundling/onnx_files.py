"""`--onnx-dir`: the strongly typed graphs of all engines, whatever the backend, with their weights beside them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from engines.errors import BuildError
from engines.files import sha256_bytes
from tmpdiff_export.bundling.engine import StoredFile
from tmpdiff_export.bundling.leftovers import discard
from tmpdiff_export.bundling.site import Site
from tmpdiff_export.bundling.stage_files import link
from tmpdiff_export.bundling.weights import shared_tensors, store_codes, store_plain
from tmpdiff_export.targets.exported import OnnxForm, plain_tensors, strong_graph, write_graph
from tmpdiff_export.targets.target import EngineJob


@dataclass(frozen=True, eq=False)
class ModelJobs:
    """The engines of one model.

    Attributes:
        jobs: of the variants that the bundle has.
        source: hash of the files that the model comes from.
        weight: of a quantized layer by the layer's name.
    """

    jobs: Sequence[EngineJob]
    source: str
    weight: Callable[[str], torch.Tensor]


def keep_graphs(site: Site, folder: Path, models: Sequence[ModelJobs]) -> None:
    """Writes `<engine>.onnx` and weight files into a folder, all of them or, on an error, none.

    Args:
        site: the build.
        folder: made if it is missing; files of the same names are replaced.
        models: all that the bundle has.

    Raises:
        BuildError: a model cannot be exported, a graph is not valid, or a folder has the name of a file.
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Named after the bundle, of which there is one build at a time: what one that was killed has left is known by it.
    scratch = folder / f".partial-{sha256_bytes(os.fsencode(site.stages.folder))[:8]}"
    if os.path.lexists(scratch):
        discard(scratch)
    scratch.mkdir()
    try:
        for model in models:
            _write(site, scratch, model)
        made = sorted(scratch.iterdir())
        if taken := [path.name for path in made if (folder / path.name).is_dir()]:
            raise BuildError(f"{folder / taken[0]} is a folder, where --onnx-dir is to have a file; remove it")
        for path in made:
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write(site: Site, folder: Path, model: ModelJobs) -> None:
    form = OnnxForm()
    graphs = {}
    for job in model.jobs:
        site.report(f"export {job.name}.onnx", 0, 1)
        graphs[job.name] = strong_graph(job)
    tensors = {job.name: plain_tensors(job, graphs[job.name], form) for job in model.jobs}
    plain = {
        readers: store_plain(site, form, model.jobs[0].model, readers, shared, model.source)
        for readers, shared in shared_tensors(tensors).items()
    }
    for job in model.jobs:
        files = [stored for readers, stored in plain.items() if job.name in readers]
        if job.ranges:
            files.append(store_codes(site, form, job, model.source, model.weight))
        paths = [_placed(stored, folder, copied=site.options.keep_stages) for stored in files]
        write_graph(graphs[job.name], folder / f"{job.name}.onnx", paths)


def _placed(stored: StoredFile, folder: Path, *, copied: bool) -> Path:
    """A weight file in the folder; copied where the stage stays, since ONNX's checker refuses files of two names."""
    path = folder / stored.path.name
    if not path.exists():
        if copied:
            shutil.copyfile(stored.path, path)
        else:
            link(stored.path, path)
    return path
