"""What a build may be asked about torch packages, beyond the options of any build."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from engines.errors import BackendError
from engines.precision import REFERENCE, Precision

MAX_WORKERS = 256


@dataclass(frozen=True)
class PackageSettings:
    """Settings of torch packages.

    Attributes:
        share_weights: the quantized precision whose stored weights the reference is made of as well, so that both need
            one copy; None for weights of its own.
        fp8_attention: the quantized precisions whose attention is in FP8 as well.
        workers: processes that compile packages side by side; with 1 it is done in this process.
        compile: "whole" or "blocks": whether blocks that repeat are compiled once, which is faster to build.

    Raises:
        BackendError: a number of workers out of range.
    """

    share_weights: Precision | None = None
    fp8_attention: tuple[Precision, ...] = ()
    workers: int = 1
    compile: Literal["whole", "blocks"] = "whole"

    def __post_init__(self) -> None:
        if not 1 <= self.workers <= MAX_WORKERS:
            raise BackendError(f"workers is {self.workers}, expected 1 to {MAX_WORKERS}")

    def require_unset(self, backend: str) -> None:
        """Refuses settings that another backend would ignore.

        Args:
            backend: its name.

        Raises:
            BackendError: naming the first of them.
        """
        for given, option, instead in (
            (self.share_weights is not None, "--share-weights", "hold their own"),
            (self.workers > 1, "--workers", "are built in one process"),
            (bool(self.fp8_attention), "--fp8-attention", "have 16-bit attention"),
            (self.compile != "whole", "--compile", "are made whole"),
        ):
            if given:
                raise BackendError(f"{option} is for packages of the torch backend; engines of {backend!r} {instead}")

    def require_built(self, precisions: Sequence[Precision]) -> None:
        """Refuses to share the weights, or change the attention, of engines that are not built.

        Args:
            precisions: the denoiser engines that will be made.

        Raises:
            BackendError: naming the precision, which is not built or is the reference.
        """
        choices = [precision for precision in precisions if precision is not REFERENCE]
        for option, asked, expected in (
            (
                "--share-weights",
                () if self.share_weights is None else (self.share_weights,),
                "a quantized precision that is",
            ),
            ("--fp8-attention", self.fp8_attention, "quantized precisions that are"),
        ):
            if other := [item for item in asked if item not in choices]:
                raise BackendError(
                    f"{option} names {other[0].value}, expected {expected} built: "
                    f"{', '.join(item.value for item in choices) or 'none is'}"
                )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options, a group of their own."""
    group = parser.add_argument_group("backend torch")
    group.add_argument(
        "--share-weights",
        type=_precision,
        metavar="PRECISION",
        help="make the fp16 engine of the stored weights of this precision, so that both need one copy",
    )
    group.add_argument(
        "--fp8-attention",
        type=_precisions,
        default=(),
        metavar="PRECISIONS",
        help="quantized precisions, comma-separated, whose attention is in FP8 as well, through cuDNN (pip install "
        "nvidia-cudnn-frontend; a Hopper GPU or later)",
    )
    group.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="processes that compile packages and measure them side by side, worker i on GPU i modulo the number of visible "
        "GPUs, or on a CPU with its share of the threads (default 1: all in this process)",
    )
    group.add_argument(
        "--compile",
        choices=("whole", "blocks"),
        default="whole",
        help="blocks: compile a denoiser's repeated blocks once and call them with their own weights, which builds faster; "
        "whole: everything in one package, whose steps may be a little faster (default whole)",
    )


def _precision(text: str) -> Precision:
    try:
        return Precision(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no precision; choose from {', '.join(Precision)}") from None


def _precisions(text: str) -> tuple[Precision, ...]:
    return tuple(dict.fromkeys(_precision(name.strip()) for name in text.split(",")))
