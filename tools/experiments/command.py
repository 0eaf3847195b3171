"""What the commands share: arguments, the result file, goals, and drawing again from the result file."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from engines.cli import guarded
from engines.documents import read_json
from engines.errors import TmpDiffError
from engines.files import atomic_write_text
from tmpdiff_export.display import print_table, progress_bar
from tools.experiments.figures import save
from tools.experiments.statistics import Interval
from tools.experiments.study import Study, add_study_arguments, open_study

DIGITS = 5


@dataclass(frozen=True)
class Goal:
    """A goal, and what was measured for it.

    Attributes:
        subject: what it is about, as "int8, K = 8".
        target: what is asked for, in words.
        value: what was measured, in words.
        verdict: "met", "missed", or "not distinguishable" where the difference lies within the confidence interval.
    """

    subject: str
    target: str
    value: str
    verdict: str


@dataclass(frozen=True)
class Analysis:
    """What follows from the measured data.

    Attributes:
        findings: JSON data; all that the figure shows beyond the data.
        goals: in the order printed.
        notes: lines to print below them.
    """

    findings: dict[str, Any]
    goals: tuple[Goal, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Experiment:
    """An experiment: measuring is apart from what is made of it.

    Attributes:
        name: of the module.
        about: first line of the help.
        add_arguments: declares arguments of its own.
        measure: raw data of every sample, JSON; the only part that runs a model.
        analyse: gets the result file's content, setting and data.
        draw: gets the content, and the findings.
        version: of the data; files of others are not read.
        same_data: the experiment that measures the same, whose result files this one can analyse; "" for none.
    """

    name: str
    about: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    measure: Callable[[Study, argparse.Namespace], dict[str, Any]]
    analyse: Callable[[dict[str, Any]], Analysis]
    draw: Callable[[dict[str, Any], dict[str, Any]], Figure]
    version: int = 1
    same_data: str = ""

    def parser(self) -> argparse.ArgumentParser:
        """Of the command."""
        parser = argparse.ArgumentParser(prog=f"python -m tools.experiments.{self.name}", description=self.about)
        add_study_arguments(parser)
        self.add_arguments(parser)
        parser.add_argument("--out", type=Path, metavar="PREFIX", help="writes PREFIX.json and PREFIX.png")
        also = f", or one of {self.same_data}, which measures the same" if self.same_data else ""
        parser.add_argument("--redraw", type=Path, metavar="JSON", help=f"analyse and draw a result file again{also}")
        return parser

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """Runs the command; the exit status: 0 whether goals are met or not, 1 for a failure, 2 for wrong usage."""
        parser = self.parser()
        args = parser.parse_args(arguments)
        missing = [name for name in ("bundle", "prompts", "out") if getattr(args, name) is None]
        if not args.redraw and missing:
            parser.error(f"{missing[0]} is missing; give BUNDLE, --prompts and --out, or --redraw")
        return guarded(self.name, lambda: self._run(args))

    def _run(self, args: argparse.Namespace) -> int:
        if not args.redraw:
            require_folder(args.out)
            with progress_bar() as report, open_study(args, report) as study:
                content = self.content(study, args)
            # What was measured is safe before analysis, which takes its time; `--redraw` does that again.
            write_content(content, args.out)
            self.finish(content, args.out)
            return 0
        content = self._read(args.redraw)
        foreign = content["experiment"] != self.name
        if foreign and not args.out:
            raise TmpDiffError(f"{args.redraw} is a file of {content['experiment']}; name the one to write with --out")
        self.finish(content, args.out or args.redraw.with_suffix(""), args.redraw.name if foreign else None)
        return 0

    def content(self, study: Study, args: argparse.Namespace) -> dict[str, Any]:
        """Measures; what the result file holds before it is analysed."""
        found: dict[str, Any] = round_numbers(
            {
                "experiment": self.name,
                "version": self.version,
                "command": self.wording(args),
                "setting": study.setting,
                "data": self.measure(study, args),
            }
        )
        return found

    def _read(self, path: Path) -> dict[str, Any]:
        content = read_json(path, "result file", TmpDiffError)
        found = (content.get("experiment"), content.get("version"))
        if found not in ((self.name, self.version), (self.same_data, self.version)):
            raise TmpDiffError(
                f"{path} holds {found[0]!r} version {found[1]!r}, expected {self.name!r} version {self.version}; measure "
                "again, or use the command that made it"
            )
        if "data" not in content:
            raise TmpDiffError(f"{path} has no measurements; redraw {content['data_in']}, which holds them")
        return content

    def finish(self, content: dict[str, Any], prefix: Path, data_in: str | None = None) -> None:
        """Writes, draws and prints; measurements that lie in another file, `data_in`, are not written again."""
        found = self.analyse(content)
        findings = round_numbers(found.findings)
        whole = {**content, "findings": findings, "goals": [asdict(goal) for goal in found.goals]}
        if data_in:
            command = f"python -m tools.experiments.{self.name} --redraw {data_in} --out {prefix.name}"
            whole |= {"experiment": self.name, "command": command, "data_in": data_in}
            del whole["data"]
        write_content(whole, prefix)
        save(lambda: self.draw(content, findings), beside(prefix, ".png"))
        setting = content["setting"]
        print_goals(f"{self.name}, {setting['denoiser']}, T = {setting['num_steps']}", found.goals)
        for note in found.notes:
            print(note)
        print(f"wrote {beside(prefix, '.json')} and {beside(prefix, '.png')}")

    def wording(self, args: argparse.Namespace) -> str:
        """The command as it was given; paths by their name only."""
        words = [f"python -m tools.experiments.{self.name} BUNDLE"]
        for name, value in vars(args).items():
            if value is True:
                words.append(f"--{name.replace('_', '-')}")
            elif name not in ("bundle", "redraw") and value is not None and value is not False:
                words.append(f"--{name.replace('_', '-')} {value.name if isinstance(value, Path) else value}")
        return " ".join(words)


def require_folder(prefix: Path) -> None:
    """Refuses a prefix whose folder is not there, before anything is measured."""
    if not prefix.parent.is_dir():
        raise TmpDiffError(f"output folder {prefix.parent} does not exist; make it first")


def write_content(content: dict[str, Any], prefix: Path) -> None:
    """Writes PREFIX.json."""
    atomic_write_text(beside(prefix, ".json"), compact_json(content) + "\n")


def print_goals(name: str, goals: Sequence[Goal]) -> None:
    """The goals as a table on stdout, under the name of the experiment and what it was made on."""
    if not goals:
        print(f"{name}: no goal is set for this experiment")
        return
    rows = [[goal.subject, goal.target, goal.value, goal.verdict] for goal in goals]
    met = sum(goal.verdict == "met" for goal in goals)
    print_table(f"Goals of {name}: {met} of {len(goals)} met", ["", "goal", "measured", ""], rows)


def verdict(met: bool) -> str:
    """A goal without a confidence interval to consider."""
    return "met" if met else "missed"


def wording(interval: Interval, form: str = ".3f") -> str:
    """An interval in words, "0.981 [0.972, 0.990]"."""
    return f"{interval.value:{form}} [{interval.low:{form}}, {interval.high:{form}}]"


def round_numbers(data: Any) -> Any:
    """JSON data with floats of `DIGITS` significant digits; NaN and infinities become None."""
    if isinstance(data, dict):
        return {key: round_numbers(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [round_numbers(value) for value in data]
    if isinstance(data, float):
        return float(f"{data:.{DIGITS}g}") if math.isfinite(data) else None
    return data


def compact_json(data: Any, depth: int = 0) -> str:
    """JSON with lists of numbers on one line."""
    indent = " " * (depth + 1)
    if isinstance(data, dict) and data:
        parts = [f"{indent}{json.dumps(str(key))}: {compact_json(value, depth + 1)}" for key, value in data.items()]
        return "{\n" + ",\n".join(parts) + "\n" + " " * depth + "}"
    if isinstance(data, list) and any(isinstance(value, (dict, list, str)) for value in data):
        return "[\n" + ",\n".join(indent + compact_json(value, depth + 1) for value in data) + "\n" + " " * depth + "]"
    return json.dumps(data, allow_nan=False, separators=(",", ":"))


def beside(prefix: Path, suffix: str) -> Path:
    """The file of a prefix; it may hold dots."""
    return prefix.with_name(prefix.name + suffix)
