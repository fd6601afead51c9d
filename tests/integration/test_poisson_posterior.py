"""The default method under Poisson and Poisson–Gaussian noise: honest draws on average, its limit, and what is caught.

`scripts/bench_poisson` is the same at full size.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from diffinv.core.linalg import dense
from diffinv.core.rng import Rng
from diffinv.core.types import Image
from diffinv.guidance.base import ConjugateGradients
from diffinv.guidance.moment_matching import MomentMatching
from diffinv.likelihood import Observation
from diffinv.operators.spectral import BandMixing
from diffinv.posterior import Posterior
from diffinv.priors.analytic import GaussianPrior
from diffinv.samplers.base import Sampler, sample
from diffinv.samplers.sde import StochasticMultistep
from diffinv.samplers.smc import TwistedSmc
from diffinv.schedules import LogUniform

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
TRIALS, DRAWS, STEPS = 128, 63, 32
MEDIUM = ("Poisson, 20 counts", "Poisson–Gaussian, 20 electrons")
GUIDANCE = MomentMatching(ConjugateGradients(32, 1e-6))
# Two-sided probability of 4.5 standard deviations.
RARE = 7e-6


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def toys() -> Iterator[ModuleType]:
    yield load("poisson_toys")
    del sys.modules["poisson_toys"]


def draw(prior, likelihood: Observation, like: Image, rng: Rng) -> Image:
    target = Posterior(prior, likelihood, GUIDANCE)
    return sample(StochasticMultistep(), target, LogUniform(1e-3, 50.0).grid(STEPS), like, rng).x


def excess(toys: ModuleType, trials) -> float:
    """Coverage less its nominal value, in standard errors over trials: pixels of one trial are dependent."""
    inside, error, nominal = toys.coverage(trials)
    return (inside - nominal) / error


@pytest.mark.parametrize("name", MEDIUM)
def test_the_default_is_calibrated_under_counting_noise(toys: ModuleType, name: str) -> None:
    trials = toys.simulate(toys.PROBLEMS[name](), draw, trials=TRIALS, draws=DRAWS, seed=3)
    found = toys.report(trials)
    assert found["SBC p"] > RARE
    assert abs(excess(toys, trials)) < 4.5
    assert found["std/prior std"] < 0.7  # it has learnt from the data


def test_too_small_a_noise_variance_is_caught(toys: ModuleType) -> None:
    overconfident = lambda prior, likelihood, like, rng: draw(prior, toys.half_variance(likelihood), like, rng)
    trials = toys.simulate(toys.PROBLEMS[MEDIUM[0]](), overconfident, trials=TRIALS, draws=DRAWS, seed=3)
    assert toys.report(trials)["SBC p"] < RARE
    assert excess(toys, trials) < -4.5


def test_draws_of_the_prior_are_caught_by_the_likelihood_alone(toys: ModuleType) -> None:
    ignorant = lambda prior, likelihood, like, rng: prior.sample(like, rng)
    trials = toys.simulate(toys.PROBLEMS[MEDIUM[0]](), ignorant, trials=TRIALS, draws=DRAWS, seed=3)
    p_values = {name: toys.chi_square(rank, DRAWS) for name, rank in trials.ranks.items()}
    assert p_values.pop("log-likelihood") < RARE
    assert min(p_values.values()) > RARE
    assert abs(excess(toys, trials)) < 4.5


def test_ranks_of_exact_draws_pass_and_of_shifted_ones_fail(toys: ModuleType) -> None:
    rng = Rng.for_draws(1, [0], 1)
    exact = (rng.uniform(torch.zeros(1, 512, dtype=torch.float64))[0] * (DRAWS + 1)).long()
    shifted = (exact + 8).clamp_max(DRAWS)
    assert toys.chi_square(exact, DRAWS) > RARE > toys.chi_square(shifted, DRAWS)
    assert toys.distance(exact, DRAWS) < 2.45 / 512**0.5 < toys.distance(shifted, DRAWS)


def best_linear(matrix: Tensor, mean: Tensor, covariance: Tensor, gain: float, y: Tensor) -> Tensor:
    """D + C Aᵀ Cov[y]⁻¹ (y − A D) with Cov[y] = A C Aᵀ + E[Var(y | x₀)] and E[Var(y | x₀)] = A D/g for Poisson noise."""
    rate = mean @ matrix.T
    total = matrix @ covariance @ matrix.T + torch.diag_embed(rate / gain)
    weighted = torch.linalg.solve(total, (y - rate)[..., None])
    return mean + (covariance @ matrix.T @ weighted)[..., 0]


def test_poisson_guidance_is_the_best_linear_estimate(toys: ModuleType) -> None:
    """The noise's variance is linear in the mean, so that Gauss–Newton at D has the exact second moments of y given x_σ."""
    problem = toys.PROBLEMS["Poisson, 4 counts"]()
    rng, like = Rng.for_draws(2, range(6), 1), torch.zeros(6, toys.PIXELS, 1, 1, dtype=torch.float64)
    data = problem.data(problem.prior.sample(like, rng.spawn(1)), rng.spawn(2))
    level, eye = 0.4, torch.eye(toys.PIXELS, dtype=torch.float64)
    sigma = torch.full((6,), level, dtype=torch.float64)
    x = problem.prior.sample(like, rng.spawn(3)) + level * rng.spawn(4).normal(like)
    mean = problem.prior(x, sigma).flatten(1)
    covariance = torch.linalg.inv(torch.linalg.inv(problem.prior.covariance) + eye / level**2)
    matrix = dense(data.operator.apply, like[:1])
    expected = best_linear(matrix, mean, covariance, 4.0, data.y.flatten(1))
    guided = MomentMatching(ConjugateGradients(60, 1e-13))
    found = Posterior(problem.prior, data, guided)(x, sigma).flatten(1)
    assert torch.allclose(found, expected, rtol=0, atol=1e-10)
    brighter = replace(data, noise=replace(data.noise, gain=2 * data.noise.gain))
    assert not torch.allclose(Posterior(problem.prior, brighter, guided)(x, sigma).flatten(1), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["Poisson, 4 counts", "Poisson–Gaussian, 4 electrons", "range 9:1, Poisson, 4 counts"])
def test_the_reference_has_our_density(toys: ModuleType, name: str) -> None:
    pytest.importorskip("numpyro", reason="the reference needs diffinv[unmix]")
    nuts, problem = load("poisson_nuts"), toys.PROBLEMS[name]()
    rng, like = Rng.for_draws(5, range(16), 1), torch.zeros(16, toys.PIXELS, 1, 1, dtype=torch.float64)
    data = problem.data(problem.prior.sample(like, rng.spawn(1)), rng.spawn(2))
    assert nuts.agreement(problem, data, rng.spawn(3)) < 1e-9
    mutant = replace(problem, noise=replace(problem.noise, gain=1.001 * problem.noise.gain))
    assert nuts.agreement(mutant, data, rng.spawn(3)) > 1e-6


def two_pixels(toys: ModuleType, counts: tuple[float, float]) -> tuple[GaussianPrior, Observation]:
    """The first two pixels of the smooth prior, and counts of them at four a unit."""
    prior = GaussianPrior(torch.ones(1, 2, 1, 1, dtype=torch.float64), 0.3**2 * toys.correlation()[:2, :2])
    operator = BandMixing(torch.tensor([[[0.7, 0.3], [0.2, 0.8]]], dtype=torch.float64), (1, 1))
    return prior, Observation(torch.tensor(counts, dtype=torch.float64).reshape(1, 2, 1, 1) / 4, operator, toys.poisson(4.0))


def by_quadrature(prior: GaussianPrior, data: Observation) -> tuple[Tensor, Tensor]:
    """Mean and std of p(x | y) on a grid of 400² images up to six standard deviations of the prior away."""
    axis = torch.linspace(-0.8, 2.8, 400, dtype=torch.float64)
    x = torch.cartesian_prod(axis, axis)[..., None, None]
    weight = (prior.log_prob(x, torch.zeros(len(x), dtype=torch.float64)) + data.log_prob(x)).softmax(0)[:, None]
    mean = (weight * x.flatten(1)).sum(0)
    return mean, (weight * (x.flatten(1) - mean) ** 2).sum(0).sqrt()


def mean_error(toys: ModuleType, sampler: Sampler, counts: tuple[float, float], draws: int = 2048) -> Tensor:
    """Of both pixels, in σ of the posterior; Monte-Carlo error 0.022 if the draws are independent, up to 0.045 in clouds."""
    prior, data = two_pixels(toys, counts)
    mean, std = by_quadrature(prior, data)
    like, grid = torch.zeros(draws, 2, 1, 1, dtype=torch.float64), LogUniform(1e-3, 50.0).grid(STEPS)
    x = sample(sampler, Posterior(prior, data, GUIDANCE), grid, like, Rng.for_draws(0, [0], draws)).x.flatten(1)
    return (x.mean(0) - mean) / std


def test_without_any_count_moment_matching_is_too_bright_and_twisted_smc_is_not(toys: ModuleType) -> None:
    """A linear estimate cannot follow the posterior mean of data far from what was expected; the weights of SMC do."""
    assert mean_error(toys, StochasticMultistep(), (3.0, 5.0)).abs().max() < 0.15
    assert mean_error(toys, StochasticMultistep(), (0.0, 0.0)).min() > 0.3
    assert mean_error(toys, TwistedSmc(64, 2), (0.0, 0.0)).abs().max() < 0.2
