"""Command line arguments that several commands take: their text in, their value out, or argparse's error."""

from __future__ import annotations

import argparse
import math
import re

from engines.setting_choice import MAX_PIXELS, MAX_TOKENS, SettingChoice

MAX_SEED = (1 << 63) - 1
MAX_THREADS = 1024
MAX_RESIDENT_ENGINES = 64
MAX_STEPS = 1000  # as many as schedulers are trained on; a table of more would only be slow to make


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


def parse_steps(text: str) -> int:
    """An argument that is a number of inference steps."""
    return _integer(text, 1, MAX_STEPS)


def parse_text_length(text: str) -> int:
    """An argument that is a number of tokens."""
    return _integer(text, 1, MAX_TOKENS)


def parse_size(text: str) -> tuple[int, int]:
    """An argument that is a picture size, "1216x832" (width, then height): (height, width) in pixels."""
    found = re.fullmatch(r"(\d{1,6})x(\d{1,6})", text)
    width, height = map(int, found.groups()) if found else (0, 0)
    if not (1 <= width <= MAX_PIXELS and 1 <= height <= MAX_PIXELS):
        raise argparse.ArgumentTypeError(
            f"{text[:40]!r} is not a picture size such as 1216x832: width, then height, in pixels"
        )
    return height, width


def add_setting_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments that pick a setting of a bundle."""
    group = parser.add_argument_group(
        "which setting of the bundle", "The first that fits is taken, without any the bundle's first."
    )
    group.add_argument("--steps", type=parse_steps, metavar="N", help="its num_inference_steps")
    group.add_argument("--size", type=parse_size, metavar="WIDTHxHEIGHT", help="its picture size in pixels")
    group.add_argument(
        "--scheduler-setting", metavar="NAME", help="its name, as `inspect` lists it, or its scheduler's class name"
    )


def setting_choice(args: argparse.Namespace) -> SettingChoice:
    """The setting that the arguments of `add_setting_arguments` mean."""
    return SettingChoice(args.steps, args.size, args.scheduler_setting)


def parse_share(text: str) -> float:
    """An argument from 0 to 1."""
    value = parse_guidance_scale(text)
    if value > 1.0:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number from 0 to 1")
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
