"""Where a bundle keeps what `calibrate` wrote of its default setting."""

from __future__ import annotations

from pathlib import Path

from engines.bundle import Bundle


def schedule_path(bundle: Path) -> Path:
    opened = Bundle.open(bundle)
    return opened.schedule_path(opened.setting())


def sensitivity_path(bundle: Path) -> Path:
    opened = Bundle.open(bundle)
    return opened.sensitivity_path(opened.setting())


def setting_name(bundle: Path) -> str:
    return Bundle.open(bundle).setting().name
