"""The multistep samplers' extrapolation: a Gaussian far from both ends of the grid keeps its spread, at any step length."""

from __future__ import annotations

import math

import pytest
import torch

from diffinv.priors.analytic import GaussianPrior
from diffinv.samplers import ode, sde
from diffinv.samplers.base import Sampler
from diffinv.schedules import Karras, LogUniform, Schedule
from tests.probe import probe_sampler

STDS = torch.tensor([0.3, 0.8, 1.0, 2.5], dtype=torch.float64)


def spread(sampler: Sampler, schedule: Schedule, steps: int) -> float:
    """Largest |std ratio − 1| over directions of different spread, exact."""
    shape = (1, 1, len(STDS))
    target = GaussianPrior(torch.zeros(1, *shape, dtype=torch.float64), torch.diag(STDS**2))
    covariance = probe_sampler(sampler, target, schedule.grid(steps), shape)[1]
    return float((covariance.diagonal().sqrt() / STDS - 1).abs().max())


def log_steps(h: float) -> int:
    return 1 + math.ceil(math.log(1e7) / h)


WIDE = LogUniform(1e-3, 1e4)


@pytest.mark.parametrize(("h", "bound"), [(0.2, 2e-4), (0.4, 5e-4), (0.7, 3.5e-3), (1.0, 4e-3)])
def test_the_stochastic_slope_keeps_the_spread(h: float, bound: float) -> None:
    assert spread(sde.StochasticMultistep(), WIDE, log_steps(h)) < bound


@pytest.mark.parametrize(("h", "bound"), [(0.2, 2e-4), (0.4, 3e-4), (0.7, 8e-4), (1.0, 1e-3)])
def test_the_slope_of_the_flow_keeps_the_spread(h: float, bound: float) -> None:
    assert spread(ode.Multistep(), WIDE, log_steps(h)) < bound


def test_the_textbook_slope_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    half = lambda now, after, before: 0.5 * torch.log(now / after) / torch.log(before / now)
    monkeypatch.setattr(sde, "stochastic_slope", half)
    assert spread(sde.StochasticMultistep(), WIDE, log_steps(0.4)) > 0.02


def test_steps_of_changing_length_keep_the_spread_to_two_percent() -> None:
    assert spread(sde.StochasticMultistep(), Karras(1e-3, 80.0), 36) < 0.02
