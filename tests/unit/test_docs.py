"""What the pages and docstrings name exists: links, options, commands, files, modules; and the README stays short."""

from __future__ import annotations

import argparse
import importlib
import re
from pathlib import Path

import pytest
from helpers.paths import ROOT

from tmpdiff_export.cli import COMMANDS

README = ROOT / "README.md"
GUIDE = ROOT / "docs" / "guide.md"
PACKAGES = ("engines", "calibration", "tmpdiff_export", "tools", "tests")
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
LINK = re.compile(r"\]\(([^)\s]+)\)")
MODULE = re.compile(r"python -m (tools[.\w]*)")
NAME = re.compile(r"`((?:engines|calibration|tmpdiff_export|tools)(?:\.\w+)+)`")
PATH = re.compile(r"(?<![\w./-])(?:tools|tests|engines|calibration|tmpdiff_export|docs)/[\w./-]*\w/?")


def options() -> dict[str, set[str]]:
    """The options of every subcommand of `tmpdiff-export`; `tmpdiff-runtime` has those of `run` and `verify`."""
    found = {}
    for name, (module, declare, _, _) in COMMANDS.items():
        parser = argparse.ArgumentParser()
        getattr(importlib.import_module(module), declare)(parser)
        found[name] = set(OPTION.findall(parser.format_help()))
    return found


def commands_in(text: str) -> list[tuple[str, list[str]]]:
    """(subcommand, options) of every command line in fenced or indented blocks; a backslash continues a line."""
    lines = text.replace("\\\n", " ").splitlines()
    asked = [re.match(r"\s*tmpdiff-(?:export|runtime) ([a-z]+)(.*)", line.partition("#")[0]) for line in lines]
    return [(match[1], OPTION.findall(match[2])) for match in asked if match]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as they are made on the web: lower case, hyphens for blanks, no punctuation."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(("page", "lines", "words"), [(README, 200, 1500), (ROOT / "docs/architecture.md", 150, None)])
def test_pages_stay_short(page: Path, lines: int, words: int | None) -> None:
    text = page.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= lines
    assert words is None or len(text.split()) <= words


def test_lines_of_the_changelog_are_wrapped() -> None:
    lines = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if len(line) > 120] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in link]
    broken = []
    for link in links:
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", [README, GUIDE], ids=lambda page: page.name)
def test_options_that_are_named_exist(page: Path) -> None:
    known = set().union(*options().values())
    named = set(OPTION.findall(page.read_text(encoding="utf-8")))
    assert named - known == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_take_the_options_they_are_given(page: Path) -> None:
    known = options()
    asked = commands_in(page.read_text(encoding="utf-8"))
    assert [(name, option) for name, given in asked for option in given if option not in known[name]] == []


def test_the_guide_names_every_option() -> None:
    named = set(OPTION.findall(GUIDE.read_text(encoding="utf-8")))
    assert set().union(*options().values()) - {"--help"} - named == set()


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_modules_and_files_that_are_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    modules = {module.rstrip(".").removesuffix(".NAME") for module in MODULE.findall(text)}
    files = [module.replace(".", "/") for module in modules]
    missing = [name for name in files if not (ROOT / name).is_dir() and not (ROOT / f"{name}.py").is_file()]
    missing += [path for path in PATH.findall(text) if not (ROOT / path).exists()]
    assert missing == []


def test_modules_and_names_that_the_code_speaks_of_exist() -> None:
    """Such as `engines.loop.host_loop` in a docstring: the module is there, and the name stands in it."""
    missing = []
    for path in (path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))):
        for name in NAME.findall(path.read_text(encoding="utf-8")):
            file, names = source_of(name)
            if file is None or not all(re.search(rf"\b{part}\b", file.read_text(encoding="utf-8")) for part in names):
                missing.append(f"{path.relative_to(ROOT)}: {name}")
    assert missing == []


def source_of(name: str) -> tuple[Path | None, list[str]]:
    """The file of the innermost module in a dotted name, and what comes behind it."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[:count])
        for file in (place.with_suffix(".py"), place / "__init__.py"):
            if file.is_file():
                return file, parts[count:]
    return None, parts
