"""Quantiles from few draws: where they are read, and what they cover."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from diffinv.core.checks import DiffinvError
from diffinv.core.rng import Rng
from diffinv.uncertainty.quantiles import fewest_draws, quantile

TRIALS = 40000
Z = 4.5


def uniform(*shape: int) -> Tensor:
    return Rng.for_draws(0, [0], shape[0]).uniform(torch.zeros(shape, dtype=torch.float64))


def order_statistics(draws: int) -> Tensor:
    """1 … M, shuffled: a quantile is then the position itself."""
    return (1 + (torch.arange(draws, dtype=torch.float64) * 7) % draws)[None]


@pytest.mark.parametrize(
    ("draws", "p", "position"),
    [(19, 0.05, 1), (19, 0.95, 19), (39, 0.05, 2), (32, 0.5, 16.5), (31, 0.5, 16), (24, 0.1, 2.5), (99, 0.9, 90), (1, 0.5, 1)],
)
def test_a_quantile_is_read_at_m_plus_one_times_p(draws: int, p: float, position: float) -> None:
    assert float(quantile(order_statistics(draws), p)) == pytest.approx(position, abs=1e-9)


def coverage_z(method, draws: int, p: float) -> float:
    """z-score of how often a new draw lies below the quantile of M others, in 40,000 trials; exact for uniform draws."""
    u = uniform(TRIALS, draws + 1)
    below = (u[:, -1] <= method(u[:, :-1], p)).double()
    return float(below.mean() - p) / math.sqrt(p * (1 - p) / TRIALS)


@pytest.mark.parametrize(("draws", "p"), [(19, 0.05), (19, 0.95), (32, 0.05), (32, 0.95), (32, 0.5), (24, 0.9), (9, 0.1)])
def test_a_new_draw_lies_below_the_quantile_with_its_probability(draws: int, p: float) -> None:
    assert abs(coverage_z(quantile, draws, p)) < Z


def test_plain_interpolation_fails_the_same_test() -> None:
    """torch.quantile reads at (M − 1)p + 1."""
    assert coverage_z(lambda u, p: torch.quantile(u, p, dim=1), 19, 0.95) < -Z
    assert coverage_z(lambda u, p: torch.quantile(u, p, dim=1), 19, 0.05) > Z


def test_a_ninety_percent_interval_of_normals_covers_ninety_percent() -> None:
    """At integer positions (19 draws) this holds for any distribution, without interpolation."""
    z = Rng.for_draws(1, [0], TRIALS).normal(torch.zeros(TRIALS, 20, dtype=torch.float64)).exp()
    draws, new = z[:, :-1], z[:, -1]
    inside = ((new >= quantile(draws, 0.05)) & (new <= quantile(draws, 0.95))).double()
    assert abs(float(inside.mean()) - 0.9) < Z * math.sqrt(0.09 / TRIALS)


@pytest.mark.parametrize(("p", "fewest"), [(0.05, 19), (0.95, 19), (0.025, 39), (0.975, 39), (0.1, 9), (0.5, 1), (0.01, 99)])
def test_fewest_draws(p: float, fewest: int) -> None:
    assert fewest_draws(p) == fewest
    quantile(uniform(2, fewest), p)
    if fewest > 1:
        with pytest.raises(DiffinvError, match=f"at least {fewest}"):
            quantile(uniform(2, fewest - 1), p)


@pytest.mark.parametrize("p", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_a_probability_outside_zero_one_is_refused(p: float) -> None:
    with pytest.raises(DiffinvError, match="inside"):
        quantile(uniform(2, 30), p)


def test_quantiles_work_along_any_axis_and_keep_the_dtype() -> None:
    samples = uniform(3, 20, 2, 4).float()
    got = quantile(samples, 0.3)
    assert got.shape == (3, 2, 4) and got.dtype == torch.float32
    assert torch.equal(quantile(samples.movedim(1, 0), 0.3, dim=0), got)
    assert torch.equal(quantile(samples.flip(1), 0.3), got)


def test_quantiles_rise_with_p_and_stay_within_the_draws() -> None:
    samples = uniform(5, 40)
    values = torch.stack([quantile(samples, p) for p in (0.025, 0.1, 0.33, 0.5, 0.9, 0.975)])
    assert bool((values.diff(dim=0) > 0).all())
    assert bool((values[0] >= samples.amin(1)).all() and (values[-1] <= samples.amax(1)).all())
