"""Worker processes that take calibration measurements, one per GPU or per share of the cores; on dask.distributed.

dask.distributed starts the processes, hands out the measurements, starts a process again when it dies and performs
elsewhere what was lost with it. Chosen over Ray (a large binary with its own object store and daemons), torchrun (one
program in lockstep: a worker that dies restarts all of them) and loky (a worker that dies breaks the whole pool, and no
task stays with a worker): it is pure Python and small, and a task can prefer a worker without depending on it.

Processes talk over TLS sockets on the loopback interface, with keys made for this run and kept in memory: dask's
messages are pickles, and another user of the host must not be able to send one. None is ever written to a file.

Importing this module imports dask.distributed; `workers.require_engine` says what to install.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import resource_tracker
from types import TracebackType
from typing import Any, Self, cast

import dask
import distributed

from calibration.measure.requests import Outcome, Request, Run, Samples
from engines.errors import BackendError, TmpDiffError

log = logging.getLogger(__name__)

OpenSamples = Callable[[], Samples]
"""Called once in every worker. Importable there, as is all it holds."""

LOOPBACK = "127.0.0.1"
RETRIES = 3
"""Workers that may die with the same measurement in hand before it is given up."""
START_TIMEOUT_S = 120
POLL_S = 10
"""How often a driver that waits looks whether any worker is left."""
_REMEDY = "use fewer --workers. What was measured is kept; the same command goes on from there"
_SETTINGS: dict[str, Any] = {
    "distributed.scheduler.allowed-failures": RETRIES,
    "distributed.scheduler.work-stealing": False,  # a stolen sample's states would have to be computed again
    "distributed.scheduler.worker-ttl": None,  # loading a large engine may keep a worker from answering for minutes
    "distributed.scheduler.active-memory-manager.start": False,
    "distributed.worker.profile.enabled": False,
    "distributed.diagnostics.nvml": False,  # nobody but the engines touches a GPU
    "distributed.scheduler.http.routes": [],
    "distributed.worker.http.routes": [],
    "distributed.admin.system-monitor.gil.enabled": False,
}


class SampleWorkers:
    """`calibration.measure.requests.Pool` on worker processes of this host; a context manager.

    Sample i belongs to worker i modulo their number, which keeps its states; while that worker is down, another one
    takes its measurements and computes the states again. Leaving the context ends every process. So does the end of
    this process in whatever way: workers watch it.
    """

    def __init__(self, open_samples: OpenSamples, environments: Sequence[Mapping[str, str]], at_once: int = 1) -> None:
        """Starts the processes and lets each load its samples.

        Args:
            open_samples: see `OpenSamples`.
            environments: variables of each worker, set before it imports or touches anything of the samples.
            at_once: samples of one run that a worker is handed together, at most.

        Raises:
            BackendError: a worker does not start.
            TmpDiffError: what `open_samples` raised.
        """
        self._asked = 0
        self._running: dict[str, str] = {}
        self._at_once = at_once
        # By worker and run, in the order they were asked for: what others rest on was asked for before them.
        self._waiting: dict[str, dict[tuple[int, Run], list[Request]]] = {}
        self._pending: dict[str, dict[distributed.Future[Any], list[Request]]] = {}
        with contextlib.ExitStack() as owned:
            folder = owned.enter_context(tempfile.TemporaryDirectory(prefix="tmpdiff-workers-"))
            try:
                try:
                    started = _start_on_free_ports(environments, folder, owned)
                except RuntimeError as error:  # another process may have taken a port before the worker did
                    log.info("a worker process did not start (%s); once more with other ports", error)
                    started = _start_on_free_ports(environments, folder, owned)
                self._cluster, self._client, self._ports = started
            except (OSError, RuntimeError, TimeoutError) as error:
                raise BackendError(
                    f"the worker processes do not start ({type(error).__name__}: {error}); use fewer --workers, or none"
                ) from error
            self._client.register_plugin(_SampleHolder(open_samples))
            waiting = [self._prefer(worker, _load) for worker in range(len(environments))]
            while waiting:
                for future, _ in self._first_of(waiting):
                    waiting.remove(future)
            self._owned = owned.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # ends every worker process; what they have in hand is lost
        self._waiting.clear()
        self._pending.clear()
        self._owned.close()

    def submit(self, samples: str, request: Request) -> None:
        """See `Pool.submit`."""
        run = request.sample % len(self._ports), request.of_run
        self._waiting.setdefault(samples, {}).setdefault(run, []).append(request)

    def finished(self, samples: str) -> list[tuple[Request, Outcome]]:
        """See `Pool.finished`."""
        self._hand_out()
        pending = self._pending[samples]
        found: list[tuple[Request, Outcome]] = []
        for future, outcomes in self._first_of(list(pending)):
            found += zip(pending.pop(future), outcomes, strict=True)
        return found

    def _hand_out(self) -> None:
        """Gives workers what has been asked for since the last time, as many samples of a run together as may be."""
        for samples, runs in self._waiting.items():
            for (worker, _), requests in runs.items():
                for begin in range(0, len(requests), self._at_once):
                    together = requests[begin : begin + self._at_once]
                    future = self._prefer(worker, _perform, samples, together)
                    self._pending.setdefault(samples, {})[future] = together
        self._waiting.clear()

    def forget(self, samples: str, precision: str) -> None:
        """See `Pool.forget`."""
        # a worker that is just being started again has nothing to forget
        self._client.run(_forget, samples, precision, on_error="ignore")

    def _prefer(self, worker: int, function: Callable[..., Any], *arguments: Any) -> distributed.Future[Any]:
        """Calls a function in a worker, or in another one while it is down."""
        self._asked += 1  # first come, first served: a reference run comes before what is compared with it
        return self._client.submit(
            function,
            *arguments,
            workers=[f"tls://{LOOPBACK}:{self._ports[worker]}"],
            allow_other_workers=True,
            priority=-self._asked,
            pure=False,
        )

    def _first_of(self, futures: list[distributed.Future[Any]]) -> list[tuple[distributed.Future[Any], Any]]:
        """Results of the futures that are done, once there is one."""
        alive = time.monotonic()
        done: set[distributed.Future[Any]] = set()
        while not done:
            try:
                with self._client.as_current():
                    done = distributed.wait(futures, timeout=POLL_S, return_when="FIRST_COMPLETED").done
            except TimeoutError:
                if self._cluster.scheduler.workers:
                    alive = time.monotonic()
                elif time.monotonic() - alive > START_TIMEOUT_S:
                    raise TmpDiffError(
                        f"no worker process has been running for {START_TIMEOUT_S} s; {_REMEDY}"
                    ) from None
        self._notice_deaths()
        try:
            ready = [future for future in futures if future in done]
            # a failure waits until nothing that was finished beside it would be lost
            sound = [future for future in ready if future.status == "finished"] or ready[:1]
            return list(zip(sound, self._client.gather(sound), strict=True))
        except distributed.KilledWorker as error:
            raise TmpDiffError(
                f"{RETRIES + 1} worker processes died over the same measurement (out of memory?); {_REMEDY}"
            ) from error

    def _notice_deaths(self) -> None:
        running = {worker.server_id: worker.name for worker in list(self._cluster.scheduler.workers.values())}
        for process, name in self._running.items():
            if process not in running:
                log.warning("worker process %s died; what it had not finished is done again", name)
        self._running = running


def _free_ports(count: int) -> list[int]:
    """Ports for workers to listen on, so that one that is started again has the address its measurements prefer."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server((LOOPBACK, 0))) for _ in range(count)]
        return [item.getsockname()[1] for item in sockets]


def _start_on_free_ports(
    environments: Sequence[Mapping[str, str]], folder: str, owned: contextlib.ExitStack
) -> tuple[Any, Any, list[int]]:
    """What `_start` returns, and the ports; `owned` closes it."""
    ports = _free_ports(len(environments))
    with contextlib.ExitStack() as started:
        cluster, client = _start(environments, ports, folder, started)
        owned.enter_context(started.pop_all())
    return cluster, client, ports


def _start(
    environments: Sequence[Mapping[str, str]], ports: Sequence[int], folder: str, owned: contextlib.ExitStack
) -> tuple[Any, Any]:
    """Scheduler, a nanny with a worker process per environment, and a client, all closed with `owned`."""
    owned.enter_context(dask.config.set(_SETTINGS))
    owned.enter_context(_environment_restored())
    security = distributed.Security.temporary()
    common = {
        "host": LOOPBACK,
        "protocol": "tls",
        "security": security,
        "nthreads": 1,
        "memory_limit": 0,  # otherwise nannies kill workers that use more than their share
        "local_directory": folder,
        "dashboard": False,
        "silence_logs": logging.CRITICAL,
        "death_timeout": START_TIMEOUT_S,
    }
    workers = {
        str(index): {"cls": distributed.Nanny, "options": {**common, "env": dict(variables), "worker_port": port}}
        for index, (variables, port) in enumerate(zip(environments, ports, strict=True))
    }
    listening = {"host": LOOPBACK, "port": 0, "protocol": "tls", "security": security}
    listening |= {"dashboard": False, "dashboard_address": f"{LOOPBACK}:0"}
    scheduler = {"cls": distributed.Scheduler, "options": listening}
    with _interrupts_held():
        cluster = distributed.SpecCluster(
            workers=workers, scheduler=scheduler, security=security, silence_logs=logging.CRITICAL
        )
        owned.callback(cluster.close)
        client = distributed.Client(cluster, security=security, set_as_default=False)
        owned.callback(client.close)
    return cluster, client


@contextlib.contextmanager
def _environment_restored() -> Iterator[None]:
    """Takes back what nannies set in this process for their children, as OMP_NUM_THREADS and PYTHONHASHSEED."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C has to wait for the end of the block, and never reaches the threads and processes started in it.

    A terminal sends it to every process; workers are ended by this one. Children inherit the mask.
    """
    resource_tracker.ensure_running()  # started later, it would lift the mask of its thread
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _SampleHolder(distributed.WorkerPlugin):
    """Of every worker, restarted ones as well: opens the samples when they are first needed."""

    name = "samples"

    def __init__(self, open_samples: OpenSamples) -> None:
        self._open = open_samples
        self.opened: Samples | None = None

    def samples(self) -> Samples:
        if self.opened is None:
            self.opened = self._open()
        return self.opened


def _holder(worker: distributed.Worker | None = None) -> _SampleHolder:
    return cast(_SampleHolder, (worker or distributed.get_worker()).plugins[_SampleHolder.name])


def _load() -> None:
    _holder().samples()


def _perform(samples: str, requests: list[Request]) -> list[Outcome]:
    return _holder().samples().perform(samples, requests)


def _forget(samples: str, precision: str, dask_worker: distributed.Worker) -> None:
    opened = _holder(dask_worker).opened
    if opened is not None:
        opened.forget(samples, precision)
