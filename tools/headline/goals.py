"""What a study says of its goals: quality at given speeds, by straight lines between measured points."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

SPEEDUPS = (1.5, 1.75, 2.0, 2.25, 2.5, 2.75, 3.0, 3.5, 4.0)
GOAL_SPEEDUP, GOAL_SSIM = 2.5, 0.90
CACHE_DIT = "cache-dit"
SCHEDULE = "schedule"


def value(row: dict[str, Any], key: str) -> float:
    """A measure of a row: "ssim", "lpips" (means over prompts) or "typical_error"."""
    return float(row[key] if key == "typical_error" else row[key]["mean"])


def best_points(rows: Iterable[dict[str, Any]], key: str = "ssim") -> list[tuple[float, float]]:
    """Points (speed-up, value) that no other row is both faster and better than, slowest first; of SSIM more is better."""
    sign = 1 if key == "ssim" else -1
    found: list[tuple[float, float]] = []
    for row in sorted(rows, key=lambda row: (-row["speedup"], -sign * value(row, key))):
        point = (row["speedup"], value(row, key))
        if not found or sign * point[1] > sign * found[-1][1]:
            found.append(point)
    return found[::-1]


def frontier(rows: Iterable[dict[str, Any]]) -> list[tuple[float, float]]:
    """The best points by SSIM, after the 16-bit run of all steps, which is one of every method's."""
    return [(1.0, 1.0), *best_points(rows)]


def at_speedup(rows: Iterable[dict[str, Any]], speedup: float) -> float | None:
    """Best mean SSIM at a speed-up: between two points of the frontier on the line through them; None beyond the fastest."""
    points = frontier(rows)
    if speedup > points[-1][0]:
        return None
    return float(np.interp(speedup, *np.array(points).T))


def curves(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows by group; the 16-bit baseline is in none."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows[1:]:
        found.setdefault(row["group"], []).append(row)
    return found


def findings(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """SSIM by speed-up of the schedules, of all of cache-dit and of every other group; whether the goals are met."""
    schedules = [row for row in rows if row["group"] == SCHEDULE]
    cached = [row for row in rows if row["group"].startswith(CACHE_DIT)]
    others = {name: group for name, group in curves(rows).items() if name != SCHEDULE}
    table = [
        {
            "speedup": speedup,
            SCHEDULE: at_speedup(schedules, speedup),
            CACHE_DIT: at_speedup(cached, speedup),
            "others": {name: at_speedup(group, speedup) for name, group in others.items()},
        }
        for speedup in SPEEDUPS
    ]
    reached = at_speedup(schedules, GOAL_SPEEDUP)
    pairs = {speedup: (at_speedup(schedules, speedup), at_speedup(cached, speedup)) for speedup in SPEEDUPS}
    above = {
        str(speedup): own > other for speedup, (own, other) in pairs.items() if own is not None and other is not None
    }
    return {
        "by_speedup": table,
        "goals": {
            "ssim_at_2.5": reached,
            "ssim_at_2.5_met": reached is not None and reached >= GOAL_SSIM,
            "above_cache_dit": above,
            "above_cache_dit_met": bool(above) and all(above.values()),
        },
    }
