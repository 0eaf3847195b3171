"""`tmpdiff-export schedule`: show a schedule of a bundle, and exchange it with the step policies of other runtimes."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.arguments import add_setting_arguments, setting_choice
from engines.bundle import Bundle
from engines.errors import ScheduleError
from engines.schedule import Schedule
from engines.setting_entry import SettingEntry
from engines.terminal import print_json

if TYPE_CHECKING:
    from calibration.choose.stored_prediction import StoredPrediction


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the subcommand's arguments."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="bundle folder")
    add_setting_arguments(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--schedule",
        metavar="FILE|uniform:PRECISION",
        help="which schedule (default: the calibrated one in the bundle)",
    )
    which.add_argument(
        "--import-policy",
        type=Path,
        metavar="CONFIG",
        help="take it from the diffusion_step_policy in this transformer/config.json",
    )
    parser.add_argument(
        "--precision",
        metavar="P",
        help="with --import-policy: what its native steps run at (default: as its quant_algo)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the schedule, for `run --schedule FILE`")
    parser.add_argument(
        "--export-policy", type=Path, metavar="FILE", help="write it as a diffusion_step_policy, where it is one"
    )
    parser.add_argument(
        "--nearest",
        action="store_true",
        help="with --export-policy: where it is none, write the policy of least predicted error that is no slower",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Shows the schedule and writes what was asked for."""
    if args.precision is not None and args.import_policy is None:
        raise ValueError("--precision says what the native steps of an imported policy run at; add --import-policy")
    if args.nearest and args.export_policy is None:
        raise ValueError("--nearest says what to export; add --export-policy FILE")
    bundle = Bundle.open(args.bundle)
    setting = bundle.setting(setting_choice(args))
    prediction = _prediction(bundle, setting)
    schedule = (
        bundle.schedule(setting, args.schedule) if args.import_policy is None else _imported(bundle, setting, args)
    )
    if args.export_policy:
        _require_computed(schedule)
    if prediction:
        schedule = schedule.model_copy(
            update={
                "predicted_error": _predicted_error(prediction, schedule.precisions),
                "predicted_latency": _predicted_latency(prediction, schedule.precisions),
            }
        )
    exported = _export(args, bundle, schedule, prediction, _calls(bundle, setting)) if args.export_policy else None
    if args.out:
        schedule.save(args.out)
    if args.json:
        print_json({"bundle": str(args.bundle), "schedule": schedule.model_dump(mode="json"), "exported": exported})
        return 0
    _print(args, schedule, exported)
    return 0


def _prediction(bundle: Bundle, setting: SettingEntry) -> StoredPrediction | None:
    """What the bundle's calibration predicts; None without one, and with an outdated one, which is said on stderr."""
    from calibration.choose.stored_prediction import StoredPrediction
    from calibration.document import OutdatedCalibrationError
    from tmpdiff_export.calibrate.bundle import read_calibration

    if not bundle.sensitivity_path(setting).exists():
        return None
    try:
        return StoredPrediction(read_calibration(bundle, setting))
    except OutdatedCalibrationError as error:
        print(error, file=sys.stderr)
        return None


def _require_computed(schedule: Schedule) -> None:
    from tmpdiff_export.drop_in.step_policy import require_computed

    require_computed(schedule.precisions)


def _predicted_error(prediction: StoredPrediction, schedule: tuple[str, ...]) -> float | None:
    """None where a step is at a precision without scores, or steps are reused as was not measured."""
    return prediction.error(schedule) if prediction.predicts(schedule) else None


def _predicted_latency(prediction: StoredPrediction, schedule: tuple[str, ...]) -> float | None:
    """None where steps are reused, and the calibration did not time that."""
    return prediction.latency(schedule) if prediction.times(schedule) else None


def _imported(bundle: Bundle, setting: SettingEntry, args: argparse.Namespace) -> Schedule:
    from tmpdiff_export.drop_in.step_policy import FORMATS, read_policy

    policy, native = read_policy(args.import_policy)
    native = args.precision or native
    reference, *low = bundle.manifest.precisions
    if native is None:
        raise ScheduleError(
            f"config {args.import_policy} names no quant_algo of {', '.join(FORMATS)}; say with --precision what its "
            f"native steps run at, one of {', '.join(low)}"
        )
    if native not in low:
        raise ScheduleError(
            f"the native steps of {args.import_policy} run at {native}; the bundle's low precisions are "
            f"{', '.join(low) or 'none'}: pass one with --precision, or build a bundle with {native}"
        )
    calls = _calls(bundle, setting)
    return Schedule(
        bundle_id=bundle.manifest.bundle_id,
        setting=setting.name,
        precisions=policy.precisions(calls, reference, native),
        origin=policy.described(calls, reference, native),
    )


def _calls(bundle: Bundle, setting: SettingEntry) -> tuple[int, ...]:
    """How often every step of the setting's scheduler calls the denoiser."""
    if setting.num_steps == setting.num_inference_steps:
        return (1,) * setting.num_steps

    from engines.sampler import SamplerTable
    from tmpdiff_export.drop_in.step_policy import calls_of_steps

    return calls_of_steps(SamplerTable.from_json(bundle.read(setting.sampler)))


def _export(
    args: argparse.Namespace,
    bundle: Bundle,
    schedule: Schedule,
    prediction: StoredPrediction | None,
    calls: tuple[int, ...],
) -> dict[str, Any]:
    """Writes the policy file; returns what is in it, for display."""
    from tmpdiff_export.drop_in.step_policy import exact_policy, nearest_policy, write_policy

    exact = exact_policy(schedule.precisions, bundle.manifest.precisions[0], calls)
    if exact:
        write_policy(args.export_policy, *exact)
        return {"exact": True, **asdict(exact[0]), "native": exact[1]}
    if prediction is None:
        raise ScheduleError(
            "the schedule is no step policy (the first N and last M steps in 16 bit, the others at one low precision), "
            f"and without a calibration none can be said to be near it; run `tmpdiff-export calibrate {args.bundle}`"
        )
    nearest = nearest_policy(prediction, schedule.precisions, calls)
    if nearest is None:
        raise ScheduleError(
            "the schedule is no step policy, and no policy of fp8 or nvfp4 is as fast; export another schedule"
        )
    figures = {
        "exact": False,
        **asdict(nearest.policy),
        "native": nearest.native,
        "predicted_error": nearest.predicted_error,
        "predicted_latency": nearest.predicted_latency,
    }
    if not args.nearest:
        own = "unknown" if schedule.predicted_error is None else f"{schedule.predicted_error:.3e}"
        raise ScheduleError(
            f"the schedule is no step policy (first N and last M steps in 16 bit); the best one no slower is first "
            f"{nearest.policy.first_steps} and last {nearest.policy.last_steps} of {nearest.native}, predicted E "
            f"{nearest.predicted_error:.3e} against {own}: pass --nearest to export that"
        )
    write_policy(args.export_policy, nearest.policy, nearest.native)
    return figures


def _print(args: argparse.Namespace, schedule: Schedule, exported: dict[str, Any] | None) -> None:
    from tmpdiff_export.display import number, schedule_strip

    print(f"schedule: {schedule_strip(schedule.precisions)} (origin: {schedule.origin})")
    print(
        f"predicted E {number(schedule.predicted_error, '.3e')}, "
        f"latency {number(schedule.predicted_latency, '.3f')} of the reference"
    )
    if exported:
        what = (
            "exactly" if exported["exact"] else f"as the nearest policy, predicted E {exported['predicted_error']:.3e}"
        )
        print(
            f"wrote {args.export_policy} {what}: first {exported['first_steps']} and last {exported['last_steps']} steps "
            f"in 16 bit, the others {exported['native']}"
        )
    if args.out:
        print(f"wrote {args.out}")
