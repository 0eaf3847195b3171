"""`tmpdiff-export inspect`: what a bundle holds."""

from __future__ import annotations

import argparse
from pathlib import Path

from engines.bundle import Bundle


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the subcommand's arguments."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="bundle folder")
    parser.add_argument("--json", action="store_true", help="print the documents as JSON")


def run(args: argparse.Namespace) -> int:
    """Prints the manifest, and schedule and sensitivity where the bundle was calibrated."""
    from tmpdiff_export.calibrate.bundle import read_calibration
    from tmpdiff_export.commands.build import print_engines
    from tmpdiff_export.commands.calibrate import print_sensitivity
    from tmpdiff_export.display import print_json

    bundle = Bundle.open(args.bundle)
    calibrated = bundle.schedule_path.exists() or bundle.sensitivity_path.exists()
    found = read_calibration(bundle) if calibrated else None
    if args.json:
        print_json(
            {
                "manifest": bundle.manifest.model_dump(mode="json"),
                "schedule": bundle.schedule().model_dump(mode="json") if found else None,
                "sensitivity": found.model_dump(mode="json") if found else None,
            }
        )
        return 0
    print_engines(bundle.manifest)
    if found is None:
        print(f"not calibrated yet: tmpdiff-export calibrate {args.bundle} --prompts FILE")
    else:
        print_sensitivity(found)
    return 0
