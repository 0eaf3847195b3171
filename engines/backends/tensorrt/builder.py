"""Builds one plan from one ONNX file.

The network is strongly typed: precision is in the ONNX graph's types and Q/DQ nodes, and no precision
flag is ever set. Polygraphy makes the builder configuration; network, optimization profiles, parser and
build are TensorRT's own, since Polygraphy's loaders log the reasons of a failure to a logger of theirs and
do not raise them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from engines.backends.tensorrt.bindings import LEAN, VERSION, require_supported, trt, version_tuple
from engines.backends.tensorrt.build_progress import BuildProgress, ProgressCallback
from engines.backends.tensorrt.inspection import read_inspector, require_quantized, summarize
from engines.backends.tensorrt.messages import LOG
from engines.backends.tensorrt.options import PlanOptions
from engines.backends.tensorrt.plan_store import PlanFacts, PlanRequest, PlanTensor, inspector_file
from engines.backends.tensorrt.preflight import require_precision
from engines.backends.tensorrt.timing_cache import load_timing_cache, save_timing_cache
from engines.errors import BackendError, BuildError
from engines.files import atomic_write_bytes, atomic_write_text, sha256_bytes, sha256_file
from engines.plan_entry import Profile

_SHOWN_ERRORS = 3


def build_plan(
    asked: PlanRequest, target: Path, *, timing_cache: Path, progress: ProgressCallback | None = None
) -> PlanFacts:
    """Builds a plan on the current CUDA device.

    Args:
        asked: for this device.
        target: the plan to write, atomically; the engine inspector's JSON goes to `inspector_file(target)`.
        timing_cache: file of tactic timings to use and extend, from `timing_cache_path`; its folder exists.
        progress: called with (stage, steps done, steps in all). What it raises, KeyboardInterrupt
            included, stops the build and is raised from here.

    Returns:
        Facts about the plan; `warnings` is for the user to see.

    Raises:
        BackendError: TensorRT, Polygraphy or the GPU cannot build this, or the build failed; TensorRT's words.
        BuildError: TensorRT's parser refuses the file, a profile does not fit it, or a quantized plan came
            out without quantized layers.
    """
    require_builder()
    options = asked.options
    require_precision(asked.precision, asked.gpu, version_tuple(), options)
    started = time.monotonic()
    plan, warnings = serialized_plan(asked.onnx, asked.profiles, options, timing_cache, progress)
    engine = _loaded(plan, options)
    inspector = str(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))
    layers = summarize(read_inspector(inspector))
    require_quantized(asked.precision, layers)
    atomic_write_bytes(target, memoryview(plan))
    atomic_write_text(inspector_file(target), inspector)
    return PlanFacts(
        sha256=sha256_file(target),
        bytes=target.stat().st_size,
        inspector_sha256=sha256_bytes(inspector.encode()),
        weights_bytes=_weights_bytes(engine, plan),
        streamable_weights_bytes=engine.streamable_weights_size if options.weight_streaming else 0,
        scratch_bytes=engine.device_memory_size_v2,
        inputs=_tensors(engine, trt.TensorIOMode.INPUT),
        outputs=_tensors(engine, trt.TensorIOMode.OUTPUT),
        layers=layers,
        build_s=time.monotonic() - started,
        warnings=tuple(dict.fromkeys([*warnings, *LOG.warnings])),
    )


def require_builder() -> None:
    """Checks that this installation can build plans.

    Raises:
        BackendError: TensorRT is too old or the lean runtime only, or Polygraphy is missing.
    """
    require_supported()
    if LEAN:
        raise BackendError(
            f"tensorrt_lean {VERSION} runs plans but cannot build them; pip install tensorrt of the same version"
        )
    try:
        import polygraphy.backend.trt  # noqa: F401
    except ModuleNotFoundError as error:
        raise BackendError(
            f"building TensorRT plans needs the module {error.name}, which is not installed; pip install polygraphy"
        ) from error


def serialized_plan(
    onnx: Path,
    profiles: Sequence[Profile],
    options: PlanOptions,
    timing_cache: Path,
    progress: ProgressCallback | None,
) -> tuple[trt.IHostMemory, list[str]]:
    """The serialized plan in memory that TensorRT owns, and warnings; arguments and errors as for `build_plan`.

    Builder, network and parser hold copies of the weights; they are gone when this returns.
    """
    LOG.clear()
    builder = _builder()
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, LOG)  # holds the weights that the network points to: keep it until the end
    if not parser.parse_from_file(str(onnx.absolute())) or parser.num_errors:
        raise BuildError(
            f"TensorRT's parser refuses {onnx.name}: {_parser_words(parser) or 'it gave no reason'}; "
            "export the model again with this release, or leave this precision out"
        )
    for profile in profiles:
        _require_profile_fits(network, profile, onnx)
    monitor = BuildProgress(progress)
    config = _configuration(builder, network, profiles, options, monitor)
    warnings = [load_timing_cache(timing_cache, config)]
    try:
        with monitor.interruptible():
            plan = builder.build_serialized_network(network, config)
    finally:
        warnings.append(save_timing_cache(timing_cache, config))  # a cancelled build's timings count too
    monitor.raise_stopped()
    if plan is None:
        raise LOG.fail(
            f"TensorRT {VERSION} could not build {onnx.name}",
            "allow a larger workspace, free device memory, or leave this precision out",
        )
    LOG.words()  # tactics that failed while others did not
    return plan, [warning for warning in warnings if warning]


def _builder() -> trt.Builder:
    try:
        return trt.Builder(LOG)
    except TypeError as error:  # what pybind makes of a null
        raise LOG.fail("TensorRT's builder does not start", "check the GPU and its driver with nvidia-smi") from error


def _parser_words(parser: trt.OnnxParser) -> str:
    """What the parser says of the first nodes it refused; if it is not about nodes, also what it logged besides."""
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    reasons = [" ".join(error.desc().split()) for error in errors]
    words = []
    if not any(error.node_name() for error in errors):  # such as "Failed to open file: model.onnx.data"
        words = [line for line in LOG.errors if not any(reason in line for reason in reasons)]
    for error, reason in list(zip(errors, reasons, strict=True))[:_SHOWN_ERRORS]:
        words.append(f"node {error.node_name()} ({error.node_operator()}): {reason}" if error.node_name() else reason)
    if (more := len(errors) - _SHOWN_ERRORS) > 0:
        words.append(f"and {more} more")
    return " | ".join(words)


def _require_profile_fits(network: trt.INetworkDefinition, profile: Profile, onnx: Path) -> None:
    """A profile names the network's inputs and keeps their fixed axes."""
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    if set(profile) != {tensor.name for tensor in inputs}:
        raise BuildError(
            f"{onnx.name} has inputs {', '.join(tensor.name for tensor in inputs)}, the optimization profile is for "
            f"{', '.join(profile)}; export the model again with this release"
        )
    for tensor in inputs:
        axes = tuple(tensor.shape)
        for shape in profile[tensor.name]:
            if len(shape) != len(axes) or any(axis not in (-1, size) for axis, size in zip(axes, shape, strict=True)):
                raise BuildError(
                    f"input {tensor.name} of {onnx.name} has shape {axes} (-1 is any), the optimization profile asks for "
                    f"{shape}; give ranges that fit"
                )


def _configuration(
    builder: trt.Builder,
    network: trt.INetworkDefinition,
    profiles: Sequence[Profile],
    options: PlanOptions,
    monitor: BuildProgress,
) -> trt.IBuilderConfig:
    from polygraphy.backend.trt import CreateConfig
    from polygraphy.exception import PolygraphyException
    from polygraphy.logger import G_LOGGER

    try:
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):  # it prints to the user's terminal
            create = CreateConfig(
                tf32=False,  # what the export leaves in FP32 is there for accuracy
                profiles=[],  # ours are added below
                profiling_verbosity=trt.ProfilingVerbosity.DETAILED,  # the engine inspector's JSON depends on it
                memory_pool_limits=(
                    None if options.workspace_bytes is None else {trt.MemoryPoolType.WORKSPACE: options.workspace_bytes}
                ),
                builder_optimization_level=options.builder_optimization_level,
                hardware_compatibility_level=_hardware_compatibility(options),
                version_compatible=options.version_compatible,
                weight_streaming=options.weight_streaming,
                refittable=options.refittable,
                progress_monitor=monitor,
            )
            config: trt.IBuilderConfig = create(builder, network)
    except PolygraphyException as error:
        raise BackendError(
            f"TensorRT {VERSION} refuses the configuration: {' '.join(str(error).split())}; change the build options"
        ) from error
    for index, profile in enumerate(profiles):
        made = builder.create_optimization_profile()
        for name, (least, opt, most) in profile.items():
            made.set_shape(name, least, opt, most)
        if index > 0:
            made.extra_memory_target = 0.0  # no second copy of the weights, laid out for another size; a hint
        if config.add_optimization_profile(made) != index:
            raise LOG.fail(f"TensorRT {VERSION} refuses optimization profile {index}", "give other shape ranges")
    return config


def _hardware_compatibility(options: PlanOptions) -> trt.HardwareCompatibilityLevel:
    name = options.hardware_compatibility.upper()
    level: trt.HardwareCompatibilityLevel | None = getattr(trt.HardwareCompatibilityLevel, name, None)
    if level is None:
        raise BackendError(
            f"TensorRT {VERSION} does not know hardware compatibility {options.hardware_compatibility}; "
            "choose none or ampere_plus, or upgrade the tensorrt package"
        )
    return level


def _loaded(plan: trt.IHostMemory, options: PlanOptions) -> trt.ICudaEngine:
    """The plan's engine, for its inspector; one copy of the weights on the device."""
    runtime = trt.Runtime(LOG)
    runtime.engine_host_code_allowed = options.version_compatible  # the lean runtime that we have just put there
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise LOG.fail("TensorRT cannot load the plan it has built", "free device memory and build again")
    return engine


def _weights_bytes(engine: trt.ICudaEngine, plan: trt.IHostMemory) -> int:
    if hasattr(trt, "EngineStat") and hasattr(engine, "get_engine_stat"):
        return int(engine.get_engine_stat(trt.EngineStat.TOTAL_WEIGHTS_SIZE))
    # TensorRT 10.13 does not tell; "the serialized engine size approximates the weight memory" (its guide).
    return int(plan.nbytes)


def _tensors(engine: trt.ICudaEngine, mode: trt.TensorIOMode) -> tuple[PlanTensor, ...]:
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    return tuple(
        PlanTensor(
            name=name,
            dtype=_DTYPES.get(engine.get_tensor_dtype(name).name, engine.get_tensor_dtype(name).name.lower()),
            shape=tuple(engine.get_tensor_shape(name)),
        )
        for name in names
        if engine.get_tensor_mode(name) == mode
    )


_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}  # the others are called as numpy calls them
