"""Figure 4 of the paper: SSIM and typical error over the speed-up of whole loops, from result files of `quality`.

    python -m tools.experiments.speed_quality FILE.json ... --ratios docs/results/experiments/step-ratios.json --out PREFIX

Every file is of one bundle. The speed-up of a schedule with K of T steps at the reference is T / (K + (T - K) / ratio), of
all steps at the low precision the ratio itself. Ratios are not measured here: the table says of each where it comes from,
of which denoiser, and whether of the hardware that the errors were measured on. Writes PREFIX.json and PREFIX.png.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from engines.cli import guarded
from engines.documents import read_json
from engines.errors import TmpDiffError
from engines.files import atomic_write_text
from tools.experiments.command import compact_json, round_numbers
from tools.experiments.figures import INK, colour, headline, label, panels, save
from tools.experiments.quality_analysis import MIXED, SCHEDULE, UNIFORM, analyse
from tools.experiments.summary import VERSIONS

PROGRAM = "speed_quality"
SHOWN = {SCHEDULE: "-*", MIXED: ":."}
"""Series of a precision, and how they are drawn; both begin and end at the uniform runs."""
_STYLES = ("-", "--", "-.")


@dataclass(frozen=True)
class Ratio:
    """How many times as fast as a 16-bit step a step is.

    Attributes:
        form: what `label` calls the precision, without "simulated": "fp8", "nvfp4 (W4A4R32)".
        ratio: the one that is drawn.
        hardware: what it was measured on.
        simulated: whether errors and speed are of different hardware; of different denoisers they are anyway.
        source: where it is published.
    """

    form: str
    ratio: float
    hardware: str
    simulated: bool
    source: str


def read_ratios(path: Path) -> dict[str, Ratio]:
    """The ratios that are drawn, by form; further entries of the file are for the reader.

    Raises:
        TmpDiffError: it is no such table.
    """
    data = read_json(path, "table of ratios", TmpDiffError)
    try:
        drawn = [item for item in data["ratios"] if item["drawn"]]
        found = [Ratio(*(item[key] for key in ("form", "ratio", "hardware", "simulated", "source"))) for item in drawn]
    except (KeyError, TypeError) as error:
        raise TmpDiffError(f"{path} is no table of ratios: {error} is missing or of another type") from error
    return {item.form: item for item in found}


def speed_up(ratio: float, num_steps: int, high: int) -> float:
    """Of a loop in which `high` steps are at the reference."""
    return num_steps / (high + (num_steps - high) / ratio)


def series(content: dict[str, Any], ratios: dict[str, Ratio]) -> dict[str, Any]:
    """By the precision's label its ratio, and by series (speed-up, typical error, SSIM) of every K, the fastest last.

    Precisions without a ratio are left out.
    """
    setting, found = content["setting"], {}
    num_steps = setting["num_steps"]
    for precision, entry in analyse(content).findings["precisions"].items():
        name = label(precision, setting)
        ratio = ratios.get(name.replace(", simulated", ""))
        if ratio is None or not entry["cells"]:
            continue
        points: dict[str, list[list[float]]] = {shown: [] for shown in SHOWN}
        for count, cell in sorted(entry["cells"].items(), key=lambda item: -int(item[0])):
            for shown in SHOWN:
                points[shown].append([speed_up(ratio.ratio, num_steps, int(count)), *_quality(cell, shown)])
        uniform = [ratio.ratio, *_quality(next(iter(entry["cells"].values())), UNIFORM)]
        found[name] = {
            "precision": precision,
            "ratio": asdict(ratio),
            "series": {shown: [*rows, uniform] for shown, rows in points.items()},
        }
    return found


def _quality(cell: dict[str, Any], name: str) -> tuple[float, float]:
    return cell["typical"][name]["value"], 1 - cell["pictures"]["dissimilarity"][name]


def draw(found: dict[str, Any], setting: dict[str, Any]) -> Figure:
    """SSIM, and typical error, over the speed-up."""
    figure, ((ssim, error),) = panels(1, 2, width=5.2, height=3.9)
    by_precision: dict[str, int] = {}
    for name, entry in found.items():
        turn = by_precision.setdefault(entry["precision"], 0)
        by_precision[entry["precision"]] += 1
        for shown, style in SHOWN.items():
            speed, typical, quality = zip(*entry["series"][shown], strict=True)
            line = style if shown != SCHEDULE else _STYLES[turn % len(_STYLES)] + style[-1]
            words = f"{name}, {entry['ratio']['ratio']:g} times: {shown}"
            shade, alpha = colour(entry["precision"]), 1.0 if shown == SCHEDULE else 0.5
            ssim.plot(speed, quality, line, label=words, color=shade, alpha=alpha)
            error.plot(speed, typical, line, color=shade, alpha=alpha)
    for axes, words in ((ssim, "SSIM to the reference's pictures"), (error, "typical error of the latents")):
        axes.set_xlabel("speed-up over 16 bit")
        axes.set_ylabel(words)
        axes.axvline(1, color=INK, linewidth=0.8, alpha=0.6)
    error.set_yscale("log")
    figure.legend(loc="outside lower center", ncols=2)
    simulated = [name for name, entry in found.items() if entry["ratio"]["simulated"]]
    headline(
        figure,
        f"{setting['denoiser']}, T = {setting['num_steps']}, {len(setting['validation_prompts'])} unseen samples. Errors are "
        "measured; speed-ups follow from ratios of steps of larger denoisers"
        + (f", published for other hardware: {', '.join(simulated)}" if simulated else ""),
    )
    return figure


def run(args: argparse.Namespace) -> int:
    """Reads, draws, and writes."""
    ratios = read_ratios(args.ratios)
    found: dict[str, Any] = {}
    setting: dict[str, Any] = {}
    for path in args.files:
        content = read_json(path, "result file", TmpDiffError)
        if (content.get("experiment"), content.get("version")) != ("quality", VERSIONS["quality"]):
            raise TmpDiffError(f"{path} is no result file of quality as it is now; measure again")
        same = ("denoiser", "num_steps", "validation_prompts")
        if setting and any(setting[key] != content["setting"][key] for key in same):
            raise TmpDiffError(f"{path} is of another denoiser, number of steps or other prompts than {args.files[0]}")
        setting = setting or content["setting"]
        for name, entry in series(content, ratios).items():
            found.setdefault(name, {**entry, "file": path.name})
    if not found:
        raise TmpDiffError(f"{args.ratios} has no ratio of what was measured; it names {', '.join(ratios)}")
    document = {
        "experiment": PROGRAM,
        "files": [path.name for path in args.files],
        "ratios": args.ratios.name,
        "columns": ["speed-up", "typical error", "SSIM"],
        "precisions": found,
    }
    atomic_write_text(args.out.with_name(f"{args.out.name}.json"), compact_json(round_numbers(document)) + "\n")
    save(lambda: draw(found, setting), args.out.with_name(f"{args.out.name}.png"))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; the exit status."""
    parser = argparse.ArgumentParser(prog=f"python -m tools.experiments.{PROGRAM}", description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", metavar="JSON", help="result files of quality, of one denoiser")
    parser.add_argument("--ratios", type=Path, required=True, metavar="JSON", help="table of ratios of steps")
    parser.add_argument("--out", type=Path, required=True, metavar="PREFIX", help="writes PREFIX.json and PREFIX.png")
    args = parser.parse_args(arguments)
    return guarded(PROGRAM, lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
