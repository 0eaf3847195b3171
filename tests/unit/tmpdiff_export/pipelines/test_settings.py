"""Settings as users ask for them."""

from __future__ import annotations

from pathlib import Path

import diffusers
import numpy as np
import pytest

from engines.errors import BuildError
from tmpdiff_export.pipelines.families.unet import UNET
from tmpdiff_export.pipelines.scheduler_table import sampler_table
from tmpdiff_export.pipelines.settings import PipelineFacts, SettingRequest, resolve, scheduler_form, setting_entry

FACTS = PipelineFacts(
    family=UNET, scheduler={"class": "DDIMScheduler", "config": {}}, size=(64, 64), pixels_per_latent=8, size_step=8,
    largest_side=None, latent_channels=4, guidance_scale=7.5, takes_guidance_scale=True, text_length=None,
)  # fmt: skip


@pytest.mark.parametrize("kind", ["DPMSolverMultistepScheduler", "EulerDiscreteScheduler"])
def test_a_scheduler_comes_from_the_file_that_diffusers_saves(kind: str, tmp_path: Path) -> None:
    """DPM-Solver's has an infinite number in it."""
    scheduler = getattr(diffusers, kind)(use_karras_sigmas=True)
    scheduler.save_config(tmp_path)
    file = tmp_path / "scheduler_config.json"
    assert ("Infinity" in file.read_text()) == (kind == "DPMSolverMultistepScheduler")
    found = resolve(FACTS, SettingRequest(num_steps=5, scheduler=str(file)))
    assert found.table.scheduler == kind
    assert found.name.startswith(f"5-64x64-{kind}.")
    np.testing.assert_array_equal(found.table.timesteps, sampler_table(scheduler, 5).timesteps)


@pytest.mark.parametrize(
    ("scale", "name"),
    [
        (7.5, "g7.5"),
        (7.0, "g7"),
        (7.5000001, "g7.5000001"),
        (1e7, "g1e07"),
        (12345678.0, "g12345678.0"),
        (1e-300, "g1e-300"),
    ],
)
def test_every_guidance_scale_has_a_name_of_its_own_that_a_manifest_takes(scale: float, name: str) -> None:
    found = resolve(FACTS, SettingRequest(num_steps=2, guidance_scale=scale, scheduler="EulerDiscreteScheduler"))
    assert found.name == f"2-64x64-EulerDiscreteScheduler-{name}"
    entry = setting_entry(found)
    assert (entry.name, entry.guidance_scale) == (found.name, scale)


def test_a_pipelines_scheduler_with_nan_is_not_run_with_a_default_in_its_place() -> None:
    with pytest.raises(BuildError, match=r"configuration has NaN for beta_start; correct its scheduler_config\.json"):
        scheduler_form(diffusers.EulerDiscreteScheduler(beta_start=float("nan")))
