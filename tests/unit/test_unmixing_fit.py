"""Fits of pixels and of maps, against closed forms and simulations."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diffinv.core.checks import DiffinvError
from diffinv.core.rng import Rng
from diffinv.noise.gaussian import Gaussian
from diffinv.noise.poisson import Poisson
from diffinv.spectral.base import Grid, Parameter
from diffinv.spectral.combine import UserModel
from diffinv.unmixing.maps import MapPlan, Splitting, fit_map_at, risks
from diffinv.unmixing.mixture import Component, Coordinates, Mixture, SpectralData
from diffinv.unmixing.pixels import (
    EXTRAPOLATED,
    NODATA,
    PixelPlan,
    Quadratic,
    fit_pixels,
    normal_equations,
    pooled,
    quadratic,
    start_amplitude,
)
from diffinv.unmixing.starlet import Starlet, mirror, torus

F64 = torch.float64
CHANNELS = 24
GRID = Grid.of(torch.linspace(1.0, 4.0, CHANNELS + 1, dtype=F64).tolist())


def line(theta: Tensor) -> Tensor:
    """A line of width 0.3 at `centre` on a continuum exp(−E/T), sum 1."""
    temperature, centre = theta.unbind(1)
    energy = GRID.middle
    values = torch.exp(-energy / temperature[:, None]) + 0.5 * torch.exp(-(((energy - centre[:, None]) / 0.3) ** 2) / 2)
    return values / values.sum(1, keepdim=True)


def slope(theta: Tensor) -> Tensor:
    values = GRID.middle**-theta
    return values / values.sum(1, keepdim=True)


LINE = UserModel(GRID, (Parameter("T", "keV", 0.3, 3.0), Parameter("centre", "keV", 1.5, 3.5)), line)
SLOPE = UserModel(GRID, (Parameter("Gamma", "", 0.0, 4.0),), slope)
HOT = Mixture((Component("hot", LINE, ("T",)),))
BOTH = Mixture((Component("hot", LINE, ("T",)), Component("cold", SLOPE)))


def counts(mixture: Mixture, amplitude: Tensor, u: Tensor, seed: int = 0, background: float = 0.0) -> SpectralData:
    floor = torch.full((1, CHANNELS), background, dtype=F64)
    noise = Poisson(torch.ones(1, dtype=F64), torch.zeros(1, dtype=F64), floor=1e-9)
    mean = mixture.mean(amplitude, u, floor)
    return SpectralData(noise.sample(mean, Rng.for_draws(seed, range(len(u)), 1)), noise, floor)


def spread(count: int, seed: int = 1) -> Tensor:
    return 0.3 + 0.4 * Rng.for_draws(seed, range(count), 1).uniform(torch.empty(count, 2, dtype=F64))


def full(value: float, count: int, columns: int = 1) -> Tensor:
    return torch.full((count, columns), value, dtype=F64)


@pytest.mark.parametrize("extend", [mirror, torus])
@pytest.mark.parametrize("size", [(24, 18), (7, 5)])
def test_starlet_is_exact_its_adjoint_its_transpose_and_its_energy_the_variance_of_its_noise(extend, size) -> None:
    transform = Starlet(3, True, extend)
    x = Rng.for_draws(0, range(2), 1).normal(torch.empty(2, 1, *size, dtype=F64))
    u = Rng.for_draws(1, range(2), 1).normal(transform.forward(x))
    torch.testing.assert_close(transform.forward(x).sum(1, keepdim=True), x, rtol=0, atol=1e-14)
    torch.testing.assert_close((transform.forward(x) * u).sum(), (x * transform.adjoint(u)).sum(), rtol=1e-12, atol=1e-12)


def test_starlet_energy_is_the_variance_of_details_of_independent_noise() -> None:
    size, place = 48, 24
    variance = 1 + torch.arange(size * size, dtype=F64).reshape(1, 1, size, size) / size**2
    eye = torch.eye(size * size, dtype=F64).reshape(-1, 1, size, size)
    rows = Starlet(2).forward(eye)[:, :, place, place]  # of Φ, for the details at one pixel
    expected = (rows**2 * variance.flatten()[:, None]).sum(0)
    torch.testing.assert_close(Starlet(2).energy(variance)[0, :, place, place], expected, rtol=1e-10, atol=0)


def test_coordinates_go_there_and_back_and_refuse_a_logarithm_of_zero() -> None:
    axes, u = HOT.coordinates, spread(5)
    theta = axes.physical(u)
    torch.testing.assert_close(axes.unit(theta), u)
    torch.testing.assert_close(theta[:, 0], 0.3 * 10 ** u[:, 0])
    torch.testing.assert_close(theta[:, 1], 1.5 + 2 * u[:, 1])
    with pytest.raises(DiffinvError, match="starts at 0"):
        Coordinates(SLOPE.own, ("Gamma",))


def test_linearisation_is_the_derivative_and_links_make_one_column() -> None:
    linked = Mixture((Component("a", LINE), Component("b", LINE)), (("a.centre", "b.centre"),))
    assert linked.names == ("a.T", "a.centre", "b.T")
    amplitude, u = (
        torch.tensor([[30.0, 50.0], [5.0, 1.0]], dtype=F64),
        torch.tensor([[0.3, 0.5, 0.8], [0.1, 0.2, 0.9]], dtype=F64),
    )
    floor = full(0.1, 1, CHANNELS)
    mean, jacobian = linked.linearise(amplitude, u, floor)
    torch.testing.assert_close(mean, linked.mean(amplitude, u, floor))
    for k in range(5):
        kick = torch.zeros(2, 5, dtype=F64)
        kick[:, k] = 1e-5
        ends = [linked.mean(amplitude + s * kick[:, :2], u + s * kick[:, 2:], floor) for s in (1, -1)]
        torch.testing.assert_close((ends[0] - ends[1]) / 2e-5, jacobian[..., k], rtol=1e-6, atol=1e-6)


def test_a_link_of_different_boxes_is_refused() -> None:
    with pytest.raises(DiffinvError, match=r"hot.T and cold.Gamma differ"):
        replace(BOTH, links=(("hot.T", "cold.Gamma"),))


def test_a_parameter_in_two_groups_is_refused() -> None:
    three = Mixture((*BOTH.components, Component("third", SLOPE), Component("fourth", SLOPE)))
    with pytest.raises(DiffinvError, match="links: third.Gamma in more than one group; join the groups"):
        replace(three, links=(("cold.Gamma", "third.Gamma"), ("third.Gamma", "fourth.Gamma")))


def test_starting_amplitudes_are_equal_shares_of_the_counts_whatever_the_unit() -> None:
    amplitude, u = full(500.0, 20, 2), torch.full((20, 3), 0.5, dtype=F64)
    data, shapes = counts(BOTH, amplitude, u), torch.stack(BOTH.shapes(u), 1)
    unit = torch.tensor([1e6, 1.0], dtype=F64)
    one, other = (start_amplitude(data, s) for s in (shapes, shapes * unit[:, None]))
    torch.testing.assert_close(other * unit, one)
    assert float((one / one.sum(1, keepdim=True)).min()) > 0.2


def test_score_has_mean_zero_and_the_variance_of_fisher() -> None:
    count = 4000
    amplitude, u = full(60.0, count), spread(1).expand(count, 2)
    data = counts(HOT, amplitude, u)
    _, gradient, fisher = normal_equations(HOT, data, amplitude, u)
    standard = gradient.mean(0) / (fisher[0].diagonal() / count).sqrt()
    assert float(standard.abs().max()) < 4
    root = torch.linalg.cholesky(torch.linalg.inv(fisher[0]))
    white = gradient @ root
    torch.testing.assert_close(white.mT @ white / count, torch.eye(3, dtype=F64), rtol=0, atol=5 * math.sqrt(2 / count))


def test_pixels_reach_the_bound_of_cramer_and_rao() -> None:
    """At 2,000 counts maximum likelihood is efficient: mean of the squared standardised error 1 ± 4 σ, without bias."""
    count = 400
    amplitude, u = full(2000.0, count), spread(count)
    data = counts(HOT, amplitude, u)
    fit = fit_pixels(HOT, data)
    assert not bool(fit.flags.any())
    step = quadratic(HOT, data, amplitude, u)
    error = fit.u - u
    chi2 = (error[:, None] @ step.fisher @ error[..., None]).flatten()
    assert abs(float(chi2.mean()) / 2 - 1) < 4 / math.sqrt(count) + 0.05
    _, gradient, _ = normal_equations(HOT, data, fit.amplitude, fit.u)
    assert float((gradient[:, 1:].abs() / step.fisher.diagonal(dim1=1, dim2=2).sqrt()).max()) < 1e-2
    alone = fit_pixels(HOT, data.select([7]))
    torch.testing.assert_close(alone.u[0], fit.u[7], rtol=1e-9, atol=1e-9)


def test_two_components_background_and_masked_channels() -> None:
    """Twice the likelihood ratio to the truth is χ² of the five parameters (Wilks)."""
    count = 100
    amplitude = torch.tensor([[2e5, 1e5]], dtype=F64).expand(count, 2)
    u = torch.cat([spread(count), full(0.6, count)], 1)
    data = counts(BOTH, amplitude, u, background=5.0)
    mask = torch.ones(count, CHANNELS, dtype=torch.bool)
    mask[:, 3] = False
    broken = replace(data, y=data.y.where(mask, torch.nan), noise=replace(data.noise, mask=mask))
    fit = fit_pixels(BOTH, broken, PixelPlan(starts=(0.25, 0.75)))
    assert int((fit.flags == 0).sum()) > 0.9 * count
    ratio = 2 * (broken.loss(BOTH.mean(amplitude, u, broken.background)) - fit.loss)[fit.flags == 0]
    assert float(ratio.mean()) == pytest.approx(5, abs=4 * math.sqrt(2 * 5 / count))


def test_gaussian_errors_give_weighted_least_squares() -> None:
    """Of a model that is linear in its amplitudes at fixed parameters: A = (SᵀWS)⁻¹SᵀWy."""
    still = Mixture((Component("a", UserModel(GRID, (), lambda t: line(t.new_tensor([[1.0, 2.0]]).expand(len(t), 2)))),
                     Component("b", UserModel(GRID, (), lambda t: slope(t.new_tensor([[2.0]]).expand(len(t), 1))))))  # fmt: skip
    std = torch.linspace(0.5, 2, CHANNELS, dtype=F64)[None]
    y = 10 + Rng.for_draws(0, range(6), 1).normal(torch.empty(6, CHANNELS, dtype=F64))
    fit = fit_pixels(still, SpectralData(y, Gaussian(std), full(0.0, 1, CHANNELS)))
    shapes = torch.stack(still.shapes(y.new_zeros(1, 0)), -1)[0]
    expected = torch.linalg.lstsq(shapes / std.T, (y / std).T).solution.T
    assert bool((expected > 0).all())
    torch.testing.assert_close(fit.amplitude, expected, rtol=1e-6, atol=1e-6)


def test_a_fit_that_ends_at_the_box_is_flagged_and_an_empty_pixel_has_no_data() -> None:
    amplitude, u = full(5000.0, 3), torch.tensor([[0.5, 0.5], [0.5, 1.1], [0.5, 0.5]], dtype=F64)
    data = counts(HOT, amplitude, u)
    y = data.y.clone()
    y[2] = 0
    fit = fit_pixels(HOT, replace(data, y=y))
    assert fit.flags.tolist() == [0, EXTRAPOLATED, NODATA]
    assert float(fit.u[1, 1]) == 1.0


def test_amplitudes_are_eliminated_by_the_schur_complement() -> None:
    amplitude, u = torch.tensor([[80.0, 40.0]], dtype=F64), torch.tensor([[0.4, 0.5, 0.3]], dtype=F64)
    data = counts(BOTH, amplitude, u)
    _, gradient, fisher = normal_equations(BOTH, data, amplitude, u)
    step = quadratic(BOTH, data, amplitude, u)
    both = torch.linalg.solve(fisher[0], gradient[0])
    torch.testing.assert_close(torch.linalg.solve(step.fisher[0], step.score[0]), both[2:], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(step.step[0] - step.slope[0] @ both[2:], both[:2], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(torch.linalg.inv(step.fisher[0]), torch.linalg.inv(fisher[0])[2:, 2:], rtol=1e-6, atol=1e-9)


def test_pooling_adds_counts_and_keeps_bad_pixels_out() -> None:
    data = counts(HOT, full(50.0, 20), spread(20), background=0.5)
    mask = torch.ones(20, CHANNELS, dtype=torch.bool)
    mask[0] = False
    mask[7, 2] = False
    mask[[2, 3, 7], 4] = False
    broken = replace(data, y=data.y.where(mask, torch.nan), noise=replace(data.noise, mask=mask))
    pool = pooled(broken, (4, 5), 2)
    assert len(pool.y) == 6
    torch.testing.assert_close(pool.y[0, 3], data.y[[1, 5, 6], 3].sum())
    torch.testing.assert_close(pool.background[0], full(1.5, 1, CHANNELS)[0])
    torch.testing.assert_close(pool.y[1, 2], 4 / 3 * data.y[[2, 3, 8], 2].sum())
    assert not bool(pool.good[1, 4]) and bool(pool.good[1, 2]) and bool(pool.good[0].all())


def quadratic_problem() -> tuple[Splitting, Tensor, Tensor]:
    """A map of two parameters with correlated, uneven information: splitting, truth (N, 2) and F."""
    side = 12
    rows = torch.arange(side, dtype=F64)
    truth = torch.stack([(rows[:, None] > 5).expand(side, side).double(), (rows / side)[None].expand(side, side)], -1).reshape(
        -1, 2
    )
    root = Rng.for_draws(5, range(side**2), 1).normal(torch.empty(side**2, 2, 2, dtype=F64)) * 6
    fisher = root @ root.mT + 4 * torch.eye(2, dtype=F64)
    return Splitting(Starlet(2), (side, side), fisher), truth, fisher


def test_the_splitting_finds_the_minimum() -> None:
    split, truth, fisher = quadratic_problem()
    q = (fisher @ truth[..., None])[..., 0] + Rng.for_draws(1, [0], 1).normal(truth[None])[0]
    weights = split.weights()
    cost = lambda u: float(0.5 * (u[:, None] @ fisher @ u[..., None]).sum() - (q * u).sum() + split.penalty(u, weights))
    start = (truth[None], split.zeros(1))
    best = split.solve(q[None], weights, start, 3000)[0][0]
    tries = [best + 1e-3 * Rng.for_draws(k, [0], 1).normal(truth[None])[0] for k in range(20)]
    assert all(cost(u) > cost(best) for u in tries)
    assert cost(split.solve(q[None], weights, start, 10)[0][0]) > cost(best)
    free = split.solve(q[None], 0 * weights, start, 2000)[0][0]
    torch.testing.assert_close(free, torch.linalg.solve(fisher, q[..., None])[..., 0], rtol=1e-6, atol=1e-8)


def test_steins_estimate_is_unbiased_for_the_error() -> None:
    """Mean over 24 data sets of estimate − error within 4 standard errors of zero, at two κ."""
    split, truth, fisher = quadratic_problem()
    plan = MapPlan(iterations=60, kappas=(0.5, 2.0), probes=1)
    root = torch.linalg.cholesky(fisher)
    gaps = []
    for seed in range(24):
        score = (root @ Rng.for_draws(seed, [0], 1).normal(truth[None])[0][..., None])[..., 0]
        step = Quadratic(score, fisher, truth, truth[..., None], fisher)
        q = score + (fisher @ truth[..., None])[..., 0]
        estimate = risks(split, step, truth, replace(plan, seed=1000 + seed))
        state = (truth[None], split.zeros(1))
        row = []
        for kappa, value in zip(plan.kappas, estimate, strict=True):
            state = split.solve(q[None], kappa * split.weights(), state, plan.iterations)
            error = state[0][0] - truth
            row.append(value - float((error[:, None] @ fisher @ error[..., None]).sum()))
        gaps.append(row)
    gaps = torch.tensor(gaps)
    z = gaps.mean(0) / (gaps.std(0) / math.sqrt(len(gaps)))
    assert float(z.abs().max()) < 4
    assert float(gaps.mean(0).abs().max()) < 0.15 * 2 * truth.shape[0]


def test_a_map_is_nearer_to_a_smooth_truth_than_pixels_and_kappa_zero_is_the_pixels() -> None:
    side = 12
    ramp = torch.linspace(0.35, 0.65, side, dtype=F64)
    u = torch.stack([ramp[:, None].expand(side, side), ramp[None].expand(side, side)], -1).reshape(-1, 2)
    data = counts(HOT, full(300.0, side**2), u)
    pixels = fit_pixels(HOT, data)
    plan = MapPlan(scales=2, rounds=12)
    free = fit_map_at(HOT, data, (side, side), (pixels.amplitude, pixels.u), 0.0, plan)
    torch.testing.assert_close(free.u, pixels.u, rtol=0, atol=2e-3)
    smooth = fit_map_at(HOT, data, (side, side), (pixels.amplitude, pixels.u), 2.0, plan)
    errors = [(fit.u - u).pow(2).mean(0).sqrt() for fit in (pixels, smooth)]
    assert bool((errors[1] < 0.6 * errors[0]).all())
