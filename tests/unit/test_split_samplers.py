"""Split, Langevin, corrected and churned samplers against closed forms; no Monte Carlo where the problem is Gaussian."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from diffinv.core.rng import Rng
from diffinv.guidance.base import Gmres
from diffinv.likelihood import Joint, Likelihood, Observation
from diffinv.noise.gaussian import Gaussian
from diffinv.noise.photon import PoissonGaussian
from diffinv.noise.poisson import Poisson
from diffinv.operators.adapters import CallableOperator, LinearCallable
from diffinv.posterior import Posterior
from diffinv.priors.base import Denoiser
from diffinv.samplers.base import Sampler, State, sample
from diffinv.samplers.daps import Daps
from diffinv.samplers.daps_matched import DapsMatched
from diffinv.samplers.half_step import HalfStep
from diffinv.samplers.langevin import Langevin, LangevinState, PnpUla
from diffinv.samplers.ode import Euler
from diffinv.samplers.sde import StochasticMultistep
from diffinv.samplers.split import Descent
from diffinv.samplers.split_gibbs import SplitGibbs
from diffinv.schedules import LogUniform
from tests.cases.guidance import CASES as GUIDANCES
from tests.cases.guidance import DATA, SHAPE, SIZE, smooth_prior
from tests.cases.operators import draw
from tests.contracts.checks import close
from tests.contracts.test_samplers import exact_posterior
from tests.probe import ProbeRng, probe

EXACT = HalfStep(iterations=60, tol=1e-13)
EYE = torch.eye(SIZE, dtype=torch.float64)
Map = Callable[[Tensor, ProbeRng], Tensor]


def level(value: float, like: Tensor) -> Tensor:
    return torch.full((like.shape[0],), value, dtype=torch.float64)


def target_of(likelihood: Likelihood, prior: Denoiser | None = None) -> Posterior:
    return Posterior(prior or smooth_prior(), likelihood, GUIDANCES["moment_matching"]().guidance)


def blurred() -> tuple[Posterior, Tensor, Tensor]:
    """Target of one image, with its F and F-weighted data h = Aᵀ Σ⁻¹ y, dense and without any adjoint."""
    data = DATA["blur"]()
    return target_of(data.likelihood.select([0])), *data.information(0)


def moved(sampler: Sampler, target: Denoiser, sigma: float, sigma_next: float) -> Map:
    """One step from the state x that is given."""
    bound = langevin_bound(target) if isinstance(sampler, Langevin) else None

    def run(x: Tensor, rng: ProbeRng) -> Tensor:
        state = State(x) if bound is None else LangevinState(x, bound=bound.expand(len(x)))
        return sampler.step(target, state, level(sigma, x), level(sigma_next, x), rng).x

    return run


def langevin_bound(target: Posterior) -> Tensor:
    like = torch.zeros(1, *SHAPE, dtype=torch.float64)
    return PnpUla().init(target, like, level(1.0, like), Rng.for_draws(0, [0], 1)).bound


def affine(run: Map) -> tuple[Tensor, Tensor, Tensor]:
    """x' = a + B x + noise of covariance Q of an affine step, from unit vectors: a (n,), B (n, n), Q (n, n)."""
    silent = ProbeRng({}, recording=True)
    a = run(torch.zeros(1, *SHAPE, dtype=torch.float64), silent).flatten()
    matrix = (run(EYE.reshape(-1, *SHAPE), ProbeRng({}, recording=True)).flatten(1) - a).T
    return a, matrix, probe(run, SHAPE)[1]


def stationary(run: Map) -> tuple[Tensor, Tensor]:
    """Mean and covariance that the step leaves alone: m = a + B m, S = B S Bᵀ + Q by doubling."""
    a, power, total = affine(run)
    mean = torch.linalg.solve(EYE - power, a)
    for _ in range(40):
        total, power = total + power @ total @ power.T, power @ power
    return mean, total


# The half-step.


def half_step_moments(half_step: HalfStep, name: str, rho: float) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Mean and covariance found by probing, and P⁻¹ (h + c/ρ²), P⁻¹ with P = F + I/ρ²."""
    likelihood, (fisher, pull) = DATA[name]().likelihood.select([0]), DATA[name]().information(0)
    centre = draw(1, *SHAPE, seed=3)
    run = lambda like, rng: half_step(likelihood, centre + like, level(rho, like), rng).image
    covariance = torch.linalg.inv(fisher + EYE / rho**2)
    return probe(run, SHAPE), (covariance @ (pull + centre.flatten() / rho**2), covariance)


@pytest.mark.parametrize("rho", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("name", DATA)
def test_the_half_step_of_gaussian_data_has_the_exact_mean_and_covariance(name: str, rho: float) -> None:
    found, exact = half_step_moments(EXACT, name, rho)
    close(found[0], exact[0], 1e-9)
    close(found[1], exact[1], 1e-9)


def test_a_truncated_or_detuned_half_step_is_seen() -> None:
    found, exact = half_step_moments(HalfStep(iterations=2, tol=0.0), "blur", 1.0)
    with pytest.raises(AssertionError):
        close(found[1], exact[1], 1e-2)
    with pytest.raises(AssertionError):
        close(half_step_moments(EXACT, "blur", 1.1)[0][1], exact[1], 1e-2)


def test_the_residual_says_whether_the_half_step_converged() -> None:
    likelihood, centre = DATA["blur"]().likelihood, draw(2, *SHAPE, seed=3)
    residual = lambda h: h(likelihood, centre, level(5.0, centre), Rng.for_draws(0, [0, 1], 1)).residual
    assert float(residual(HalfStep(iterations=60, tol=1e-10)).max()) <= 1e-10
    assert float(residual(HalfStep(iterations=2, tol=1e-10)).min()) > 1e-3


MIX = torch.tensor([[0.8, 0.3], [0.2, 0.9]], dtype=torch.float64)
PAIR = (1, 1, 2)


def photons() -> Observation:
    """Three and one photon of two pixels that see both of two unknowns, over a background of one photon."""
    one = torch.ones(1, dtype=torch.float64)
    y = torch.tensor([2.0, 0.0], dtype=torch.float64).reshape(1, *PAIR)
    return Observation(y, LinearCallable(lambda x: x @ MIX, PAIR, PAIR), Poisson(one, one))


def curved() -> Observation:
    """A saturating detector with Gaussian noise."""
    y = torch.tensor([0.9, -0.4], dtype=torch.float64).reshape(1, *PAIR)
    return Observation(y, CallableOperator(lambda x: torch.asinh(2 * x @ MIX), PAIR, PAIR), Gaussian(torch.full((1,), 0.4)))


def quadrature(likelihood: Likelihood, centre: Tensor, rho: float) -> tuple[Tensor, Tensor]:
    """Powers z₀, z₁, z₀², z₀z₁, z₁², z₀³, z₁³ of p(z) on a grid of ±8ρ."""
    axis = torch.linspace(-8 * rho, 8 * rho, 1201, dtype=torch.float64)
    z = centre + torch.cartesian_prod(axis, axis).reshape(-1, *PAIR)
    log_p = likelihood.log_prob(z) - ((z - centre) ** 2).flatten(1).sum(1) / (2 * rho**2)
    return (log_p.softmax(0)[:, None] * powers(z)).sum(0)


def powers(z: Tensor) -> Tensor:
    a, b = z.flatten(1).unbind(1)
    return torch.stack([a, b, a * a, a * b, b * b, a**3, b**3], 1)


def half_step_z(half_step: HalfStep, likelihood: Likelihood, rng: type[Rng] = Rng) -> float:
    """Largest |z| of seven moments of 8,000 draws against quadrature."""
    draws, rho = 8000, 1.5
    centre = torch.tensor([0.5, -0.2], dtype=torch.float64).reshape(1, *PAIR)
    like = centre.expand(draws, *PAIR)
    values = powers(half_step(likelihood, like, level(rho, like), rng.for_draws(1, [0], draws)).image)
    error = values.mean(0) - quadrature(likelihood, centre, rho)
    return float((error / values.std(0)).abs().max()) * math.sqrt(draws)


class AlwaysAccept(Rng):
    """Uniforms that accept every proposal."""

    def uniform(self, like: Tensor) -> Tensor:
        return torch.full_like(super().uniform(like), 1e-300)


@pytest.mark.parametrize("make", [photons, curved])
def test_the_half_step_of_other_data_samples_its_density(make: Callable[[], Likelihood]) -> None:
    assert half_step_z(HalfStep(langevin=30), make()) < 4.8


@pytest.mark.parametrize("make", [photons, curved])
def test_without_steps_or_without_rejection_the_half_step_is_seen_to_be_wrong(make: Callable[[], Likelihood]) -> None:
    assert half_step_z(HalfStep(langevin=0), make()) > 8
    assert half_step_z(HalfStep(langevin=30), make(), AlwaysAccept) > 8


@dataclass(frozen=True, eq=False)
class NotTold(Observation):
    """Linear Gaussian data that do not say so."""

    @property
    def quadratic(self) -> bool:
        return False


def test_the_chain_of_the_half_step_never_rejects_for_a_gaussian() -> None:
    part = DATA["blur"]().likelihood
    hidden, centre = NotTold(part.y, part.operator, part.noise), draw(2, *SHAPE, seed=3)
    drawn = replace(EXACT, langevin=20)(hidden, centre, level(1.0, centre), Rng.for_draws(0, [0, 1], 1))
    assert torch.equal(drawn.accepted, torch.ones(2, dtype=torch.float64))


def counted() -> dict[str, Likelihood]:
    two = torch.tensor([30.0, 8.0], dtype=torch.float64)
    y, operator = DATA["blur"]().likelihood.y, DATA["blur"]().likelihood.operator
    poisson = Observation(((y + 1) * 30).round().clamp_min(0) / 30 - 1, operator, Poisson(two[:1], two / two))
    read = Observation(y, operator, PoissonGaussian(two, two / two, two / two))
    return {"poisson": poisson, "poisson_gaussian": read, "joint": Joint((poisson, DATA["blur"]().likelihood, read))}


BRIEF = HalfStep(langevin=3, newton=3)


@pytest.mark.parametrize("sampler", [SplitGibbs(half_step=BRIEF), Daps(half_step=BRIEF), DapsMatched()])
@pytest.mark.parametrize("name", counted())
def test_split_samplers_take_counting_noise_row_by_row(sampler: Sampler, name: str) -> None:
    """To the rounding of the noise's series (1e-13), amplified by ill-conditioned solves through a dozen proposals."""
    grid, like, likelihood = LogUniform(0.1, 1.0).grid(3), torch.zeros(2, *SHAPE, dtype=torch.float64), counted()[name]
    both = sample(sampler, target_of(likelihood), grid, like, Rng.for_draws(3, [7, 9], 1)).x
    assert bool(both.isfinite().all())
    alone = sample(sampler, target_of(likelihood.select([1])), grid, like[:1], Rng.for_draws(3, [9], 1)).x
    close(alone, both[1:], 1e-8)


# Split Gibbs and DAPS.


@dataclass(frozen=True)
class ExactKernel(Sampler):
    """One step to 0: a draw of p(x₀ | x_σ) = N(D, σ² C (C + σ²)⁻¹) of the smooth prior."""

    order = None

    def step(self, target: Denoiser, state: State, sigma: Tensor, sigma_next: Tensor, rng: Rng) -> State:
        prior, square = smooth_prior(), sigma[:, None] ** 2
        spread = (square * prior.eigenvalues / (prior.eigenvalues + square)).sqrt()
        z = (rng.normal(state.x).flatten(1) * spread) @ prior.eigenvectors.T
        return State(target(state.x, sigma) + z.reshape(state.x.shape))


KERNEL = Descent(ExactKernel(), levels=1)


def split_posterior(rho: float) -> tuple[Tensor, Tensor]:
    """x of π(x, z) ∝ p(x) N(x; z, ρ²) p(y | z), from the joint precision of (x, z)."""
    prior, (_, fisher, pull) = smooth_prior(), blurred()
    inverse, link = torch.linalg.inv(prior.covariance), EYE / rho**2
    joint = torch.linalg.inv(torch.cat([torch.cat([inverse + link, -link], 1), torch.cat([-link, fisher + link], 1)]))
    mean = joint @ torch.cat([inverse @ prior.mean.flatten(), pull])
    return mean[:SIZE], joint[:SIZE, :SIZE]


@pytest.mark.parametrize("rho", [0.05, 0.5])
def test_split_gibbs_leaves_the_split_posterior_alone(rho: float) -> None:
    found = stationary(moved(SplitGibbs(KERNEL, half_step=EXACT), blurred()[0], rho, 0.0))
    exact = split_posterior(rho)
    close(found[0], exact[0], 1e-8)
    close(found[1], exact[1], 1e-8)
    with pytest.raises(AssertionError):
        close(found[1], split_posterior(1.05 * rho)[1], 1e-4)


def test_split_gibbs_with_its_own_descent_is_near_it_and_more_levels_nearer() -> None:
    errors = []
    for levels in (20, 40):
        sampler = SplitGibbs(Descent(StochasticMultistep(), levels), half_step=EXACT)
        found = stationary(moved(sampler, blurred()[0], 0.3, 0.0))[1]
        errors.append(float((found - split_posterior(0.3)[1]).norm() / found.norm()))
    assert errors[0] < 0.02
    assert errors[1] < errors[0] / 3


def test_the_split_posterior_tends_to_the_posterior_as_the_square_of_rho() -> None:
    exact = exact_posterior(0).covariance
    gaps = [float((split_posterior(rho)[1] - exact).norm()) for rho in (0.02, 0.01)]
    assert gaps[0] / gaps[1] == pytest.approx(4, rel=0.05)


def test_two_sweeps_are_one_sweep_twice() -> None:
    once = affine(moved(SplitGibbs(KERNEL, half_step=EXACT), blurred()[0], 0.5, 0.0))
    twice = affine(moved(SplitGibbs(KERNEL, sweeps=2, half_step=EXACT), blurred()[0], 0.5, 0.0))
    close(twice[1], once[1] @ once[1], 1e-9)
    close(twice[2], once[2] + once[1] @ once[2] @ once[1].T, 1e-9)


def test_a_step_of_daps_is_ode_then_conditioned_gaussian_then_noise() -> None:
    target, fisher, pull = blurred()
    sigma, sigma_next, ratio, x = 0.7, 0.4, 0.5, 1 + draw(1, *SHAPE, seed=6)
    end = x
    grid = [(1 + k / 2 * (0.01 ** (1 / 7) - 1)) ** 7 * sigma for k in range(3)] + [0.0]
    for s, following in zip(grid[:-1], grid[1:], strict=True):
        end = end + (following - s) * (end - target.prior(end, level(s, end))) / s
    precision = fisher + EYE / (ratio * sigma) ** 2
    run = moved(Daps(Descent(Euler(), levels=3), ratio, EXACT), target, sigma, sigma_next)
    mean, covariance = probe(lambda like, rng: run(like + x, rng), SHAPE)
    close(mean, torch.linalg.solve(precision, pull + end.flatten() / (ratio * sigma) ** 2), 1e-9)
    close(covariance, torch.linalg.inv(precision) + sigma_next**2 * EYE, 1e-9)


@pytest.mark.parametrize("sigma", [0.2, 3.0])
def test_a_step_of_matched_daps_draws_the_exact_conditional(sigma: float) -> None:
    target, fisher, pull = blurred()
    x, inverse = 1 + draw(1, *SHAPE, seed=6), torch.linalg.inv(smooth_prior().covariance)
    exact = torch.linalg.inv(inverse + EYE / sigma**2 + fisher)
    exact_mean = exact @ (inverse @ smooth_prior().mean.flatten() + x.flatten() / sigma**2 + pull)
    run = moved(DapsMatched(KERNEL, Gmres(SIZE, 1e-13)), target, sigma, sigma / 2)
    mean, covariance = probe(lambda like, rng: run(like + x, rng), SHAPE)
    close(mean, exact_mean, 1e-8)
    close(covariance, exact + (sigma / 2) ** 2 * EYE, 1e-8)
    short = moved(DapsMatched(KERNEL, Gmres(2, 0.0)), target, sigma, sigma / 2)
    with pytest.raises(AssertionError):
        close(probe(lambda like, rng: short(like + x, rng), SHAPE)[1], exact + (sigma / 2) ** 2 * EYE, 1e-4)
