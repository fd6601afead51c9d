"""Langevin, corrected and churned samplers against closed forms, and what they and the split samplers refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from diffinv.core.checks import DiffinvError, UnsupportedError
from diffinv.core.rng import Rng
from diffinv.likelihood import Flat
from diffinv.posterior import Posterior
from diffinv.priors.base import Denoiser
from diffinv.samplers.base import Sampler, State, sample
from diffinv.samplers.churn import ChurnedHeun
from diffinv.samplers.corrected import Corrected
from diffinv.samplers.daps import Daps
from diffinv.samplers.daps_matched import DapsMatched
from diffinv.samplers.half_step import HalfStep
from diffinv.samplers.langevin import PnpUla, SkRock
from diffinv.samplers.ode import Euler
from diffinv.samplers.sde import Ancestral
from diffinv.samplers.split import Descent
from diffinv.samplers.split_gibbs import SplitGibbs
from tests.cases.guidance import SHAPE, smooth_prior
from tests.cases.operators import draw
from tests.cases.samplers import gaussian
from tests.contracts.checks import close
from tests.contracts.test_samplers import SHORT, Counting
from tests.probe import probe
from tests.unit.test_split_samplers import EYE, affine, blurred, counted, langevin_bound, level, moved, stationary, target_of


def precision(sigma: float) -> tuple[Tensor, Tensor]:
    """H = F + (C + σ²)⁻¹ and H-weighted mean h of π_σ, dense."""
    _, fisher, pull = blurred()
    smooth = torch.linalg.inv(smooth_prior().covariance + sigma**2 * EYE)
    return fisher + smooth, pull + smooth @ smooth_prior().mean.flatten()


def delta_of(sampler: PnpUla | SkRock, sigma: float) -> float:
    return sampler.step_size * sampler.unit / (float(langevin_bound(blurred()[0])) + sigma**-2)


def test_the_bound_is_the_largest_eigenvalue_of_the_fisher_information() -> None:
    exact = float(torch.linalg.eigvalsh(blurred()[1])[-1])
    assert float(langevin_bound(blurred()[0])) == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("sigma", [0.1, 1.0])
def test_pnp_ula_has_its_closed_stationary_law_with_the_bias_of_the_step(sigma: float) -> None:
    sampler = PnpUla(step_size=0.9)
    matrix, pull = precision(sigma)
    mean, covariance = stationary(moved(sampler, blurred()[0], sigma, 0.0))
    close(mean, torch.linalg.solve(matrix, pull), 1e-8)
    close(covariance, torch.linalg.inv(matrix - delta_of(sampler, sigma) / 2 * matrix @ matrix), 1e-8)
    assert float(torch.linalg.eigvals(matrix @ covariance).real.max()) > 1.2


def chebyshev(sampler: SkRock, sigma: float) -> tuple[Tensor, Tensor]:
    """B and Q of the step, from T_s and U_{s−1} of the matrix ω₀ − ω₁ δ H by their trigonometric forms."""
    s, omega0 = sampler.stages, 1 + sampler.eta / sampler.stages**2
    first = lambda x: math.cosh(s * math.acosh(x)) if x >= 1 else math.cos(s * math.acos(x))
    second = lambda x: (
        math.sinh(s * math.acosh(x)) / math.sinh(math.acosh(x)) if x >= 1 else math.sin(s * math.acos(x)) / math.sin(math.acos(x))
    )
    omega1 = first(omega0) / (s * second(omega0))
    delta = delta_of(sampler, sigma)
    values, vectors = torch.linalg.eigh(precision(sigma)[0])
    p = [-delta * float(v) for v in values]
    gain = [first(omega0 + omega1 * v) / first(omega0) for v in p]
    push = [second(omega0 + omega1 * v) / second(omega0) * (1 + omega1 * v / 2) for v in p]
    gain, push = (torch.tensor(v, dtype=torch.float64) for v in (gain, push))
    return (vectors * gain) @ vectors.T, (vectors * (2 * delta * push**2)) @ vectors.T


@pytest.mark.parametrize("stages", [1, 2, 5, 10])
def test_a_step_of_skrock_is_its_chebyshev_polynomial(stages: int) -> None:
    sampler, (matrix, pull) = SkRock(stages=stages), precision(0.5)
    _, step, noise = affine(moved(sampler, blurred()[0], 0.5, 0.0))
    exact = chebyshev(sampler, 0.5)
    close(step, exact[0], 1e-9)
    close(noise, exact[1], 1e-9)
    mean, covariance = stationary(moved(sampler, blurred()[0], 0.5, 0.0))
    close(mean, torch.linalg.solve(matrix, pull), 1e-8)
    assert float((covariance - torch.linalg.inv(matrix)).norm() / covariance.norm()) < 0.5


def test_skrock_of_one_stage_without_damping_is_ula_with_the_score_at_half_the_noise() -> None:
    """x' = x + δ b(x + Q/2) + Q: B = 1 − δH, Q = 2δ (1 − δH/2)², and its law N(H⁻¹h, H⁻¹ (1 − δH/2))."""
    sampler = SkRock(stages=1, eta=1e-10, step_size=0.25)
    matrix, delta = precision(0.5)[0], delta_of(sampler, 0.5)
    assert delta == pytest.approx(0.5 * delta_of(PnpUla(step_size=1.0), 0.5), rel=1e-6)
    _, step, _ = affine(moved(sampler, blurred()[0], 0.5, 0.0))
    close(step, EYE - delta * matrix, 1e-8)
    covariance = stationary(moved(sampler, blurred()[0], 0.5, 0.0))[1]
    close(covariance, torch.linalg.inv(matrix) @ (EYE - delta / 2 * matrix), 1e-8)


def test_skrock_is_stable_far_beyond_the_limit_of_the_unadjusted_algorithm() -> None:
    radius = lambda sampler: float(torch.linalg.eigvals(affine(moved(sampler, blurred()[0], 0.5, 0.0))[1]).abs().max())
    rock = SkRock(stages=10, step_size=0.9)
    assert delta_of(rock, 0.5) > 80 * delta_of(PnpUla(step_size=1.99), 0.5)
    assert radius(rock) < 1
    assert radius(PnpUla(step_size=1.9)) < 1
    too_far = PnpUla(step_size=1.9)
    object.__setattr__(too_far, "step_size", 2.3)
    assert radius(too_far) > 1


@dataclass(frozen=True)
class Exact(Sampler):
    """A predictor that lands on N(m, C + σ'²) exactly."""

    order = None

    def step(self, target: Denoiser, state: State, sigma: Tensor, sigma_next: Tensor, rng: Rng) -> State:
        prior = gaussian()
        spread = (prior.eigenvalues + sigma_next[:, None] ** 2).sqrt()
        z = (rng.normal(state.x).flatten(1) * spread) @ prior.eigenvectors.T
        return State(prior.mean + z.reshape(state.x.shape))


@pytest.mark.parametrize("corrections", [1, 3])
def test_a_corrector_leaves_a_gaussian_alone_to_the_square_of_its_step(corrections: int) -> None:
    """v ← (1 − t)² v + 2tv, t = δσ²/v, each step; the limit of many is v/(1 − t/2)."""
    sigma, delta, prior = 0.8, 0.05, gaussian()
    run = moved(Corrected(Exact(), corrections, delta), prior, 2.0, sigma)
    mean, covariance = probe(run, SHAPE)
    v = prior.eigenvalues + sigma**2
    t, expected = delta * sigma**2 / v, v
    for _ in range(corrections):
        expected = (1 - t) ** 2 * expected + 2 * t * v
    close(mean, prior.mean.flatten(), 1e-12)
    close(covariance, (prior.eigenvectors * expected) @ prior.eigenvectors.T, 1e-10)
    assert bool((expected <= v / (1 - t / 2)).all())
    assert float((expected / v - 1).max()) < delta**2 * corrections


def test_many_corrections_mend_a_predictor_that_draws_too_narrow() -> None:
    """The map of a correction contracts to N(m, v/(1 − t/2)), from wherever the predictor left x."""
    sigma, delta, prior = 0.8, 0.2, gaussian()

    def correct(x: Tensor, rng: Rng) -> Tensor:
        return moved(Corrected(Still(), 1, delta), prior, 2.0, sigma)(x, rng)

    mean, covariance = stationary(correct)
    v = prior.eigenvalues + sigma**2
    expected = v / (1 - delta * sigma**2 / v / 2)
    close(mean, prior.mean.flatten(), 1e-9)
    close(covariance, (prior.eigenvectors * expected) @ prior.eigenvectors.T, 1e-9)


@dataclass(frozen=True)
class Still(Sampler):
    """A predictor that does nothing."""

    order = None

    def step(self, target: Denoiser, state: State, sigma: Tensor, sigma_next: Tensor, rng: Rng) -> State:
        return state


def test_without_corrections_the_predictor_is_left_as_it_is() -> None:
    like, rng = torch.zeros(2, *SHAPE, dtype=torch.float64), lambda: Rng.for_draws(0, [0, 1], 1)
    corrected = sample(Corrected(Euler(), corrections=0), gaussian(), SHORT.grid(6), like, rng()).x
    assert torch.equal(corrected, sample(Euler(), gaussian(), SHORT.grid(6), like, rng()).x)


def test_churned_heun_without_churn_is_a_step_of_edm() -> None:
    """Algorithm 1: d = (x − D)/σ, Euler, d', the mean of both slopes."""
    x, sigma, following, prior = draw(2, *SHAPE, seed=6), 0.9, 0.5, gaussian()
    slope = (x - prior(x, level(sigma, x))) / sigma
    euler = x + (following - sigma) * slope
    expected = x + (following - sigma) * (slope + (euler - prior(euler, level(following, x))) / following) / 2
    run = lambda sampler: moved(sampler, prior, sigma, following)(x, Rng.for_draws(0, [0, 1], 1))
    close(run(ChurnedHeun(s_churn=0.0)), expected, 1e-13)
    with pytest.raises(AssertionError):
        close(run(ChurnedHeun(s_churn=1.0)), expected, 1e-2)


def churned(sampler: ChurnedHeun, sigma: float, following: float) -> tuple[Tensor, Tensor]:
    """Q of the step, and S − B S Bᵀ, that a step must add to leave the exact marginals N(m, C + σ²) exact."""
    prior = gaussian()
    _, step, noise = affine(moved(sampler, prior, sigma, following))
    before, after = (prior.covariance + s**2 * EYE for s in (sigma, following))
    return noise, after - step @ before @ step.T


def test_churn_keeps_the_variance_of_every_level() -> None:
    """To the third order of the step in ln σ, here 0.02 with γ = 0.04; s_noise = 1.3 breaks it."""
    noise, needed = churned(ChurnedHeun(s_churn=2.0), 0.5, 0.5 * math.exp(-0.02))
    close(noise, needed, 1e-2)
    with pytest.raises(AssertionError):
        close(churned(ChurnedHeun(s_churn=2.0, s_noise=1.3), 0.5, 0.5 * math.exp(-0.02))[0], needed, 1e-1)


def test_each_row_is_churned_by_its_own_level() -> None:
    x, sigma = draw(3, *SHAPE, seed=6), torch.tensor([0.2, 1.0, 5.0], dtype=torch.float64)
    step = lambda s: s.step(gaussian(), State(x), sigma, sigma / 2, Rng.for_draws(0, [0, 1, 2], 1)).x
    plain, windowed, every = (step(s) for s in (ChurnedHeun(0.0), ChurnedHeun(s_min=0.5, s_max=2.0), ChurnedHeun()))
    changed = lambda a, b: [float((p - q).abs().max()) > 1e-3 for p, q in zip(a, b, strict=True)]
    assert changed(plain, windowed) == [False, True, False]
    assert changed(plain, every) == [True, True, True]
    close(windowed[1], every[1], 1e-14)


# Cost and refusals.


@pytest.mark.parametrize(
    ("sampler", "calls"),
    [
        (SplitGibbs(), 1 + 5 * 20),
        (SplitGibbs(sweeps=2), 1 + 5 * 40),
        (Daps(), 1 + 5 * 5),
        (DapsMatched(), 1 + 5 * 21),
        (PnpUla(), 1 + 5),
        (PnpUla(repeats=3), 1 + 15),
        (SkRock(), 1 + 50),
        (Corrected(Ancestral(), corrections=2), 1 + 5 + 4 * 2),
        (ChurnedHeun(), 1 + 2 * 5 - 1),
    ],
)
def test_a_sampler_calls_the_prior_as_often_as_it_says(sampler: Sampler, calls: int) -> None:
    counting, like = Counting(), torch.zeros(2, *SHAPE, dtype=torch.float64)
    target = counting if sampler.guided else target_of(Flat(SHAPE), counting)
    sample(sampler, target, SHORT.grid(5), like, Rng.for_draws(0, [0, 1], 1))
    assert counting.calls == calls


class Untouched(Posterior):
    """A posterior whose guidance must not be called."""

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        raise AssertionError("the guidance was called")


@pytest.mark.parametrize("sampler", [SplitGibbs(), Daps(), DapsMatched(), PnpUla(), SkRock()])
def test_a_split_sampler_never_calls_the_guidance(sampler: Sampler) -> None:
    target = blurred()[0]
    untouched = Untouched(target.prior, target.likelihood, target.guidance)
    like = torch.zeros(1, *SHAPE, dtype=torch.float64)
    assert not sampler.guided
    assert bool(sample(sampler, untouched, SHORT.grid(3), like, Rng.for_draws(0, [0], 1)).x.isfinite().all())


@pytest.mark.parametrize("sampler", [PnpUla(), SkRock()])
@pytest.mark.parametrize("name", counted())
def test_a_langevin_sampler_refuses_data_without_a_bound(sampler: Sampler, name: str) -> None:
    like = torch.zeros(2, *SHAPE, dtype=torch.float64)
    with pytest.raises(UnsupportedError, match="one bound on the data's curvature") as error:
        sample(sampler, target_of(counted()[name]), SHORT.grid(3), like, Rng.for_draws(0, [0, 1], 1))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: HalfStep(iterations=0), "iterations 0"),
        (lambda: HalfStep(langevin=-1), "langevin -1"),
        (lambda: SplitGibbs(sweeps=0), "sweeps"),
        (lambda: Daps(ratio=0.0), "ratio"),
        (lambda: Descent(Daps(), levels=5), "Daps cannot sample the prior alone"),
        (lambda: Descent(Euler(), levels=5, depth=0.5), "sigma_min"),
        (lambda: Descent(Euler(), levels=0), "at least 1"),
        (lambda: PnpUla(step_size=2.0), "unstable"),
        (lambda: PnpUla(repeats=0), "repeats 0"),
        (lambda: SkRock(step_size=1.0), "unstable"),
        (lambda: SkRock(stages=0), "stages 0"),
        (lambda: Corrected(SplitGibbs()), "SplitGibbs does not follow"),
        (lambda: Corrected(delta=2.0), "delta 2.0"),
        (lambda: ChurnedHeun(s_churn=-1.0), "s_churn -1.0"),
        (lambda: ChurnedHeun(s_min=2.0, s_max=1.0), "s_min 2.0"),
    ],
)
def test_a_setting_without_meaning_is_refused(build: Callable[[], object], words: str) -> None:
    with pytest.raises(DiffinvError, match=words) as error:
        build()
    assert "\n" not in str(error.value)
