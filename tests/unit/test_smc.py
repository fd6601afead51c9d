"""Twists and the particle filter: exact where the mathematics says so, and the mutants that are not."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from diffinv.core.checks import DiffinvError, ShapeError
from diffinv.core.linalg import dense, expand
from diffinv.core.rng import Rng
from diffinv.engine.draws import Method
from diffinv.engine.reconstruct import reconstruct
from diffinv.guidance.twist import fisher_basis, moment_matching_twist
from diffinv.likelihood import Flat, Observation
from diffinv.noise.gaussian import Gaussian
from diffinv.noise.poisson import Poisson
from diffinv.operators.algebra import Identity
from diffinv.posterior import Posterior
from diffinv.priors.analytic import GaussianPrior, MixturePrior
from diffinv.samplers.base import sample
from diffinv.samplers.sde import StochasticMultistep
from diffinv.samplers.smc import Cloud, TwistedSmc, effective_sample_size, resample
from diffinv.schedules import LogUniform
from tests.cases.guidance import CASES, DATA, SHAPE, SIZE, smooth_prior
from tests.contracts.checks import close
from tests.contracts.test_guidance import conditional_mean, levels, noisy

F64 = torch.float64
GUIDANCE = CASES["moment_matching"]().guidance


def matrix_of(prior: GaussianPrior, x: Tensor, sigma: float) -> Tensor:
    """Cov[x₀ | x_σ] of a Gaussian prior, dense."""
    c = prior.covariance
    return c - c @ torch.linalg.solve(c + sigma**2 * torch.eye(len(c), dtype=F64), c)


@pytest.mark.parametrize("name", DATA)
def test_the_twist_is_the_exact_evidence_and_mean_of_a_gaussian_prior(name: str) -> None:
    data, prior, sigma = DATA[name](), smooth_prior(), levels(0.6, 4.0)
    x = noisy(sigma)
    twist = moment_matching_twist(prior, data.likelihood, fisher_basis(data.likelihood, x, rank=SIZE), x, sigma)
    close(twist.mean, conditional_mean(prior, data, x, sigma), 1e-8)
    for row in range(2):
        single = data.likelihood.select([row])
        rows = [dense(op.select([row]).apply, torch.zeros(1, *SHAPE, dtype=F64)) for op in data.operators]
        matrix = torch.cat(rows)
        y = torch.cat([y[row].flatten() for y in data.data])
        variance = torch.cat([std[row].expand(len(a)) ** 2 for std, a in zip(data.stds, rows, strict=True)])
        gram = matrix @ matrix_of(prior, x, float(sigma[row])) @ matrix.T + torch.diag(variance)
        mean = prior(x[row : row + 1], sigma[row : row + 1])
        exact = torch.distributions.MultivariateNormal(matrix @ mean.flatten(), gram).log_prob(y)
        assert math.isclose(float(twist.log_prob[row]), float(exact), rel_tol=1e-7)
        assert not math.isclose(float(single.log_prob(mean)), float(exact), rel_tol=1e-2)


def test_the_basis_spans_the_fisher_information() -> None:
    likelihood = DATA["blur"]().likelihood
    x = torch.zeros(2, *SHAPE, dtype=F64)
    basis = fisher_basis(likelihood, x, rank=SIZE)
    for row in range(2):
        fisher, q = dense(likelihood.select([row]).fisher(x[:1]).apply, x[:1]), basis.vectors[row]
        close(q.T @ basis.information[row] @ q, fisher, 1e-8)
        close(q @ q.T, torch.eye(SIZE, dtype=F64), 1e-8)


def test_a_basis_of_smaller_rank_holds_the_leading_directions() -> None:
    std = torch.linspace(1, 4, SIZE, dtype=F64).reshape(1, *SHAPE)
    likelihood = Observation(torch.zeros(1, *SHAPE, dtype=F64), Identity(SHAPE), Gaussian(std))
    basis = fisher_basis(likelihood, torch.zeros(1, *SHAPE, dtype=F64), rank=3)
    assert basis.rank == 3
    assert float(basis.vectors[0, 0].abs()[0]) > 0.9
    assert float(fisher_basis(Flat(SHAPE), torch.zeros(1, *SHAPE, dtype=F64), rank=3).vectors.abs().max()) == 0


def test_the_evidence_of_gaussian_data() -> None:
    """E[exp log_evidence] = p(y) over independent clouds: 64 clouds of 32, |z| < 4."""
    case, prior, particles, clouds = DATA["blur"](), smooth_prior(), 32, 64
    likelihood = case.likelihood.select([1])
    like = torch.zeros(particles * clouds, *SHAPE, dtype=F64)
    sampler = TwistedSmc(particles, rank=SIZE)
    state = sample(
        sampler, Posterior(prior, likelihood, GUIDANCE), LogUniform(0.01, 100).grid(60), like, streams(5, clouds, particles)
    )
    matrix = dense(case.operators[0].select([1]).apply, like[:1])
    gram = matrix @ prior.covariance @ matrix.T + case.stds[0][1] ** 2 * torch.eye(len(matrix), dtype=F64)
    exact = torch.distributions.MultivariateNormal(matrix @ prior.mean.flatten(), gram).log_prob(case.data[0][1].flatten())
    ratio = (state.log_evidence[::particles] - exact).exp()
    assert abs(float(ratio.mean()) - 1) < 4 * float(ratio.std()) / clouds**0.5 + 0.02  # 2 %: the grid's own error
    assert 0.001 < float(ratio.std()) < 0.5


def streams(seed: int, clouds: int, particles: int) -> Rng:
    return Rng.for_draws(seed, range(clouds), particles)


def two_modes() -> tuple[MixturePrior, Observation, float]:
    """Modes at ∓4 in 2-D, the second three times as heavy; a datum on x₁ between them. Exact P(mode 1)."""
    means = torch.tensor([[[[-4.0, -4.0]]], [[[4.0, 4.0]]]], dtype=F64)
    prior = MixturePrior(means, torch.tensor([0.25, 0.75], dtype=F64), torch.tensor(1.0, dtype=F64))
    half = torch.tensor([[[[1.0, float("inf")]]]], dtype=F64)
    noise = Gaussian(torch.where(half.isfinite(), 0.5, 1.0), mask=half.isfinite())
    y = torch.full((1, 1, 1, 2), -0.2, dtype=F64)
    weight = lambda m, w: w * math.exp(-((-0.2 - m) ** 2) / (2 * 1.25))
    first, second = weight(-4, 0.25), weight(4, 0.75)
    return prior, Observation(y, Identity((1, 1, 2)), noise), first / (first + second)


def mode_share(sampler, draws: int = 4096) -> float:
    prior, likelihood, _ = two_modes()
    like = torch.zeros(draws, 1, 1, 2, dtype=F64)
    x = sample(sampler, Posterior(prior, likelihood, GUIDANCE), LogUniform(0.05, 60).grid(40), like, streams(1, 1, draws)).x
    return float((x[..., 0] < 0).double().mean())


def test_the_filter_weighs_modes_as_the_posterior_does_and_the_guidance_alone_does_not() -> None:
    """4096 particles: standard error of a share below .012 with half of them effective; guidance alone is off by more."""
    exact = two_modes()[2]
    assert abs(mode_share(TwistedSmc(4096, rank=2)) - exact) < 4.5 * 0.012
    assert abs(mode_share(StochasticMultistep()) - exact) > 4.5 * 0.012


def test_poisson_counts_against_quadrature() -> None:
    """x ~ N(6, 2²), y ~ Poisson(x): mean and standard deviation of 8192 particles against the integral."""
    one = torch.tensor([1.0], dtype=F64)
    prior = GaussianPrior(torch.full((1, 1, 1, 1), 6.0, dtype=F64), torch.tensor([[4.0]], dtype=F64))
    likelihood = Observation(torch.full((1, 1, 1, 1), 3.0, dtype=F64), Identity((1, 1, 1)), Poisson(one, 0 * one))
    like = torch.zeros(8192, 1, 1, 1, dtype=F64)
    target = Posterior(prior, likelihood, GUIDANCE)
    x = sample(TwistedSmc(8192, rank=1), target, LogUniform(0.02, 100).grid(60), like, streams(2, 1, 8192)).x.flatten()
    grid = torch.linspace(0.01, 20, 4000, dtype=F64)
    density = (3 * grid.log() - grid - (grid - 6) ** 2 / 8).exp()
    density = density / density.sum()
    mean = float((density * grid).sum())
    std = float((density * (grid - mean) ** 2).sum().sqrt())
    assert abs(float(x.mean()) - mean) < 5 * std / 60  # 3600 effective
    assert abs(float(x.std()) / std - 1) < 5 / (2 * 3600) ** 0.5


def cloud(log_weight: Tensor) -> Cloud:
    size = len(log_weight)
    x = torch.arange(size, dtype=F64).reshape(size, 1, 1, 1)
    return Cloud(x, log_weight=log_weight, log_evidence=torch.zeros(size, dtype=F64))


def test_systematic_resampling_copies_in_proportion() -> None:
    weight = torch.tensor([0.55, 0.05, 0.3, 0.1], dtype=F64)
    for u in (0.01, 0.5, 0.99):
        moved = resample(cloud(weight.log() + 3), 4, torch.tensor([u], dtype=F64), threshold=1.0)
        counts = torch.bincount(moved.x.flatten().long(), minlength=4)
        assert bool(((counts - 4 * weight).abs() < 1).all()) and int(counts.sum()) == 4
        close(moved.log_evidence, torch.full((4,), 3 - math.log(4), dtype=F64), 1e-12)
        assert float(moved.log_weight.abs().max()) == 0


def test_only_poor_clouds_are_resampled() -> None:
    weight = torch.tensor([0.97, 0.01, 0.01, 0.01, 0.25, 0.25, 0.25, 0.25], dtype=F64)
    moved = resample(cloud(weight.log()), 4, torch.tensor([0.5, 0.5], dtype=F64), threshold=0.5)
    assert moved.x[:4].flatten().tolist() == [0, 0, 0, 0]
    assert moved.x[4:].flatten().tolist() == [4, 5, 6, 7]
    assert float(moved.log_evidence[4:].abs().max()) == 0
    close(effective_sample_size(weight.log().reshape(2, 4))[1:], torch.tensor([4.0], dtype=F64), 1e-12)


def test_a_cloud_is_never_split() -> None:
    prior, likelihood, _ = two_modes()
    like = torch.zeros(6, 1, 1, 2, dtype=F64)
    with pytest.raises(ShapeError, match="whole clouds"):
        sample(TwistedSmc(4), Posterior(prior, likelihood, GUIDANCE), LogUniform(0.05, 60).grid(4), like, streams(0, 1, 6))
    method = Method(TwistedSmc(4, rank=2), GUIDANCE, steps=6, schedule=LogUniform(0.05, 60))
    with pytest.raises(DiffinvError, match="multiple"):
        reconstruct(likelihood, prior, draws=6, method=method)
    with pytest.raises(DiffinvError, match="max_batch"):
        reconstruct(likelihood, prior, draws=8, method=method, max_batch=3)
    whole = reconstruct(likelihood, prior, draws=8, method=method)
    split = reconstruct(likelihood, prior, draws=8, method=method, max_batch=5)
    assert torch.equal(whole.samples, split.samples)


@pytest.mark.parametrize("change", [{"particles": 0}, {"rank": 0}, {"threshold": 1.5}])
def test_impossible_settings_are_refused(change: dict) -> None:
    with pytest.raises(DiffinvError, match="TwistedSmc"):
        TwistedSmc(**change)


def test_noise_in_a_direction_without_data_is_the_prior() -> None:
    """Cov of x₂ given nothing about it, 4000 particles of a Gaussian: within 4.5 standard errors."""
    prior = GaussianPrior(torch.zeros(1, 1, 1, 2, dtype=F64), torch.diag(torch.tensor([1.0, 4.0], dtype=F64)))
    _, likelihood, _ = two_modes()
    like = torch.zeros(4000, 1, 1, 2, dtype=F64)
    grid = LogUniform(0.02, 100).grid(60)
    x = sample(TwistedSmc(4000, rank=2), Posterior(prior, likelihood, GUIDANCE), grid, like, streams(3, 1, 4000)).x
    assert abs(float(x[..., 1].var()) / 4 - 1) < 4.5 * (2 / 4000) ** 0.5 + 0.01
    assert expand(torch.ones(2), like[:2]).shape == (2, 1, 1, 1)
