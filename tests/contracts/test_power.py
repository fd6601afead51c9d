"""Mutants of samplers and guidance, each of which must fail the contract that is there to catch it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from diffinv.core.linalg import Solve, expand, gmres, information_solve
from diffinv.core.rng import Rng
from diffinv.core.types import Image, LinearMap, Sigma
from diffinv.guidance.base import ConjugateGradients, Guidance, InformationSolver, denoise_with_vjp
from diffinv.guidance.moment_matching import MomentMatching
from diffinv.guidance.pseudo_inverse import PseudoInverse
from diffinv.likelihood import Likelihood, Observation
from diffinv.noise.gaussian import Gaussian
from diffinv.operators.convolution import Convolution
from diffinv.posterior import Posterior
from diffinv.priors.base import Denoiser
from diffinv.samplers.base import Sampler, State
from diffinv.samplers.ode import Euler, Heun, Multistep
from diffinv.samplers.sde import Ancestral
from tests.cases.guidance import CASES, DATA, SHAPE, STD, blur, kernels, smooth_prior
from tests.contracts import test_guidance as guidance
from tests.contracts import test_samplers as samplers

EXACT = ConjugateGradients(60, 1e-13)


class NotTransposed(Convolution):
    """Its adjoint forgets to point-reflect the kernel."""

    def adjoint(self, y: Tensor) -> Tensor:
        return self.apply(y)


def told(operator: Convolution) -> Observation:
    """The data of the blur, with another operator than made them."""
    data = DATA["blur"]()
    return Observation(data.data[0], operator, Gaussian(data.stds[0]))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("flaw", ["transposed PSF", "adjoint not transposed", "wrong noise level"])
def test_a_wrong_likelihood_is_not_exact(name: str, flaw: str) -> None:
    sound = blur(kernels())
    likelihood = {
        "transposed PSF": lambda: told(blur(kernels().mT)),
        "adjoint not transposed": lambda: told(NotTransposed(sound.kernel, sound.channels, sound.size, sound.border)),
        "wrong noise level": lambda: replace(told(sound), noise=Gaussian(DATA["blur"]().stds[0] ** 2)),
    }[flaw]()
    guidance.check_exact(CASES[name](), DATA["blur"](), told(sound))
    with pytest.raises(AssertionError):
        guidance.check_exact(CASES[name](), DATA["blur"](), likelihood)


class StdForVariance(MomentMatching):
    """C = σ ∂D/∂x."""

    def __call__(self, prior: Denoiser, likelihood: Likelihood, x: Image, sigma: Sigma) -> Image:
        mean, vjp = denoise_with_vjp(prior, x, sigma)
        solved = self.solver(lambda v: expand(sigma, x) * vjp(v), likelihood.fisher(mean).apply, likelihood.score(mean))
        return mean + solved.solution


class ScoreAtTheNoisyImage(MomentMatching):
    """s at x_σ for s at D."""

    def __call__(self, prior: Denoiser, likelihood: Likelihood, x: Image, sigma: Sigma) -> Image:
        mean, vjp = denoise_with_vjp(prior, x, sigma)
        covariance = lambda v: expand(sigma**2, x) * vjp(v)
        return mean + self.solver(covariance, likelihood.fisher(x).apply, likelihood.score(x)).solution


class WithoutVjp(PseudoInverse):
    """The step of ΠGDM with ∂D/∂x left out."""

    def __call__(self, prior: Denoiser, likelihood: Likelihood, x: Image, sigma: Sigma) -> Image:
        mean = prior(x, sigma)
        square = sigma**2
        r2 = expand(square * self.sigma_data**2 / (square + self.sigma_data**2), x)
        solved = information_solve(
            lambda v: r2 * v, likelihood.fisher(mean).apply, likelihood.score(mean), iterations=60, tol=1e-13
        )
        return mean + expand(square, x) * solved.solution / r2


@pytest.mark.parametrize(
    ("name", "mutant"),
    [
        ("moment_matching", StdForVariance(EXACT)),
        ("moment_matching", ScoreAtTheNoisyImage(EXACT)),
        ("moment_matching", MomentMatching(ConjugateGradients(iterations=1, tol=0.0))),
        ("moment_matching", MomentMatching(ConjugateGradients(iterations=5, tol=0.0))),
        ("moment_matching", PseudoInverse(1.0, 60, 1e-13)),
        ("pseudo_inverse", WithoutVjp(STD)),
        ("pseudo_inverse", PseudoInverse(2 * STD, 60, 1e-13)),
    ],
)
def test_a_wrong_guidance_is_not_exact(name: str, mutant: Guidance) -> None:
    with pytest.raises(AssertionError):
        guidance.check_exact(replace(CASES[name](), guidance=mutant), DATA["blur"]())


@dataclass(frozen=True)
class Together(InformationSolver):
    """GMRES on the batch as if it were one system: the Krylov space mixes the rows."""

    iterations: int
    products = 0

    def __call__(self, covariance: LinearMap, fisher: LinearMap, score: Tensor) -> Solve:
        shape = (1, score.shape[0], *score.shape[1:])
        system = lambda u: u + fisher(covariance(u[0]))[None]
        inner = gmres(system, score.reshape(shape), iterations=self.iterations, tol=1e-3)
        return replace(inner, solution=covariance(inner.solution[0]))


def test_a_solver_that_mixes_rows_fails_batch_invariance() -> None:
    with pytest.raises(AssertionError):
        guidance.check_row_alone(MomentMatching(Together(6)), smooth_prior(), DATA["blur"]().likelihood)


def test_a_linearisation_at_the_noisy_image_fails_the_gauss_newton_identity() -> None:
    guidance.check_gauss_newton(MomentMatching(EXACT), smooth_prior())
    with pytest.raises(AssertionError):
        guidance.check_gauss_newton(ScoreAtTheNoisyImage(EXACT), smooth_prior())


class FullNoise(Ancestral):
    """Noise σ' for σ' √τ."""

    def step(self, target: Denoiser, state: State, sigma: Sigma, sigma_next: Sigma, rng: Rng) -> State:
        x, x0 = state.x, target(state.x, sigma)
        return State(x0 + expand((sigma_next / sigma) ** 2, x) * (x - x0) + expand(sigma_next, x) * rng.normal(x), x0)


class HalfDrift(Ancestral):
    """(σ'/σ) for (σ'/σ)√(1 − τ): the noise is added to a drift that did not make room for it."""

    def step(self, target: Denoiser, state: State, sigma: Sigma, sigma_next: Sigma, rng: Rng) -> State:
        x, x0, ratio = state.x, target(state.x, sigma), sigma_next / sigma
        noise = expand(sigma_next * (1 - ratio**2).sqrt(), x) * rng.normal(x)
        return State(x0 + expand(ratio, x) * (x - x0) + noise, x0)


class EulerDeclaredSecond(Euler):
    order = 2


class HeunAtTheOldLevel(Heun):
    """The corrector evaluated at σ for σ'."""

    def step(self, target: Denoiser, state: State, sigma: Sigma, sigma_next: Sigma, rng: Rng) -> State:
        x, x0, ratio = state.x, target(state.x, sigma), expand(sigma_next / sigma, state.x)
        mean = 0.5 * (x0 + target(x0 + ratio * (x - x0), sigma))
        return State(mean + ratio * (x - mean), x0)


class MultistepWithoutHalf(Multistep):
    """D̄ = D + (h/h₋)(D − D₋)."""

    def step(self, target: Denoiser, state: State, sigma: Sigma, sigma_next: Sigma, rng: Rng) -> State:
        x, x0 = state.x, target(state.x, sigma)
        mean = x0 if state.x0 is None or not bool((sigma_next > 0).all()) else 2 * x0 - state.x0
        return State(mean + expand(sigma_next / sigma, x) * (x - mean), x0, sigma)


WRONG = [FullNoise(), HalfDrift(), EulerDeclaredSecond(), HeunAtTheOldLevel(), MultistepWithoutHalf()]


@pytest.mark.parametrize("mutant", WRONG, ids=lambda mutant: type(mutant).__name__)
def test_a_wrong_sampler_fails_its_order(mutant: Sampler) -> None:
    with pytest.raises(AssertionError):
        samplers.check_order(mutant)


class OneGenerator(Rng):
    """One stream for the whole batch, dealt out row after row: a row's numbers depend on its place."""

    def spawn(self, key: int) -> Rng:
        return OneGenerator(super().spawn(key).keys)

    def normal(self, like: Tensor) -> Tensor:
        return Rng(self.keys[:1]).normal(like[None])[0]


class OneDraw(Rng):
    """The same numbers for every row."""

    def spawn(self, key: int) -> Rng:
        return OneDraw(super().spawn(key).keys)

    def normal(self, like: Tensor) -> Tensor:
        return Rng(self.keys[:1]).normal(like[:1]).expand_as(like)


@pytest.mark.parametrize("sampler", [Euler(), Ancestral()])
def test_a_generator_shared_between_rows_fails_batch_invariance(sampler: Sampler) -> None:
    with pytest.raises(AssertionError):
        samplers.check_row_alone(sampler, OneGenerator.for_draws)
    with pytest.raises(AssertionError):
        samplers.check_rows_differ(sampler, OneDraw.for_draws)


def test_one_iteration_of_conjugate_gradients_gives_over_dispersed_draws() -> None:
    """Total variance of the draws against the exact posterior's, 1,500 draws: above 1.5 with one iteration, 1 ± 0.1 with all."""
    data, draws = DATA["blur"](), 1500
    exact = samplers.exact_posterior(0).covariance.trace()
    like = torch.zeros(draws, *SHAPE, dtype=torch.float64)
    ratios = []
    for iterations in (1, 60):
        solver = MomentMatching(ConjugateGradients(iterations, 1e-6))
        target = Posterior(smooth_prior(), data.likelihood.select([0]), solver)
        state = samplers.sample(Heun(), target, samplers.SHORT.grid(32), like, Rng.for_draws(0, [0], draws))
        ratios.append(float(state.x.flatten(1).var(0).sum() / exact))
    assert ratios[0] > 1.5
    assert abs(ratios[1] - 1) < 0.1
