"""How a fake differs from what it stands for: members the real one does not have, other parameters, other values."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from types import ModuleType
from typing import Any

ONLY_IN_FAKES = "fake_"
NOT_FAKES = ("builtins", "enum")
"""Modules of base classes that fakes are built on."""


def class_differences(fake: type, real: dict[str, Any]) -> list[str]:
    """What a fake class has or takes that the real class does not.

    Args:
        fake: the class; names that start with `_` or `fake_` are its own business.
        real: the real class's members, as `Bindings.api` gives them.
    """
    found = []
    if hasattr(fake, "__members__"):
        return [f"{fake.__name__}.{name} does not exist" for name in fake.__members__ if name not in real]
    for name, member in _public_members(fake):
        where = f"{fake.__name__}.{name}"
        if name not in real:
            found.append(f"{where} does not exist")
        elif isinstance(real[name], list):
            if not inspect.isfunction(member):
                found.append(f"{where} is a method")
            elif problem := _parameter_difference(_parameters(member)[1:], real[name]):
                found.append(f"{where}{problem}")
        elif inspect.isfunction(member):
            found.append(f"{where} is not a method")
        elif isinstance(member, property) and member.fset and real[name] == "read-only":
            found.append(f"{where} is read-only")
    found += [
        f"{fake.__name__}.{name} does not exist" for name in sorted(_instance_attributes(fake)) if name not in real
    ]
    return found


def module_differences(fake: ModuleType, real: ModuleType) -> list[str]:
    """What a fake module of plain functions, enumerations and constants has or takes that the real one does not."""
    found = []
    for name, member in vars(fake).items():
        if name.startswith(("_", ONLY_IN_FAKES)):
            continue
        other = getattr(real, name, None)
        if other is None:
            found.append(f"{name} does not exist")
        elif hasattr(member, "__members__"):
            values = {key: int(value) for key, value in other.__members__.items()}
            wrong = {key: int(value) for key, value in member.__members__.items() if values.get(key) != int(value)}
            found += [f"{name}.{key} is {values.get(key)}, not {value}" for key, value in wrong.items()]
        elif isinstance(member, int):
            found += [f"{name} is {int(other)}, not {member}"] if int(other) != member else []
        elif callable(member) and not inspect.isclass(member):
            wanted = [[p.name, p.default is not p.empty] for p in inspect.signature(other).parameters.values()]
            if problem := _parameter_difference([p for p in _parameters(member) if p[0] != "cuda"], [wanted]):
                found.append(f"{name}{problem}")
    return found


def result_lengths(module: ModuleType, real: ModuleType, names: list[str]) -> dict[str, int]:
    """How many values each function of `module` returns where there is no GPU.

    Args:
        module: `real` or its fake.
        real: the real module, whose signatures tell what to pass: the first member of an enumeration, else 0.
        names: of the functions.
    """
    lengths = {}
    for name in names:
        arguments = []
        for parameter in inspect.signature(getattr(real, name)).parameters.values():
            kind = getattr(module, str(parameter.annotation), None)
            arguments.append(0 if kind is None else next(iter(kind.__members__.values())))
        lengths[name] = len(getattr(module, name)(*arguments))
    return lengths


def _public_members(cls: type) -> Iterator[tuple[str, Any]]:
    """Members of a class and its bases in the fakes."""
    seen: set[str] = set()
    for base in cls.__mro__:
        if base.__module__ in NOT_FAKES:
            continue
        for name, member in vars(base).items():
            if name not in seen and not name.startswith(("_", ONLY_IN_FAKES)):
                seen.add(name)
                yield name, member


def _instance_attributes(cls: type) -> set[str]:
    """Public names that the methods of a class assign to on self, other than properties."""
    names: set[str] = set()
    for base in cls.__mro__:
        if base.__module__ not in NOT_FAKES:
            for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(base)))):
                if (
                    isinstance(node, ast.Attribute)
                    and isinstance(node.ctx, ast.Store)
                    and ast.unparse(node.value) == "self"
                ):
                    names.add(node.attr)
    return {name for name in names if not name.startswith(("_", ONLY_IN_FAKES))}


def _parameters(function: Any) -> list[list[Any]]:
    """[name, whether it may be left out]; a parameter that takes any number of arguments counts as "*"."""
    parameters = inspect.signature(function, follow_wrapped=True).parameters.values()
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [["*" if p.kind in variable else p.name, p.default is not p.empty] for p in parameters]


def _parameter_difference(fake: list[list[Any]], overloads: list[list[list[Any]]]) -> str | None:
    """How the parameters of a fake differ from those of the real function, None if they do not.

    A fake has the parameters of one overload, or those of all of them, each of which may be left out where not all
    overloads have it. A real parameter without a name may have any in the fake.
    """
    if any(_same(fake, real) for real in overloads):
        return None
    if len(overloads) > 1:
        names = {name for real in overloads for name, _ in real}
        shared = {name for name in names if all(name in [other for other, _ in real] for real in overloads)}
        if {name for name, _ in fake} == names and all(optional or name in shared for name, optional in fake):
            return None
    return f"{_spelled(fake)} has the parameters {' or '.join(map(_spelled, overloads))}"


def _same(fake: list[list[Any]], real: list[list[Any]]) -> bool:
    return len(fake) == len(real) and all(
        mine[0] == other[0] or other[0] is None for mine, other in zip(fake, real, strict=True)
    ) and all(other[1] or not mine[1] for mine, other in zip(fake, real, strict=True))  # fmt: skip


def _spelled(parameters: list[list[Any]]) -> str:
    return "(" + ", ".join((name or "_") + ("=..." if optional else "") for name, optional in parameters) + ")"
