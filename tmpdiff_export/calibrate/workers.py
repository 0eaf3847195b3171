"""Calibration of one bundle by several worker processes: what each of them sees and opens."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from calibration.measure.bundle_evaluator import BundleSamples
from calibration.measure.latency import runs_on_gpu
from calibration.measure.sample_batches import SampleBatches
from engines.backends.cuda.gpu import VISIBLE_DEVICES, visible_gpus
from engines.errors import BackendError, TmpDiffError
from engines.runtime import DenoiseRuntime
from engines.setting_choice import SettingChoice

if TYPE_CHECKING:
    from tmpdiff_export.calibrate.dask_pool import SampleWorkers

MODULES = ("distributed", "cryptography")


def require_libraries() -> None:
    """Checks that what runs worker processes is installed.

    Raises:
        BackendError: naming what to install.
    """
    for module in MODULES:
        if importlib.util.find_spec(module) is None:
            raise BackendError(
                f"more than one worker needs the module {module}, which is not installed; "
                "pip install '.[distributed]', or leave --workers out"
            )


def require_workers(runtime: DenoiseRuntime, workers: int, threads: int | None) -> None:
    """Checks, before any work, that this host can have so many workers for a bundle.

    Raises:
        BackendError: a library that they need is not installed.
        TmpDiffError: there are fewer GPUs, or on a CPU fewer threads.
    """
    if workers < 1:
        raise TmpDiffError(f"workers is {workers}, expected 1 or more")
    if workers == 1:
        return
    require_libraries()
    if runs_on_gpu(runtime):
        gpus = visible_gpus()
        if workers > len(gpus):
            limit = f" ({VISIBLE_DEVICES} is {os.environ[VISIBLE_DEVICES]!r})" if VISIBLE_DEVICES in os.environ else ""
            raise TmpDiffError(
                f"{workers} workers need a GPU each, and {len(gpus)} can be seen here{limit}; pass --workers {len(gpus)} at most"
            )
    elif workers > _threads(threads):
        given = f"--threads is {threads}" if threads else f"there are {_threads(None)} cores"
        raise TmpDiffError(
            f"{workers} workers need a thread each, and {given}; pass --workers {_threads(threads)} at most"
        )


def open_workers(
    runtime: DenoiseRuntime, samples: BundleSamples, workers: int, threads: int | None, at_once: int
) -> SampleWorkers:
    """Starts the workers; each sees one GPU, or gets its share of the threads, and loads the bundle for itself.

    Args:
        runtime: the bundle, open in this process; free its engines first, or they stay on the first GPU.
        samples: those of the bundle that are measured on.
        workers: as checked by `require_workers`.
        threads: of a CPU backend, for all workers together; None for one per core.
        at_once: samples that a denoiser call takes.

    Raises:
        TmpDiffError: a worker does not start, or cannot load the bundle.
    """
    from tmpdiff_export.calibrate.dask_pool import SampleWorkers

    share = None
    if runs_on_gpu(runtime):
        environments = [{VISIBLE_DEVICES: gpu} for gpu in visible_gpus()[:workers]]
    else:
        share = max(_threads(threads) // workers, 1)
        environments = [{"OMP_NUM_THREADS": str(share)}] * workers
    bundle = runtime.bundle.folder.absolute()
    which = OpenedBundle(bundle, runtime.manifest.bundle_id, SettingChoice(named=runtime.setting.name))
    open_samples = partial(bundle_samples, which, samples, share, at_once)
    return SampleWorkers(open_samples, environments, at_once)


@dataclass(frozen=True)
class OpenedBundle:
    """A bundle that a process has opened, for others to open.

    Attributes:
        folder: bundle folder, absolute.
        bundle_id: that the process has found there.
        setting: which one is measured.
    """

    folder: Path
    bundle_id: str
    setting: SettingChoice


def bundle_samples(which: OpenedBundle, samples: BundleSamples, threads: int | None, at_once: int) -> SampleBatches:
    """The samples of a bundle, for as long as the process lives; what a worker calls.

    Raises:
        BundleError: a file of the bundle is damaged.
        TmpDiffError: the folder holds another bundle by now.
    """
    runtime = DenoiseRuntime.load(which.folder, setting=which.setting, threads=threads)
    if runtime.manifest.bundle_id != which.bundle_id:
        raise TmpDiffError(f"bundle {which.folder} was replaced while it was calibrated; run the command again")
    return SampleBatches(samples.open(runtime).named(), at_once, threads)


def _threads(threads: int | None) -> int:
    return threads or len(os.sched_getaffinity(0))
