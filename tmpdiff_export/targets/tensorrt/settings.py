"""What a build may be asked about TensorRT plans, beyond the options of any build."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engines.backends.tensorrt.options import HARDWARE_COMPATIBILITY, PlanOptions
from engines.backends.tensorrt.profiles import ShapeRange
from engines.errors import BackendError
from tmpdiff_export.targets.settings import DEFAULT_BATCH, parse_shape_range

BATCH, HEIGHT, WIDTH = "batch", "height", "width"


@dataclass(frozen=True)
class PlanSettings:
    """Settings of a TensorRT build.

    Attributes:
        options: builder options.
        batch: pictures at once; the engines' own batches follow from it.
        shapes: sizes of the other symbolic axes of the exported graphs, by symbol; height and width are of the latents.
        cache: folder of finished plans and timing caches, None for the user's cache folder.
    """

    options: PlanOptions = field(default_factory=PlanOptions)
    batch: ShapeRange = DEFAULT_BATCH
    shapes: Mapping[str, ShapeRange] = field(default_factory=dict)
    cache: Path | None = None

    def require_unset(self, backend: str, allowed: Sequence[str] = ()) -> None:
        """Refuses settings that a backend would ignore.

        Args:
            backend: its name.
            allowed: settings that it does not ignore.

        Raises:
            BackendError: naming them.
        """
        default = PlanSettings()
        values, defaults = self.options.canonical(), default.options.canonical()
        options = {f"--{name.replace('_', '-')}": (values[name], defaults[name]) for name in values}
        options["--workspace-mib"] = options.pop("--workspace-bytes")
        options["--batch"] = self.batch, default.batch
        options["--shape"] = self.shapes, default.shapes
        options["--plan-cache"] = self.cache, default.cache
        given = [name for name, (mine, theirs) in options.items() if mine != theirs and name not in allowed]
        if given:
            raise BackendError(
                f"{', '.join(given)} are settings of TensorRT plans; backend {backend!r} does not have them"
            )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options, but for `--batch`, which torch packages have too; a group of their own."""
    group = parser.add_argument_group("backend tensorrt")
    default = PlanOptions()
    group.add_argument(
        "--shape",
        type=_named_shape_range,
        action="append",
        default=[],
        metavar="SYMBOL=MIN:OPT:MAX",
        help="sizes of another symbolic axis of the exported graphs (default for height and width: an optimization profile "
        "for each picture size); repeat it for several",
    )
    group.add_argument(
        "--builder-optimization-level",
        type=int,
        default=default.builder_optimization_level,
        metavar="0..5",
        help=f"how long the builder searches (default {default.builder_optimization_level})",
    )
    group.add_argument(
        "--workspace-mib", type=int, metavar="MIB", help="most scratch a layer may use (default: no limit)"
    )
    group.add_argument("--weight-streaming", action="store_true", help="let weights stay in host memory at run time")
    group.add_argument(
        "--version-compatible", action="store_true", help="run on the lean runtime and on later TensorRT versions"
    )
    group.add_argument(
        "--hardware-compatibility",
        choices=HARDWARE_COMPATIBILITY,
        default=default.hardware_compatibility,
        help="which other GPUs the plans must run on (default none)",
    )
    group.add_argument("--refittable", action="store_true", help="let TensorRT's Refitter replace weights; costs speed")
    group.add_argument(
        "--plan-cache",
        type=Path,
        metavar="DIR",
        help="finished plans and timing caches (default: the user's cache folder)",
    )


def plan_settings(args: argparse.Namespace) -> PlanSettings:
    """The settings that were given on the command line.

    Raises:
        BuildError: a value outside its choices.
    """
    return PlanSettings(
        options=PlanOptions(
            builder_optimization_level=args.builder_optimization_level,
            workspace_bytes=None if args.workspace_mib is None else args.workspace_mib << 20,
            weight_streaming=args.weight_streaming,
            version_compatible=args.version_compatible,
            hardware_compatibility=args.hardware_compatibility,
            refittable=args.refittable,
        ),
        batch=args.batch,
        shapes=dict(args.shape),
        cache=args.plan_cache,
    )


def _named_shape_range(text: str) -> tuple[str, ShapeRange]:
    symbol, equals, sizes = text.partition("=")
    if not (symbol and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not SYMBOL=MIN:OPT:MAX")
    return symbol, parse_shape_range(sizes)
