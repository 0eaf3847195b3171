"""Calibration: which denoising step suffers how much from which precision, and the schedule that follows.

Works on an `Evaluator` and numbers; never imports torch or diffusers.
"""

from calibration.choose.allocation import ErrorBudget, HighSteps, LatencyBudget
from calibration.choose.picture_budget import QualityBudget
from calibration.document import Sensitivity
from calibration.measure.evaluator import Evaluator, SampleSet, SampleSets
from calibration.measure.journal import open_journal
from calibration.run import CalibrationResult, calibrate
from calibration.stages import CalibrationOptions

__all__ = [
    "CalibrationOptions",
    "CalibrationResult",
    "ErrorBudget",
    "Evaluator",
    "HighSteps",
    "LatencyBudget",
    "QualityBudget",
    "SampleSet",
    "SampleSets",
    "Sensitivity",
    "calibrate",
    "open_journal",
]
