"""What every closed-form denoiser promises, and mutants that break it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diffinv.core.checks import DiffinvError
from diffinv.core.linalg import expand
from diffinv.core.rng import Rng
from diffinv.priors.analytic import FourierGaussianPrior, GaussianPrior, LowRankGaussianPrior, MixturePrior
from tests.cases import priors
from tests.cases.priors import CASES, SIZE, VARIANTS, PriorCase

ALL = {**CASES, **VARIANTS}
GAUSSIAN = ["gaussian", "gaussian_fourier", "gaussian_low_rank"]
DRAWS = 20000
Z = 4.5


@pytest.fixture(params=ALL)
def case(request: pytest.FixtureRequest) -> PriorCase:
    return ALL[request.param]()


def levels(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def noisy() -> Tensor:
    """(3, *image), no relation to the prior."""
    return 2 * torch.cos(torch.arange(3 * SIZE, dtype=torch.float64) * 0.9).reshape(3, *priors.SHAPE)


def check_identity(case: PriorCase) -> None:
    """|D(x, σ) − x| = σ² |∇ log p| → 0: at σ = 1e-4, below 1e-8 × |x − m| × 5 (smallest eigenvalue 0.2)."""
    x = noisy()
    gap = (case.prior(x, levels(1e-4, 1e-4, 1e-4)) - x).abs().max()
    assert float(gap) <= 5e-8 * float((x.flatten(1).norm(dim=1) + 6).max())


def check_prior_mean(case: PriorCase) -> None:
    """|D(x, σ) − m| ≤ λ_max |x − m|/σ²: at σ = 1e4 about 1e-7."""
    denoised = case.prior(noisy(), levels(1e4, 1e4, 1e4))
    assert float((denoised - case.mean).abs().max()) <= 1e-8 * 10 * SIZE


def check_tweedie(case: PriorCase) -> None:
    """D = x + σ² ∇ log p(x; σ)."""
    sigma = levels(0.1, 1.0, 5.0)
    x = noisy().requires_grad_()
    (score,) = torch.autograd.grad(case.prior.log_prob(x, sigma).sum(), x)
    torch.testing.assert_close(case.prior(x, sigma), x + expand(sigma**2, x) * score, rtol=1e-10, atol=1e-10)


def check_covariance(case: PriorCase) -> None:
    """σ² ∂D/∂x = C − C (C + σ²)⁻¹ C."""
    for sigma in (0.3, 2.0):
        jacobian = torch.func.jacrev(lambda v, s=sigma: case.prior(v, levels(s))[0].flatten())(noisy()[:1]).reshape(SIZE, SIZE)
        c = case.covariance
        expected = c - c @ torch.linalg.solve(c + sigma**2 * torch.eye(SIZE, dtype=c.dtype), c)
        torch.testing.assert_close(sigma**2 * jacobian, expected, rtol=1e-10, atol=1e-10)


def check_samples(case: PriorCase) -> None:
    """Mean and covariance of the samples, along the axes and 12 other directions."""
    rng = Rng.for_draws(0, [0], DRAWS)
    draws = case.prior.sample(torch.zeros(DRAWS, *priors.SHAPE, dtype=torch.float64), rng)
    mixing = torch.cos(torch.arange(12.0, dtype=torch.float64)[:, None] * torch.arange(SIZE, dtype=torch.float64) + 0.3)
    directions = torch.cat([torch.eye(SIZE, dtype=torch.float64), mixing])
    t = (draws - case.mean).flatten(1) @ directions.mT
    expected = torch.einsum("mi,ij,mj->m", directions, case.covariance, directions)
    for values in (t, t**2 - expected):
        assert bool((values.mean(0).abs() <= Z * values.std(0) / math.sqrt(DRAWS)).all())


CHECKS = [check_identity, check_prior_mean, check_tweedie, check_samples]


@pytest.mark.parametrize("check", CHECKS)
def test_a_closed_form_denoiser_keeps_its_contract(case: PriorCase, check) -> None:
    check(case)


@pytest.mark.parametrize("name", GAUSSIAN)
def test_the_jacobian_is_the_posterior_covariance(name: str) -> None:
    check_covariance(CASES[name]())


def test_every_closed_form_prior_has_a_case() -> None:
    classes = (GaussianPrior, FourierGaussianPrior, LowRankGaussianPrior, MixturePrior)
    assert set(CASES) == {cls.registry_key[1] for cls in classes}


def test_a_row_alone_equals_the_row_in_a_batch(case: PriorCase) -> None:
    x, sigma = noisy(), levels(0.1, 1.0, 5.0)
    for i in range(3):
        row = slice(i, i + 1)
        torch.testing.assert_close(case.prior(x[row], sigma[row]), case.prior(x, sigma)[row], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            case.prior.log_prob(x[row], sigma[row]), case.prior.log_prob(x, sigma)[row], rtol=1e-12, atol=0
        )


def test_a_float32_prior_keeps_float32(case: PriorCase) -> None:
    sigma = levels(0.1, 1.0, 5.0)
    expected = case.prior(noisy(), sigma)
    single = case.prior.to(torch.float32)
    got = single(noisy().float(), sigma)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)
    assert single.log_prob(noisy().float(), sigma).dtype == torch.float64
    assert single.sample(noisy().float(), Rng([1, 2, 3])).dtype == torch.float32


def test_the_two_gaussians_agree() -> None:
    fourier = priors.gaussian_fourier()
    dense = GaussianPrior(fourier.mean, fourier.covariance)
    x, sigma = noisy(), levels(0.1, 1.0, 5.0)
    torch.testing.assert_close(fourier.prior(x, sigma), dense(x, sigma), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(fourier.prior.log_prob(x, sigma), dense.log_prob(x, sigma), rtol=1e-10, atol=0)


def test_the_gaussian_density_is_that_of_torch() -> None:
    case, x = priors.gaussian(), noisy()
    law = torch.distributions.MultivariateNormal(case.mean.flatten(), case.covariance + 0.49 * torch.eye(SIZE, dtype=x.dtype))
    torch.testing.assert_close(case.prior.log_prob(x, levels(0.7, 0.7, 0.7)), law.log_prob(x.flatten(1)), rtol=1e-10, atol=0)


def test_the_gaussian_posterior_is_the_information_form() -> None:
    """(C⁻¹ + AᵀA/v)⁻¹ and its mean, against the covariance form that the prior uses."""
    case, x = priors.gaussian(), noisy()
    matrix = torch.sin(torch.arange(7 * SIZE, dtype=x.dtype)).reshape(7, SIZE)
    variance = levels(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
    y = x.flatten(1) @ matrix.mT
    mean, covariance = case.prior.posterior(matrix, y, variance)
    expected = torch.linalg.inv(torch.linalg.inv(case.covariance) + matrix.mT @ (matrix / variance[:, None]))
    torch.testing.assert_close(covariance, expected, rtol=1e-8, atol=1e-8)
    pull = ((y - case.mean.flatten() @ matrix.mT) / variance) @ matrix @ expected
    torch.testing.assert_close((mean - case.mean).flatten(1), pull, rtol=1e-8, atol=1e-8)


def test_the_mixture_equals_brute_force_quadrature() -> None:
    """In one dimension: E[x₀ | x] and p(x; σ) by the trapezoid rule over x₀."""
    weights, means, var = levels(0.3, 0.7), levels(-1.0, 2.0), 0.25
    prior = MixturePrior(means.reshape(2, 1, 1, 1), weights, torch.tensor(var, dtype=torch.float64))
    x, sigma = levels(-2.0, 0.3, 1.0, 6.0), levels(0.1, 0.5, 1.0, 3.0)
    x0 = torch.linspace(-12, 12, 24001, dtype=torch.float64)
    density = (weights * torch.exp(-((x0[:, None] - means) ** 2) / (2 * var)) / math.sqrt(2 * math.pi * var)).sum(1)
    kernel = torch.exp(-(((x[:, None] - x0) / sigma[:, None]) ** 2) / 2) / (sigma[:, None] * math.sqrt(2 * math.pi))
    evidence = (kernel * density).sum(1) * 1e-3
    expected = (kernel * density * x0).sum(1) * 1e-3 / evidence
    image = x.reshape(4, 1, 1, 1)
    torch.testing.assert_close(prior(image, sigma).flatten(), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(prior.log_prob(image, sigma), evidence.log(), rtol=1e-9, atol=1e-9)


def test_a_mixture_far_from_every_component_stays_finite() -> None:
    case = CASES["mixture"]()
    x = (1e4 * noisy()).requires_grad_()
    value = case.prior(x, levels(0.01, 0.01, 0.01))
    (gradient,) = torch.autograd.grad(value.sum(), x)
    assert bool(value.isfinite().all() and gradient.isfinite().all())


@pytest.mark.parametrize(
    "make",
    [
        lambda: GaussianPrior(torch.zeros(1, 1, 1, 2), torch.eye(3)),
        lambda: GaussianPrior(torch.zeros(1, 1, 1, 2), torch.tensor([[1.0, 0.5], [0.0, 1.0]])),
        lambda: GaussianPrior(torch.zeros(1, 1, 1, 2), torch.tensor([[1.0, 2.0], [2.0, 1.0]])),
        lambda: FourierGaussianPrior(torch.zeros(1, 1, 1, 4), torch.tensor([[[[1.0, 2.0, 1.0, 3.0]]]])),
        lambda: FourierGaussianPrior(torch.zeros(1, 1, 1, 4), -torch.ones(1, 1, 1, 4)),
        lambda: MixturePrior(torch.zeros(2, 1, 1, 2), torch.tensor([1.0, 0.0]), torch.tensor(1.0)),
        lambda: MixturePrior(torch.zeros(2, 1, 1, 2), torch.ones(2), torch.eye(3)),
    ],
)
def test_an_impossible_prior_is_refused_in_one_line(make) -> None:
    with pytest.raises(DiffinvError) as error:
        make()
    assert "\n" not in str(error.value)


class StdForVariance(GaussianPrior):
    """λ/(λ + σ)."""

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return super().forward(x, sigma.sqrt())


class MeanForgotten(GaussianPrior):
    """C (C + σ²)⁻¹ x."""

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return super().forward(x + self.mean, sigma) - self.mean


class VarianceForStd(GaussianPrior):
    """Samples with λ for √λ."""

    def sample(self, like: Tensor, rng: Rng) -> Tensor:
        return self._image(rng.normal(like).flatten(1) * self.eigenvalues)


@pytest.mark.parametrize(
    ("mutant", "check"),
    [
        (StdForVariance, check_identity),
        (StdForVariance, check_prior_mean),
        (StdForVariance, check_tweedie),
        (StdForVariance, check_covariance),
        (MeanForgotten, check_prior_mean),
        (MeanForgotten, check_tweedie),
        (VarianceForStd, check_samples),
    ],
)
def test_a_broken_gaussian_fails_its_contract(mutant: type[GaussianPrior], check) -> None:
    sound = priors.gaussian()
    check(sound)
    with pytest.raises(AssertionError):
        check(replace(sound, prior=mutant(sound.mean, sound.covariance)))
