"""Small denoisers and sampler tables, and plans of them as the fake TensorRT builds them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from fakes.install import Fakes
from onnx import TensorProto, helper, numpy_helper

from engines.documents import FileEntry
from engines.files import sha256_bytes
from engines.manifest import EngineEntry, TensorSpec
from engines.plan_entry import PlanEntry
from engines.sampler import SamplerRow, SamplerTable

CHANNELS, SIDE, TOKENS, WIDTH = 3, 4, 5, 6
SEEDS = {"fp16": 0, "fp8": 1, "int8": 2, "int4": 3}
"""Which small denoiser each precision is."""
KINDS = {"float16": TensorProto.FLOAT16, "float32": TensorProto.FLOAT, "int64": TensorProto.INT64}


@dataclass(frozen=True)
class SmallModel:
    """An ONNX model with its tensors as a manifest names them."""

    model: onnx.ModelProto
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@functools.cache
def denoiser(seed: int, dtype: str = "float16", *, weights: int = 64, any_size: bool = False) -> SmallModel:
    """model_output = tanh(latents * w + mean(hidden_states) + timestep / 1000), in `dtype`; `weights` pads its size.

    Height and width of the latents are `SIDE`, or symbolic with `any_size`.
    """
    random = np.random.default_rng(seed)
    kind = KINDS[dtype]
    constants = {
        "w": random.standard_normal((1, CHANNELS, 1, 1)).astype(dtype),
        "axes": np.array([1, 2], np.int64),
        "column": np.array([-1, 1, 1, 1], np.int64),
        "thousandth": np.array(0.001, np.float32),
        "padding": random.standard_normal(weights).astype(dtype) / 1e4,
        "first": np.array([0], np.int64),
    }
    nodes = [
        helper.make_node("Mul", ["latents", "w"], ["scaled"]),
        helper.make_node("ReduceMean", ["hidden_states", "axes"], ["mean"], keepdims=0),
        helper.make_node("Mul", ["timestep", "thousandth"], ["time"]),
        helper.make_node("Cast", ["time"], ["time_cast"], to=kind),
        helper.make_node("Gather", ["padding", "first"], ["pad"]),
        helper.make_node("Sum", ["mean", "time_cast", "pad"], ["shift"]),
        helper.make_node("Reshape", ["shift", "column"], ["shift_column"]),
        helper.make_node("Add", ["scaled", "shift_column"], ["shifted"]),
        helper.make_node("Tanh", ["shifted"], ["model_output"]),
    ]
    shape = ("batch", CHANNELS, *(("height", "width") if any_size else (SIDE, SIDE)))
    inputs = (
        TensorSpec(name="latents", dtype=dtype, shape=shape),
        TensorSpec(name="timestep", dtype="float32", shape=("batch",)),
        TensorSpec(name="hidden_states", dtype=dtype, shape=("batch", TOKENS, WIDTH)),
    )
    outputs = (TensorSpec(name="model_output", dtype=dtype, shape=shape),)
    return _small(f"denoiser{seed}", nodes, inputs, outputs, constants)


def embedder() -> SmallModel:
    """Not a denoiser: token ids to hidden states."""
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["hidden_states"])]
    table = np.random.default_rng(1).standard_normal((11, WIDTH)).astype(np.float16)
    inputs = (TensorSpec(name="input_ids", dtype="int64", shape=("batch", TOKENS)),)
    outputs = (TensorSpec(name="hidden_states", dtype="float16", shape=("batch", TOKENS, WIDTH)),)
    return _small("embedder", nodes, inputs, outputs, {"table": table})


def inputs(batch: int = 2, size: tuple[int, int] = (SIDE, SIDE)) -> dict[str, np.ndarray]:
    """For one call of a small denoiser."""
    random = np.random.default_rng(3)
    return {
        "latents": random.standard_normal((batch, CHANNELS, *size)).astype(np.float32),
        "timestep": np.full(batch, 500, np.float32),
        "hidden_states": random.standard_normal((batch, TOKENS, WIDTH)).astype(np.float32),
    }


def entry(
    fakes: Fakes,
    small: SmallModel,
    folder: Path,
    name: str,
    *,
    batch: tuple[int, int, int] = (1, 2, 4),
    sizes: Sequence[tuple[int, int]] = ((SIDE, SIDE),),
    flags: Sequence[str] = (),
    **changed: Any,
) -> tuple[EngineEntry, Path]:
    """Builds a plan with a profile per size; its manifest entry (fields of the plan's can be changed) and its file."""

    def shapes_of(size: tuple[int, int]) -> dict[str, tuple[Any, ...]]:
        axes = [{"batch": samples, "height": size[0], "width": size[1]} for samples in batch]
        return {
            spec.name: tuple(tuple(fixed.get(axis, axis) for axis in spec.shape) for fixed in axes)
            for spec in small.inputs
        }

    profiles = tuple(map(shapes_of, sizes))
    major, minor = fakes.cuda.compute_capability
    machine = (fakes.tensorrt.__version__, fakes.cuda.name, major, minor)
    data = _plan(
        machine, small.model.SerializeToString(), tuple(tuple(shapes.items()) for shapes in profiles), tuple(flags)
    )
    path = folder / f"{name}.plan"
    path.write_bytes(data)
    file = FileEntry(path=path.name, sha256=sha256_bytes(data), bytes=len(data))
    plan = {
        "version_compatible": "VERSION_COMPATIBLE" in flags,
        "hardware_compatibility": "none",
        "profiles": profiles,
        "weight_streaming": "WEIGHT_STREAMING" in flags,
        "weights_bytes": 1,
        "scratch_bytes": 1,
        "layers": {},
        "inspector": file,
    } | changed
    return (
        EngineEntry(
            file=file,
            backend="tensorrt",
            backend_version=fakes.tensorrt.__version__,
            device=f"sm{major}{minor} {fakes.cuda.name}",
            lowering={},
            onnx_sha256="0" * 64,
            recipe="none",
            sqnr_db=99.0,
            sqnr_floor_db=1.0,
            inputs=small.inputs,
            outputs=small.outputs,
            plan=PlanEntry.model_validate(plan),
        ),
        path,
    )


@functools.cache
def _plan(machine: tuple[Any, ...], model: bytes, profiles: tuple[Any, ...], flags: tuple[str, ...]) -> bytes:
    """What the fakes that are installed, which are those of `machine`, build of a model."""
    trt: Any = sys.modules["tensorrt"]
    log = trt.Logger()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert trt.OnnxParser(network, log).parse(model)
    config = builder.create_builder_config()
    for shapes in profiles:
        profile = builder.create_optimization_profile()
        for input_name, ranges in shapes:
            profile.set_shape(input_name, *ranges)
        config.add_optimization_profile(profile)
    for flag in flags:
        config.set_flag(getattr(trt.BuilderFlag, flag))
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    return bytes(builder.build_serialized_network(network, config))


def table(steps: int, reach: int, *, past_samples: bool = False, seed: int = 0) -> SamplerTable:
    """A sampler whose rows name the last `reach` model outputs (and samples), with coefficients drawn at random.

    reach 1 is like DDIM or Euler, 2 and 3 like multistep DPM-Solver++, 4 like LMS, `steps` names all of them.
    """
    random = np.random.default_rng(seed)
    rows = []
    for k in range(steps):
        window = range(max(0, k - reach + 1), k + 1)
        outputs = tuple((j, float(random.standard_normal() / 3)) for j in window)
        samples = tuple((j, float(random.uniform(0.2, 0.5))) for j in (window if past_samples else (k,)))
        rows.append(SamplerRow(samples, outputs))
    return SamplerTable(
        scheduler="Random",
        num_inference_steps=steps,
        timesteps=np.linspace(999, 3.7, steps),
        sigmas=None,
        init_noise_sigma=1.37,
        input_scale=np.where(np.arange(steps) % 3 == 0, 1.0, random.uniform(0.1, 1.0, steps)),
        rows=tuple(rows),
    )


def _small(
    name: str,
    nodes: list[onnx.NodeProto],
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    constants: dict[str, np.ndarray],
) -> SmallModel:
    def values(specs: tuple[TensorSpec, ...]) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(spec.name, KINDS[spec.dtype], spec.shape) for spec in specs]

    graph = helper.make_graph(
        nodes,
        name,
        values(inputs),
        values(outputs),
        [numpy_helper.from_array(array, key) for key, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    return SmallModel(model, inputs, outputs)
