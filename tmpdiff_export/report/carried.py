"""The part of the report on scores that another bundle's calibration has measured."""

from __future__ import annotations

import math
from html import escape

from calibration import Sensitivity
from calibration.document import TransferRecord
from tmpdiff_export.display import number
from tmpdiff_export.report.pieces import precision_name, table


def carried(found: Sensitivity, record: TransferRecord) -> str:
    """Where carried scores come from, and how they compare with what was measured here."""
    rows = [
        f"<tr><td>{precision_name(found, check.precision)}</td><td class=left>{', '.join(map(str, check.steps))}</td>"
        f"<td>{check.level:.2f}</td><td>&times; {math.exp(check.scatter):.2f}</td>"
        f"<td>{number(check.spearman, '.2f')}</td></tr>"
        for check in record.checks
    ]
    head = ("precision", "checked steps", "measured / carried", "scatter", "Spearman")
    return (
        f"<h3>Carried scores</h3><p>These scores were measured on bundle {escape(record.bundle_id[:12])} with T = "
        f"{record.num_steps} and guidance scale {record.guidance_scale:g}, and carried over through noise level. They were "
        f"measured again at the checked steps and brought to the level found there.</p>{table(head, rows, 'carried scores')}"
    )
