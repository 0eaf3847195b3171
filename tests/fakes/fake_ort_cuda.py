"""A FAKE of ONNX Runtime's CUDA provider: the real onnxruntime with its CPU provider, over the fake CUDA's memory.

Sessions, optimizers, I/O binding and arithmetic are real. Fake is where they run: "device memory" is host memory behind
real addresses (`fake_memory`), a run is queued on the fake stream that the provider option names, and so happens when
the stream gets to it. What the real provider takes, computes, needs and how fast it is, is not shown.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import onnxruntime

from fakes.fake_cuda import FakeCuda
from fakes.fake_memory import FakeCudaError

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
STRICT = "session.disable_cpu_ep_fallback"
# The real words, of ONNX Runtime 1.31 on a CPU.
NO_FALLBACK = (
    "[ONNXRuntimeError] : 1 : FAIL : This session contains graph nodes that are assigned to the default CPU EP, but "
    "fallback to CPU EP has been explicitly disabled by the user."
)
_REAL_SESSION, _REAL_OPTIONS = onnxruntime.InferenceSession, onnxruntime.SessionOptions


class Options(_REAL_OPTIONS):  # type: ignore[misc]
    """Real session options; the entry that a session on the CPU provider refuses is only noted."""

    def __init__(self) -> None:
        super().__init__()
        self.config: dict[str, str] = {}
        self.sizes: dict[str, int] = {}

    def add_session_config_entry(self, key: str, value: str) -> None:
        self.config[key] = value
        if key != STRICT:
            super().add_session_config_entry(key, value)

    def add_free_dimension_override_by_name(self, symbol: str, size: int) -> None:
        self.sizes[symbol] = size
        super().add_free_dimension_override_by_name(symbol, size)


@dataclass(frozen=True)
class Opened:
    """What a session was made with.

    Attributes:
        path: its file.
        options: its session options.
        given: its provider options.
        session: gives it while it lives.
    """

    path: str
    options: Options
    given: dict[str, str]
    session: weakref.ref[Session]


@dataclass
class FakeOrtCuda:
    """State of the fake provider, for tests to set and look at.

    Attributes:
        cuda: the fake CUDA it runs on.
        starts: whether the provider finds its libraries.
        refused: operators it has no kernel for.
        run_error: raised by the next run, which is then not queued.
        opened: every session that was made.
        preloads: calls of `preload_dlls`.
        preload_prints: what that prints.
        severities: what the default logger was set to.
    """

    cuda: FakeCuda
    starts: bool = True
    refused: set[str] = field(default_factory=set)
    run_error: Exception | None = None
    opened: list[Opened] = field(default_factory=list)
    preloads: int = 0
    preload_prints: str = ""
    severities: list[int] = field(default_factory=list)

    @classmethod
    def install(cls, monkeypatch: Any, cuda: FakeCuda) -> FakeOrtCuda:
        """Puts the fake into the real onnxruntime module until the test ends."""
        fake = cls(cuda)
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
        monkeypatch.setattr(onnxruntime, "SessionOptions", Options)
        monkeypatch.setattr(onnxruntime, "InferenceSession", fake.open)
        monkeypatch.setattr(onnxruntime, "preload_dlls", fake.preload, raising=False)
        monkeypatch.setattr(onnxruntime, "set_default_logger_severity", fake.severities.append)
        return fake

    def preload(self, *, msvc: bool) -> None:
        """Stands in for `onnxruntime.preload_dlls`."""
        self.preloads += 1
        if self.preload_prints:
            print(self.preload_prints)

    def open(self, path: str, options: Any = None, *, providers: Sequence[Any], **others: Any) -> Any:
        """Stands in for `onnxruntime.InferenceSession`."""
        if providers == [CPU]:
            return _REAL_SESSION(path, options, providers=providers, **others)
        ((name, given),) = providers  # exactly one, with options
        assert name == CUDA
        assert others == {"enable_fallback": 0}
        assert all(isinstance(text, str) for pair in given.items() for text in pair)
        return Session(self, path, options, given)

    def alive(self) -> list[Opened]:
        """Sessions that hold what would be device memory."""
        return [item for item in self.opened if item.session() is not None]


class Session:
    """An `InferenceSession` that says it is on the GPU."""

    def __init__(self, fake: FakeOrtCuda, path: str, options: Options, given: Mapping[str, str]) -> None:
        self.path, self._fake = path, fake
        self._real = _REAL_SESSION(path, options, providers=[CPU])
        self._stream = fake.cuda.stream(int(given["user_compute_stream"]))  # raises if there is none
        strict = options.config.get(STRICT) == "1"
        if strict and (not fake.starts or self._refused()):
            raise RuntimeError(NO_FALLBACK)
        fake.opened.append(Opened(path, options, dict(given), weakref.ref(self)))

    def _refused(self) -> bool:
        if not self._fake.refused:
            return False
        import onnx

        return any(
            node.op_type in self._fake.refused for node in onnx.load(self.path, load_external_data=False).graph.node
        )

    def get_inputs(self) -> Any:
        return self._real.get_inputs()

    def get_outputs(self) -> Any:
        return self._real.get_outputs()

    def get_providers(self) -> list[str]:
        return [CUDA, CPU] if self._fake.starts else [CPU]

    def get_provider_graph_assignment_info(self) -> list[Any]:
        """The real assignment, to the CPU, told as the fake GPU's but for the operators that it refuses."""
        parts = []
        for part in self._real.get_provider_graph_assignment_info():
            for node in part.get_nodes():
                there = self._fake.starts and node.op_type not in self._fake.refused
                parts.append(SimpleNamespace(ep_name=CUDA if there else CPU, get_nodes=lambda node=node: [node]))
        return parts

    def io_binding(self) -> Binding:
        return Binding(self._real.io_binding())

    def run_with_iobinding(self, binding: Binding, options: Any) -> None:
        """Queues a run on the stream, as the provider enqueues its kernels."""
        cuda = self._fake.cuda
        cuda.record("run_with_iobinding", self.path)
        asynchronous = options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
        if self._fake.run_error is not None:
            error, self._fake.run_error = self._fake.run_error, None
            raise error
        spans, path, real = dict(binding.spans), self.path, self._real
        alive = weakref.ref(self)

        def action() -> None:
            if alive() is None:
                raise FakeCudaError(f"a session of {path} was freed before its queued work ran")
            for what, (address, nbytes) in spans.items():
                cuda.device.check(address, nbytes, f"tensor {what}")
            real.run_with_iobinding(binding.real, options)

        operation = cuda.scheduler.enqueue(
            self._stream,
            f"run {self.path}",
            action,
            reads=tuple(spans[name] for name in binding.inputs),
            writes=tuple(spans[name] for name in spans if name not in binding.inputs),
        )
        if not asynchronous:
            cuda.record("ONNX Runtime waits")
            cuda.scheduler.run_until(operation)


class Binding:
    """An `IOBinding` to "cuda" memory of the fake CUDA, which really is host memory."""

    def __init__(self, real: Any) -> None:
        self.real = real
        self.inputs: list[str] = []
        self.spans: dict[str, tuple[int, int]] = {}

    def bind_input(self, name: str, device: str, index: int, kind: Any, shape: Sequence[int], address: int) -> None:
        assert (device, index) == ("cuda", 0)
        self.inputs.append(name)
        self._note(name, kind, shape, address)
        self.real.bind_input(name, "cpu", 0, kind, shape, address)

    def bind_output(self, name: str, device: str, index: int, kind: Any, shape: Sequence[int], address: int) -> None:
        assert (device, index) == ("cuda", 0)
        self._note(name, kind, shape, address)
        self.real.bind_output(name, "cpu", 0, kind, shape, address)

    def _note(self, name: str, kind: Any, shape: Sequence[int], address: int) -> None:
        size = kind().itemsize
        for axis in shape:
            size *= axis
        self.spans[name] = (address, size)
