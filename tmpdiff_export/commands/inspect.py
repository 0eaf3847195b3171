"""`tmpdiff-export inspect`: what a bundle holds."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from engines.bundle import Bundle


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the subcommand's arguments."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="bundle folder")
    parser.add_argument("--json", action="store_true", help="print the documents as JSON")


def run(args: argparse.Namespace) -> int:
    """Prints the manifest, and schedule and sensitivity where the bundle was calibrated."""
    from calibration.document import OutdatedCalibrationError
    from tmpdiff_export.calibrate.bundle import read_calibration
    from tmpdiff_export.commands.build import print_engines
    from tmpdiff_export.commands.tables import print_sensitivity
    from tmpdiff_export.display import print_json, schedule_strip

    bundle = Bundle.open(args.bundle)
    calibrated = bundle.schedule_path.exists() or bundle.sensitivity_path.exists()
    found = None
    try:
        found = read_calibration(bundle) if calibrated else None
    except OutdatedCalibrationError as error:  # the schedule runs all the same
        print(error, file=sys.stderr)
    if args.json:
        print_json(
            {
                "manifest": bundle.manifest.model_dump(mode="json"),
                "schedule": bundle.schedule().model_dump(mode="json") if calibrated else None,
                "sensitivity": found.model_dump(mode="json") if found else None,
            }
        )
        return 0
    print_engines(bundle.manifest)
    if found is not None:
        print_sensitivity(found)
    elif calibrated:
        print(f"schedule: {schedule_strip(bundle.schedule().precisions)}")
    else:
        print(f"not calibrated yet: tmpdiff-export calibrate {args.bundle} --prompts FILE")
    return 0
