"""Denoisers of every family: the wrapper against the pipeline, the engine against torch, what is quantized."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from helpers.stored_graphs import save_stored

from engines.backends.onnxruntime.cpu import OnnxRuntimeEngine
from engines.errors import BuildError
from engines.manifest import MODEL_OUTPUT
from engines.precision import REFERENCE, Precision
from tmpdiff_export.bundling.engine import require_floor
from tmpdiff_export.devices import Batch
from tmpdiff_export.pipelines.families.flux import pack
from tmpdiff_export.pipelines.families.table import DENOISERS, FAMILIES, family_of
from tmpdiff_export.pipelines.load import open_pipeline
from tmpdiff_export.quantization.sixteen_bit import NO_RECIPE
from tmpdiff_export.targets.accuracy import sqnr_db
from tmpdiff_export.targets.exported import strong_graph, typed_graph
from tmpdiff_export.targets.onnxruntime.lowering import lower_for_cpu
from tmpdiff_export.targets.target import EngineJob, SourceModel
from tmpdiff_export.targets.torch.compile import EngineModule
from tmpdiff_export.targets.torch.lowering import lower_for_torch
from tmpdiff_export.weights.streamed import on_meta
from tools.acceptance.checks import check_of
from tools.acceptance.export_families import best_cpu_engine, family_model, quantized_weights, write_strong_graph
from tools.acceptance.miniatures import TEXT_TOKENS, Miniature, miniature

FP16_FLOOR_DB = 50.0


@dataclass(frozen=True, eq=False)
class Exported:
    """A miniature, whole and as a build has it."""

    small: Miniature
    module: torch.nn.Module
    model: SourceModel
    batches: list[Batch]

    @property
    def job(self) -> EngineJob:
        """Its FP16 engine."""
        return EngineJob("fp16", self.model, NO_RECIPE, REFERENCE, {}, FP16_FLOOR_DB)

    def feeds(self, batch: Batch) -> dict[str, np.ndarray]:
        return {name: tensor.numpy() for name, tensor in zip(self.small.family.inputs, batch, strict=True)}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def exported() -> Callable[[str], Exported]:
    """A family, made once."""
    made: dict[str, Exported] = {}

    def export(name: str) -> Exported:
        if name not in made:
            small = miniature(name)
            module, batches = small.wrap(), small.batches(4, seed=1)
            model = family_model(miniature(name), [rows(batches[2], 3)])
            made[name] = Exported(small, module, model, batches)
        return made[name]

    return export


def rows(batch: Batch, count: int) -> Batch:
    """`count` samples made of those in `batch`, all different."""
    repeated = (torch.cat([tensor] * count)[:count] for tensor in batch)
    latents, *rest = repeated
    return (latents + torch.arange(count).reshape(-1, 1, 1, 1), *rest)


def outputs_of(module: torch.nn.Module, batch: Batch) -> tuple[np.ndarray, ...]:
    return check_of(module, (), "", [batch]).references


def fits(small: Miniature, key: str) -> bool:
    """Whether a family takes a denoiser."""
    family = DENOISERS[key]
    return type(small.denoiser).__name__ == family.denoiser_class and family.refusal(small.denoiser) is None


def test_every_family_has_a_miniature() -> None:
    for name, family in DENOISERS.items():
        small = miniature(name)
        assert type(small.denoiser).__name__ == family.denoiser_class
        assert next(key for key in DENOISERS if fits(small, key)) == name


@pytest.mark.parametrize("name", DENOISERS)
def test_the_wrapper_computes_what_the_pipeline_is_given(name: str) -> None:
    small = miniature(name)
    module = small.wrap()
    scheduled = []
    batches, outputs = small.calls(3, seed=5)
    for batch, output in zip(batches, outputs, strict=True):
        with torch.inference_mode():
            measured = module(*batch)
        assert measured.shape == batch[0].shape
        expected = output.chunk(2, dim=1)[0] if name == "pixart" else output
        torch.testing.assert_close(
            pack(measured) if name.startswith("flux") else measured, expected, rtol=1e-4, atol=1e-4
        )
        scheduled.append(float(batch[1][0]))
    np.testing.assert_allclose(scheduled, small.pipe.scheduler.timesteps.numpy(), rtol=1e-6)


@pytest.mark.parametrize("name", DENOISERS)
def test_the_fp16_engine_equals_torch_at_any_batch_and_text_length(
    name: str, exported: Callable[[str], Exported], tmp_path: Path
) -> None:
    export = exported(name)
    lowered, _ = lower_for_cpu(typed_graph(export.job))
    engine = OnnxRuntimeEngine(save_stored(lowered, tmp_path / "engine.onnx", export.module))
    three = rows(export.batches[1], 3)
    shorter = tuple(tensor[:, : TEXT_TOKENS - 5] if tensor.shape[1:2] == (TEXT_TOKENS,) else tensor for tensor in three)
    assert any(a.shape != b.shape for a, b in zip(three, shorter, strict=True))
    for batch in (rows(export.batches[0], 1), three, shorter):
        (expected,) = outputs_of(export.module, batch)
        measured = engine.run(export.feeds(batch))[MODEL_OUTPUT]
        assert measured.shape == tuple(batch[0].shape)
        assert sqnr_db(expected, measured) > FP16_FLOOR_DB


# Layers (linear ones, with INT8 convolutions too) that stay in FP16 are embedders, modulation, text projections,
# output layers, and in UNets the convolutions on the bare residual stream; with INT4 the output layers only.
QUANTIZED = [
    ("pixart", Precision.NVFP4, 2 * 10),  # 8 attention projections and 2 of the feed-forward per block
    ("sana", Precision.INT8, 2 * 10),  # of them 2 pointwise convolutions per block
    ("flux", Precision.INT4, 2 * 12 + 2 * 5 + 12),  # double and single blocks, modulation and embedders
    ("flux-schnell", Precision.INT8, 2 * 12 + 2 * 5),
    ("sd3", Precision.FP8, 2 * 16 + 9),  # the last block does not update the text
    ("unet", Precision.INT8, 6 * (10 + 2) + 12 * 2),  # 6 transformers with pointwise projections, 12 residual blocks
    ("unet-sdxl", Precision.FP8, 6 * (2 * 10 + 2)),  # 6 transformers of two layers; its convolutions are narrow
]


def test_every_family_is_quantized_here() -> None:
    assert {name for name, *_ in QUANTIZED} == set(DENOISERS)
    assert {precision for _, precision, _ in QUANTIZED} == set(Precision) - {Precision.FP16}


@pytest.mark.parametrize(("name", "precision", "layers"), QUANTIZED)
def test_quantized_engines_reach_their_floor_and_leave_no_layer_out(
    name: str, precision: Precision, layers: int, exported: Callable[[str], Exported], tmp_path: Path
) -> None:
    export = exported(name)
    job, entry = best_cpu_engine(export.model, precision, export.batches, tmp_path)
    require_floor(precision.value, entry)
    assert quantized_weights(strong_graph(job), precision) == layers


@pytest.mark.parametrize("name", DENOISERS)
def test_a_denoiser_travels_to_a_worker_without_its_weights(name: str, exported: Callable[[str], Exported]) -> None:
    """As the torch backend sends it: pickled, without weights."""
    export = exported(name)
    module = EngineModule(on_meta(export.module), torch.float32, [True] * len(export.batches[0])).eval()
    data = pickle.dumps(module)
    state = {**dict(export.module.named_parameters()), **dict(export.module.named_buffers())}
    assert len(data) < 0.2 * sum(item.numel() * item.element_size() for item in state.values())
    arrived = pickle.loads(data)
    assert {item.device.type for item in arrived.tensors.values()} == {"meta"}
    with torch.inference_mode():
        (found,) = torch.func.functional_call(
            arrived, {f"module.{name}": state[name] for name in arrived.tensors}, export.batches[0]
        )
    (expected,) = outputs_of(export.module, export.batches[0])
    np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parametrize("name", DENOISERS)
def test_a_lowered_denoiser_leaves_no_tensor_on_another_device(name: str, exported: Callable[[str], Exported]) -> None:
    """Stands for a GPU, where a tensor that the module makes for itself on the CPU would end its compilation."""
    export = exported(name)
    lowered, _ = lower_for_torch(on_meta(export.module), {}, torch.bfloat16)
    batch = export.batches[0]
    module = EngineModule(lowered, torch.bfloat16, [False] * len(batch)).eval()
    with torch.inference_mode():
        (found,) = module(*(item.to("meta") for item in batch))
    assert found.device.type == "meta"
    assert found.shape == batch[0].shape


def test_flux_in_fp16_sees_timestep_and_guidance_in_full(exported: Callable[[str], Exported], tmp_path: Path) -> None:
    """The strongly typed file itself: FP16 would round timesteps to halves and 1000 times the guidance to twos."""
    export = exported("flux")
    latents, _, text, pooled, _ = rows(export.batches[0], 2)
    batch = (latents, torch.tensor([931.2, 457.3]), text, pooled, torch.tensor([3.603, 7.517]))
    (expected,) = outputs_of(export.module, batch)
    path = write_strong_graph(export.job, tmp_path / "fp16.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    kinds = {"tensor(float16)": np.float16, "tensor(float)": np.float32}
    feeds = export.feeds(batch)
    measured = session.run(
        None, {item.name: feeds[item.name].astype(kinds[item.type]) for item in session.get_inputs()}
    )
    assert sqnr_db(expected, measured[0].astype(np.float32)) > FP16_FLOOR_DB


@pytest.mark.parametrize("name", ["SanaSprintPipeline", "SanaPAGPipeline", "SanaControlNetPipeline"])
def test_a_pipeline_of_which_only_the_denoiser_is_known_is_refused_before_it_is_loaded(
    name: str, tmp_path: Path
) -> None:
    pipe = type(name, (), {"transformer": miniature("sana").denoiser})()
    index = {"_class_name": name, "transformer": ["diffusers", "SanaTransformer2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))  # and nothing beside it
    for refused in (lambda: family_of(pipe), lambda: open_pipeline(tmp_path)):
        with pytest.raises(BuildError) as caught:
            refused()
        text = str(caught.value)
        assert text.startswith(f"pipeline class {name} is not supported; its denoiser class SanaTransformer2DModel is ")
        assert f"whole pipelines of this release: {', '.join(FAMILIES)}" in text
        assert "\n" not in text


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("unet", {"in_channels": 9}, "family unet: it takes more channels than it returns"),
        ("unet", {"class_embed_type": "timestep"}, "family unet: it is conditioned by class_embed_type='timestep'"),
        ("unet", {"addition_embed_type": "image"}, "its addition_embed_type is 'image', not None; family unet-sdxl: "),
        ("sana", {"guidance_embeds": True}, "Sana-Sprint"),
        ("flux", {"out_channels": 8}, "family flux: it takes more channels than it returns"),
    ],
)
def test_denoisers_that_are_called_otherwise_are_refused(name: str, changes: dict, reason: str) -> None:
    small = miniature(name)
    small.denoiser.register_to_config(**changes)
    of_class = {
        key: family for key, family in DENOISERS.items() if type(small.denoiser).__name__ == family.denoiser_class
    }
    refusals = [f"family {key}: {family.refusal(small.denoiser)}" for key, family in of_class.items()]
    assert not any(fits(small, key) for key in DENOISERS)
    assert reason in "; ".join(refusals)


def test_only_the_models_that_are_asked_for_are_loaded(tiny_pipeline: Path) -> None:
    source = open_pipeline(tiny_pipeline)
    hollow = {name: getattr(source.pipe, name) for name in source.other_models}
    with source.filled(["vae"]):
        assert all(bool(item.isfinite().all()) for item in source.pipe.vae.parameters())
        assert source.pipe.text_encoder is hollow["text_encoder"]
    assert {name: getattr(source.pipe, name) for name in source.other_models} == hollow
