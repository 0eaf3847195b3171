"""Worker processes that make engines of a build, on a `ProcessPoolExecutor`.

Chosen over the dask workers of `calibrate.dask_pool`: nothing has to stay with a worker, a worker that dies ends the
build, and the standard library's executor is there without the extra `distributed`.

Workers talk to this process through pipes that nobody else can open. What goes to them is pickled here and read there
at once; no pickle is ever written to a file.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from threading import Thread
from typing import Protocol

import torch

from engines.backends.cuda.gpu import VISIBLE_DEVICES
from engines.errors import BuildError, TmpDiffError, first_line
from engines.manifest import EngineEntry

COMPILE_THREADS = "TORCHINDUCTOR_COMPILE_THREADS"


class _Environments(Protocol):
    """A queue of the workers' environment variables."""

    def get(self) -> Mapping[str, str]: ...


class _Started(Protocol):
    """A queue of the process groups of workers."""

    def put(self, group: int) -> None: ...


class BuildWorkers:
    """Workers that make engines; from `open_build_workers`."""

    def __init__(self, executor: ProcessPoolExecutor, workers: int) -> None:
        self._executor = executor
        self._workers = workers
        self._submitted: dict[Future[EngineEntry], str] = {}

    def submit(self, name: str, task: Callable[[], EngineEntry]) -> Future[EngineEntry]:
        """Hands a task to a worker, once one is free: what waits here has its weights on the disk already.

        Args:
            name: of the engine, for messages.
            task: travels to the worker.

        Raises:
            BuildError: the task cannot travel.
            TmpDiffError: what an earlier task raised; a BuildError that names its engine where that was another error.
            BrokenProcessPool: a worker died; `open_build_workers` makes a BuildError of it.
        """
        try:
            # Not left to the executor, which pickles in another thread and moves tensors to shared memory.
            data = pickle.dumps(task)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise BuildError(
                f"{name}: its module cannot be handed to a worker process ({error}); leave --workers out"
            ) from error
        while len(running := [made for made in self._submitted if not made.done()]) >= self._workers:
            for made in wait(running, return_when=FIRST_COMPLETED).done:
                made.result()
        with _no_interrupts_inherited():
            made = self._executor.submit(_perform, name, data)
        self._submitted[made] = name
        return made

    def lost(self) -> list[str]:
        """The engines that were in the making when a worker died."""
        return [
            name
            for made, name in self._submitted.items()
            if not made.done() or isinstance(made.exception(), BrokenProcessPool)
        ]


@contextlib.contextmanager
def open_build_workers(workers: int, gpus: Sequence[str] | None) -> Iterator[BuildWorkers]:
    """Worker processes for the length of a block; they start with their first tasks.

    When the block ends, in whatever way, they are gone with every compiler that they have started. So they are when
    this process ends.

    Args:
        workers: how many, 2 or more.
        gpus: from `engines.backends.cuda.gpu.visible_gpus`; worker i sees the one at i modulo their number. None
            without GPUs.

    Raises:
        BuildError: a worker died.
    """
    context = multiprocessing.get_context("spawn")
    environments, started = context.SimpleQueue(), context.SimpleQueue()
    for index in range(workers):
        environments.put({} if gpus is None else {VISIBLE_DEVICES: gpus[index % len(gpus)]})
    ended, alive = context.Pipe(duplex=False)
    threads, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    shares = max(threads // workers, 1), max(cores // workers, 1)
    executor = ProcessPoolExecutor(workers, context, _begin, (ended, environments, started, threads, *shares))
    pool = BuildWorkers(executor, workers)
    try:
        yield pool
    except BrokenProcessPool as error:
        raise BuildError(
            f"a worker process died while {', '.join(dict.fromkeys(pool.lost()))} was compiled (out of memory?); "
            "use fewer --workers"
        ) from error
    finally:
        alive.close()
        while not started.empty():  # one that was killed cannot end its compilers itself
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.get(), signal.SIGKILL)
        executor.shutdown(cancel_futures=True)
        for end in (ended, environments, started):
            end.close()


def _begin(
    ended: Connection,
    environments: _Environments,
    started: _Started,
    threads: int,
    thread_share: int,
    compiler_share: int,
) -> None:
    """What a worker does first.

    Args:
        ended: a pipe that nothing is written to; its other end closes when the workers have to go.
        environments: one for each worker; set before anything asks for a GPU.
        started: told the process group that the worker makes for itself.
        threads: what CPU packages are compiled for, as in a build without workers.
        thread_share: of torch, in this process.
        compiler_share: processes that compile GPU kernels for this one, unless the user has set them.
    """
    os.setpgrp()  # with its compilers: a terminal's Ctrl-C is for the build, which ends the whole group
    started.put(os.getpid())
    Thread(target=_end_with, args=(ended,), daemon=True).start()
    os.environ.update(environments.get())
    # Locks that a library makes (tqdm does) then leave nothing behind to be cleaned up, and warned of, when this is
    # killed.
    multiprocessing.set_start_method("fork", force=True)
    from torch._inductor import config

    config.cpp.threads = threads
    if COMPILE_THREADS not in os.environ:
        config.compile_threads = compiler_share
    torch.set_num_threads(thread_share)


def _end_with(ended: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        ended.recv_bytes()
    os.killpg(0, signal.SIGKILL)


def _perform(name: str, data: bytes) -> EngineEntry:
    try:
        entry: EngineEntry = pickle.loads(data)()
    except TmpDiffError:
        raise
    except Exception as error:  # whatever somebody else's model may raise: here its engine is still known
        raise BuildError(f"{name}: a worker process failed: {type(error).__name__}: {first_line(error)}") from error
    return entry


@contextlib.contextmanager
def _no_interrupts_inherited() -> Iterator[None]:
    """Processes started in the block ignore Ctrl-C, also before their first line runs."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
