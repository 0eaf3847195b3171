"""Fake Builder, its configuration, optimization profiles and timing cache."""

from __future__ import annotations

import json
from typing import Any

from fakes import fake_onnx
from fakes.fake_network import INetworkDefinition, has_precision_flags
from fakes.fake_plan import Plan, encode
from fakes.fake_trt_base import (
    MINIMUM_CAPABILITY,
    Build,
    Dims,
    IHostMemory,
    ILogger,
    IProgressMonitor,
    checked_logger,
    enums,
    flag,
    installation,
)

CACHE_MAGIC = b"ftrtCACH"
INT_MAX = 2**63 - 1


class IOptimizationProfile:
    """Shape ranges of the dynamic inputs; `extra_memory_target` counts for all profiles of a plan but the first."""

    def __init__(self) -> None:
        self.extra_memory_target = 1.0
        self.fake_shapes: dict[str, tuple[tuple[int, ...], ...]] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        shapes = tuple(tuple(Dims(item)) for item in (min, opt, max))
        if len({len(item) for item in shapes}) != 1 or any(
            not 0 <= a <= b <= c for a, b, c in zip(*shapes, strict=False)
        ):
            raise ValueError(f"Shape provided for min/opt/max of {input} is inconsistent.")
        self.fake_shapes[input] = shapes

    def get_shape(self, input: str) -> list[Dims]:
        return [Dims(item) for item in self.fake_shapes.get(input, ())]

    def __bool__(self) -> bool:
        return True


class ITimingCache:
    """Fake timings: the set of layer signatures that were timed on one kind of GPU with one version."""

    def __init__(self, origin: dict[str, Any], entries: set[str]) -> None:
        self.fake_origin, self.fake_entries = origin, entries

    def serialize(self) -> IHostMemory:
        content = {"origin": self.fake_origin, "entries": sorted(self.fake_entries)}
        return IHostMemory(CACHE_MAGIC + json.dumps(content).encode())

    def combine(self, input_cache: ITimingCache, ignore_mismatch: bool) -> bool:
        if input_cache.fake_origin != self.fake_origin and not ignore_mismatch:
            return False
        self.fake_entries |= input_cache.fake_entries
        return True

    def reset(self) -> bool:
        self.fake_entries.clear()
        return True


def cache_origin() -> dict[str, Any]:
    """What a timing cache is valid for."""
    here = installation()
    return {"version": here.version, "gpu": here.cuda.name, "capability": list(here.cuda.compute_capability)}


class IBuilderConfig:
    """Defaults as the real one's: TF32 on, optimization level 3, layer names only."""

    def __init__(self, logger: ILogger) -> None:
        self._logger = logger
        self._profiles: list[IOptimizationProfile] = []
        self._pools = {name: installation().cuda.total_bytes for name in enums()["MemoryPoolType"].__members__}
        self._features: dict[str, bool] = {}
        self._cache: ITimingCache | None = None
        self._sources = (1 << len(enums()["TacticSource"])) - 1
        self.flags = 1 << int(flag("BuilderFlag", "TF32"))
        self.builder_optimization_level = 3
        self.hardware_compatibility_level = flag("HardwareCompatibilityLevel", "NONE")
        self.profiling_verbosity = flag("ProfilingVerbosity", "LAYER_NAMES_ONLY")
        self.runtime_platform = flag("RuntimePlatform", "SAME_AS_BUILD")
        self.tiling_optimization_level = flag("TilingOptimizationLevel", "NONE")
        self.engine_capability = flag("EngineCapability", "STANDARD")
        self.default_device_type = flag("DeviceType", "GPU")
        self.DLA_core = -1
        self.max_aux_streams = -1
        self.max_num_tactics = -1
        self.avg_timing_iterations = 1
        self.l2_limit_for_tiling = -1
        self.plugins_to_serialize: list[str] = []
        self.profile_stream = 0
        self.progress_monitor: IProgressMonitor | None = None

    def set_flag(self, flag: Any) -> None:
        self.flags |= 1 << _member(flag, "BuilderFlag")

    def clear_flag(self, flag: Any) -> None:
        self.flags &= ~(1 << _member(flag, "BuilderFlag"))

    def get_flag(self, flag: Any) -> bool:
        return bool(self.flags & 1 << _member(flag, "BuilderFlag"))

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self._profiles.append(profile)
        return len(self._profiles) - 1

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._profiles)

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        self._pools[pool.name] = int(pool_size)

    def get_memory_pool_limit(self, pool: Any) -> int:
        return self._pools[pool.name]

    def set_preview_feature(self, feature: Any, enable: bool) -> None:
        self._features[feature.name] = enable

    def get_preview_feature(self, feature: Any) -> bool:
        return self._features.get(feature.name, False)

    def set_tactic_sources(self, tactic_sources: int) -> bool:
        self._sources = tactic_sources
        return True

    def get_tactic_sources(self) -> int:
        return self._sources

    def create_timing_cache(self, serialized_timing_cache: Any) -> ITimingCache | None:
        data = bytes(serialized_timing_cache)
        if not data:
            return ITimingCache(cache_origin(), set())
        try:
            if not data.startswith(CACHE_MAGIC):
                raise ValueError("no timing cache")
            content = json.loads(data[len(CACHE_MAGIC) :])
        except ValueError as error:
            self._logger.log(ILogger.ERROR, f"Timing cache deserialization failed: {error}")
            return None
        return ITimingCache(content["origin"], set(content["entries"]))

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        if not isinstance(cache, ITimingCache):
            raise TypeError(f"set_timing_cache(): incompatible function arguments: {cache!r}")
        here = cache_origin()
        wrong = [key for key in here if here[key] != cache.fake_origin[key]]
        if "version" in wrong or (wrong and not ignore_mismatch):
            self._logger.log(ILogger.ERROR, f"Timing cache was made on a different {', '.join(wrong)}")
            return False
        self._cache = cache
        return True

    def get_timing_cache(self) -> ITimingCache | None:
        return self._cache

    def reset(self) -> None:
        self.__init__(self._logger)  # type: ignore[misc]

    @property
    def fake_profiles(self) -> list[IOptimizationProfile]:
        return self._profiles


def _member(item: Any, enum_name: str) -> int:
    if not isinstance(item, enums()[enum_name]):
        raise TypeError(f"incompatible function arguments: expected {enum_name}, received {item!r}")
    return int(item)


class Builder:
    """Builds plans; without a usable GPU the constructor logs and raises TypeError, as the real bindings do."""

    def __init__(self, logger: ILogger) -> None:
        self._logger = checked_logger(logger)
        if not installation().cuda.gpus:
            self._logger.log(ILogger.ERROR, "createInferBuilder: CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self.max_threads = 1

    @property
    def logger(self) -> ILogger:
        return self._logger

    @property
    def num_DLA_cores(self) -> int:
        return 0

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        return INetworkDefinition(self, int(flags))

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig(self._logger)

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def reset(self) -> None: ...

    def is_network_supported(self, network: INetworkDefinition, config: IBuilderConfig) -> bool:
        return not self._problems(network, config)

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> IHostMemory | None:
        """The plan; None, with the reason logged as an error, if it cannot be built or the monitor cancels."""
        here = installation()
        here.cuda.record("build_serialized_network", network.name)
        if here.build_exception is not None:
            raise here.build_exception
        problems = self._problems(network, config)
        for problem in problems:
            self._logger.log(ILogger.ERROR, problem)
        if problems or network.fake_model is None:
            return None
        layers = fake_onnx.layers(network.fake_inferred, unquantized=here.unquantized)
        if not self._time_layers(layers, config, network):
            self._logger.log(ILogger.ERROR, "Build was cancelled by the progress monitor.")
            return None
        return IHostMemory(encode(self._plan(network, config, layers)))

    def _problems(self, network: INetworkDefinition, config: IBuilderConfig) -> list[str]:
        here = installation()
        model = network.fake_model
        if here.build_error is not None:
            return [here.build_error]
        if model is None:
            return ["Error Code 4: Internal Error (Network must have at least one output)"]
        if here.major == 10 and not network.get_flag(flag("NetworkDefinitionCreationFlag", "STRONGLY_TYPED")):
            return ["the fake builds strongly typed networks only; pass NetworkDefinitionCreationFlag.STRONGLY_TYPED"]
        problems = [
            f"Error Code 3: API Usage Error (BuilderFlag::k{name} is set, but it is not allowed in a strongly typed network)"
            for name in has_precision_flags(config.flags)
        ]
        capability = here.cuda.compute_capability
        for kind in sorted(fake_onnx.types_used(model) & set(MINIMUM_CAPABILITY)):
            if capability < MINIMUM_CAPABILITY[kind]:
                problems.append(
                    f"Error Code 9: Networks with {kind} precision require hardware with {kind} support "
                    f"(compute capability {'.'.join(map(str, MINIMUM_CAPABILITY[kind]))}, this GPU has "
                    f"{'.'.join(map(str, capability))})"
                )
        needed = config.get_memory_pool_limit(flag("MemoryPoolType", "WORKSPACE"))
        if needed < 1024:
            problems.append("Error Code 10: Could not find any implementation for node: insufficient workspace")
        return problems + _profile_problems(network, config)

    def _time_layers(self, layers: Any, config: IBuilderConfig, network: INetworkDefinition) -> bool:
        """Progress as nested phases, timing every layer the cache does not know; False if cancelled."""
        here = installation()
        cache = config.get_timing_cache()
        known = (
            set()
            if cache is None or config.get_flag(flag("BuilderFlag", "DISABLE_TIMING_CACHE"))
            else cache.fake_entries
        )
        monitor = config.progress_monitor
        timed = 0
        open_phases: list[str] = []

        def start(name: str, parent: str | None, steps: int) -> None:
            if monitor is not None:
                monitor.phase_start(name, parent, max(steps, 1))
                open_phases.append(name)

        def step(name: str, index: int) -> bool:
            return monitor is None or bool(monitor.step_complete(name, index))

        def finish() -> None:
            if monitor is not None:
                monitor.phase_finish(open_phases.pop())

        root, profiles = f"Building Engine from {network.name}", max(config.num_optimization_profiles, 1)
        start(root, None, profiles)
        for profile in range(profiles):
            phase = f"Timing graph nodes of profile {profile}"
            start(phase, root, len(layers))
            for index, layer in enumerate(layers):
                signature = f"{layer.operator}:{layer.compute}:{layer.inputs and layer.inputs[-1][1]}:{profile}"
                if signature not in known:
                    timed += 1
                    known.add(signature)
                if not step(phase, index):
                    while open_phases:
                        finish()
                    return False
            finish()
            if not step(root, profile):
                finish()
                return False
        finish()
        options = {
            "optimization_level": config.builder_optimization_level,
            "workspace_bytes": config.get_memory_pool_limit(flag("MemoryPoolType", "WORKSPACE")),
            "max_aux_streams": config.max_aux_streams,
            "hardware_compatibility": config.hardware_compatibility_level.name,
        }
        here.builds.append(Build(len(layers), timed, _flag_names(config.flags), options))
        return True

    def _plan(self, network: INetworkDefinition, config: IBuilderConfig, layers: Any) -> Plan:
        here = installation()
        model = network.fake_model
        flags = _flag_names(config.flags)
        missing: tuple[str, ...] = ()
        data = model.SerializeToString()
        if "STRIP_PLAN" in flags:
            data, missing = fake_onnx.strip(model)
            if not {"REFIT", "REFIT_IDENTICAL", "REFIT_INDIVIDUAL"} & set(flags):
                flags += ("REFIT_IDENTICAL",)
        profiles = tuple(dict(item.fake_shapes) for item in config.fake_profiles) or ({},)
        static = {
            item.name: (item.shape,) * 3 for item in network.fake_tensors if item.is_input and -1 not in item.shape
        }
        return Plan(
            version=here.version,
            gpu=here.cuda.name,
            compute_capability=here.cuda.compute_capability,
            flags=flags,
            hardware_compatibility=config.hardware_compatibility_level.name,
            optimization_level=config.builder_optimization_level,
            profiling_verbosity=config.profiling_verbosity.name,
            max_aux_streams=config.max_aux_streams,
            name=network.name,
            tensors=network.fake_tensors,
            layers=layers,
            profiles=tuple(static | item for item in profiles),
            weights=_weights(fake_onnx.weight_bytes(model), config.fake_profiles),
            missing=missing,
            model=data,
        )


def _weights(weights: dict[str, int], profiles: list[IOptimizationProfile]) -> dict[str, int]:
    """With the copies that further profiles make where they may: laid out anew for the kernels of their shapes."""
    copies = {
        f"{name} [profile {index}]": int(size * profile.extra_memory_target)
        for index, profile in enumerate(profiles[1:], 1)
        for name, size in weights.items()
    }
    return weights | {name: size for name, size in copies.items() if size}


def _flag_names(flags: int) -> tuple[str, ...]:
    return tuple(
        name
        for name, item in enums()["BuilderFlag"].__members__.items()
        if flags & 1 << int(item) and item.name == name
    )


def _profile_problems(network: INetworkDefinition, config: IBuilderConfig) -> list[str]:
    inputs = [item for item in network.fake_tensors if item.is_input]
    dynamic = [item for item in inputs if -1 in item.shape]
    if dynamic and not config.fake_profiles:
        return ["Error Code 4: Network has dynamic or shape inputs, but no optimization profile has been defined."]
    problems = []
    for index, profile in enumerate(config.fake_profiles):
        for item in inputs:
            shapes = profile.fake_shapes.get(item.name)
            if shapes is None:
                if item in dynamic:
                    problems.append(
                        f"Error Code 4: Dynamic input {item.name} is missing dimensions in profile {index}."
                    )
                continue
            if any(len(shape) != len(item.shape) for shape in shapes):
                problems.append(f"Error Code 4: rank of input {item.name} and of profile {index} differ")
            elif any(real not in (-1, got) for shape in shapes for real, got in zip(item.shape, shape, strict=True)):
                problems.append(
                    f"Error Code 4: static dimension mismatch of input {item.name} in profile {index}: {shapes}"
                )
    return problems
