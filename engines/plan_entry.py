"""What a manifest says of a TensorRT plan, and the checks of it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from engines.documents import Document, FileEntry
from engines.setting_choice import size_text

Shape = tuple[int, ...]
Profile = dict[str, tuple[Shape, Shape, Shape]]
"""An optimization profile: input name -> (min, opt, max) shapes, those of fixed shape included."""


class LayerShare(Document):
    """How much of a plan runs at one layer precision.

    Attributes:
        layers: number of layers.
        time_share: their part of the measured time, None if the plan was not profiled.
    """

    layers: int = Field(ge=0)
    time_share: float | None = Field(default=None, ge=0, le=1)


class PlanEntry(Document):
    """What is particular to a TensorRT plan.

    Attributes:
        version_compatible: whether later TensorRT versions and the lean runtime run it.
        hardware_compatibility: which GPUs run it besides the architecture it was built on.
        profiles: its optimization profiles, one per picture size, the default size first; all for the same inputs.
        weight_streaming: whether its weights may stay in host memory.
        weights_bytes: device memory of its weights, which all profiles use.
        scratch_bytes: device memory of its activations at the largest shapes of any profile.
        layers: by layer precision, from the engine inspector; shares of time are of the first profile.
        inspector: the engine inspector's JSON.
        warnings: what the build had to say about it.
    """

    version_compatible: bool
    hardware_compatibility: Literal["none", "ampere_plus", "same_compute_capability"]
    profiles: tuple[Profile, ...] = Field(min_length=1)
    weight_streaming: bool
    weights_bytes: int = Field(ge=0)
    scratch_bytes: int = Field(ge=0)
    layers: dict[str, LayerShare]
    inspector: FileEntry
    warnings: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _profiles_fit(self) -> PlanEntry:
        if any(set(profile) != set(self.profiles[0]) for profile in self.profiles):
            raise ValueError("optimization profiles are for different inputs, expected the same in each")
        for profile in self.profiles:
            for name, (least, opt, most) in profile.items():
                if not len(least) == len(opt) == len(most) or not all(
                    a <= b <= c for a, b, c in zip(least, opt, most, strict=True)
                ):
                    raise ValueError(
                        f"optimization profile of {name} is {least}, {opt}, {most}, expected min <= opt <= max"
                    )
        return self

    def holds(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a profile has one sample of a shape for an input; true of an input that the plan does not have."""
        return name not in self.profiles[0] or any(
            all(low <= size <= high for low, size, high in zip(least[1:], shape, most[1:], strict=True))
            for least, _, most in (profile[name] for profile in self.profiles)
            if len(least) == len(shape) + 1
        )

    def sizes(self, name: str) -> tuple[str, ...]:
        """Of an input [B, C, h, w] the w x h of every profile, "128x96" or "64x64 to 128x96"; empty for other inputs."""
        found = []
        for profile in self.profiles:
            least, _, most = profile.get(name, ((), (), ()))
            if len(least) == 4:
                ends = dict.fromkeys((size_text(*least[2:]), size_text(*most[2:])))
                found.append(" to ".join(ends))
        return tuple(found)
