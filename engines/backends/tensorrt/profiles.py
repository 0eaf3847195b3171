"""Optimization profiles from tensor specs: which input shapes a plan accepts, and which it is tuned for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from engines.errors import BuildError
from engines.manifest import TensorSpec
from engines.plan_entry import Profile, Shape


@dataclass(frozen=True)
class ShapeRange:
    """Sizes that one symbolic axis may take.

    For the axis "batch" these are engine batches: twice the number of images where guidance runs the
    conditional and the unconditional half together.

    Attributes:
        min: smallest size.
        opt: the size tactics are timed at.
        max: largest size; scratch memory is sized for it.

    Raises:
        BuildError: not 1 <= min <= opt <= max.
    """

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise BuildError(f"shape range {self} is not ordered; expected 1 <= MIN <= OPT <= MAX")

    def __str__(self) -> str:
        return f"{self.min}:{self.opt}:{self.max}"

    @classmethod
    def parse(cls, text: str) -> ShapeRange:
        """Reads "MIN:OPT:MAX", or "N" for one fixed size.

        Raises:
            BuildError: neither form, or not ordered.
        """
        parts = text.split(":")
        if len(parts) not in (1, 3) or not all(part.isascii() and part.isdigit() for part in parts):
            raise BuildError(
                f"shape range {text!r} is malformed; expected MIN:OPT:MAX such as 1:2:8, or one size such as 2"
            )
        sizes = [int(part) for part in parts]
        return cls(*sizes) if len(sizes) == 3 else cls(sizes[0], sizes[0], sizes[0])


def profile(specs: Sequence[TensorSpec], ranges: Mapping[str, ShapeRange]) -> Profile:
    """The optimization profile of an engine.

    Args:
        specs: its inputs; symbols in their shapes are looked up in `ranges`.
        ranges: symbol -> sizes.

    Returns:
        Input name -> (min, opt, max) shapes; inputs of fixed shape are included, three times the same.

    Raises:
        BuildError: a symbol has no range, or a range is for a symbol that no input has.
    """
    symbols = symbols_of(specs)
    if unused := sorted(set(ranges) - set(symbols)):
        raise BuildError(
            f"shape ranges were given for {', '.join(unused)}, which no input has; "
            f"the inputs' symbolic axes are {', '.join(symbols) or 'none'}"
        )
    _require_ranges(symbols, ranges)
    return {
        spec.name: (
            _sized(spec, ranges, lambda sizes: sizes.min),
            _sized(spec, ranges, lambda sizes: sizes.opt),
            _sized(spec, ranges, lambda sizes: sizes.max),
        )
        for spec in specs
    }


def symbols_of(specs: Sequence[TensorSpec]) -> tuple[str, ...]:
    """The symbolic axes of `specs`, each once, in order of appearance."""
    return tuple(dict.fromkeys(axis for spec in specs for axis in spec.shape if isinstance(axis, str)))


def _require_ranges(symbols: Sequence[str], ranges: Mapping[str, ShapeRange]) -> None:
    if missing := [symbol for symbol in symbols if symbol not in ranges]:
        raise BuildError(
            f"no shape range was given for {', '.join(missing)}; give MIN:OPT:MAX for each of {', '.join(symbols)}"
        )


def _sized(spec: TensorSpec, ranges: Mapping[str, ShapeRange], pick: Callable[[ShapeRange], int]) -> Shape:
    return tuple(pick(ranges[axis]) if isinstance(axis, str) else axis for axis in spec.shape)
