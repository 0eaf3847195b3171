"""Text encoders whose linear layers are stored in 8 bit: what is stored, and what engines of them compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file

from engines.backends.onnxruntime.cpu import OnnxRuntimeEngine
from engines.precision import REFERENCE, Precision
from engines.text import text_inputs
from tmpdiff_export.bundling.components import with_narrow_weights
from tmpdiff_export.bundling.engine import NARROW_WEIGHTS_FLOOR_DB
from tmpdiff_export.onnx_graphs.export import ExportInput
from tmpdiff_export.pipelines.families.table import family_of
from tmpdiff_export.pipelines.texts import source_texts
from tmpdiff_export.quantization.sixteen_bit import NO_RECIPE
from tmpdiff_export.targets.accuracy import sqnr_db
from tmpdiff_export.targets.exported import OnnxForm, linear_layers, plain_tensors, strong_graph, write_graph
from tmpdiff_export.targets.onnxruntime.cpu import CpuTarget
from tmpdiff_export.targets.target import EngineJob, SourceModel, file_entry
from tmpdiff_export.targets.torch.settings import PackageSettings
from tmpdiff_export.targets.torch.target import TorchTarget
from tmpdiff_export.weights.streamed import taken_weights
from tools.acceptance.checks import check_of
from tools.acceptance.export_families import store
from tools.acceptance.text_pipelines import TEXT_PIPELINES

# Linear layers of the encoders, and of them those that nothing depends on: SDXL and SD3 leave CLIP's last layers out, and
# SDXL the projection of none.
NAMES = {"sd": (18, 0), "sdxl": (18 + 19, 6), "sd3-t5": (19 + 19 + 14, 0), "flux": (18 + 14, 0), "sana": (14, 0)}


@pytest.fixture(scope="module")
def job_of() -> Callable[[str], EngineJob]:
    """The text encoder engine of a pipeline, in 8 bit; made once."""
    made: dict[str, EngineJob] = {}

    def job(name: str) -> EngineJob:
        if name not in made:
            made[name] = narrow_job(name)
        return made[name]

    return job


def narrow_job(name: str) -> EngineJob:
    pipe = TEXT_PIPELINES[name]()
    _, family = family_of(pipe)
    arrays: dict[str, torch.Tensor] = {}
    for position, text in enumerate(source_texts(pipe, family)):
        tokens = text.tokens(["a red ring", "blue"])
        ids, mask = text_inputs(position)
        arrays[ids] = torch.from_numpy(tokens.input_ids)
        if text.part.masked:
            arrays[mask] = torch.from_numpy(tokens.attention_mask)
    module = family.wrap_text(pipe, None).eval()
    outputs = {name: dict(axes) for name, axes in family.text_outputs.items()}
    check = check_of(module, tuple(arrays), next(iter(outputs)), [tuple(arrays.values())])
    weights = {**taken_weights(module), **dict(module.named_buffers())}
    model = SourceModel(
        module=module,
        read=weights.__getitem__,
        inputs=[ExportInput(key, tensor, {0: "batch"}) for key, tensor in arrays.items()],
        outputs=outputs,
        check=check,
        checked=name,
        batch_per_picture=2,
        dtype=torch.float32,
        half=False,
    )
    return with_narrow_weights(EngineJob("text_encoder", model, NO_RECIPE, REFERENCE, {}, 40.0))


@pytest.mark.parametrize("name", NAMES)
def test_all_linear_layers_are_codes_that_what_is_returned_depends_on(
    name: str, job_of: Callable[[str], EngineJob]
) -> None:
    job = job_of(name)
    every, unread = NAMES[name]
    linear = [part for part in job.model.module.modules() if isinstance(part, torch.nn.Linear)]
    assert len(linear) == every
    assert len(job.ranges) == len(linear_layers(job.model)) == every - unread


@pytest.mark.parametrize("name", NAMES)
def test_the_cpus_engine_reaches_its_floor_and_is_smaller(
    name: str, job_of: Callable[[str], EngineJob], tmp_path: Path
) -> None:
    job, target = job_of(name), CpuTarget()
    (tmp_path / "engines").mkdir()
    prepared = target.prepare(job)
    file = store(job, prepared.tensors, target.form, tmp_path / "engines" / "text_encoder.safetensors")
    entry = prepared.task(tmp_path, [file_entry(tmp_path, file)])()
    assert NARROW_WEIGHTS_FLOOR_DB < entry.sqnr_db < 60
    assert entry.lowering["int8-weights"] == len(job.ranges)
    assert_small(job, load_file(file))


@pytest.mark.parametrize("name", NAMES)
def test_the_strongly_typed_graph_computes_the_same(
    name: str, job_of: Callable[[str], EngineJob], tmp_path: Path
) -> None:
    """As ONNX Runtime has it on a GPU."""
    job = job_of(name)
    graph = strong_graph(job)
    path = tmp_path / "text_encoder.onnx"
    file = store(job, plain_tensors(job, graph, OnnxForm()), OnnxForm(), path.with_suffix(".safetensors"))
    write_graph(graph, path, [file])
    assert job.model.check.sqnr_db(OnnxRuntimeEngine(path)) > NARROW_WEIGHTS_FLOOR_DB
    onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])  # with all optimizers
    assert_small(job, load_file(file))


@pytest.mark.parametrize("name", NAMES)
def test_the_torch_module_computes_the_same(name: str, job_of: Callable[[str], EngineJob], tmp_path: Path) -> None:
    job = job_of(name)
    target = TorchTarget("cpu", 1, (Precision.FP16,), PackageSettings())
    prepared = target.prepare(job)
    file = store(job, prepared.tensors, target.form, tmp_path / "text_encoder.safetensors")
    task = prepared.task(tmp_path, [])
    stored = load_file(file)
    assert stored.keys() == task.module.tensors.keys()
    (batch,), (reference,) = job.model.check.batches, job.model.check.references
    with torch.inference_mode():
        found = torch.func.functional_call(task.module, {f"module.{key}": item for key, item in stored.items()}, batch)
    assert NARROW_WEIGHTS_FLOOR_DB < sqnr_db(reference, found[0].numpy()) < 60
    assert task.lowering == {"int8 weight in a float32 product": len(job.ranges)}
    assert_small(job, stored)


def assert_small(job: EngineJob, stored: dict[str, torch.Tensor]) -> None:
    """Every layer has one byte a weight and a scale a row, and nothing is stored twice."""
    layers = {name: job.model.module.get_submodule(name) for name in job.ranges}
    codes = [item for item in stored.values() if item.dtype is torch.int8]
    assert sum(item.numel() for item in codes) == sum(layer.weight.numel() for layer in layers.values())
    assert not {f"{name}.weight" for name in layers} & stored.keys()
    scales = [item for name, item in stored.items() if name.endswith("weight_scale")]
    assert sorted(len(item) for item in scales) == sorted(layer.out_features for layer in layers.values())
    assert {item.dtype for item in scales} == {torch.float32}
    assert all(np.isfinite(item.float().numpy()).all() for item in stored.values())
