"""The journal of a calibration: every finished measurement, on disk before the next one starts.

Append-only JSON lines, each with its own checksum and synced to disk. The first line names what the
measurements belong to. Reopening keeps every whole line and drops a torn last one, so a calibration that
was killed goes on from its last finished measurement. Floats are written with `repr` and read back bit
for bit.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from calibration.measure.evaluator import Evaluator
from engines.documents import canonical_json
from engines.errors import TmpDiffError
from engines.files import fsync_folder, sha256_bytes

JOURNAL_VERSION = 2
"""2: downcasts have error vectors. A journal of an older version is replaced, a newer one is refused."""

MOST_CALLS = 2**32
"""Denoiser calls of one measurement."""

log = logging.getLogger(__name__)


class JournalError(TmpDiffError):
    """A journal is damaged or belongs to another calibration."""


@dataclass(frozen=True)
class Entry:
    """One finished measurement.

    Attributes:
        value: what was measured; JSON data.
        calls: denoiser calls it took, per precision.
    """

    value: Any
    calls: Mapping[str, int] = field(default_factory=dict)


class Journal:
    """Measurements by name; open with `Journal.open`, or keep one in memory with `Journal.in_memory`."""

    def __init__(self, key: str, path: Path | None, entries: dict[str, Entry]) -> None:
        self.key = key
        self.path = path
        self._entries = entries

    @classmethod
    def in_memory(cls, key: str) -> Journal:
        """A journal without a file, for runs that need not survive."""
        return cls(key, None, {})

    @classmethod
    def open(cls, path: Path, key: str, parameters: Mapping[str, Any]) -> Journal:
        """Opens the journal at `path`, or starts one; one of the same measurements in an older format is started afresh.

        Args:
            path: the file; its folder exists.
            key: digest of everything that shapes the measurements.
            parameters: further settings that have to agree, and that a reader of the file wants to see;
                JSON data.

        Raises:
            JournalError: the file belongs to another key or other parameters, or is damaged before its
                last line.
        """
        header = {"journal": JOURNAL_VERSION, "key": key, "parameters": dict(parameters)}
        data = path.read_bytes() if path.exists() else b""
        if _outdated(data, header):
            log.warning(
                "journal %s is of an earlier version, whose measurements have no error vectors; starting afresh", path
            )
            data = b""
        records, sound_bytes = _read(path, data)
        if not records:
            if not _line(header).startswith(data):
                raise JournalError(f"{path} is no calibration journal; name another file or start afresh")
            journal = cls(key, path, {})
            path.write_bytes(b"")
            journal._append(header)
            fsync_folder(path.parent)
            return journal
        if records[0] != header:
            raise JournalError(_difference(path, records[0], header))
        if sound_bytes < len(data):
            with open(path, "r+b") as stream:
                stream.truncate(sound_bytes)
                os.fsync(stream.fileno())
        for number, record in enumerate(records[1:], start=2):
            _check_record(path, number, record)
        entries = {record["name"]: Entry(record["value"], record["calls"]) for record in records[1:]}
        return cls(key, path, entries)

    def get(self, name: str) -> Entry | None:
        """The entry called `name`, None if it has not been measured."""
        return self._entries.get(name)

    def record(self, measured: Mapping[str, Entry]) -> None:
        """Writes measurements that were taken together; they are on disk when this returns.

        Args:
            measured: by name.

        Raises:
            ValueError: a value is no JSON data or holds NaN or Infinity, or a name was recorded before.
            OSError: the disk is full or the file cannot be written.
        """
        for name in measured:
            if name in self._entries:
                raise ValueError(f"measurement {name!r} is recorded already; names are used once")
        records = [{"name": name, "value": item.value, "calls": dict(item.calls)} for name, item in measured.items()]
        # what a resumed run would read, so that both go on with equal data
        records = [json.loads(canonical_json(record)) for record in records]
        self._append(*records)
        self._entries |= {record["name"]: Entry(record["value"], record["calls"]) for record in records}

    def remember(self, name: str, measure: Callable[[], Any], anew: bool = False) -> Any:
        """The last recorded value of `name`; measured with `measure` and recorded when there is none, or a doubted one.

        For what calibration is given from outside, as step latencies: a resumed run then uses the same.

        Args:
            name: without a number in brackets at its end, which later measurements get.
            measure: gives JSON data.
            anew: measures in any case.
        """
        times = self._times(name)
        if anew or not times or _doubted(name, times) in self._entries:
            times += 1
            self.record({_numbered(name, times): Entry(measure())})
        return self._entries[_numbered(name, times)].value

    def doubt(self, name: str) -> None:
        """Says that the value remembered under `name` may be wrong: the next `remember` measures anew."""
        times = self._times(name)
        if times and _doubted(name, times) not in self._entries:
            self.record({_doubted(name, times): Entry(True)})

    def _times(self, name: str) -> int:
        """How often `name` was measured; entries are never changed, so that each time has one of its own."""
        return next(times for times in count() if _numbered(name, times + 1) not in self._entries)

    def _append(self, *records: dict[str, Any]) -> None:
        if self.path is None:
            return
        with open(self.path, "ab") as stream:
            stream.write(b"".join(map(_line, records)))
            stream.flush()
            os.fsync(stream.fileno())


def journal_key(evaluator: Evaluator, validation: Evaluator | None) -> str:
    """What the measurements of a calibration with these evaluators belong to."""
    return sha256_bytes(f"{evaluator.key()} {validation.key() if validation else ''}".encode())


def open_journal(path: Path, evaluator: Evaluator, validation: Evaluator | None = None) -> Journal:
    """The journal for a calibration with these evaluators; pass it to `calibrate`.

    Method and budget are no part of its key: a measurement does not depend on them, so another budget or a
    full sweep after a bisection reuses what is there (and counts it as its own).

    Raises:
        JournalError: the file belongs to other evaluators, or is damaged.
    """
    parameters = {
        "num_steps": evaluator.num_steps,
        "num_samples": evaluator.num_samples,
        "validation_samples": validation.num_samples if validation else 0,
        "precisions": list(evaluator.precisions),
    }
    return Journal.open(path, journal_key(evaluator, validation), parameters)


def _numbered(name: str, times: int) -> str:
    return name if times == 1 else f"{name} [{times}]"


def _doubted(name: str, times: int) -> str:
    return f"{_numbered(name, times)} in doubt"


def _outdated(data: bytes, header: Mapping[str, Any]) -> bool:
    """Whether a journal begins with `header` but for an older version."""
    first = _parse(data.partition(b"\n")[0]) or {}
    version = first.get("journal")
    return isinstance(version, int) and version < JOURNAL_VERSION and first == {**header, "journal": version}


def _line(record: dict[str, Any]) -> bytes:
    digest = sha256_bytes(canonical_json(record))
    return canonical_json({**record, "sha256": digest}) + b"\n"


def _parse(line: bytes) -> dict[str, Any] | None:
    """The record of a line, None where the line is not whole."""
    try:
        record = json.loads(line)
        digest = record.pop("sha256", None) if isinstance(record, dict) else None
        return record if digest is not None and digest == sha256_bytes(canonical_json(record)) else None
    except (ValueError, RecursionError):  # not JSON, with NaN in it, or nested without end
        return None


def _read(path: Path, data: bytes) -> tuple[list[dict[str, Any]], int]:
    """The whole records of a journal and the number of bytes they take up.

    Raises:
        JournalError: a line before the last one is damaged.
    """
    *lines, torn = data.split(b"\n")  # torn: what follows the last newline
    records: list[dict[str, Any]] = []
    sound_bytes = 0
    for number, line in enumerate(lines, start=1):
        record = _parse(line)
        if record is None:
            if number < len(lines) or torn:
                raise JournalError(f"journal {path} is damaged at line {number}; delete it to start afresh")
            break
        records.append(record)
        sound_bytes += len(line) + 1
    return records, sound_bytes


def _check_record(path: Path, number: int, record: dict[str, Any]) -> None:
    """Refuses a line that is whole, but no measurement."""
    calls = record.get("calls")
    sound = record.keys() == {"name", "value", "calls"} and isinstance(record["name"], str) and isinstance(calls, dict)
    if not sound or not all(type(count) is int and 0 <= count <= MOST_CALLS for count in record["calls"].values()):
        raise JournalError(f"journal {path} has no measurement at line {number}; delete it to start afresh")


def _difference(path: Path, found: dict[str, Any], expected: dict[str, Any]) -> str:
    subjects = {"journal": "format version", "key": "key of bundle, prompts, seeds and guidance"}
    name = next((name for name in expected if found.get(name) != expected[name]), "parameters")
    return (
        f"journal {path} belongs to another calibration: its {subjects.get(name, name)} is "
        f"{_brief(found.get(name))}, expected {_brief(expected[name])}; delete it to start afresh, "
        "or go on with the arguments it was made with"
    )


def _brief(value: Any) -> str:
    return value[:12] if isinstance(value, str) else json.dumps(value)
