"""`tmpdiff-export report`: what a calibration found, as one HTML file."""

from __future__ import annotations

import argparse
from pathlib import Path

from engines.arguments import add_setting_arguments, parse_prompt, setting_choice
from engines.terminal import print_json

PICTURES = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the subcommand's arguments."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="calibrated bundle folder")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.html", help="page to write, self-contained")
    add_setting_arguments(parser)
    parser.add_argument(
        "--prompt",
        type=parse_prompt,
        action="append",
        default=[],
        metavar="TEXT",
        help="draw this at every precision and with the schedule; repeatable (default: no pictures)",
    )
    parser.add_argument(
        "--pictures",
        type=int,
        metavar="N",
        help=f"pictures per prompt, with seeds 0 to N-1 (default {PICTURES}, 0 without a prompt)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Writes the page and says where."""
    from tmpdiff_export.display import progress_bar
    from tmpdiff_export.report.write import write_report

    count = args.pictures if args.pictures is not None else (PICTURES if args.prompt else 0)
    if count < 0:
        raise ValueError(f"--pictures is {count}, expected 0 or more")
    if count and not args.prompt:
        raise ValueError(
            f"--pictures {count} was given without a prompt; a bundle stores none, add --prompt TEXT (repeatable)"
        )
    with progress_bar() as report:
        result = write_report(
            args.bundle,
            args.out,
            setting=setting_choice(args),
            prompts=args.prompt,
            pictures=count,
            progress=report,
        )
    if args.json:
        print_json(result)
        return 0
    print(f"wrote {args.out}: {result['bytes'] / 1e6:.2f} MB, {result['pictures']} pictures")
    if result["loses_to"]:
        names = ", ".join(result["loses_to"])
        print(f"the schedule LOSES on validation to: {names}, beyond the 95 % interval (the page says so at its top)")
    return 0
