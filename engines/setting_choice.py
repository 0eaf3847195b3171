"""Which setting of a bundle is meant; imports nothing that a command line would have to wait for."""

from __future__ import annotations

from dataclasses import dataclass

MAX_PIXELS = 1 << 16  # of a side
MAX_TOKENS = 1 << 16


@dataclass(frozen=True)
class SettingChoice:
    """Which setting of a bundle is meant; what is None may be anything.

    Attributes:
        steps: `num_inference_steps`.
        size: (height, width) in pixels.
        named: its name, or the class name of its scheduler.
    """

    steps: int | None = None
    size: tuple[int, int] | None = None
    named: str | None = None

    @property
    def described(self) -> str:
        """As on the command line."""
        parts = [
            "" if self.steps is None else f"--steps {self.steps}",
            "" if self.size is None else f"--size {size_text(*self.size)}",
            "" if self.named is None else f"--scheduler-setting {self.named}",
        ]
        return " ".join(part for part in parts if part)


def size_text(height: int, width: int) -> str:
    """A picture size as the command line has it: width, then height."""
    return f"{width}x{height}"
