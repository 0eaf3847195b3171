"""A calibration that was interrupted, and its journal: the same result, and nothing measured twice."""

from __future__ import annotations

import json
import os
import signal
import sys

import pytest
from helpers.children import start, wait_for
from helpers.paths import ROOT
from helpers.planted import Counted, Interrupted
from helpers.planted_calibration import STEPS, loop, pictures, run

from calibration import (
    open_journal,
)
from calibration.measure.journal import Entry, JournalError


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
    limits: list[tuple[int | None, int | None]] = [(n, None) for n in range(0, calibration_calls, 41)]
    limits += [(None, n) for n in range(0, validation_calls, 41)]
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
    for cut in [*range(last, len(whole), 9), len(whole) - 1]:
        path = tmp_path / "torn"
        path.write_bytes(whole[:cut])
        assert document(interrupted_run(path, None)) == expected
        assert path.read_bytes() == whole, "the torn line is gone, the same measurement in its place"
    header = whole.index(b"\n")
    for cut in (0, 1, header // 2, header):
        path.write_bytes(whole[:cut])
        assert open_journal(path, loop(), loop(seed=1)).get("calibration/uniform/fp16/0") is None


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
