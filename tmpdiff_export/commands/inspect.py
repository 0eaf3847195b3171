"""`tmpdiff-export inspect`: what a bundle holds."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from engines.bundle import Bundle
from engines.terminal import print_json, printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the subcommand's arguments."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="bundle folder")
    parser.add_argument("--json", action="store_true", help="print the documents as JSON")


def run(args: argparse.Namespace) -> int:
    """Prints the manifest, and schedule and sensitivity where the bundle was calibrated."""
    from calibration.document import OutdatedCalibrationError, Sensitivity
    from tmpdiff_export.calibrate.bundle import read_calibration
    from tmpdiff_export.commands.build import print_engines
    from tmpdiff_export.commands.tables import print_sensitivity
    from tmpdiff_export.display import schedule_strip

    bundle = Bundle.open(args.bundle)
    found: dict[str, Sensitivity | None] = {}
    for setting in bundle.manifest.settings:
        if bundle.schedule_path(setting).exists() or bundle.sensitivity_path(setting).exists():
            try:
                found[setting.name] = read_calibration(bundle, setting)
            except OutdatedCalibrationError as error:  # the schedule runs all the same
                print(printable(str(error)), file=sys.stderr)
                found[setting.name] = None
    if args.json:
        print_json(
            {
                "manifest": bundle.manifest.model_dump(mode="json"),
                "settings": {
                    setting.name: {
                        "schedule": bundle.schedule(setting).model_dump(mode="json"),
                        "sensitivity": known.model_dump(mode="json") if (known := found[setting.name]) else None,
                    }
                    for setting in bundle.manifest.settings
                    if setting.name in found
                },
            }
        )
        return 0
    print_engines(bundle.manifest)
    for setting in bundle.manifest.settings:
        if setting.name not in found:
            print(f"setting {setting.name}: not calibrated yet: {bundle.how_to_calibrate(setting)}")
            continue
        print(f"setting {setting.name}:")
        if known := found[setting.name]:
            print_sensitivity(known)
        else:
            print(f"schedule: {schedule_strip(bundle.schedule(setting).precisions)}")
    return 0
