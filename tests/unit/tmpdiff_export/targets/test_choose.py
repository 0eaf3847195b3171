"""Settings belong to backends: what the command line offers for each, and who refuses what."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from engines.backends.tensorrt.options import PlanOptions
from engines.backends.tensorrt.profiles import ShapeRange
from engines.errors import BackendError
from engines.precision import Precision
from tmpdiff_export.bundling.options import BuildOptions
from tmpdiff_export.commands.build import add_arguments
from tmpdiff_export.targets.choose import require_own_settings
from tmpdiff_export.targets.tensorrt.settings import PlanSettings, plan_settings
from tmpdiff_export.targets.torch.settings import PackageSettings

NEEDED = ["pipeline", "--out", "bundle", "--prompts", "prompts.txt"]
# Option -> the backends that have it, and the settings with it.
SETTINGS: dict[str, tuple[set[str], dict[str, Any]]] = {
    "--device": ({"onnxruntime", "torch"}, {"device": "cpu"}),
    "--text-encoder-weights": ({"onnxruntime", "torch"}, {"text_encoder_weights": "int8"}),
    "--batch": ({"tensorrt", "torch"}, {"plans": PlanSettings(batch=ShapeRange(1, 2, 2))}),
    "--share-weights": ({"torch"}, {"packages": PackageSettings(share_weights=Precision.FP8)}),
    "--fp8-attention": ({"torch"}, {"packages": PackageSettings(fp8_attention=(Precision.FP8,))}),
    "--compile": ({"torch"}, {"packages": PackageSettings(compile="blocks")}),
    "--workers": ({"torch"}, {"packages": PackageSettings(workers=2)}),
    "--shape": ({"tensorrt"}, {"plans": PlanSettings(shapes={"tokens": ShapeRange(1, 2, 2)})}),
    "--plan-cache": ({"tensorrt"}, {"plans": PlanSettings(cache=Path("plans"))}),
    "--workspace-mib": ({"tensorrt"}, {"plans": PlanSettings(options=PlanOptions(workspace_bytes=1 << 20))}),
    "--refittable": ({"tensorrt"}, {"plans": PlanSettings(options=PlanOptions(refittable=True))}),
}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser()
    add_arguments(made)
    return made


@pytest.mark.parametrize("option", SETTINGS)
@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt", "tensorrt-rtx", "torch"])
def test_a_setting_of_another_backend_is_refused_by_name(backend: str, option: str) -> None:
    backends, given = SETTINGS[option]
    settings = {"device": None, "packages": PackageSettings(), "plans": PlanSettings(), **given}
    if backend in backends:
        require_own_settings(backend, **settings)
    else:
        with pytest.raises(BackendError, match=f"^{option} .*'{backend}'"):
            require_own_settings(backend, **settings)


def test_the_help_groups_options_by_backend() -> None:
    groups = {
        group.title: {name for action in group._group_actions for name in action.option_strings}
        for group in parser()._action_groups
        if group.title and "backend" in group.title
    }
    assert next(iter(groups)) == "any backend"
    for option, (backends, _) in SETTINGS.items():
        (title,) = (title for title, options in groups.items() if option in options)
        assert {name for name in ("onnxruntime", "tensorrt", "torch") if name in title.split()} == backends


def test_nothing_given_is_what_build_options_are_by_default() -> None:
    args = parser().parse_args(NEEDED)
    default = BuildOptions((Precision.FP16,), ("a", "b"))
    assert plan_settings(args) == default.plans
    assert PackageSettings(args.share_weights, args.fp8_attention, args.workers, args.compile) == default.packages
    assert (args.device, args.backend) == (default.device, default.backend)


def test_settings_of_plans_come_from_the_command_line() -> None:
    given = ["--batch", "2", "--shape", "tokens=1:2:4", "--workspace-mib", "3", "--version-compatible"]
    given += ["--hardware-compatibility", "ampere_plus", "--builder-optimization-level", "1", "--plan-cache", "plans"]
    args = parser().parse_args([*NEEDED, *given])
    assert plan_settings(args) == PlanSettings(
        PlanOptions(1, 3 << 20, version_compatible=True, hardware_compatibility="ampere_plus"),
        ShapeRange(2, 2, 2),
        {"tokens": ShapeRange(1, 2, 4)},
        Path("plans"),
    )
