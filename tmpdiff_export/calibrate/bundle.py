"""Calibrates a bundle on disk: latencies, journal, schedule and sensitivity documents."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from calibration import CalibrationOptions, Sensitivity, calibrate, open_journal
from calibration.measure.bundle_evaluator import BundleSamples, samples_per_call
from calibration.measure.journal import JournalError
from calibration.measure.latency import machine, step_latencies
from calibration.measure.requests import Pool
from calibration.measure.sample_batches import SampleBatches
from calibration.records import CalibrationSettings
from calibration.scores.carried import CarriedScores, carried_scores
from calibration.scores.transfer import TransferError, step_axes
from calibration.stages import DEFAULT_OPTIONS, Progress
from engines.bundle import Bundle
from engines.errors import BudgetError, TmpDiffError
from engines.runtime import DenoiseRuntime
from engines.sampler import SamplerTable
from engines.text import PromptFile
from tmpdiff_export.calibrate.workers import open_workers, require_workers
from tmpdiff_export.targets.settings import MAX_BATCH

JOURNAL_FOLDER = "calibration"


@dataclass(frozen=True)
class RunOptions:
    """How a bundle is run to be calibrated.

    Attributes:
        seed: of the first sample's noise.
        guidance_scale: of every run; None for the bundle's.
        batch: pictures at once, for which latencies are measured; scores do not depend on it.
        threads: of a CPU backend, and for comparing pictures; shared out among the workers; None for one per core.
        workers: processes that share the samples out, each with a GPU of its own where the bundle runs on one; 1 does
            everything in this process. Latencies are measured before they start, by this process alone.
        fresh_latencies: measure step latencies even where the journal has some of this machine and batch.

    Raises:
        TmpDiffError: a negative seed, or a batch out of range.
    """

    seed: int = 0
    guidance_scale: float | None = None
    batch: int = 1
    threads: int | None = None
    workers: int = 1
    fresh_latencies: bool = False

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise TmpDiffError(f"seed is {self.seed}, expected 0 or more")
        if not 1 <= self.batch <= MAX_BATCH:
            raise TmpDiffError(f"batch is {self.batch}, expected 1 to {MAX_BATCH}")


ONE_PROCESS = RunOptions()


def calibrate_bundle(
    bundle: Path,
    prompts: PromptFile,
    options: CalibrationOptions = DEFAULT_OPTIONS,
    how: RunOptions = ONE_PROCESS,
    *,
    source: Path | None = None,
    progress: Progress | None = None,
) -> Sensitivity:
    """Calibrates the bundle and writes `schedule.json` and `sensitivity.json` into it.

    Every finished measurement is kept in a journal inside the bundle; the same call after an interruption
    goes on from there and gives the same result. Latencies are kept as well, but those that a budget was refused for are
    measured anew by the next call: the machine may have been busy. Packages compiled for several pictures take as many samples in every
    call. The documents are written last, each in one piece.

    Args:
        bundle: bundle folder.
        prompts: calibration and validation prompts, one sample each.
        options: what is asked for.
        how: the bundle is run.
        source: a calibrated bundle to carry scores from, in place of a search; see `calibration.scores.transfer`. It
            may be `bundle` itself, for another guidance scale.
        progress: called with (stage, done, total).

    Raises:
        BackendError: what runs worker processes is not installed.
        BudgetError: no schedule meets the budget; the text names the nearest.
        TransferError: the scores of `source` do not hold for `bundle`.
        TmpDiffError: the bundle is damaged, or a run gave latents that are not finite.
    """
    report = progress or (lambda stage, done, total: None)
    with DenoiseRuntime.load(bundle, threads=how.threads) as runtime:
        require_workers(runtime, how.workers, how.threads)
        if source is not None:
            calibrated = Bundle.open(source)
            options = replace(options, carried=scores_from(calibrated, read_calibration(calibrated), runtime))
        return _calibrate(runtime, prompts, options, how, report)


def read_calibration(bundle: Bundle) -> Sensitivity:
    """The sensitivity document, checked against the schedule and the manifest it is shown beside.

    Raises:
        TmpDiffError: not calibrated, or the documents contradict each other.
    """
    remedy = f"run `tmpdiff-export calibrate {bundle.folder} --prompts FILE`"
    for path in (bundle.sensitivity_path, bundle.schedule_path):
        if not path.exists():
            raise TmpDiffError(f"bundle {bundle.folder} is not calibrated: it holds no {path.name}; {remedy}")
    found = Sensitivity.load(bundle.sensitivity_path)
    if found.precisions != bundle.manifest.precisions or found.num_steps != bundle.manifest.sampling.num_steps:
        raise TmpDiffError(
            f"sensitivity {bundle.sensitivity_path} has {found.num_steps} steps at {', '.join(found.precisions)}, the "
            f"bundle {bundle.manifest.sampling.num_steps} at {', '.join(bundle.manifest.precisions)}; {remedy}"
        )
    if found.settings is None or found.settings.bundle_id != bundle.manifest.bundle_id:
        raise TmpDiffError(f"sensitivity {bundle.sensitivity_path} was measured on another bundle; {remedy}")
    if found.schedule != bundle.schedule().precisions:
        raise TmpDiffError(
            f"{bundle.schedule_path.name} of {bundle.folder} is not the schedule that {bundle.sensitivity_path.name} "
            f"describes; {remedy}"
        )
    return found


def scores_from(source: Bundle, found: Sensitivity, target: DenoiseRuntime) -> CarriedScores:
    """Carries the scores of a calibration to the steps of `target`.

    Args:
        source: the bundle that was calibrated; it may be that of `target`, for another guidance scale.
        found: its sensitivity document.
        target: where the scores are wanted.

    Raises:
        TransferError: the bundles are of different denoisers or schedulers.
    """
    if source.manifest.model.denoiser_sha256 != target.manifest.model.denoiser_sha256:
        raise TransferError(
            f"bundle {source.folder} was built from another denoiser than {target.bundle.folder}; its scores say "
            "nothing here, calibrate without --from"
        )
    table = SamplerTable.from_json(source.read(source.manifest.sampler))
    return carried_scores(found, *step_axes(table, target.table))


def _calibrate(
    runtime: DenoiseRuntime, prompts: PromptFile, options: CalibrationOptions, how: RunOptions, report: Progress
) -> Sensitivity:
    runtime.bundle.verify(runtime.manifest.files())
    scale = runtime.manifest.sampling.guidance_scale if how.guidance_scale is None else how.guidance_scale
    samples = BundleSamples(prompts, how.seed, scale)
    sets = samples.open(runtime)
    folder = runtime.bundle.folder / JOURNAL_FOLDER
    folder.mkdir(exist_ok=True)
    name = "-".join(found.evaluator.key()[:12] for found in sets.named().values())
    # A bundle moves between machines with its journal; latencies hold where they were measured.
    remembered = f"step latencies in ms, {machine(runtime, how.threads)}"
    remembered += f", batch {how.batch}" if how.batch > 1 else ""
    with ExitStack() as stack:
        path = stack.enter_context(_locked(folder / f"{name}.journal"))
        journal = open_journal(path, *sets.evaluators)
        latencies = journal.remember(
            remembered,
            lambda: _latencies(runtime, [prompts.calibration[0]] * how.batch, scale, report),
            how.fresh_latencies,
        )
        if not isinstance(latencies, dict) or not all(type(found) in (int, float) for found in latencies.values()):
            raise JournalError(f"journal {path} has no {remembered}; delete it to start afresh")
        pool: Pool
        at_once = samples_per_call(runtime, scale)
        if how.workers > 1:
            runtime.close()  # this process runs no engine from here on; the first worker's GPU is the one it used
            report("start workers", 0, how.workers)
            pool = stack.enter_context(open_workers(runtime, samples, how.workers, how.threads, at_once))
            report("start workers", how.workers, how.workers)
        else:
            pool = SampleBatches(sets.named(), at_once, how.threads)
        try:
            result = calibrate(sets, latencies, options, journal=journal, pool=pool, progress=report)
        except BudgetError:
            journal.doubt(remembered)
            raise
    bundle_id = runtime.manifest.bundle_id
    settings = CalibrationSettings(
        bundle_id=bundle_id,
        machine=machine(runtime, how.threads),
        batch=how.batch,
        guidance_scale=scale,
        seed=how.seed,
        calibration_prompts=prompts.calibration,
        validation_prompts=prompts.validation,
    )
    found = result.sensitivity.model_copy(update={"settings": settings})
    found.save(runtime.bundle.sensitivity_path)
    result.schedule(bundle_id).save(runtime.bundle.schedule_path)
    return found


@contextmanager
def _locked(journal: Path) -> Iterator[Path]:
    """A journal that no other process writes while the block runs; whoever is killed lets go of it.

    Raises:
        JournalError: one does.
    """
    import fcntl  # not on every system that reads calibrations

    with open(journal, "ab") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise JournalError(
                f"journal {journal} is being written by another calibration of these prompts; wait until it is done"
            ) from None
        yield journal


def _latencies(runtime: DenoiseRuntime, prompts: list[str], scale: float, report: Progress) -> dict[str, float]:
    conditioning = runtime.encode(prompts)
    timings = step_latencies(
        runtime, conditioning, scale, on_round=lambda done, total: report("step latencies", done, total)
    )
    return {name: timing.median_ms for name, timing in timings.items()}
