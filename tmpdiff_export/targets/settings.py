"""Options of a build that several backends have."""

from __future__ import annotations

import argparse

from engines.backends.tensorrt.profiles import ShapeRange
from engines.errors import BuildError

DEFAULT_BATCH = ShapeRange(1, 1, 4)
MAX_BATCH = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options, a group for those who share them."""
    group = parser.add_argument_group("backends onnxruntime and torch")
    group.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        help="what engines of torch (default: the GPU) and of ONNX Runtime (default: the CPU) are for",
    )
    group.add_argument(
        "--text-encoder-weights",
        choices=("int8",),
        help="store the linear layers of the text encoders in 8 bit; they compute in FP32 as ever (default: 16 bit)",
    )
    parser.add_argument_group("backends tensorrt and torch").add_argument(
        "--batch",
        type=parse_shape_range,
        default=DEFAULT_BATCH,
        metavar="MIN:OPT:MAX",
        help=f"pictures at once (default {DEFAULT_BATCH}); OPT is what plans are tuned for and torch packages compiled for",
    )


def parse_shape_range(text: str) -> ShapeRange:
    """The sizes of an axis on the command line."""
    try:
        return ShapeRange.parse(text)
    except BuildError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
