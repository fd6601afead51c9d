"""What every guidance promises: exact where it says so, the prior without data, and rows that do not see each other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffinv.core.linalg import dense, expand
from diffinv.guidance.base import ConjugateGradients, Gmres, Guidance
from diffinv.guidance.moment_matching import MomentMatching
from diffinv.guidance.pseudo_inverse import PseudoInverse
from diffinv.likelihood import Flat, Likelihood, Observation
from diffinv.noise.gaussian import Gaussian
from diffinv.operators.algebra import compose
from diffinv.operators.detector import Arcsinh
from diffinv.posterior import Posterior
from diffinv.priors.analytic import GaussianPrior, MixturePrior
from diffinv.priors.base import Denoiser
from tests.cases.guidance import CASES, DATA, SHAPE, SIZE, VARIANTS, DataCase, GuidanceCase, blur, kernels, mean, smooth_prior
from tests.cases.operators import draw
from tests.contracts.checks import close

ALL = {**CASES, **VARIANTS}
LEVELS = ((0.05, 4.0), (0.6, 0.2), (30.0, 1.0))
EXACT_CG, EXACT_GMRES = ConjugateGradients(60, 1e-13), Gmres(SIZE, 1e-13)


@pytest.fixture(params=ALL)
def case(request: pytest.FixtureRequest) -> GuidanceCase:
    return ALL[request.param]()


@pytest.fixture(params=DATA)
def data(request: pytest.FixtureRequest) -> DataCase:
    return DATA[request.param]()


def levels(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def noisy(sigma: Tensor) -> Tensor:
    """x_σ of two images: (2, *SHAPE)."""
    return mean() + expand(sigma + 1, mean()) * draw(2, *SHAPE, seed=11)


def conditional_mean(prior: GaussianPrior, data: DataCase, x: Tensor, sigma: Tensor) -> Tensor:
    """E[x₀ | x_σ, y] = Λ⁻¹ (C⁻¹ m + x/σ² + Σ Aᵀy/σ_y²), Λ = C⁻¹ + 1/σ² + Σ AᵀA/σ_y²."""
    inverse, eye = torch.linalg.inv(prior.covariance), torch.eye(SIZE, dtype=torch.float64)
    rows = []
    for row in range(2):
        precision, pull = data.information(row)
        pull = inverse @ prior.mean.flatten() + x[row].flatten() / sigma[row] ** 2 + pull
        rows.append(torch.linalg.solve(inverse + eye / sigma[row] ** 2 + precision, pull))
    return torch.stack(rows).reshape(x.shape)


def check_exact(case: GuidanceCase, data: DataCase, likelihood: Likelihood | None = None) -> None:
    """D_y = E[x₀ | x_σ, y] in closed form; `likelihood` is what the guidance is told, if not the truth."""
    target = Posterior(case.prior, likelihood or data.likelihood, case.guidance)
    for pair in LEVELS:
        sigma = levels(*pair)
        close(target(noisy(sigma), sigma), conditional_mean(case.prior, data, noisy(sigma), sigma), case.tolerance)


def check_row_alone(guidance: Guidance, prior: Denoiser, likelihood: Likelihood) -> None:
    """Row i alone gives what it gives in the batch, although the rows converge after different numbers of iterations."""
    sigma = levels(0.05, 4.0)
    x = noisy(sigma)
    both = guidance(prior, likelihood, x, sigma)
    for row in range(2):
        one = slice(row, row + 1)
        close(guidance(prior, likelihood.select([row]), x[one], sigma[one]), both[one], 1e-12)


def test_a_guidance_is_exact_for_its_gaussian_prior(case: GuidanceCase, data: DataCase) -> None:
    check_exact(case, data)


def test_a_row_alone_equals_the_row_in_a_batch(case: GuidanceCase, data: DataCase) -> None:
    check_row_alone(case.guidance, case.prior, data.likelihood)


@pytest.mark.parametrize("tol", [1e-1, 1e-2])
@pytest.mark.parametrize("solver", [ConjugateGradients, Gmres])
def test_rows_that_stop_early_do_not_see_the_rows_that_go_on(solver, tol: float, data: DataCase) -> None:
    check_row_alone(MomentMatching(solver(SIZE, tol)), smooth_prior(), data.likelihood)


def test_without_data_the_posterior_is_the_prior(case: GuidanceCase) -> None:
    sigma = levels(0.6, 4.0)
    target = Posterior(case.prior, Flat(SHAPE), case.guidance)
    assert torch.equal(target(noisy(sigma), sigma), case.prior(noisy(sigma), sigma))


def test_a_float32_posterior_keeps_float32(case: GuidanceCase, data: DataCase) -> None:
    """Condition number of I + CF below 100·30: 3e3 × 6e-8 relative, with a factor 5 of room."""
    sigma = levels(0.6, 4.0)
    exact = Posterior(case.prior, data.likelihood, case.guidance)(noisy(sigma), sigma)
    single = Posterior(case.prior.to(torch.float32), data.likelihood.to(torch.float32), case.guidance)(
        noisy(sigma).float(), sigma
    )
    assert single.dtype == torch.float32
    close(single.double(), exact, 1e-3)


def test_a_datum_that_is_not_a_number_is_never_ignored(case: GuidanceCase) -> None:
    """A silent fall back on the prior would look like an answer."""
    data, sigma = DATA["blur"](), levels(0.6, 4.0)
    y = data.data[0].clone()
    y[1, 0, 1, 2] = torch.nan
    broken = Observation(y, data.operators[0], Gaussian(data.stds[0]))
    got = Posterior(case.prior, broken, case.guidance)(noisy(sigma), sigma)
    assert bool(got[1].isnan().any()) and bool(got[0].isfinite().all())


def check_gauss_newton(guidance: Guidance, prior: Denoiser) -> None:
    """D + C Jᵀ (Σ_y + J C Jᵀ)⁻¹ (y − A(D)), C = σ² ∂D/∂x at x, J = ∂A/∂x at D, by dense algebra."""
    operator = compose(Arcsinh(SHAPE, levels(0.4, 1.0)), blur(kernels()))
    y, std, sigma = draw(2, *SHAPE, seed=3), levels(0.1, 0.3), levels(0.3, 2.0)
    x = noisy(sigma)
    got = guidance(prior, Observation(y, operator, Gaussian(std)), x, sigma)
    for row in range(2):
        one = slice(row, row + 1)
        denoised = prior(x[one], sigma[one])
        jacobian = torch.func.jacrev(lambda v, s=sigma[one]: prior(v, s))(x[one]).reshape(SIZE, SIZE)
        slope = dense(operator.select([row]).linearize(denoised).apply, denoised)
        gain = sigma[row] ** 2 * jacobian @ slope.T
        inner = slope @ gain + std[row] ** 2 * torch.eye(SIZE, dtype=torch.float64)
        residual = (y[one] - operator.select([row])(denoised)).flatten()
        close(got[row].flatten(), denoised.flatten() + gain @ torch.linalg.solve(inner, residual), 1e-8)


@pytest.mark.parametrize("solver", [EXACT_CG, EXACT_GMRES])
@pytest.mark.parametrize("shape", ["gaussian", "mixture"])
def test_moment_matching_of_a_non_linear_operator_is_a_gauss_newton_step(solver, shape: str) -> None:
    covariance = smooth_prior().covariance
    mixture = MixturePrior(draw(3, *SHAPE, seed=9), levels(0.2, 0.5, 0.3), 0.3 * covariance)
    check_gauss_newton(MomentMatching(solver), {"gaussian": smooth_prior(), "mixture": mixture}[shape])


def test_gmres_equals_conjugate_gradients_where_the_jacobian_is_symmetric(data: DataCase) -> None:
    sigma = levels(0.2, 4.0)
    cg, gmres = (MomentMatching(s)(smooth_prior(), data.likelihood, noisy(sigma), sigma) for s in (EXACT_CG, EXACT_GMRES))
    close(cg, gmres, 1e-9)


class Skewed(Denoiser):
    """D = M x/(1 + σ²) with a matrix that is not symmetric, as that of a network."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = smooth_prior().covariance / 4 + 0.2 * draw(SIZE, SIZE, seed=6)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return (x.flatten(1) @ self.matrix.T).reshape(x.shape) / expand(1 + sigma**2, x)


def skewed_solution(data: DataCase, x: Tensor, sigma: Tensor) -> Tensor:
    """D + C (I + F C)⁻¹ s, C = σ² (∂D/∂x)ᵀ, dense."""
    prior = Skewed()
    denoised, rows = prior(x, sigma), []
    for row in range(2):
        precision, pull = data.information(row)
        covariance = sigma[row] ** 2 / (1 + sigma[row] ** 2) * prior.matrix.T
        score = pull - precision @ denoised[row].flatten()
        rows.append(covariance @ torch.linalg.solve(torch.eye(SIZE, dtype=torch.float64) + precision @ covariance, score))
    return denoised + torch.stack(rows).reshape(x.shape)


def test_gmres_is_right_for_a_jacobian_that_is_not_symmetric_and_conjugate_gradients_are_not(data: DataCase) -> None:
    sigma = levels(0.6, 4.0)
    expected = skewed_solution(data, noisy(sigma), sigma)
    close(MomentMatching(EXACT_GMRES)(Skewed(), data.likelihood, noisy(sigma), sigma), expected, 1e-8)
    with pytest.raises(AssertionError):
        close(MomentMatching(EXACT_CG)(Skewed(), data.likelihood, noisy(sigma), sigma), expected, 1e-3)


def test_moment_matching_says_it_is_calibrated_and_the_pseudo_inverse_that_it_is_not() -> None:
    assert MomentMatching(EXACT_CG).calibrated
    assert not PseudoInverse(1.0).calibrated


def test_more_iterations_come_nearer_to_the_exact_answer(data: DataCase) -> None:
    """CG and GMRES: the error after 2, 6 and 16 iterations falls."""
    sigma = levels(0.6, 4.0)
    exact = conditional_mean(smooth_prior(), data, noisy(sigma), sigma)
    for solver in (ConjugateGradients, Gmres):
        errors = [
            (MomentMatching(solver(k, 0.0))(smooth_prior(), data.likelihood, noisy(sigma), sigma) - exact).norm()
            for k in (2, 6, 16)
        ]
        assert errors[0] > errors[1] > errors[2]
