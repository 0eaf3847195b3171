"""Fake streams, events and graphs: work is queued, and runs late and in an unkind order.

Nothing runs before something synchronises. `Scheduler.policy` then decides among the streams that
could go on; all three are legal on a real GPU:

- "younger_first" (default): the stream created last runs as far as it can, whoever synchronises.
  Shows a prefetch or download that overwrites or reads what an older stream still works on.
- "older_first": the stream created first runs as far as it can.
- "lazy": only what the synchronised stream or event depends on runs; everything else waits.
  Shows data taken from another stream without a wait.

Besides, whatever the policy, two queued operations that touch the same bytes (one of them writing) and are not
ordered by a stream, an event or a host synchronisation are refused as a race when the second is queued. Copies,
memsets and engine executions (their tensors and scratch) say what they touch; kernels do not.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from fakes.fake_memory import FakeCudaError

POLICIES = ("younger_first", "older_first", "lazy")
Ranges = tuple[tuple[int, int], ...]  # (address, bytes)


@dataclass(eq=False)
class Operation:
    """One queued piece of work.

    Attributes:
        name: what it is, for `Scheduler.executed`.
        stream: handle of its stream.
        action: runs it; None for records and waits.
        before: the operation before it on its stream.
        after: operations of other streams that must be done first.
        reads, writes: memory it touches.
        milliseconds: how far it moves the fake device clock.
        done_ms: device clock when it was done, None while it is queued.
        capture: the capture it was recorded in.
    """

    name: str
    stream: int
    action: Callable[[], None] | None = None
    before: Operation | None = None
    after: tuple[Operation, ...] = ()
    reads: Ranges = ()
    writes: Ranges = ()
    milliseconds: float = 0.0
    done_ms: float | None = None
    capture: Capture | None = None

    @property
    def parents(self) -> tuple[Operation, ...]:
        return self.after if self.before is None else (self.before, *self.after)


@dataclass(eq=False)
class Stream:
    handle: int
    blocking: bool  # takes part in the legacy default stream's implicit synchronisation
    queue: deque[Operation] = field(default_factory=deque)
    last: Operation | None = None
    capture: Capture | None = None
    captured_last: Operation | None = None
    destroyed: bool = False


@dataclass(eq=False)
class Event:
    timed: bool
    record: Operation | None = None


@dataclass(eq=False)
class Capture:
    """Work recorded between begin and end of a capture."""

    origin: Stream
    mode: int  # a member of cudaStreamCaptureMode
    thread: int = field(default_factory=threading.get_ident)
    nodes: list[Operation] = field(default_factory=list)
    streams: list[Stream] = field(default_factory=list)


@dataclass(eq=False)
class Graph:
    """Recorded nodes in a legal order."""

    nodes: list[Operation]


class Scheduler:
    """All streams of the fake GPU.

    Attributes:
        executed: (operation name, stream handle) in the order things really ran.
        clock_ms: fake device time; operations run one after the other.
        detect_races: refuse unordered conflicting operations when they are queued.
    """

    def __init__(self, policy: str = "younger_first") -> None:
        if policy not in POLICIES:
            raise ValueError(f"policy {policy!r}; expected one of {', '.join(POLICIES)}")
        self.policy = policy
        self.detect_races = True
        self.streams: dict[int, Stream] = {0: Stream(0, blocking=True)}
        self.executed: list[tuple[str, int]] = []
        self.clock_ms = 0.0
        self.captures: list[Capture] = []
        self._unsettled: list[Operation] = []  # the host has not waited for these, directly or indirectly

    def create(self, handle: int, *, blocking: bool) -> Stream:
        self.streams[handle] = Stream(handle, blocking)
        return self.streams[handle]

    def stream(self, handle: int) -> Stream:
        stream = self.streams.get(handle)
        if stream is None or stream.destroyed:
            raise FakeCudaError(f"stream {handle:#x} {'was destroyed' if stream else 'was never created'}")
        return stream

    def enqueue(
        self,
        stream: Stream,
        name: str,
        action: Callable[[], None] | None = None,
        *,
        after: Iterable[Operation] = (),
        reads: Ranges = (),
        writes: Ranges = (),
        milliseconds: float = 0.0,
    ) -> Operation:
        """Queues work, or records it when the stream captures or waits for a capture.

        Raises:
            FakeCudaError: a race, or something a capture does not allow.
        """
        after = tuple(after)
        self._join_capture(stream, after)
        operation = Operation(name, stream.handle, action, None, after, reads, writes, milliseconds)
        if stream.capture is not None:
            if any(item.capture is not stream.capture for item in after):
                raise FakeCudaError(f"{name} in a capture waits for work outside it; record that event in the capture")
            operation.capture = stream.capture
            operation.before = stream.captured_last
            self._refuse_race(operation, stream.capture.nodes)
            stream.capture.nodes.append(operation)
            stream.captured_last = operation
            return operation
        if stream.handle == 0 and any(item.blocking for capture in self.captures for item in capture.streams):
            raise FakeCudaError("work on the default stream while a blocking stream captures (implicit dependency)")
        operation.before = stream.last
        operation.after += self._legacy(stream)
        self._refuse_race(operation, self._unsettled)
        self._unsettled.append(operation)
        stream.queue.append(operation)
        stream.last = operation
        return operation

    def _join_capture(self, stream: Stream, after: tuple[Operation, ...]) -> None:
        joined = next((item.capture for item in after if item.capture is not None), None)
        if joined is None or stream.capture is not None:
            return
        if joined not in self.captures:
            raise FakeCudaError("wait for an event that was recorded in a capture which has ended")
        stream.capture = joined
        joined.streams.append(stream)

    def _legacy(self, stream: Stream) -> tuple[Operation, ...]:
        """Implicit order between the default stream and the blocking streams."""
        if stream.handle == 0:
            others = [item for item in self.streams.values() if item.blocking and item is not stream]
            return tuple(item.last for item in others if item.last is not None)
        default = self.streams[0].last
        return (default,) if stream.blocking and default is not None else ()

    def _refuse_race(self, operation: Operation, others: list[Operation]) -> None:
        if not self.detect_races or not (operation.reads or operation.writes):
            return
        conflicting = [item for item in others if _conflict(operation, item)]
        if not conflicting:
            return
        ordered = _ancestors(operation)
        for item in conflicting:
            if id(item) not in ordered:
                raise FakeCudaError(
                    f"race: {operation.name} on stream {operation.stream:#x} and {item.name} on stream "
                    f"{item.stream:#x} touch the same memory, and no event or synchronisation orders them"
                )

    # Running

    def run_until(self, target: Operation | None) -> None:
        """The host waits for `target`: runs queued work until it is done. None: nothing to wait for."""
        if target is None:
            return
        while target.done_ms is None:
            stream = self._next(target)
            if stream is None:
                raise FakeCudaError(f"deadlock: {target.name} waits for work that can never run")
            self._run(stream.queue.popleft())
        settled = _ancestors(target)
        for operation in self._unsettled:
            if id(operation) in settled:
                operation.before, operation.after = None, ()
        self._unsettled = [item for item in self._unsettled if id(item) not in settled]

    def run_all(self) -> None:
        """The host waits for everything that is queued."""
        for stream in sorted(self.streams.values(), key=lambda item: item.handle):
            self.run_until(stream.last)

    def _next(self, target: Operation) -> Stream | None:
        """The stream whose first queued operation runs next."""
        ready = [
            stream
            for stream in self.streams.values()
            if stream.queue and all(item.done_ms is not None for item in stream.queue[0].after)
        ]
        if self.policy == "lazy":
            needed = _ancestors(target)
            ready = [stream for stream in ready if id(stream.queue[0]) in needed]
        if not ready:
            return None
        return (min if self.policy == "older_first" else max)(ready, key=lambda item: item.handle)

    def _run(self, operation: Operation) -> None:
        if operation.action is not None:
            operation.action()
            self.executed.append((operation.name, operation.stream))
        self.clock_ms += operation.milliseconds
        operation.done_ms = self.clock_ms

    # Capture

    def begin_capture(self, stream: Stream, mode: int) -> None:
        if stream.handle == 0:
            raise FakeCudaError("capture on the default stream is not possible")
        if stream.capture is not None:
            raise FakeCudaError("the stream already captures")
        stream.capture = Capture(stream, mode, streams=[stream])
        self.captures.append(stream.capture)

    def end_capture(self, stream: Stream) -> Graph | None:
        """The graph; None if a forked stream was not joined back. Either way the capture is over."""
        capture = stream.capture
        if capture is None or capture.origin is not stream:
            raise FakeCudaError("end of capture on a stream on which no capture was begun")
        joined = _ancestors(stream.captured_last) if stream.captured_last is not None else set()
        for item in capture.streams:
            item.capture = item.captured_last = None
        self.captures.remove(capture)
        return Graph(capture.nodes) if len(joined) == len(capture.nodes) else None

    def refuse_in_capture(self, what: str, *, relaxed: bool = False) -> None:
        """Raises FakeCudaError if a capture forbids `what` to the calling thread.

        A global capture (mode 0) forbids it to all threads, a thread-local one (1) to its own, a relaxed one (2)
        as well unless `relaxed`: then it allows it.
        """
        for capture in self.captures:
            mine = capture.thread == threading.get_ident()
            if capture.mode == 0 or (mine and not (capture.mode == 2 and relaxed)):
                raise FakeCudaError(f"{what} while a stream captures")

    def launch(self, graph: Graph, stream: Stream) -> Operation:
        """Queues all of a graph as one operation."""
        return self.enqueue(
            stream,
            "graph",
            lambda: self._run_graph(graph),
            reads=tuple(item for node in graph.nodes for item in node.reads),
            writes=tuple(item for node in graph.nodes for item in node.writes),
        )

    def _run_graph(self, graph: Graph) -> None:
        """Runs the nodes, the youngest stream's first ("older_first": the oldest's)."""
        waiting = list(graph.nodes)
        done: set[int] = set()
        choose = min if self.policy == "older_first" else max
        while waiting:
            ready = [node for node in waiting if all(id(item) in done for item in node.parents)]
            node = choose(ready, key=lambda item: item.stream)
            waiting.remove(node)
            done.add(id(node))
            if node.action is not None:
                node.action()
                self.executed.append((node.name, node.stream))
            self.clock_ms += node.milliseconds


def _ancestors(operation: Operation) -> set[int]:
    """Ids of `operation` and of all that must be done before it."""
    found: set[int] = set()
    wanted = [operation]
    while wanted:
        item = wanted.pop()
        if id(item) not in found:
            found.add(id(item))
            wanted.extend(item.parents)
    return found


def _conflict(one: Operation, other: Operation) -> bool:
    return _overlap(one.writes, other.writes) or _overlap(one.writes, other.reads) or _overlap(one.reads, other.writes)


def _overlap(some: Ranges, others: Ranges) -> bool:
    return any(a < d + m and d < a + n for a, n in some for d, m in others)
