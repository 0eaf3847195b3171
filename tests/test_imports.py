"""Imports run one way, and the runtime imports nothing that a product does not have."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXPORT_WORLD = (
    "torch",
    "diffusers",
    "transformers",
    "onnx",
    "modelopt",
    "rich",
    "skimage",
    "matplotlib",
    "safetensors",
    "dask",
    "distributed",
)
FORBIDDEN = {
    "engines": {"calibration", "tmpdiff_export", "tools", *EXPORT_WORLD},
    "calibration": {
        "tmpdiff_export",
        "tools",
        "torch",
        "diffusers",
        "transformers",
        "onnx",
        "modelopt",
        "dask",
        "distributed",
    },
    "tmpdiff_export": {"tools", "modelopt"},  # the judge of our range calibration, in tests
}
ROOMS = {
    "engines": """
        __main__
        cli
        run
        runtime
        conditioning
        loaded
        backends
        host
        loop
        engine
        bundle sampler text pictures noise arguments terminal
        manifest sampler_document schedule
        plan_entry package_entry text_entry setting_entry
        documents old_manifests precision reuse floating sampler_state
        files
        setting_choice
        errors version
    """,
    "engines.backends": """
        choose
        session_host
        onnxruntime tensorrt torch
        cuda onnx_references table
    """,
    "calibration": """
        run
        stages validation
        choose
        scores
        statistics
        measure
        document
        reuse_records
        records
    """,
    "tmpdiff_export": """
        cli
        commands
        report demo drop_in
        calibrate bundling
        targets
        pipelines
        onnx_graphs
        quantization
        weights
        display devices
        memory
    """,
    "tmpdiff_export.targets": """
        choose
        onnxruntime tensorrt torch
        exported
        target
        accuracy settings
    """,
    "tools": """
        headline
        experiments scale parity
        gpu_bench
        release demo acceptance
    """,
}
"""The rooms of each package, a floor a line, from the top down. A room imports from the floors below its own, never
from above and never from a room beside it."""

TORCH_LIBRARY = ROOT / "engines" / "backends" / "torch" / "library.py"  # the torch backend imports them from here
GPU_LIBRARIES = {"cuda"}  # imported by what runs on a GPU; tensorrt as well, which is not installed here
RUNTIME_LIBRARIES = {"numpy", "pydantic", "pydantic_core", "annotated_types", "typing_extensions", "typing_inspection"}
WALK = """
import sys
if sys.argv[1] == "engines":
    sys.modules["torch"] = None  # as in a product that has none
before = {name.partition(".")[0] for name in sys.modules}
import importlib, pkgutil
package = importlib.import_module(sys.argv[1])
names = [package.__name__]
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    if not module.name.endswith(".__main__"):
        try:
            importlib.import_module(module.name)
        except Exception as error:  # without TensorRT and torch their modules end in our own words
            backends = ("engines.backends.tensorrt.", "engines.backends.torch.")
            if not (module.name.startswith(backends) and "pip install" in str(error)):
                raise
        names.append(module.name)
print(*names)
loaded = {name.partition(".")[0] for name in sys.modules} - before
print(*sorted(name for name in loaded - sys.stdlib_module_names if not name.startswith("_sysconfigdata")))
"""


def files_of(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Line and top-level name of every import in a file, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; imports here are absolute"
            yield node.lineno, str(node.module).partition(".")[0]


def names_of(path: Path) -> Iterator[tuple[int, str]]:
    """Line and whole name of everything a file imports, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def in_subprocess(program: str, *args: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", program, *args],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_run_one_way(package: str) -> None:
    files = files_of(package)
    assert files
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files
        for line, name in imports_of(path)
        if name in FORBIDDEN[package] and not (path == TORCH_LIBRARY and name in ("torch", "safetensors"))
    ]
    assert wrong == []


@pytest.mark.parametrize("package", ROOMS)
def test_no_room_imports_from_above_or_beside(package: str) -> None:
    floors = {
        room: level for level, line in enumerate(reversed(ROOMS[package].strip().splitlines())) for room in line.split()
    }
    folder = ROOT.joinpath(*package.split("."))
    assert set(floors) == {path.relative_to(folder).parts[0].removesuffix(".py") for path in folder.rglob("*.py")} - {
        "__init__"
    }
    wrong = []
    for path in files_of(package.replace(".", "/")):
        room = path.relative_to(folder).parts[0].removesuffix(".py")
        for line, name in names_of(path) if room != "__init__" else ():
            inner = name.removeprefix(f"{package}.").partition(".")[0] if name.startswith(f"{package}.") else room
            if inner != room and floors.get(inner, -1) >= floors[room]:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert wrong == []


def test_the_map_names_every_room() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rooms = [room for floors in ROOMS.values() for room in floors.split() if room != "__main__"]
    assert [room for room in rooms if f"`{room}`" not in text and f"`{room}/`" not in text] == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {
        module_of(path): imported_modules(path)
        for package in ("engines", "calibration", "tmpdiff_export", "tools")
        for path in files_of(package)
    }
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported_modules(path: Path) -> set[str]:
    """Modules of this project that a file imports from; what a package's face hands on counts as that package's."""
    found = set()
    for _, name in names_of(path):
        parts = name.split(".")
        whole, parent = ROOT.joinpath(*parts), ROOT.joinpath(*parts[:-1])
        if whole.with_suffix(".py").exists() or (whole / "__init__.py").exists():
            found.add(name)
        elif parent.with_suffix(".py").exists() or (parent / "__init__.py").exists():
            found.add(".".join(parts[:-1]))
    return found - {module_of(path)}


@pytest.mark.parametrize("package", ["engines", "calibration"])
def test_importing_every_module_loads_nothing_forbidden(package: str) -> None:
    names, loaded = in_subprocess(WALK, package)
    expected = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in files_of(package)
        if path.name != "__main__.py"
    }
    assert set(names.split()) == expected
    assert not set(loaded.split()) & FORBIDDEN[package]
    if package == "engines":
        compiled = {name for name in loaded.split() if name.startswith(("_cython_", "cython_"))}  # parts of cuda
        assert set(loaded.split()) - GPU_LIBRARIES - compiled == {"engines", *RUNTIME_LIBRARIES}


def test_the_command_line_starts_without_libraries() -> None:
    program = "import sys, engines.cli; print(*({'numpy', 'pydantic', 'onnxruntime', 'PIL'} & set(sys.modules)))"
    assert in_subprocess(program) == [""]


def test_the_runtime_imports_what_it_declares() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    backends = [
        requirement
        for name in ("tensorrt", "tensorrt-lean", "tensorrt-rtx", "torch", "fp8-attention")
        for requirement in extras[name]
    ]
    declared = {name_of(requirement) for requirement in (*project["dependencies"], *backends)}
    distributions = {"cudnn": ["nvidia-cudnn-frontend"], **packages_distributions()}  # which needs a GPU's libraries
    imported = {name for path in files_of("engines") for _, name in imports_of(path)}
    third_party = imported - sys.stdlib_module_names - {"engines"}
    assert third_party
    used = {distribution.lower() for name in third_party for distribution in distributions.get(name, [name])}
    used -= {"cuda-core", "cuda-pathfinder"}  # further owners of the name space `cuda`
    assert used | {"onnxruntime-ep-nv-tensorrt-rtx-cu13"} == declared  # that one is imported by its name


def name_of(requirement: str) -> str:
    """The distribution of a requirement such as "numpy>=2.0"."""
    return requirement.partition(">")[0].strip().lower()
