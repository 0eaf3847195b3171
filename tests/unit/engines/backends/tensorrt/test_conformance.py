"""The TensorRT backend uses the API that TensorRT 10.16 and 11.4 really have, full and lean.

The bindings of each version are loaded without TensorRT's libraries, so names, parameters and types are
checked, not behaviour; the lean runtime is there as a whole, but no GPU is.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes.install import install
from helpers.fake_conformance import class_differences, module_differences, result_lengths
from helpers.paths import ROOT
from helpers.tensorrt_conformance import (
    BINDINGS,
    CUDA_PACKAGE,
    MYPY_SETTINGS,
    PACKAGE,
    Bindings,
    calls,
    chains,
    modules,
    prepare,
    run_side,
    untyped_objects,
)

# Every line that ends in a comment is one that mypy has to report.
PLANTED = """
from engines.backends.tensorrt.bindings import trt
from engines.backends.tensorrt.messages import MessageLog

log = MessageLog()
runtime = trt.Runtime(log)
trt.Runtim(log)  # wrong class
trt.DataType.HALFF  # wrong enum member
runtime.deserialize_cuda_engine(b"").num_io_tensors  # None not handled
engine = runtime.deserialize_cuda_engine(plan := b"plan")
assert engine is not None
engine.num_io_tensor  # wrong property
engine.num_io_tensors = 3  # read-only property
engine.get_tensor_dtype(index=1)  # wrong keyword
engine.get_tensor_dtype(1)  # wrong type
engine.weight_streaming_budget_v2 = 1 << 30
context = engine.create_execution_context(strategy=trt.ExecutionContextAllocationStrategy.USER_MANAGED)
assert context is not None
context.set_input_shape("latents", (2, 4, 32, 32))
context.set_device_memory(1)  # argument left out
trt.IExecutionContext()  # no constructor
shape: tuple[int, ...] = tuple(engine.get_tensor_shape("latents"))
view = memoryview(engine.serialize())


class Times(trt.IProfiler):
    def report_layer_time(self, layer_name: str, ms: float) -> None: ...


class Wrong(trt.IProfiler):
    def report_layer_time(self, layer_name: str) -> None: ...  # parameter left out
"""
WRONG_LINES = {number for number, line in enumerate(PLANTED.splitlines(), 1) if "  # " in line}

LEAN_WITHOUT_GPU = """
import importlib
import os
import subprocess
import sys
for name in sys.argv[1:]:
    importlib.import_module(f"engines.backends.tensorrt.{name}")
from engines.backends.tensorrt.bindings import LEAN, VERSION, trt
from engines.backends.tensorrt.host import tensorrt_host
from engines.backends.tensorrt.messages import MessageLog
from engines.errors import BackendError

print(LEAN, VERSION)
try:
    tensorrt_host()
except BackendError as error:
    print(error)
log = MessageLog()
runtime = trt.Runtime(log)
try:
    log.check("cannot make a TensorRT runtime", "look at the driver")
except BackendError as error:
    print(error, flush=True)
os._exit(0)  # without a GPU the Runtime's destructor crashes
"""


@pytest.fixture(scope="module")
def all_bindings() -> Iterator[list[Bindings]]:
    found = prepare(BINDINGS)
    yield found
    for bindings in found:
        bindings.close()


@pytest.fixture(scope="module")
def full_bindings(all_bindings: list[Bindings]) -> list[Bindings]:
    return [bindings for bindings in all_bindings if not bindings.lean]


@pytest.fixture(scope="module")
def lean_bindings(all_bindings: list[Bindings]) -> Bindings:
    (lean,) = [bindings for bindings in all_bindings if bindings.lean]
    return lean


@pytest.fixture(scope="module")
def mypy_reports(all_bindings: list[Bindings], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """mypy's errors for each of the bindings, in the files that must work with them and in the planted one."""
    work = tmp_path_factory.mktemp("mypy")
    settings, planted = work / "mypy.ini", work / "planted.py"
    settings.write_text(MYPY_SETTINGS)
    planted.write_text(PLANTED)
    return {b.name: b.mypy([*(run_side() if b.lean else modules()), planted], settings) for b in all_bindings}


def test_the_oldest_version_both_majors_and_the_lean_runtime_are_checked(all_bindings: list[Bindings]) -> None:
    names = [bindings.name for bindings in all_bindings]
    assert {name.split(".")[0] for name in names} == {"10", "11", "lean-11"}
    read_oldest = "from engines.backends.tensorrt.bindings import OLDEST; print(*OLDEST, sep='.')"
    assert names[0].startswith(f"{all_bindings[0].python(read_oldest).strip()}.")
    for bindings in all_bindings:
        print_version = f"import {bindings.module} as trt; print(trt.__version__, hasattr(trt, 'Builder'))"
        assert bindings.python(print_version).split() == [bindings.version, str(not bindings.lean)]


def test_the_type_stubs_have_the_members_of_the_real_classes(all_bindings: list[Bindings]) -> None:
    for bindings in all_bindings:
        stubs = {
            name: {member for member in members if not member.startswith("_")}
            for name, members in bindings.api.items()
            if "." not in name and not name.startswith("_")
        }
        assert stubs == {name: set(members) for name, members in bindings.members().items()}, bindings.name


def test_every_tensorrt_name_in_the_backend_exists(all_bindings: list[Bindings]) -> None:
    missing = {}
    for bindings in all_bindings:
        files = run_side() if bindings.lean else modules()
        used = {chain for path in files for chain in chains(path.read_text(), "trt")}
        assert "ILogger.Severity.WARNING" in used
        missing[bindings.name] = bindings.missing(used)
    assert missing == {bindings.name: [] for bindings in all_bindings}


def test_a_wrong_tensorrt_name_is_found(all_bindings: list[Bindings]) -> None:
    source = (PACKAGE / "messages.py").read_text().replace("Severity.WARNING", "Severity.WARN")
    source += 'getattr(trt.BuilderFlag, "FP17")\n'
    for bindings in all_bindings:
        missing = bindings.missing(chains(source, "trt"))
        assert {"ILogger.Severity.WARN", "BuilderFlag.FP17"} <= set(missing), bindings.name


def test_no_tensorrt_object_is_hidden_from_the_type_checker() -> None:
    # gpu.py holds CUDA's structures, for which there are no type stubs.
    hidden = {path.name: untyped_objects(path.read_text()) for path in modules()}
    assert {name: uses for name, uses in hidden.items() if uses} == {}
    assert untyped_objects("def f(engine: Any, name: Any): return engine.num_layers, name") == ["1: engine.num_layers"]


def test_the_backend_type_checks_against_each_version(mypy_reports: dict[str, list[str]]) -> None:
    errors = {f"{name}: {line}" for name, report in mypy_reports.items() for line in report if "planted.py" not in line}
    assert errors == set()


def test_wrong_uses_do_not_type_check(mypy_reports: dict[str, list[str]]) -> None:
    for name, report in mypy_reports.items():
        found = {int(line.split(":")[1]) for line in report if "planted.py" in line}
        assert found == WRONG_LINES, (name, report)


def test_every_cuda_call_in_the_backend_has_the_real_parameters() -> None:
    from cuda.bindings import driver, runtime

    checked = 0
    for path in (*modules(), *CUDA_PACKAGE.glob("*.py")):
        for alias, module in (("runtime", runtime), ("driver", driver), ("api", driver)):
            if f"import {alias}" not in path.read_text() and f"as {alias}" not in path.read_text():
                continue
            for chain in chains(path.read_text(), alias):
                value = module
                for part in chain.split("."):
                    assert hasattr(value, part), f"{path.name}: {module.__name__} has no {chain}"
                    value = getattr(value, part)
            for call in calls(path, alias):
                function = getattr(module, call.function)
                if inspect.isroutine(function):
                    arguments = inspect.signature(function)
                    arguments.bind(*[None] * call.positional, **dict.fromkeys(call.keywords))
                    checked += 1
    assert checked > 15


@pytest.mark.parametrize(
    ("options", "flags", "settings"),
    [
        ({}, set(), {"builder_optimization_level": "3"}),
        (
            {"version_compatible": True, "hardware_compatibility": "ampere_plus", "workspace_bytes": 1 << 30},
            {"VERSION_COMPATIBLE"},
            {"hardware_compatibility_level": "HardwareCompatibilityLevel.AMPERE_PLUS"},
        ),
        (
            {"weight_streaming": True, "builder_optimization_level": 5},
            {"WEIGHT_STREAMING"},
            {"builder_optimization_level": "5"},
        ),
        (
            {"refittable": True, "hardware_compatibility": "same_compute_capability"},
            {"REFIT"},
            {"hardware_compatibility_level": "HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY"},
        ),
    ],
)
def test_the_builder_configuration_uses_what_each_version_has(
    full_bindings: list[Bindings], options: dict[str, Any], flags: set[str], settings: dict[str, str]
) -> None:
    for bindings in full_bindings:
        noted = bindings.configuration(options)
        set_flags = {arguments[0].split(".")[1].split("=")[-1] for name, arguments in noted if name == "set_flag"}
        assert set_flags == flags, bindings.name
        assert ["clear_flag", ["BuilderFlag.TF32"]] in noted, bindings.name
        assert {"profiling_verbosity": "ProfilingVerbosity.DETAILED", **settings}.items() <= {
            name: arguments[0] for name, arguments in noted
        }.items(), bindings.name
        limits = [arguments for name, arguments in noted if name == "set_memory_pool_limit"]
        wanted = options.get("workspace_bytes")
        assert limits == ([["MemoryPoolType.WORKSPACE", str(wanted)]] if wanted else []), bindings.name
        assert noted[:3] == [
            ["set_shape", ["latents", "(1, 4, 32, 32)", "(2, 4, 32, 32)", "(4, 4, 32, 32)"]],
            ["set_shape", ["latents", "(1, 4, 24, 40)", "(2, 4, 24, 40)", "(4, 4, 24, 40)"]],
            ["extra_memory_target", ["0.0"]],  # of the second one
        ]
        assert [name for name, _ in noted].count("add_optimization_profile") == 2, bindings.name


def test_the_lean_runtime_without_a_gpu_ends_in_our_errors(lean_bindings: Bindings) -> None:
    names = [path.stem for path in run_side()]
    assert {"host", "plan", "context"} <= set(names)
    done = subprocess.run(  # in a process of its own, which it ends
        [sys.executable, "-c", LEAN_WITHOUT_GPU, *names],
        env=lean_bindings.environment,
        check=True,
        capture_output=True,
        text=True,
    )
    kind, no_gpu, no_runtime = done.stdout.splitlines()
    assert kind == f"True {lean_bindings.version}"
    assert "no NVIDIA GPU" in no_gpu
    assert no_runtime.startswith("cannot make a TensorRT runtime: ")
    assert "CUDA initialization failure" in no_runtime
    assert no_runtime.endswith("; look at the driver")


def test_the_fakes_have_nothing_that_tensorrt_does_not_have(
    all_bindings: list[Bindings], monkeypatch: pytest.MonkeyPatch
) -> None:
    differences = {}
    for bindings in recorded(all_bindings).values():
        fakes = install(monkeypatch, version=bindings.version, lean=bindings.lean)
        real = bindings.api
        classes = {name: item for name, item in vars(fakes.tensorrt).items() if inspect.isclass(item)}
        assert {"Runtime", "ICudaEngine", "IExecutionContext", "DataType"} <= classes.keys()
        differences[bindings.name] = [f"{name} does not exist" for name in classes if name not in real] + [
            difference for name, item in classes.items() for difference in class_differences(item, real.get(name, {}))
        ]
    assert not any(differences.values()), differences


def test_the_fakes_have_nothing_that_cuda_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    from cuda.bindings import driver, runtime

    fakes = install(monkeypatch)
    assert module_differences(sys.modules["cuda.bindings.runtime"], runtime) == []
    assert module_differences(sys.modules["cuda.bindings.driver"], driver) == []
    assert fakes.cuda.calls == []


def test_the_fake_cuda_runtime_returns_as_many_values_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from cuda.bindings import runtime

    install(monkeypatch, gpus=0)
    fake = sys.modules["cuda.bindings.runtime"]
    names = [name for name, item in vars(fake).items() if inspect.isroutine(getattr(runtime, name, None))]
    assert len(names) > 20
    code = (
        "import json, sys; from cuda.bindings import runtime; from helpers.fake_conformance import result_lengths;"
        "print(json.dumps(result_lengths(runtime, runtime, sys.argv[1:])))"
    )
    real = subprocess.run(
        [sys.executable, "-c", code, *names],
        env=os.environ | {"PYTHONPATH": str(ROOT / "tests"), "CUDA_VISIBLE_DEVICES": ""},
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert result_lengths(fake, runtime, names) == json.loads(real.stdout)


def test_a_fake_that_differs_is_found(all_bindings: list[Bindings]) -> None:
    class ICudaEngine:
        def __init__(self) -> None:
            self.num_layer = 1

        def get_tensor_name(self, number: int) -> str:
            return str(number)

        def get_tensor_mode(self, name: str = "") -> None: ...

        def get_tensor_shape(self, name: str) -> None: ...

        def name(self) -> None: ...

        def get_weights(self) -> None: ...

    for bindings in all_bindings:
        assert class_differences(ICudaEngine, bindings.api["ICudaEngine"]) == [
            "ICudaEngine.get_tensor_name(number) has the parameters (index)",
            "ICudaEngine.get_tensor_mode(name=...) has the parameters (name)",
            "ICudaEngine.name is not a method",
            "ICudaEngine.get_weights does not exist",
            "ICudaEngine.num_layer does not exist",
        ]


def test_the_recorded_api_is_that_of_the_real_bindings(all_bindings: list[Bindings]) -> None:
    reader = ROOT / "tests" / "fakes" / "read_api.py"
    for path, bindings in recorded(all_bindings).items():
        assert json.loads(bindings.python(reader.read_text(), bindings.module)) == json.loads(path.read_text()), (
            path.name
        )


def recorded(all_bindings: list[Bindings]) -> dict[Path, Bindings]:
    """The files that the fakes take their enumerations from, and the bindings that each describes."""
    names = {f"{bindings.module}-{bindings.version}.json": bindings for bindings in all_bindings}
    paths = sorted((ROOT / "tests" / "fakes" / "api").glob("*.json"))
    assert len(paths) >= 3
    return {path: names[path.name] for path in paths}
