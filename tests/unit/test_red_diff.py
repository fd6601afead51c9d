"""RED-diff against its loss, its minimiser on a Gaussian toy, and torch's Adam."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from diffinv.core.linalg import expand
from diffinv.core.rng import Rng
from diffinv.likelihood import Flat, Observation
from diffinv.posterior import Posterior
from diffinv.priors.analytic import GaussianPrior
from diffinv.samplers.red_diff import Descent, RedDiff, adam
from tests.cases.guidance import SHAPE, SIZE, smooth_prior
from tests.cases.operators import draw
from tests.contracts.checks import close
from tests.contracts.test_guidance import levels, noisy
from tests.toys import (
    LIKELIHOODS,
    STDS,
    UNUSED,
    Still,
    dense_operator,
    mixture,
    streams,
    zeros,
)


def red_mode(data: Observation, prior: GaussianPrior, lam: float, sigma: Tensor) -> Tensor:
    """Aᵀ(y − A μ)/σ_n² = λ σ² (C + σ²)⁻¹ (μ − m), dense."""
    rows = []
    for row in range(2):
        matrix, eye = dense_operator(data, row), torch.eye(SIZE, dtype=torch.float64)
        pull = lam * sigma[row] ** 2 * torch.linalg.inv(prior.covariance + sigma[row] ** 2 * eye)
        left = matrix.T @ matrix / STDS[row] ** 2 + pull
        rows.append(torch.linalg.solve(left, pull @ prior.mean.flatten() + matrix.T @ data.y[row].flatten() / STDS[row] ** 2))
    return torch.stack(rows).reshape(2, *SHAPE)


def descent(x: Tensor) -> Descent:
    return Descent(x, first=torch.zeros_like(x), second=torch.zeros_like(x))


def test_red_diff_descends_to_its_minimiser() -> None:
    """At one level with z = 0 (whose mean it is), from 0.3 away, lr falling: within the last lr of the closed form."""
    data, prior, sigma, lam = LIKELIHOODS["gaussian"](), smooth_prior(), levels(0.5, 1.5), 2.0
    target, mode = Posterior(prior, data, UNUSED), red_mode(LIKELIHOODS["gaussian"](), smooth_prior(), 2.0, levels(0.5, 1.5))
    state = descent(mode + 0.3 * draw(2, *SHAPE, seed=1))
    for lr in torch.logspace(-1, -4, 600).tolist():
        state = RedDiff(lam, lr, 0.0).step(target, state, sigma, sigma, Still())
    assert float((state.x - mode).abs().max()) < 2e-3
    with pytest.raises(AssertionError):
        close(state.x, red_mode(data, prior, lam / 2, sigma), 2e-3)


def test_the_gradient_of_red_diff_is_on_average_that_of_its_closed_form() -> None:
    """The first step's running mean is (1 − β₁) g; 20,000 rows of g at the minimiser average to 0, |z| < 4.5."""
    data, prior, sigma, lam = LIKELIHOODS["gaussian"](), smooth_prior(), levels(0.5, 1.5), 2.0
    mode, rows = red_mode(data, prior, lam, sigma), 20_000
    x = mode[:1].expand(rows, *SHAPE).contiguous()
    target = Posterior(prior, data.select([0]), UNUSED)
    step = lambda start: RedDiff(lam, 0.1, 0.0).step(
        target, descent(start), sigma[:1].expand(rows), sigma, Rng.for_draws(0, [0], rows)
    )
    z_score = lambda g: float((g.mean(0) / g.std(0)).abs().max()) * math.sqrt(rows)
    assert z_score(step(x).first) < 4.5
    assert z_score(step(x + 0.1).first) > 10


def test_red_diff_is_the_loss_of_the_paper_in_its_own_coordinates() -> None:
    """∇_μ [‖y − A μ‖² + λ' (σ_t/α_t) ⟨ε_θ − z, μ⟩] = 2 σ_n² g with λ' = 2 σ_n² λ, ε_θ of the variance preserving x_t."""
    data, prior, sigma, lam = LIKELIHOODS["gaussian"](), mixture(), levels(0.5, 1.5), 2.0
    mu, z = noisy(sigma), streams(5).normal(zeros())
    alpha = expand((1 + sigma**2).rsqrt(), mu)
    noise = expand(sigma, mu) * alpha  # σ_t, α_t² + σ_t² = 1
    x_t = alpha * mu + noise * z
    epsilon = (x_t - alpha * prior(x_t / alpha, sigma)) / noise
    weight = expand(2 * STDS**2, mu) * lam * noise / alpha
    point = mu.clone().requires_grad_()
    loss = ((data.y - data.operator(point)) ** 2).sum() + (weight * (epsilon - z) * point).sum()
    (expected,) = torch.autograd.grad(loss, point)
    got = RedDiff(lam, 0.1, 0.0).step(Posterior(prior, data, UNUSED), descent(mu), sigma, sigma, streams(5)).first / 0.1
    close(expand(2 * STDS**2, mu) * got, expected, 1e-11)


def test_the_optimiser_is_adam() -> None:
    """Five steps of torch's own with ε = 0, and a zero gradient moves nothing."""
    gradients = draw(5, 2, *SHAPE, seed=8)
    parameter = zeros().requires_grad_()
    theirs, ours = torch.optim.Adam([parameter], lr=0.1, betas=(0.9, 0.99), eps=0.0), descent(zeros())
    for gradient in gradients:
        parameter.grad = gradient.clone()
        theirs.step()
        ours = adam(ours, gradient, lr=0.1, betas=(0.9, 0.99))
    close(ours.x, parameter.detach(), 1e-12)
    assert torch.equal(adam(descent(zeros()), zeros(), lr=0.1, betas=(0.9, 0.99)).x, zeros())


def test_red_diff_starts_at_the_regularised_solution_of_the_data() -> None:
    """μ₀ = u + (λ + F)⁻¹ s(u), u = D(0, σ) without noise, dense."""
    data, prior, lam = LIKELIHOODS["gaussian"](), smooth_prior(), 2.0
    sigma = levels(5.0, 5.0)
    u = prior(zeros(), sigma)
    got = RedDiff(lam, 0.1, 0.5).init(Posterior(prior, data, UNUSED), zeros(), sigma, Still()).x
    for row in range(2):
        matrix, eye = dense_operator(data, row), torch.eye(SIZE, dtype=torch.float64)
        score = matrix.T @ (data.y[row].flatten() - matrix @ u[row].flatten()) / STDS[row] ** 2
        pull = torch.linalg.solve(lam * eye + matrix.T @ matrix / STDS[row] ** 2, score)
        close(got[row].flatten(), u[row].flatten() + pull, 1e-9)


def test_restarts_of_red_diff_differ_by_their_spread() -> None:
    like = torch.zeros(6, *SHAPE, dtype=torch.float64)
    target = Posterior(smooth_prior(), Flat(SHAPE), UNUSED)
    start = lambda spread: (
        RedDiff(1.0, 0.1, spread).init(target, like, torch.full((6,), 1e6).double(), Rng.for_draws(0, [0], 6)).x
    )
    assert float(start(0.0).std(0).max()) < 1e-3
    assert 0.3 < float(start(0.5).std(0).mean()) < 0.7
