"""Which step a denoiser is called for, found by the timesteps that it is handed."""

import diffusers
import numpy as np
import pytest

from engines.sampler import SamplerRow, SamplerTable
from tmpdiff_export.drop_in.step_finder import StepFinder
from tmpdiff_export.pipelines.scheduler_table import sampler_table


def table_of(timesteps):
    steps = len(timesteps)
    return SamplerTable(
        scheduler="Planted",
        num_inference_steps=steps,
        timesteps=np.array(timesteps, np.float64),
        sigmas=None,
        init_noise_sigma=1.0,
        input_scale=np.ones(steps),
        rows=tuple(SamplerRow(((k, 1.0),), ()) for k in range(steps)),
    )


HEUN = [999, 666, 666, 333, 333, 0, 0]
PNDM = [751, 501, 501, 251, 1]
TRIPLE = [900, 500, 500, 500, 100]


@pytest.mark.parametrize(
    ("table", "handed", "expected"),
    [
        pytest.param([900, 600, 300], [900, 600, 300] * 2, [0, 1, 2] * 2, id="two runs"),
        pytest.param([900, 600, 300], [900, 600, 900, 600, 300], [0, 1, 0, 1, 2], id="interrupted"),
        pytest.param([900, 600, 300], [600, 300, 300, 300], [1, 2, 2, 2], id="partial, and one-step runs"),
        pytest.param([900, 600, 300], [900, 900, 600, 600], [0, 0, 1, 1], id="two calls a step"),
        pytest.param(HEUN, HEUN * 2, [*range(7)] * 2, id="heun twice"),
        pytest.param(HEUN, [999, 666, *HEUN], [0, 1, *range(7)], id="heun interrupted between occurrences"),
        pytest.param(HEUN, [*HEUN, 666, 666, 333, 333], [*range(7), 1, 2, 3, 4], id="heun partial after full"),
        pytest.param(PNDM, PNDM * 2, [*range(5)] * 2, id="pndm twice"),
        pytest.param(PNDM, [501, 501, 251, 1, *PNDM], [1, 2, 3, 4, *range(5)], id="pndm partial first"),
        pytest.param(TRIPLE, [*TRIPLE[:3], *TRIPLE], [0, 1, 2, *range(5)], id="three times the same"),
    ],
)
def test_timesteps_alone(table, handed, expected):
    finder = StepFinder(table_of(table))
    assert [finder.find(t)[0] for t in handed] == expected


def test_it_tells_new_runs_from_repeated_steps():
    finder = StepFinder(table_of([900, 600, 300]))
    handed = [900, 900, 600, 600, 300, 300, 900, 900, 600, 900]
    assert [finder.find(t)[1] for t in handed] == [False] * 6 + [True, False, False, True]


def test_it_is_told_where_a_run_begins():
    finder = StepFinder(table_of(HEUN))
    assert [finder.find(t)[0] for t in (999, 666)] == [0, 1]
    finder.begin_run(2)
    assert [finder.find(t)[0] for t in HEUN[2:]] == [2, 3, 4, 5, 6]
    finder.begin_run(1)
    assert finder.find(666) == (1, False)
    finder.begin_run()
    assert finder.find(666) == (1, False)
    assert finder.offset(HEUN[2:]) == 2
    assert finder.offset(HEUN) == 0
    assert finder.offset(HEUN[3:5]) == 3


def test_every_deterministic_scheduler_is_followed_over_two_runs():
    """The tables of real schedulers, whatever timesteps they repeat."""
    for name in ("PNDM", "HeunDiscrete", "KDPM2Discrete", "DPMSolverSinglestep", "FlowMatchHeunDiscrete"):
        scheduler = getattr(diffusers, f"{name}Scheduler")()
        for steps in (4, 20, 50):
            table = sampler_table(scheduler, steps)
            finder = StepFinder(table)
            found = [finder.find(t)[0] for t in [*table.timesteps, *table.timesteps]]
            assert found == [*range(table.num_steps)] * 2, f"{name}, {steps} steps"
