"""PALM on barycentric weights: projections, thresholds, and maps without the finest noise."""

from __future__ import annotations

import torch

from diffinv.core.rng import Rng
from diffinv.unmixing.starlet import Starlet
from diffinv.unmixing.sushi import SushiPlan, palm, project, thresholds
from tests.unit.test_unmixing_fit import CHANNELS, F64, LINE, counts, full
from tests.unit.test_unmixing_fit import HOT as MIXTURE

SIDE = 12
ANCHORS = LINE(torch.tensor([[0.4, 2.5], [3.0, 2.5], [1.0, 1.6]], dtype=F64))


def decode(weights: torch.Tensor) -> torch.Tensor:
    """Linear mixing of three spectra, kept positive."""
    return (weights @ ANCHORS).clamp_min(1e-6)


def test_projection_is_the_nearest_point_of_the_plane() -> None:
    weights = Rng([0]).normal(torch.empty(1, 5, 3, dtype=F64))[0]
    found = project(weights)
    torch.testing.assert_close(found.sum(1), torch.ones(5, dtype=F64))
    move = found - weights
    torch.testing.assert_close(move, move.mean(1, keepdim=True).expand_as(move))


def test_thresholds_are_the_noise_of_the_details() -> None:
    """Of white noise of σ = 3: k σ √(Σ ψ_j²), to 10 %."""
    transform = Starlet(2)
    noise = 3 * Rng([1]).normal(torch.empty(1, 1, 64, 64, dtype=F64))
    expected = 2 * 3 * transform.energy(torch.ones(1, 1, 64, 64, dtype=F64))[..., 32, 32].sqrt()
    torch.testing.assert_close(thresholds(transform, noise, 2.0)[..., 0, 0], expected, rtol=0.1, atol=0)


def test_maps_keep_their_constraints_descend_and_lose_their_finest_noise() -> None:
    ramp = torch.linspace(0.1, 0.7, SIDE, dtype=F64)[:, None].expand(SIDE, SIDE).flatten()
    truth = torch.stack([ramp, 0.8 - ramp, torch.full_like(ramp, 0.2)], 1)
    data = counts(MIXTURE, full(1.0, SIDE**2), torch.full((SIDE**2, 2), 0.5, dtype=F64))
    rates = 500 * decode(truth)
    y = data.noise.sample(rates, Rng.for_draws(3, range(SIDE**2), 1))
    noisy = type(data)(y, data.noise, torch.zeros(1, CHANNELS, dtype=F64))
    start = (torch.full((SIDE**2, 3), 1 / 3, dtype=F64), y.sum(1))
    free, sparse = (palm([decode], noisy, (SIDE, SIDE), [start], SushiPlan(k, 2, 25)) for k in (0.0, 3.0))
    torch.testing.assert_close(sparse.weights[0].sum(1), torch.ones(SIDE**2, dtype=F64))
    assert bool((sparse.amplitude >= 0).all())
    assert all(b <= a + 1e-6 * abs(a) for a, b in zip(free.loss, free.loss[1:], strict=False))
    details = [Starlet(1).forward(found.weights[0].T.reshape(3, 1, SIDE, SIDE)).pow(2).mean() for found in (free, sparse)]
    assert float(details[1]) < 0.25 * float(details[0])
    assert float((sparse.weights[0] - truth).pow(2).mean()) < float((start[0] - truth).pow(2).mean())


def test_two_components_share_the_light_as_the_truth_does() -> None:
    """A second component of two spectra that differ from the first's: both amplitudes to a few times their noise."""
    others = torch.stack([torch.linspace(1, 3, CHANNELS, dtype=F64), torch.linspace(3, 1, CHANNELS, dtype=F64)]) / (2 * CHANNELS)
    second = lambda weights: (weights @ others).clamp_min(1e-6)
    count = SIDE**2
    column = torch.linspace(0.2, 0.8, SIDE, dtype=F64).expand(SIDE, SIDE).flatten()
    first_weights = torch.tensor([[0.5, 0.3, 0.2]], dtype=F64).repeat(count, 1)
    bright, faint = 4000 + 2000 * column, 5000 - 2000 * column
    shapes = decode(first_weights), second(torch.stack([column, 1 - column], 1))
    mean = bright[:, None] * shapes[0] + faint[:, None] * shapes[1]
    data = counts(MIXTURE, full(1.0, count), torch.full((count, 2), 0.5, dtype=F64))
    y = data.noise.sample(mean, Rng.for_draws(4, range(count), 1))
    noisy = type(data)(y, data.noise, torch.zeros(1, CHANNELS, dtype=F64))
    even = torch.full((count, 2), 0.5, dtype=F64)
    half = y.sum(1) / 2
    start = [(first_weights, half / shapes[0].sum(1)), (even, half / second(even).sum(1))]
    found = palm([decode, second], noisy, (SIDE, SIDE), start, SushiPlan(1.0, 2, 60))
    assert found.amplitude.shape == (count, 2)
    assert all(b <= a + 1e-4 * abs(a) for a, b in zip(found.loss, found.loss[1:], strict=False))
    assert float(((found.amplitude[:, 0] - bright) / bright).pow(2).mean().sqrt()) < 0.15
    assert float(((found.amplitude[:, 1] - faint) / faint).pow(2).mean().sqrt()) < 0.15
    worse = ((start[0][1] - bright) / bright).pow(2).mean().sqrt()
    assert float(((found.amplitude[:, 0] - bright) / bright).pow(2).mean().sqrt()) < float(worse)
