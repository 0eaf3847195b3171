"""The schedules that need no measuring."""

from __future__ import annotations

import numpy as np
import pytest

from calibration.choose import baselines


def test_baselines_arrange_what_the_schedule_has():
    pool = ["h"] * 3 + ["l"] * 5
    assert "".join(baselines.first(pool)) == "hhhlllll"
    assert "".join(baselines.last(pool)) == "lllllhhh"
    assert "".join(baselines.both_ends(pool)) == "hhlllllh"
    assert "".join(baselines.evenly_spread(pool)) == "hlllhllh"
    three = ["a"] * 2 + ["b"] * 3 + ["c"] * 4
    for arrange in (baselines.first, baselines.last, baselines.both_ends, baselines.evenly_spread):
        assert sorted(arrange(three)) == three
    assert sorted(baselines.shuffled(three, np.random.default_rng(0))) == three


@pytest.mark.parametrize("size", range(1, 15))
def test_evenly_spread_is_even(size):
    for count in range(size + 1):
        spread = baselines.evenly_spread(["h"] * count + ["l"] * (size - count))
        places = [k for k, name in enumerate(spread) if name == "h"]
        assert len(places) == count
        gaps = np.diff(places)
        assert count < 2 or gaps.max() - gaps.min() <= 1
