"""`tmpdiff-export`: the subcommands; `run` and `verify` are those of `tmpdiff-runtime`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from engines.cli import guarded
from engines.version import VERSION

PROGRAM = "tmpdiff-export"

# name -> (module, its functions that declare arguments and run, help)
COMMANDS: dict[str, tuple[str, str, str, str]] = {
    "build": (
        "tmpdiff_export.commands.build",
        "add_arguments",
        "run",
        "build a bundle from a diffusers pipeline folder",
    ),
    "calibrate": (
        "tmpdiff_export.commands.calibrate",
        "add_arguments",
        "run",
        "find which step of a bundle runs at which precision",
    ),
    "run": ("engines.cli", "add_run_arguments", "run", "prompt to picture with a bundle"),
    "bench": ("tmpdiff_export.commands.bench", "add_arguments", "run", "time every precision of a bundle in one run"),
    "report": (
        "tmpdiff_export.commands.report",
        "add_arguments",
        "run",
        "write what a calibration found as one HTML file",
    ),
    "schedule": (
        "tmpdiff_export.commands.schedule",
        "add_arguments",
        "run",
        "show a schedule, import or export a step policy",
    ),
    "inspect": ("tmpdiff_export.commands.inspect", "add_arguments", "run", "show what a bundle holds"),
    "verify": ("engines.cli", "add_verify_arguments", "verify", "check every file of a bundle against its hash"),
    "demo": (
        "tmpdiff_export.commands.demo",
        "add_arguments",
        "run",
        "build, calibrate and run the embedded pipeline",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand.

    Returns:
        0, 1 when it failed (one line on stderr says why), or 130 after Ctrl-C; argparse leaves with 2.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = _parser(arguments).parse_args(arguments)
    module, _, function, _ = COMMANDS[args.command]
    return guarded(PROGRAM, lambda: int(getattr(importlib.import_module(module), function)(args)))


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser; only the module of the subcommand that was asked for is imported."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="Engines per precision for a diffusion pipeline, and a schedule that swaps them."
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {VERSION}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    asked = next((argument for argument in arguments if argument in COMMANDS), None)
    for name, (module, declare, _, text) in COMMANDS.items():
        subparser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name == asked:
            getattr(importlib.import_module(module), declare)(subparser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
