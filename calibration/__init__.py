"""Calibration: which denoising step suffers how much from which precision, and the schedule that follows.

Works on an `Evaluator` and numbers; never imports torch or diffusers.
"""

from calibration.allocation import ErrorBudget, HighSteps, LatencyBudget
from calibration.calibrate import CalibrationResult, calibrate, open_journal
from calibration.evaluator import Evaluator
from calibration.quality import QualityBudget
from calibration.sensitivity import Sensitivity

__all__ = [
    "CalibrationResult",
    "ErrorBudget",
    "Evaluator",
    "HighSteps",
    "LatencyBudget",
    "QualityBudget",
    "Sensitivity",
    "calibrate",
    "open_journal",
]
