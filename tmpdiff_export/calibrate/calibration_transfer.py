"""Scores of a calibrated bundle at the steps of another one."""

from __future__ import annotations

from calibration.carried import CarriedScores, carried_scores
from calibration.sensitivity import Sensitivity
from calibration.transfer import TransferError, step_axes
from engines.bundle import Bundle
from engines.runtime import DenoiseRuntime
from engines.sampler import SamplerTable


def scores_from(source: Bundle, found: Sensitivity, target: DenoiseRuntime) -> CarriedScores:
    """Carries the scores of a calibration to the steps of `target`.

    Args:
        source: the bundle that was calibrated; it may be that of `target`, for another guidance scale.
        found: its sensitivity document.
        target: where the scores are wanted.

    Raises:
        TransferError: the bundles are of different denoisers or schedulers.
    """
    if source.manifest.model.denoiser_sha256 != target.manifest.model.denoiser_sha256:
        raise TransferError(
            f"bundle {source.folder} was built from another denoiser than {target.bundle.folder}; its scores say "
            "nothing here, calibrate without --from"
        )
    table = SamplerTable.from_json(source.read(source.manifest.sampler))
    return carried_scores(found, *step_axes(table, target.table))
