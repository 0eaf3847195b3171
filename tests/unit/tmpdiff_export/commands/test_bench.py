"""`tmpdiff-export bench`: ratios of one run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helpers.commands import EXPORT, assert_refused, called
from helpers.demo_build import linked_copy

from engines.setting_choice import SettingChoice
from tmpdiff_export.calibrate.settings import Wanted, open_setting


def test_bench_prints_ratios_of_one_run(demo_bundle: Path, demo_pipeline: Path, tmp_path: Path) -> None:
    # Far from the measured ratios, so that a busy machine does not fail the suite, but not from the wrong kernel; and
    # the best of five runs, as other work takes caches too. Without VNNI products are of u8 by u8, and slower: 1.27.
    floor = 1.3 if "vnni" in Path("/proc/cpuinfo").read_text() else 1.15
    bundle = linked_copy(demo_bundle, tmp_path / "bundle")
    setting, _ = open_setting(bundle, Wanted(SettingChoice(steps=4)))  # whole loops are timed as well

    def ratios_hold(rows: dict[str, Any], loops: dict[str, Any]) -> bool:
        # Swaps cost 2 % where nothing else runs; what would show here is a copy or a reload at every swap.
        swaps = loops["fp16/int8"]["over_sum_percent"]
        return rows["int8"]["speedup"] > floor and rows["torch fp32"]["speedup"] < 1.3 and swaps < 25.0

    for _ in range(5):
        result = called(EXPORT, "bench", bundle, "--steps", 4, "--pipeline", demo_pipeline, "--rounds", "3", "--json")
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout)["setting"] == setting.name
        rows = {row["name"]: row for row in json.loads(result.stdout)["rows"]}
        loops = {loop["precisions"]: loop for loop in json.loads(result.stdout)["loops"]}
        if ratios_hold(rows, loops):
            break
    assert ratios_hold(rows, loops), result.stdout
    assert set(rows) == {"fp16", "fp8", "int8", "int4", "torch fp32"}
    assert rows["fp16"]["speedup"] == 1.0
    assert rows["fp8"]["remark"].startswith("no gain")
    assert set(loops) == {"fp16/fp8", "fp16/int8", "fp16/int4"}
    limited = called(EXPORT, "bench", bundle, "--resident-engines", "1")
    assert_refused(limited, "a limit on resident engines is for bundles of the")
