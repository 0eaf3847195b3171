"""Writes the report of a calibrated bundle: one HTML file from its documents, with pictures of prompts if asked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engines.bundle import Bundle
from engines.errors import TmpDiffError
from engines.files import atomic_write_text, reason, require_writable
from engines.setting_choice import SettingChoice
from tmpdiff_export.calibrate.bundle import read_calibration
from tmpdiff_export.display import Report
from tmpdiff_export.report.page import page
from tmpdiff_export.report.pictures import draw


def write_report(
    folder: Path,
    out: Path,
    *,
    setting: SettingChoice | None = None,
    prompts: Sequence[str] = (),
    pictures: int = 0,
    progress: Report | None = None,
) -> dict[str, Any]:
    """Writes the report of a bundle. Equal documents, prompts and engines give equal bytes.

    Args:
        folder: bundle folder.
        out: the HTML file, replaced where it exists.
        setting: whose calibration, None for the first.
        prompts: what to draw; without any the page has no pictures.
        pictures: pictures per prompt and schedule, with seeds 0 .. pictures - 1.
        progress: called with (stage, done, total).

    Returns:
        JSON data: "report" (path), "bundle_id", "setting", "bytes", "pictures" (how many the page shows) and "loses_to"
        (names of validation rows that are no slower and have less typical error, beyond the interval).

    Raises:
        TmpDiffError: the bundle is not calibrated or its documents do not belong together, an engine cannot
            run, or `out` cannot be written; nothing was written.
    """
    require_writable([out])
    if out.suffix.lower() not in (".html", ".htm"):
        raise TmpDiffError(f"report {out} does not end in .html; the report is an HTML page")
    bundle = Bundle.open(folder)
    entry = bundle.setting(setting)
    found = read_calibration(bundle, entry)
    rows = draw(bundle, entry, prompts, pictures, progress) if prompts and pictures else ()
    text = page(bundle.manifest, entry, found, rows)
    try:
        atomic_write_text(out, text)
    except OSError as error:
        raise TmpDiffError(f"report {out} cannot be written: {reason(error)}") from error
    return {
        "report": str(out),
        "bundle_id": bundle.manifest.bundle_id,
        "setting": entry.name,
        "bytes": len(text.encode()),
        "pictures": sum(len(row.drawings) for row in rows),
        "loses_to": [row.name for row in found.losses],
    }
