"""What a user may choose about a TensorRT plan, whatever its precision."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from engines.errors import BuildError

HardwareCompatibility = Literal["none", "ampere_plus", "same_compute_capability"]
HARDWARE_COMPATIBILITY: tuple[str, ...] = get_args(HardwareCompatibility)
MAX_OPTIMIZATION_LEVEL = 5


@dataclass(frozen=True)
class PlanOptions:
    """Builder options; precision is not among them, it is in the types of the ONNX graph.

    Attributes:
        builder_optimization_level: 0 (fastest build, ignores the timing cache) to 5 (longest search).
        workspace_bytes: most scratch a layer may use, None for what the GPU has.
        weight_streaming: the runtime may keep a part of the weights in host memory.
        version_compatible: runs on later TensorRT versions and on the lean runtime; a copy of the lean
            runtime is put into the plan.
        hardware_compatibility: which other GPUs the plan must run on.
        refittable: the weights can be replaced by different ones; costs speed.

    Raises:
        BuildError: a value outside its choices.
    """

    builder_optimization_level: int = 3
    workspace_bytes: int | None = None
    weight_streaming: bool = False
    version_compatible: bool = False
    hardware_compatibility: HardwareCompatibility = "none"
    refittable: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.builder_optimization_level <= MAX_OPTIMIZATION_LEVEL:
            raise BuildError(
                f"builder optimization level {self.builder_optimization_level} does not exist; "
                f"choose from 0 to {MAX_OPTIMIZATION_LEVEL}"
            )
        if self.workspace_bytes is not None and self.workspace_bytes <= 0:
            raise BuildError(
                f"workspace limit of {self.workspace_bytes} bytes is not positive; give a size, or none for no limit"
            )
        if self.hardware_compatibility not in HARDWARE_COMPATIBILITY:
            raise BuildError(
                f"unknown hardware compatibility {self.hardware_compatibility!r}; "
                f"choose from {', '.join(HARDWARE_COMPATIBILITY)}"
            )

    def canonical(self) -> dict[str, Any]:
        """The options as JSON data, for the key of a stored plan."""
        return asdict(self)
