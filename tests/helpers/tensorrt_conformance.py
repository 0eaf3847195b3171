"""What the conformance tests need: the real bindings, the API as their docstrings tell it, and our use of it."""

from __future__ import annotations

import ast
import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.paths import ROOT

PACKAGE = ROOT / "engines" / "backends" / "tensorrt"
CUDA_PACKAGE = ROOT / "engines" / "backends" / "cuda"
BINDINGS = Path(os.environ.get("TMPDIFF_TENSORRT_BINDINGS") or ROOT / ".venv" / "tensorrt")
RUN_SIDE_ENTRY = "host"
"""What this module imports of the package also runs where only the lean runtime is installed."""

# Stricter than the project's settings: nothing that TensorRT returns may lose its type.
MYPY_SETTINGS = """
[mypy]
python_version = 3.11
strict = true
disallow_untyped_calls = false
warn_return_any = false
follow_imports = silent
[mypy-tensorrt_lean.*,polygraphy.*,cuda.*]
ignore_missing_imports = true
"""

# Runs what it is given line by line, [code, arguments], and answers [what it printed, traceback or null]. What libraries
# write to the standard output by themselves goes to the standard error.
_SERVE = """
import contextlib, io, json, os, sys, traceback
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
for line in sys.stdin:
    code, arguments = json.loads(line)
    sys.argv[1:] = arguments
    failed, printed = None, io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
        except BaseException:
            failed = traceback.format_exc()
    print(json.dumps([printed.getvalue(), failed]), file=answers, flush=True)
"""

_MISSING = """
import importlib, json, sys
def there(chain):
    value = module
    for part in chain.split("."):
        if not hasattr(value, part):
            return False
        value = getattr(value, part)
    return True
module = importlib.import_module(sys.argv[1])
print(json.dumps([chain for chain in json.loads(sys.argv[2]) if not there(chain)]))
"""

_MEMBERS = """
import importlib, json, sys
classes = {name: item for name, item in vars(importlib.import_module(sys.argv[1])).items() if isinstance(item, type)}
print(json.dumps({name: [key for key in dir(item) if key[0] != "_"] for name, item in classes.items()}))
"""


@dataclass(frozen=True)
class Bindings:
    """One version of the real TensorRT bindings, full (nothing can be built) or lean.

    Attributes:
        folder: of all versions and of the stub libraries.
        name: of this one below `folder`.
    """

    folder: Path
    name: str

    @property
    def lean(self) -> bool:
        return self.name.startswith("lean-")

    @property
    def version(self) -> str:
        return self.name.removeprefix("lean-")

    @property
    def module(self) -> str:
        """What a user imports."""
        return "tensorrt_lean" if self.lean else "tensorrt"

    @property
    def typing(self) -> Path:
        """Folder of the type stubs, which are of a module `tensorrt`, for lean bindings too."""
        return self.folder / self.name / "typing"

    @property
    def environment(self) -> dict[str, str]:
        """Of a process where these bindings are installed and no GPU is seen."""
        return os.environ | {
            "LD_LIBRARY_PATH": str(self.folder / "stubs"),
            "PYTHONPATH": f"{self.folder / self.name}{os.pathsep}{ROOT}",
            "CUDA_VISIBLE_DEVICES": "",
        }

    @functools.cached_property
    def _server(self) -> subprocess.Popen[str]:
        """One process for all questions, so that the bindings are loaded once; it ends with this one."""
        words = [sys.executable, "-c", _SERVE]
        return subprocess.Popen(
            words, env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def python(self, code: str, *arguments: str) -> str:
        """Runs code where these bindings are installed; returns what it printed."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        print(json.dumps([code, arguments]), file=self._server.stdin, flush=True)
        answer = self._server.stdout.readline()
        assert answer, f"{self.name}: the process died with exit status {self._server.wait()}"
        printed, failed = json.loads(answer)
        assert failed is None, f"{self.name}: {failed}"
        return str(printed)

    def close(self) -> None:
        """Ends the process that answered."""
        if "_server" in self.__dict__:
            self._server.communicate()

    def missing(self, chains: set[str]) -> list[str]:
        """Those of "X.Y" that the module does not have."""
        found: list[str] = json.loads(self.python(_MISSING, self.module, json.dumps(sorted(chains))))
        return found

    def members(self) -> dict[str, list[str]]:
        """Public members of each class of the module itself, for comparison with the type stubs."""
        found: dict[str, list[str]] = json.loads(self.python(_MEMBERS, self.module))
        return found

    def configuration(self, options: dict[str, Any]) -> list[tuple[str, list[str]]]:
        """What the builder configuration is told for these `PlanOptions`; see tensorrt_strict.py."""
        code = (ROOT / "tests" / "helpers" / "tensorrt_strict.py").read_text()
        noted: list[tuple[str, list[str]]] = json.loads(self.python(code, json.dumps(options)).splitlines()[-1])
        return noted

    def mypy(self, files: list[Path], settings: Path) -> list[str]:
        """The errors that mypy finds in files, with this version's type stubs for `tensorrt`."""
        options = ["--config-file", str(settings), "--cache-dir", str(self.folder / "mypy"), "--no-error-summary"]
        command = [sys.executable, "-m", "mypy", *options, *map(str, files)]
        environment = os.environ | {"MYPYPATH": str(self.typing)}
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode in (0, 1), f"{done.stdout}{done.stderr}"
        return [line for line in done.stdout.splitlines() if ": note: " not in line]

    @functools.cached_property
    def api(self) -> dict[str, dict[str, Any]]:
        """For each class (nested ones as "A.B"), its members: a list of overloads, "property", "read-only" or "value".

        Inherited members are included.
        """
        tree = ast.parse((self.typing / "tensorrt" / "__init__.pyi").read_text())
        own = dict(_classes(tree.body, ""))
        return {path: _members(node, own) for path, node in own.items()}


def prepare(folder: Path) -> list[Bindings]:
    """All bindings, fetched into `folder` if they are not there yet.

    Raises:
        AssertionError: they cannot be had; the tool's words.
    """
    tool = [sys.executable, str(ROOT / "tools" / "release" / "fetch_bindings.py"), "--into", str(folder)]
    done = subprocess.run(tool, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [Bindings(folder, name) for name in done.stdout.split()]


def modules() -> list[Path]:
    """The backend's source files."""
    return sorted(PACKAGE.glob("*.py"))


def run_side() -> list[Path]:
    """Those that must work with the lean runtime: what running a plan imports, directly or not."""
    found: set[str] = set()
    waiting = {RUN_SIDE_ENTRY}
    while waiting:
        name = waiting.pop()
        found.add(name)
        waiting |= set(_imported_siblings(ast.parse((PACKAGE / f"{name}.py").read_text()))) - found
    return [PACKAGE / f"{name}.py" for name in sorted(found)]


def chains(source: str, name: str) -> set[str]:
    """Every "X.Y" after `name` in source, also as getattr(name.X, "Y"), but not what hasattr(name, "X") asks for first.

    >>> sorted(chains("trt.A.B(trt.C).D", "trt"))
    ['A', 'A.B', 'C']
    """
    nodes = list(ast.walk(ast.parse(source)))
    asked = {
        node.args[1].value
        for node in nodes
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "hasattr" and isinstance(node.args[1], ast.Constant)
        if ast.unparse(node.args[0]) == name
    }
    found = {_chain(node, name) for node in nodes} - {""}
    return {chain for chain in found if chain.split(".")[0] not in asked}


def untyped_objects(source: str) -> list[str]:
    """The uses of an attribute of something annotated `Any`, where mypy checks nothing, as "line: expression".

    >>> untyped_objects("def f(engine: Any, name: Any): return engine.num_layers, name")
    ['1: engine.num_layers']
    """
    tree = ast.parse(source)
    untyped: set[str] = set()
    makers: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and _is_any(node.annotation):
            untyped.add(node.arg)
        elif isinstance(node, ast.AnnAssign) and _is_any(node.annotation):
            untyped.add(ast.unparse(node.target))
        elif isinstance(node, ast.FunctionDef) and _is_any(node.returns):
            makers |= {node.name, f"self.{node.name}"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and ast.unparse(node.value.func) in makers:
            untyped |= {ast.unparse(target) for target in node.targets}
    return [
        f"{node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in untyped
    ]


def _is_any(annotation: ast.expr | None) -> bool:
    return annotation is not None and ast.unparse(annotation) in ("Any", "Any | None")


@dataclass(frozen=True)
class Call:
    """A call of `name`.function in a source file."""

    where: str
    function: str
    positional: int
    keywords: tuple[str, ...]


def calls(path: Path, name: str) -> list[Call]:
    """The calls of functions of the module `name` that pass no argument by star."""
    return [
        Call(f"{path.name}:{node.lineno}", _chain(node.func, name), len(node.args), tuple(k.arg for k in node.keywords if k.arg))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and _chain(node.func, name)
        if not any(isinstance(a, ast.Starred) for a in node.args) and all(k.arg for k in node.keywords)
    ]  # fmt: skip


def _chain(node: ast.AST, name: str) -> str:
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr" and len(node.args) == 2:
        owner, attribute = node.args
        if isinstance(attribute, ast.Constant):
            return _chain(ast.Attribute(owner, str(attribute.value)), name)
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join(reversed(parts)) if isinstance(node, ast.Name) and node.id == name else ""


def _imported_siblings(tree: ast.Module) -> Iterator[str]:
    package = ".".join(PACKAGE.relative_to(ROOT).parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == package:
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{package}."):
            yield (node.module or "").removeprefix(f"{package}.")


def _classes(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, ast.ClassDef]]:
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield prefix + node.name, node
            yield from _classes(node.body, f"{prefix}{node.name}.")


def _members(node: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for base in node.bases:
        found |= _members(classes[ast.unparse(base)], classes) if ast.unparse(base) in classes else {}
    own: dict[str, Any] = {}
    for statement in node.body:
        if isinstance(statement, ast.FunctionDef):
            decorators = {ast.unparse(decorator) for decorator in statement.decorator_list}
            if "property" in decorators:
                own[statement.name] = "read-only"
            elif f"{statement.name}.setter" in decorators:
                own[statement.name] = "property"
            else:
                own.setdefault(statement.name, []).append(_parameters(statement.args))
        elif isinstance(statement, ast.AnnAssign):
            own[ast.unparse(statement.target)] = "value"
        elif isinstance(statement, ast.Assign):
            own[ast.unparse(statement.targets[0])] = "value"
        elif isinstance(statement, ast.ClassDef):
            own[statement.name] = "value"
    return found | own


def _parameters(arguments: ast.arguments) -> list[list[Any]]:
    """[name, whether it may be left out] of each parameter after self; None for the name of a positional one."""
    positional = [*arguments.posonlyargs, *arguments.args]
    required = len(positional) - len(arguments.defaults)
    unnamed = len(arguments.posonlyargs)
    found: list[list[Any]] = [[None if i < unnamed else a.arg, i >= required] for i, a in enumerate(positional)]
    found += [[a.arg, d is not None] for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    return found[1:]
