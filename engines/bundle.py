"""A bundle folder: opened, checked, and read; nothing in it is loaded before its hash is checked."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from engines.documents import FileEntry, check_version, one_line, read_json
from engines.errors import BundleError, ScheduleError
from engines.files import inside, sha256_bytes, sha256_file, side_by_side
from engines.manifest import MANIFEST_VERSION, OLDEST_MANIFEST_VERSION, Manifest
from engines.reuse import reuse_terms
from engines.sampler_document import parse_document
from engines.schedule import Schedule
from engines.setting_choice import SettingChoice
from engines.setting_entry import SettingEntry, choose_setting

MANIFEST_NAME = "manifest.json"
SCHEDULE_NAME = "schedule.json"
SAMPLER_NAME = "sampler.json"
SCHEDULER_NAME = "scheduler.json"
SETTINGS = "settings"
SENSITIVITY_NAME = "sensitivity.json"
UNIFORM_PREFIX = "uniform:"


@dataclass
class Bundle:
    """An opened bundle: a valid manifest in a folder. Files are checked when they are asked for.

    Attributes:
        folder: the bundle folder.
        manifest: its manifest.
    """

    folder: Path
    manifest: Manifest
    _checked: set[str] = field(default_factory=set, repr=False)

    @classmethod
    def open(cls, folder: Path | str) -> Bundle:
        """Reads and validates the manifest.

        Raises:
            BundleError: no such folder, no manifest, a newer format, or a manifest that was altered.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise BundleError(f"bundle {folder} is not a folder; pass the folder that `tmpdiff-export build` wrote")
        path = folder / MANIFEST_NAME
        if not path.exists():
            raise BundleError(f"folder {folder} is not a bundle: it holds no {MANIFEST_NAME}")
        data = read_json(path, "manifest", BundleError)
        check_version(data, path, "manifest", MANIFEST_VERSION, BundleError, oldest=OLDEST_MANIFEST_VERSION)
        try:
            manifest = Manifest.model_validate(data)
        except ValidationError as error:
            raise BundleError(f"manifest {path} is malformed: {one_line(error)}") from error
        for entry in manifest.files():
            inside(folder, entry.path)
        return cls(folder, manifest)

    def path_of(self, entry: FileEntry) -> Path:
        """The path of a file after its size and SHA-256 were checked (once per opened bundle).

        Raises:
            BundleError: the file is missing, truncated or altered, or its path leaves the folder.
        """
        path = inside(self.folder, entry.path)
        if entry.path not in self._checked:
            self._check(entry, path, None)
        return path

    def paths_of(self, entries: Iterable[FileEntry]) -> list[Path]:
        """`path_of` of several files, which are hashed side by side.

        Raises:
            BundleError: as `path_of`.
        """
        paths = {entry.path: (entry, inside(self.folder, entry.path)) for entry in entries}
        left = [found for name, found in paths.items() if name not in self._checked]
        side_by_side(left, lambda found, stop: self._check(*found, stop))
        return [path for _, path in paths.values()]

    def _check(self, entry: FileEntry, path: Path, stop: threading.Event | None) -> None:
        try:
            size = path.stat().st_size
            if not path.is_file():
                raise BundleError(f"bundle file {entry.path} is not a regular file; restore it or build again")
            if size != entry.bytes:
                raise BundleError(
                    f"bundle file {entry.path} has {size} bytes, the manifest says {entry.bytes}: truncated or altered; "
                    "copy the bundle again"
                )
            digest = sha256_file(path, stop)
        except FileNotFoundError:
            raise BundleError(
                f"bundle file {entry.path} is missing from {self.folder}; copy the bundle again"
            ) from None
        except OSError as error:
            raise BundleError(f"bundle file {entry.path} cannot be read: {error.strerror}") from error
        if digest != entry.sha256:
            raise BundleError(
                f"bundle file {entry.path} was altered: its sha256 is {digest[:12]}..., "
                f"the manifest says {entry.sha256[:12]}...; copy the bundle again"
            )
        self._checked.add(entry.path)

    def read(self, entry: FileEntry) -> bytes:
        """A small file's content, hashed as read.

        Raises:
            BundleError: as `path_of`.
        """
        data = self.path_of(entry).read_bytes()
        if sha256_bytes(data) != entry.sha256:
            raise BundleError(f"bundle file {entry.path} changed while it was read; copy the bundle again")
        return data

    def verify(self, entries: Iterable[FileEntry] | None = None) -> int:
        """Checks files (all by default) and the stored schedules; returns how many.

        Raises:
            BundleError: a file is missing, truncated or altered.
            ScheduleError: a stored schedule does not belong to this bundle.
        """
        files = tuple(self.manifest.files() if entries is None else entries)
        self.paths_of(files)
        stored = [setting for setting in self.manifest.settings if self.schedule_path(setting).exists()]
        for setting in stored:
            self.schedule(setting)
        return len(files) + len(stored)

    def setting(self, choice: SettingChoice | None = None) -> SettingEntry:
        """The setting that is meant, by default the bundle's first.

        Raises:
            BundleError: there is none; the text lists them.
        """
        return choose_setting(self.manifest.settings, choice or SettingChoice())

    def schedule_path(self, setting: SettingEntry) -> Path:
        """Where `calibrate` stores the schedule of a setting."""
        return inside(self.folder, setting.folder) / SCHEDULE_NAME

    def sensitivity_path(self, setting: SettingEntry) -> Path:
        """Where `calibrate` stores what it measured of a setting."""
        return inside(self.folder, setting.folder) / SENSITIVITY_NAME

    def schedule(self, setting: SettingEntry, choice: str | Path | None = None) -> Schedule:
        """The schedule to run.

        Args:
            setting: of this bundle.
            choice: a schedule file, "uniform:<precision>", or None for the calibrated one.

        Raises:
            ScheduleError: malformed, for another bundle, setting, T or set of precisions, or a step reuses more than was
                computed before it.
            BundleError: None was given and the setting was not calibrated.
            BundleError, SamplerError: steps are reused, and the sampler table is damaged.
        """
        manifest = self.manifest
        if isinstance(choice, str) and choice.startswith(UNIFORM_PREFIX):
            precision = choice.removeprefix(UNIFORM_PREFIX)
            if precision not in manifest.precisions:
                raise ScheduleError(
                    f"schedule {choice!r} asks for precision {precision!r}; the bundle holds {', '.join(manifest.precisions)}"
                )
            schedule = Schedule.uniform(manifest.bundle_id, setting, precision)
        elif choice is not None:
            schedule = Schedule.load(Path(choice))
        elif self.schedule_path(setting).exists():
            schedule = Schedule.load(self.schedule_path(setting))
        else:
            raise BundleError(
                f"bundle {self.folder} has no schedule for its setting {setting.name} yet; run `{self.how_to_calibrate(setting)}`, "
                f"or pass --schedule uniform:{manifest.precisions[0]}"
            )
        schedule.check(bundle_id=manifest.bundle_id, setting=setting, precisions=manifest.precisions)
        if schedule.reused:
            reuse_terms(parse_document(self.read(setting.sampler)).timesteps, schedule.precisions)
        return schedule

    def how_to_calibrate(self, setting: SettingEntry) -> str:
        """The command that calibrates a setting."""
        named = "" if setting == self.manifest.settings[0] else f" --scheduler-setting {setting.name}"
        return f"tmpdiff-export calibrate {self.folder} --prompts FILE{named}"
