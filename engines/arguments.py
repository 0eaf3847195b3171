"""Command line arguments that several commands take: their text in, their value out, or argparse's error."""

from __future__ import annotations

import argparse
import math

MAX_SEED = (1 << 63) - 1
MAX_THREADS = 1024
MAX_RESIDENT_ENGINES = 64


def parse_prompt(text: str) -> str:
    """An argument that is a prompt."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("the text is not valid UTF-8") from None
    return text


def parse_seed(text: str) -> int:
    """An argument that is a seed."""
    return _integer(text, 0, MAX_SEED)


def parse_threads(text: str) -> int:
    """An argument that is a number of threads."""
    return _integer(text, 1, MAX_THREADS)


def parse_resident_engines(text: str) -> int:
    """An argument that limits how many denoiser engines are resident."""
    return _integer(text, 1, MAX_RESIDENT_ENGINES)


def _integer(text: str, low: int, high: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not an integer in {low}..{high}")
    return value


def parse_guidance_scale(text: str) -> float:
    """An argument that is a guidance scale."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0.0):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a finite number of 0 or more")
    return value
