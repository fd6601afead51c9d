"""Noise levels: grids and training distributions."""

from __future__ import annotations

import math

import pytest
import torch

from diffinv.core.checks import DiffinvError
from diffinv.core.rng import Rng
from diffinv.schedules import Karras, LogNormal, LogUniform, Schedule

SCHEDULES = [Karras(0.01, 20.0), Karras(0.1, 5.0, rho=3.0), LogUniform(0.01, 20.0), LogNormal(-1.2, 1.2)]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 17])
def test_a_grid_decreases_to_zero_in_float64(schedule: Schedule, steps: int) -> None:
    grid = schedule.grid(steps)
    assert grid.shape == (steps + 1,)
    assert grid.dtype == torch.float64
    assert bool((grid.diff() < 0).all())
    assert float(grid[-1]) == 0


def test_the_karras_grid_is_equation_five() -> None:
    low, high, rho, steps = 0.002, 80.0, 7.0, 18
    expected = [(high ** (1 / rho) + i / (steps - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho for i in range(steps)]
    torch.testing.assert_close(
        Karras(low, high).grid(steps)[:-1], torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0
    )


def test_the_log_uniform_grid_is_geometric() -> None:
    ratios = LogUniform(0.01, 20.0).grid(9)[1:-1] / LogUniform(0.01, 20.0).grid(9)[:-2]
    torch.testing.assert_close(ratios, torch.full((8,), (0.01 / 20) ** (1 / 8), dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("schedule", [Karras(0.01, 20.0), LogUniform(0.01, 20.0)])
def test_draws_stay_within_the_range_of_the_grid(schedule: Schedule) -> None:
    draws = schedule.draw(Rng.for_draws(0, [0], 5000), 5000)
    assert draws.shape == (5000,)
    assert 0.01 <= float(draws.min()) < float(draws.max()) <= 20.0


def test_log_normal_draws_have_the_declared_moments() -> None:
    count = 20000
    logs = LogNormal(-1.2, 1.2).draw(Rng.for_draws(0, [0], count), count).log()
    assert abs(float(logs.mean()) + 1.2) <= 4.5 * 1.2 / math.sqrt(count)
    assert abs(float(logs.var()) - 1.44) <= 4.5 * 1.44 * math.sqrt(2 / count)


def test_log_uniform_draws_are_uniform_in_the_logarithm() -> None:
    count = 20000
    u = LogUniform(0.1, 10.0).draw(Rng.for_draws(1, [0], count), count).log() / math.log(10)
    assert abs(float(u.mean())) <= 4.5 / math.sqrt(3 * count)
    assert abs(float((u**2).mean()) - 1 / 3) <= 4.5 * math.sqrt(4 / 45 / count)


def test_a_draw_does_not_depend_on_its_batch_mates() -> None:
    rng = Rng.for_draws(0, [5, 6, 7], 1)
    whole = Karras(0.01, 20.0).draw(rng.select(slice(None)), 3)
    assert torch.equal(whole[1:2], Karras(0.01, 20.0).draw(rng.select(slice(1, 2)), 1))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Karras(2.0, 1.0),
        lambda: Karras(0.0, 1.0),
        lambda: Karras(0.1, math.inf),
        lambda: Karras(0.1, 1.0, rho=0.0),
        lambda: LogUniform(-1.0, 1.0),
        lambda: LogNormal(0.0, 0.0),
        lambda: Karras(0.1, 1.0).grid(0),
    ],
)
def test_an_impossible_schedule_is_refused_in_one_line(make) -> None:
    with pytest.raises(DiffinvError) as error:
        make()
    assert "\n" not in str(error.value)
