"""Makes a builder configuration with real bindings and Polygraphy, on stand-ins for the objects that need a GPU.

Run by test_conformance.py with the builder options as JSON; prints what was called and set on the
configuration as JSON: [[name, [argument, ...]], ...], an enumeration member as "EnumName.MEMBER", all its names joined
by "=".
"""

from __future__ import annotations

import inspect
import json
import sys
from typing import Any

import tensorrt as trt

from engines.backends.tensorrt import builder
from engines.backends.tensorrt.build_progress import BuildProgress
from engines.backends.tensorrt.options import PlanOptions

PROFILES = [{"latents": tuple((batch, 4, *size) for batch in (1, 2, 4))} for size in ((32, 32), (24, 40))]


class Strict:
    """Has the attributes of a real class and no others: notes calls and what is set, gives the answers it was told."""

    def __init__(self, cls: type, **answers: Any) -> None:
        self.__dict__.update(cls=cls, answers=answers, noted=[])

    def __getattr__(self, name: str) -> Any:
        if isinstance(inspect.getattr_static(self.cls, name), property):
            return self.answers[name]

        def call(*args: Any, **kwargs: Any) -> Any:
            self.noted.append([name, [spelled(value) for value in (*args, *kwargs.values())]])
            answer = self.answers.get(name)
            return answer() if inspect.isfunction(answer) else answer

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        if inspect.getattr_static(self.cls, name).fset is None:
            raise AttributeError(f"{self.cls.__name__}.{name} is read-only")
        self.noted.append([name, [spelled(value)]])

    def __iter__(self) -> Any:
        return iter(())  # a network without layers

    def __bool__(self) -> bool:
        return True  # a valid optimization profile


def spelled(value: Any) -> str:
    """An argument as text."""
    members = getattr(type(value), "__members__", None)
    if members is None:
        return str(value)
    return f"{type(value).__name__}.{'='.join(name for name, member in members.items() if member == value)}"


def main() -> None:
    """Prints the calls for the options in the first argument."""
    tensor = Strict(trt.ITensor, name="latents", is_shape_tensor=False, dtype=trt.float16, shape=(-1, 4, -1, -1))
    network = Strict(trt.INetworkDefinition, num_inputs=1, get_input=tensor)
    profile = Strict(trt.IOptimizationProfile)
    indices = iter(range(len(PROFILES)))
    config = Strict(
        trt.IBuilderConfig,
        create_timing_cache="cache",
        get_timing_cache="cache",
        add_optimization_profile=lambda: next(indices),
    )
    made = Strict(trt.Builder, create_builder_config=config, create_optimization_profile=profile)
    options = PlanOptions(**json.loads(sys.argv[1]))
    builder._configuration(made, network, PROFILES, options, BuildProgress(None))
    print(json.dumps([*profile.noted, *config.noted]))


if __name__ == "__main__":
    main()
