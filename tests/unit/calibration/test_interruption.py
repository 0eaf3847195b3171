"""A calibration that was interrupted, and its journal: the same result, and nothing measured twice."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys

import numpy as np
import pytest
from helpers.children import start, wait_for
from helpers.paths import ROOT
from helpers.planted import Counted, Interrupted
from helpers.planted_calibration import STEPS, loop, pictures, run

from calibration import (
    open_journal,
)
from calibration.measure.evaluator import SampleSet
from calibration.measure.journal import JOURNAL_VERSION, Entry, Journal, JournalError
from calibration.measure.measurements import Measurements
from calibration.measure.sample_batches import SampleBatches
from calibration.measure.sketch import from_text, to_text
from engines.documents import canonical_json
from engines.files import sha256_bytes


def document(result):
    return json.dumps(result.sensitivity.model_dump(mode="json"))


def calls_in_all():
    evaluator, validation = Counted(loop()), Counted(loop(seed=1))
    whole = run(evaluator, validation=validation, decode=pictures)
    return document(whole), evaluator.calls.total(), validation.calls.total()


def interrupted_run(path, calibration_limit, validation_limit=None):
    evaluator = Counted(loop(), calibration_limit)
    validation = Counted(loop(seed=1), validation_limit)
    journal = open_journal(path, evaluator, validation)
    return run(evaluator, validation=validation, decode=pictures, journal=journal)


def test_killed_after_any_number_of_calls_and_resumed_is_the_same(tmp_path):
    expected, calibration_calls, validation_calls = calls_in_all()
    limits: list[tuple[int | None, int | None]] = [(n, None) for n in range(0, calibration_calls, 71)]
    limits += [(None, n) for n in range(0, validation_calls, 71)]
    for k, (calibration_limit, validation_limit) in enumerate(limits):
        path = tmp_path / str(k)
        with pytest.raises(Interrupted):
            interrupted_run(path, calibration_limit, validation_limit)
        assert document(interrupted_run(path, None)) == expected


def test_killed_again_and_again_gets_done(tmp_path):
    expected, *_ = calls_in_all()
    path = tmp_path / "journal"
    attempts = 0
    while True:
        attempts += 1
        sizes = path.stat().st_size if path.exists() else 0
        try:
            result = interrupted_run(path, 70, 70)
            break
        except Interrupted:
            assert path.stat().st_size > sizes, "every attempt gets further"
    assert attempts > 3
    assert document(result) == expected


def test_finished_run_is_repeated_without_a_call(tmp_path):
    expected, *_ = calls_in_all()
    interrupted_run(tmp_path / "journal", None)
    assert document(interrupted_run(tmp_path / "journal", 0, 0)) == expected


def test_resumed_run_does_not_measure_again_what_it_has(tmp_path):
    path = tmp_path / "journal"
    _, whole, _ = calls_in_all()
    with pytest.raises(Interrupted):
        interrupted_run(path, whole - 1)
    evaluator = Counted(loop())
    run(evaluator, validation=loop(seed=1), decode=pictures, journal=open_journal(path, loop(), loop(seed=1)))
    assert evaluator.calls.total() <= 3 * STEPS, "one sample's trajectories and the measurement cut off"


def test_journal_torn_at_any_byte_of_its_last_line(tmp_path):
    expected, *_ = calls_in_all()
    interrupted_run(tmp_path / "whole", None)
    whole = (tmp_path / "whole").read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for cut in [*range(last, len(whole), 29), len(whole) - 1]:
        path = tmp_path / "torn"
        path.write_bytes(whole[:cut])
        assert document(interrupted_run(path, None)) == expected
        assert path.read_bytes() == whole, "the torn line is gone, the same measurement in its place"
    header = whole.index(b"\n")
    for cut in (0, 1, header // 2, header):
        path.write_bytes(whole[:cut])
        assert open_journal(path, loop(), loop(seed=1)).get("calibration/uniform/fp16/0") is None


def test_journal_has_the_direction_of_every_downcast_and_nudged_run(tmp_path):
    path = tmp_path / "journal"
    found = interrupted_run(path, None).sensitivity
    entries = {record["name"]: record for record in map(json.loads, path.read_text().splitlines()[1:])}
    kinds = {name: name.split("/")[1] for name in entries}
    assert {"uniform", "uniform-pictures", "downcast", "nudged", "schedule", "pictures"} == set(kinds.values())
    for name, record in entries.items():
        assert ("direction" in record["value"]) == (kinds[name] in ("downcast", "nudged")), name
        if "direction" in record["value"]:
            assert from_text(record["value"]["direction"]).shape == (192,)
    measured = sum(sum(record.measured) for record in found.scores)
    samples = loop().num_samples
    assert list(kinds.values()).count("downcast") == measured * samples
    assert list(kinds.values()).count("nudged") == samples


def test_damaged_or_foreign_journal_is_refused(tmp_path):
    path = tmp_path / "journal"
    interrupted_run(path, None)
    whole = path.read_bytes()
    with pytest.raises(JournalError, match=r"belongs to another calibration: its key .* start afresh"):
        open_journal(path, loop(seed=5), loop(seed=1))
    assert path.read_bytes() == whole
    line = whole.split(b"\n")[4]
    path.write_bytes(whole.replace(line, line.replace(b"1", b"2", 1)))
    with pytest.raises(JournalError, match="damaged at line 5"):
        open_journal(path, loop(), loop(seed=1))
    path.write_text("a letter to a friend")
    with pytest.raises(JournalError, match="no calibration journal"):
        open_journal(path, loop(), loop(seed=1))


def test_named_measurements_are_remembered_bit_for_bit(tmp_path):
    path = tmp_path / "journal"
    value = {"fp16": 0.1 + 0.2, "int8": 1e-17 / 3}
    journal = open_journal(path, loop())
    assert journal.remember("latencies_ms", lambda: value) == value
    again = open_journal(path, loop())
    assert again.remember("latencies_ms", lambda: pytest.fail("measured twice")) == value
    with pytest.raises(ValueError, match="recorded already"):
        again.record({"latencies_ms": Entry({})})
    with pytest.raises(ValueError, match="not JSON compliant"):
        again.record({"broken": Entry(float("nan"))})
    assert open_journal(path, loop()).get("broken") is None


def test_what_is_doubted_or_asked_for_anew_is_measured_again(tmp_path):
    path, measured = tmp_path / "journal", []

    def remembered(anew=False):
        return open_journal(path, loop()).remember("latencies_ms", measure, anew)

    def measure():
        measured.append(len(measured))
        return {"fp16": float(measured[-1])}

    open_journal(path, loop()).doubt("latencies_ms")  # nothing to doubt yet
    assert remembered() == remembered() == {"fp16": 0.0}
    for _ in range(2):
        open_journal(path, loop()).doubt("latencies_ms")
    assert remembered() == remembered() == {"fp16": 1.0}
    assert remembered(anew=True) == remembered() == {"fp16": 2.0}
    journal = open_journal(path, loop())
    journal.doubt("latencies_ms")
    assert journal.remember("latencies_ms", measure) == {"fp16": 3.0} == remembered()
    assert path.read_bytes().count(b"\n") == 1 + 4 + 2, "header, measurements and doubts: nothing is written over"


def of_version(path, version, key=None):
    """Makes a journal say that it is of another version."""
    first, rest = path.read_bytes().split(b"\n", 1)
    record = json.loads(first)
    del record["sha256"]
    record |= {"journal": version} | ({"key": key} if key else {})
    digest = sha256_bytes(canonical_json(record))
    path.write_bytes(canonical_json({**record, "sha256": digest}) + b"\n" + rest)


def test_journal_of_an_earlier_version_is_started_afresh_and_says_so(tmp_path, caplog):
    expected, *_ = calls_in_all()
    path = tmp_path / "journal"
    interrupted_run(path, None)
    whole = path.read_bytes()
    of_version(path, JOURNAL_VERSION - 1)
    with caplog.at_level(logging.WARNING, logger="calibration.measure.journal"):
        assert document(interrupted_run(path, None)) == expected
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == f"journal {path} is of an earlier version, whose measurements have no error vectors; starting afresh"
    assert path.read_bytes() == whole
    of_version(path, JOURNAL_VERSION + 1)
    newer = path.read_bytes()
    with pytest.raises(JournalError, match="its format version is 3, expected 2; delete it to start afresh"):
        interrupted_run(path, None)
    assert path.read_bytes() == newer
    of_version(path, JOURNAL_VERSION - 1, key="another")
    foreign = path.read_bytes()
    with pytest.raises(JournalError, match="belongs to another calibration"):
        interrupted_run(path, None)
    assert path.read_bytes() == foreign, "measurements of something else are not taken away"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, r"KeyError: 'direction'"),
        (5, r"TypeError: .*"),
        ("no base64", r"Error: .*"),
        (to_text(np.array([np.inf] * 192, np.float16)), r"ValueError: a sketch holds numbers that are not finite"),
        (to_text(np.ones(12, np.float16)), r"ValueError: 12 numbers, expected 192"),
        (to_text(np.ones(0, np.float16)), r"ValueError: a sketch holds no numbers"),
    ],
)
def test_error_vectors_that_a_journal_lacks_are_named(text, says):
    journal = Journal.in_memory("key")
    samples = SampleSet(loop())
    found = Measurements("calibration", samples, journal, SampleBatches({"calibration": samples}))
    assert found.downcast(2, "int8", 0).direction.shape == (192,)
    value = {"error": 0.1} | ({} if text is None else {"direction": text})
    journal.record({"calibration/downcast/3/int8/0": Entry(value)})
    words = rf"journal in memory has no usable error vector of calibration/downcast/3/int8/0 \(.*{says}\); delete it to"
    with pytest.raises(JournalError, match=words):
        found.downcast(3, "int8", 0)


@pytest.mark.parametrize(
    "value",
    [None, [], "text", {}, {"ssim": 0.5}, {"error": None}, {"error": "0.1"}, {"error": -0.1}, {"error": 1e300},
     {"error": True}, {"error": 0.1, "ssim": "good"}],
)  # fmt: skip
def test_a_journal_with_something_else_in_place_of_errors_is_refused(value):
    journal = Journal.in_memory("key")
    samples = SampleSet(loop())
    found = Measurements("calibration", samples, journal, SampleBatches({"calibration": samples}))
    journal.record({"calibration/uniform/int8/0": Entry(value)})
    with pytest.raises(
        JournalError, match=r"journal in memory has no errors of calibration/uniform/int8/0, but .*; delete it"
    ):
        found.uniform_error("int8", 0)


@pytest.mark.parametrize(
    "record",
    [
        {"another": "kind"},
        {"name": 5, "value": {}, "calls": {}},
        {"name": "x", "value": {}},
        {"name": "x", "value": {}, "calls": [1]},
        {"name": "x", "value": {}, "calls": {"fp16": -1}},
        {"name": "x", "value": {}, "calls": {"fp16": 1.5}},
        {"name": "x", "value": {}, "calls": {"fp16": 10**400}},
    ],
)
def test_a_whole_line_that_is_no_measurement_is_refused(tmp_path, record):
    path = tmp_path / "journal"
    open_journal(path, loop())
    with open(path, "ab") as stream:
        stream.write(canonical_json({**record, "sha256": sha256_bytes(canonical_json(record))}) + b"\n")
    with pytest.raises(JournalError, match=r"has no measurement at line 2; delete it to start afresh"):
        open_journal(path, loop())


@pytest.mark.parametrize("line", [b'{"name": NaN, "sha256": "0"}', b"[" * 200_000, b"\xff\x00", b"[]", b"{}"])
def test_lines_that_no_journal_writes_are_damage(tmp_path, line):
    path = tmp_path / "journal"
    whole = open_journal(path, loop()).path.read_bytes()
    path.write_bytes(whole + line + b"\n" + whole)
    with pytest.raises(JournalError, match="damaged at line 2"):
        open_journal(path, loop())
    path.write_bytes(whole + line + b"\n")  # as the last line it may be torn
    open_journal(path, loop())
    assert path.read_bytes() == whole


CHILD = """
import sys, time
from pathlib import Path
from helpers.planted_calibration import loop, pictures, run
from calibration import open_journal
from helpers.planted import Counted

class Slow(Counted):
    def step(self, *arguments):
        time.sleep(0.002)
        return super().step(*arguments)

evaluator, validation = Slow(loop()), Slow(loop(seed=1))
journal = open_journal(Path(sys.argv[1]), evaluator, validation)
run(evaluator, validation=validation, decode=pictures, journal=journal)
"""


@pytest.mark.parametrize("lines", [12, 90])
def test_killed_process_goes_on_where_it_was(tmp_path, lines):
    path = tmp_path / "journal"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    with start([sys.executable, "-c", CHILD, path], env=environment) as child:
        wait_for(lambda: path.exists() and path.read_bytes().count(b"\n") >= lines, child)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    before = path.read_bytes()
    expected, *_ = calls_in_all()
    assert document(interrupted_run(path, None)) == expected
    assert path.read_bytes().startswith(before[: before.rindex(b"\n") + 1])
