"""Calibrates a bundle on disk: latencies, journal, schedule and sensitivity documents."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from calibration import CalibrationOptions, Sensitivity, calibrate, open_journal
from calibration.document import OutdatedCalibrationError
from calibration.measure.bundle_evaluator import BundleSamples, samples_per_call
from calibration.measure.journal import Journal, JournalError
from calibration.measure.latency import machine, reuse_latency, step_latencies
from calibration.measure.requests import Pool
from calibration.measure.sample_batches import SampleBatches
from calibration.records import CalibrationSettings
from calibration.run import REUSE
from calibration.scores.carried import CarriedScores, carried_scores
from calibration.scores.transfer import TransferError, step_axes
from calibration.stages import DEFAULT_OPTIONS, Progress
from engines.bundle import Bundle
from engines.errors import BudgetError, TmpDiffError
from engines.runtime import DenoiseRuntime
from engines.sampler import SamplerTable
from engines.setting_choice import SettingChoice
from engines.setting_entry import SettingEntry
from engines.text import PromptFile
from tmpdiff_export.calibrate.settings import shorter_loop
from tmpdiff_export.calibrate.workers import open_workers, require_workers
from tmpdiff_export.targets.settings import MAX_BATCH

JOURNAL_FOLDER = "calibration"


@dataclass(frozen=True)
class RunOptions:
    """How a bundle is run to be calibrated.

    Attributes:
        seed: of the first sample's noise.
        batch: pictures at once, for which latencies are measured; scores do not depend on it.
        threads: of a CPU backend, and for comparing pictures; shared out among the workers; None for one per core.
        workers: processes that share the samples out, each with a GPU of its own where the bundle runs on one; 1 does
            everything in this process. Latencies are measured before they start, by this process alone.
        setting: which one, None for the first; `calibrate.settings.open_setting` adds one.
        source: a calibrated bundle, whose default setting scores are carried from, in place of a search; see
            `calibration.scores.transfer`.
        fresh_latencies: measure step latencies even where the journal has some of this machine and batch.

    Raises:
        TmpDiffError: a negative seed, or a batch out of range.
    """

    seed: int = 0
    batch: int = 1
    threads: int | None = None
    workers: int = 1
    fresh_latencies: bool = False
    setting: SettingChoice | None = None
    source: Path | None = None

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
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> Sensitivity:
    """Calibrates a setting of the bundle and writes its `schedule.json` and `sensitivity.json`.

    Where the setting has no scores yet and another one of the bundle has, those are carried over if they hold here, and
    searched for anew if not; `say` is told which.

    Every finished measurement is kept in a journal inside the bundle; the same call after an interruption goes on from
    there and gives the same result. Latencies are kept as well, but those that a budget was refused for are measured anew
    by the next call: the machine may have been busy. Packages compiled for several pictures take as many samples in every
    call. The documents are written last, each in one piece.

    Args:
        bundle: bundle folder.
        prompts: calibration and validation prompts, one sample each.
        options: what is asked for.
        how: the bundle is run.
        progress: called with (stage, done, total).
        say: called with a line for the user.

    Raises:
        BackendError: what runs worker processes is not installed.
        BudgetError: no schedule meets the budget; the text names the nearest.
        TransferError: the scores of `source` do not hold for `bundle`.
        TmpDiffError: the bundle is damaged, or a run gave latents that are not finite.
    """
    report = progress or (lambda stage, done, total: None)
    tell = say or (lambda line: None)
    with DenoiseRuntime.load(bundle, setting=how.setting, threads=how.threads) as runtime:
        require_workers(runtime, how.workers, how.threads)
        if how.source is not None:
            calibrated = Bundle.open(how.source)
            entry = calibrated.setting()
            found = read_calibration(calibrated, entry)
            carried = scores_from(calibrated, entry, found, runtime)
            return _calibrate(runtime, prompts, replace(options, carried=carried), how, report)
        own = own_scores(runtime) if options.method == "bisection" else None
        if own is not None:
            try:
                result = _calibrate(runtime, prompts, replace(options, carried=own), how, report)
                tell(f"scores were carried over from setting {own.origin.setting}, which the checks here confirm")
                return result
            except TransferError as error:
                tell(f"scores of setting {own.origin.setting} are not carried over, but searched for: {error}")
        return _calibrate(runtime, prompts, options, how, report)


def own_scores(runtime: DenoiseRuntime) -> CarriedScores | None:
    """Scores of another setting of the bundle, carried to a setting that has none; None where there are none to carry.

    Of several settings that were searched, the one is taken whose number of steps is nearest.
    """
    bundle, setting = runtime.bundle, runtime.setting
    if bundle.sensitivity_path(setting).exists():
        return None
    near = sorted(bundle.manifest.settings, key=lambda entry: abs(entry.num_steps - setting.num_steps))
    for entry in near:
        try:
            found = read_calibration(bundle, entry)
            if found.transfer is None:
                return scores_from(bundle, entry, found, runtime)
        except (
            TmpDiffError
        ):  # not calibrated, by an earlier release, or with a scheduler whose steps are not comparable
            continue
    return None


def read_calibration(bundle: Bundle, setting: SettingEntry) -> Sensitivity:
    """The sensitivity document of a setting, checked against the schedule and the manifest it is shown beside.

    Raises:
        TmpDiffError: not calibrated, or the documents contradict each other.
    """
    remedy = f"run `{bundle.how_to_calibrate(setting)}`"
    path, schedule = bundle.sensitivity_path(setting), bundle.schedule_path(setting)
    for needed in (path, schedule):
        if not needed.exists():
            raise TmpDiffError(
                f"setting {setting.name} of bundle {bundle.folder} is not calibrated: there is no {needed.name}; {remedy}"
            )
    try:
        found = Sensitivity.load(path)
    except OutdatedCalibrationError as error:
        raise OutdatedCalibrationError(f"{error}: {bundle.how_to_calibrate(setting)}") from error
    if found.precisions != bundle.manifest.precisions or found.num_steps != setting.num_steps:
        raise TmpDiffError(
            f"sensitivity {path} has {found.num_steps} steps at {', '.join(found.precisions)}, the setting "
            f"{setting.num_steps} at {', '.join(bundle.manifest.precisions)}; {remedy}"
        )
    if found.settings is None or found.settings.bundle_id != bundle.manifest.bundle_id:
        raise TmpDiffError(f"sensitivity {path} was measured on another bundle; {remedy}")
    if found.settings.setting not in (None, setting.name):
        raise TmpDiffError(f"sensitivity {path} was measured on setting {found.settings.setting}; {remedy}")
    if found.schedule != bundle.schedule(setting).precisions:
        raise TmpDiffError(f"{schedule} is not the schedule that {path.name} beside it describes; {remedy}")
    return found


def scores_from(source: Bundle, entry: SettingEntry, found: Sensitivity, target: DenoiseRuntime) -> CarriedScores:
    """Carries the scores of a calibration to the steps of `target`.

    Args:
        source: the bundle that was calibrated; it may be that of `target`, for another setting.
        entry: its setting.
        found: the sensitivity document of that.
        target: where the scores are wanted.

    Raises:
        TransferError: the bundles are of different denoisers or schedulers.
    """
    if source.manifest.model.denoiser_sha256 != target.manifest.model.denoiser_sha256:
        raise TransferError(
            f"bundle {source.folder} was built from another denoiser than {target.bundle.folder}; its scores say "
            "nothing here, calibrate without --from"
        )
    table = SamplerTable.from_json(source.read(entry.sampler))
    return carried_scores(found, *step_axes(table, target.table))


def _calibrate(
    runtime: DenoiseRuntime, prompts: PromptFile, options: CalibrationOptions, how: RunOptions, report: Progress
) -> Sensitivity:
    options.require_fit(runtime.num_steps)  # before latencies are measured, as a reused step's cannot be without one
    runtime.bundle.verify(runtime.manifest.files())
    scale = runtime.setting.guidance_scale
    samples = BundleSamples(prompts, how.seed, scale, reuse=options.reuse > 0)
    sets = replace(samples.open(runtime), shorter=partial(shorter_loop, runtime.bundle, runtime.setting))
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
        if options.reuse:
            latencies = latencies | {REUSE: _reuse_latency(runtime, journal, f"reused {remembered}", prompts, how)}
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
    bundle_id, setting = runtime.manifest.bundle_id, runtime.setting.name
    settings = CalibrationSettings(
        bundle_id=bundle_id,
        setting=setting,
        machine=machine(runtime, how.threads),
        batch=how.batch,
        guidance_scale=scale,
        seed=how.seed,
        calibration_prompts=prompts.calibration,
        validation_prompts=prompts.validation,
    )
    found = result.sensitivity.model_copy(update={"settings": settings})
    found.save(runtime.bundle.sensitivity_path(runtime.setting))
    result.schedule(bundle_id, setting).save(runtime.bundle.schedule_path(runtime.setting))
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


def _reuse_latency(runtime: DenoiseRuntime, journal: Journal, name: str, prompts: PromptFile, how: RunOptions) -> float:
    """The latency of a reused step in ms, which the journal keeps by this name."""

    def measure() -> float:
        conditioning = runtime.encode([prompts.calibration[0]] * how.batch)
        return reuse_latency(runtime, conditioning, runtime.setting.guidance_scale).median_ms

    found = journal.remember(name, measure, how.fresh_latencies)
    if type(found) not in (int, float):
        raise JournalError(f"journal {journal.path} has no {name}; delete it to start afresh")
    return float(found)


def _latencies(runtime: DenoiseRuntime, prompts: list[str], scale: float, report: Progress) -> dict[str, float]:
    conditioning = runtime.encode(prompts)
    timings = step_latencies(
        runtime, conditioning, scale, on_round=lambda done, total: report("step latencies", done, total)
    )
    return {name: timing.median_ms for name, timing in timings.items()}
