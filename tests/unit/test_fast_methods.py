"""The fast, uncalibrated methods: what all of them promise, and TMPD, DiffPIR and DPS against closed forms.

DDRM and RED-diff have files of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diffinv.core.checks import ConfigError, DiffinvError, UnsupportedError
from diffinv.core.linalg import expand
from diffinv.core.rng import Rng
from diffinv.engine.draws import Method
from diffinv.engine.inspect import most_passes
from diffinv.engine.methods import Choice, build_method, describe_method
from diffinv.engine.monitor import Counting
from diffinv.guidance.base import Guidance
from diffinv.guidance.proximal import Proximal
from diffinv.guidance.pseudo_inverse import PseudoInverse
from diffinv.guidance.tmpd import Tmpd
from diffinv.likelihood import Flat, Joint, Likelihood
from diffinv.noise.gaussian import Gaussian
from diffinv.operators.algebra import Identity
from diffinv.posterior import Posterior
from diffinv.priors.analytic import GaussianPrior
from diffinv.priors.base import Denoiser
from diffinv.samplers.base import Sampler, State, sample
from diffinv.samplers.ddrm import Ddrm
from diffinv.samplers.dps import Dps, residual_norm
from diffinv.samplers.ode import Euler
from diffinv.samplers.red_diff import RedDiff
from diffinv.samplers.renoise import Renoise
from diffinv.samplers.sde import Ancestral
from tests.cases.guidance import DATA, SHAPE, SIZE, diagonal_prior, smooth_prior, white_prior
from tests.cases.operators import draw
from tests.contracts.checks import close
from tests.contracts.test_guidance import check_exact, conditional_mean, levels, noisy
from tests.small import card
from tests.toys import (
    EXACT,
    GRID,
    LIKELIHOODS,
    STDS,
    UNUSED,
    dense_denoiser,
    dense_operator,
    mixture,
    streams,
    white,
    zeros,
)

METHODS: dict[str, tuple[Sampler, Guidance]] = {
    "tmpd": (Ancestral(), Tmpd(**EXACT)),
    "diffpir": (Renoise(0.3), Proximal(1.0, **EXACT)),
    "dps": (Dps(0.1), UNUSED),
    "dps, relative": (Dps(1.0, relative=True), UNUSED),
    "ddrm": (Ddrm(), UNUSED),
    "red_diff": (RedDiff(lam=1.0, lr=0.1, spread=0.5), UNUSED),
}


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_every_likelihood_or_says_why_not(method: str, likelihood: str) -> None:
    (sampler, guidance), data = METHODS[method], LIKELIHOODS[likelihood]()
    target = Posterior(mixture(), data, guidance)
    if isinstance(sampler, Ddrm) and not data.quadratic:
        with pytest.raises(UnsupportedError, match="not quadratic"):
            sample(sampler, target, GRID, zeros(), streams())
        return
    assert bool(sample(sampler, target, GRID, zeros(), streams()).x.isfinite().all())


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("method", METHODS)
def test_a_row_alone_equals_the_row_in_a_batch(method: str, likelihood: str) -> None:
    """To rounding, amplified by six steps and the condition of the solves (1e-11 found); a batch-mate seen is 1e-2."""
    (sampler, guidance), data = METHODS[method], LIKELIHOODS[likelihood]()
    if isinstance(sampler, Ddrm) and not data.quadratic:
        return
    both = sample(sampler, Posterior(smooth_prior(), data, guidance), GRID, zeros(), streams()).x
    for row, image in enumerate((7, 9)):
        alone = Posterior(smooth_prior(), data.select([row]), guidance)
        got = sample(sampler, alone, GRID, zeros()[:1], Rng.for_draws(3, [image], 1)).x
        close(got, both[row : row + 1], 1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_the_data_matter(method: str) -> None:
    """The same draw under data that are one standard deviation brighter is brighter: no method ignores its likelihood."""
    (sampler, guidance), data = METHODS[method], white(Identity(SHAPE))
    run = lambda likelihood: sample(sampler, Posterior(smooth_prior(), likelihood, guidance), GRID, zeros(), streams()).x
    assert float((run(replace(data, y=data.y + 0.3)) - run(data)).mean()) > 1e-3


@pytest.mark.parametrize(
    ("method", "passes"), [("tmpd", 3 * 7), ("diffpir", 7), ("dps", 1 + 2 * 6), ("ddrm", 7), ("red_diff", 7)]
)
def test_a_method_costs_the_network_passes_that_it_says(method: str, passes: int) -> None:
    """Forward passes and vjps of six steps and the start; the steps are counted by rows, two of them."""
    (sampler, guidance), prior = METHODS[method], Counting(smooth_prior())
    sample(sampler, Posterior(prior, LIKELIHOODS["gaussian"](), guidance), GRID, zeros(), streams())
    assert prior.rows == 2 * passes


@pytest.mark.parametrize("method", METHODS)
def test_none_of_them_claims_to_be_calibrated(method: str) -> None:
    sampler, guidance = METHODS[method]
    assert not (sampler.calibrated and guidance.calibrated)


def test_tmpd_is_exact_for_independent_pixels_only() -> None:
    tmpd = Tmpd(**EXACT)
    case = lambda prior, guidance: _Case(guidance, prior)
    check_exact(case(diagonal_prior(), tmpd), DATA["joint"]())
    with pytest.raises(AssertionError):
        check_exact(case(smooth_prior(), tmpd), DATA["joint"]())
    with pytest.raises(AssertionError):
        check_exact(case(diagonal_prior(), PseudoInverse(1.5, **EXACT)), DATA["joint"]())


class _Case:
    def __init__(self, guidance: Guidance, prior: Denoiser) -> None:
        self.guidance, self.prior, self.tolerance = guidance, prior, 1e-8


def test_tmpd_is_its_equation_with_a_full_jacobian_in_front() -> None:
    """D + σ² Jᵀ Aᵀ (Σ_y + A diag(σ² Jᵀ1) Aᵀ)⁻¹ (y − A D), dense."""
    data, prior, sigma = LIKELIHOODS["gaussian"](), mixture(), levels(0.3, 2.0)
    x = noisy(sigma)
    got = Tmpd(**EXACT)(prior, data, x, sigma)
    for row in range(2):
        mean, jacobian = dense_denoiser(prior, x[row : row + 1], sigma[row : row + 1])
        matrix = dense_operator(data, row)
        sums = (sigma[row] ** 2 * jacobian.sum(0)).clamp_min(0)
        inner = matrix @ torch.diag(sums) @ matrix.T + STDS[row] ** 2 * torch.eye(SIZE, dtype=torch.float64)
        pull = matrix.T @ torch.linalg.solve(inner, data.y[row].flatten() - matrix @ mean)
        close(got[row].flatten(), mean + sigma[row] ** 2 * jacobian.T @ pull, 1e-8)


def test_tmpd_takes_a_negative_row_sum_for_zero() -> None:
    prior = GaussianPrior(zeros()[:1], torch.linalg.inv(torch.eye(SIZE, dtype=torch.float64) + 5 * negative_coupling()))
    sigma = levels(1.0, 1.0)
    _, jacobian = dense_denoiser(prior, noisy(sigma)[:1], sigma[:1])
    assert float(jacobian.sum(0).min()) < 0
    got = Tmpd(**EXACT)(prior, LIKELIHOODS["gaussian"](), noisy(sigma), sigma)
    assert bool(got.isfinite().all())


def negative_coupling() -> Tensor:
    """vvᵀ with v of both signs: the inverse of 1 + 5 vvᵀ has rows with negative sums."""
    v = torch.linspace(0.1, 1.5, SIZE, dtype=torch.float64)
    return torch.outer(v, v) / v.square().sum() * 2


def test_proximal_minimises_its_objective() -> None:
    """(λ/σ² + AᵀA/σ_n²) u = λ D/σ² + Aᵀy/σ_n², dense; another λ misses it."""
    data, prior, sigma = LIKELIHOODS["gaussian"](), mixture(), levels(0.3, 2.0)
    x = noisy(sigma)
    for row in range(2):
        matrix, mean = dense_operator(data, row), prior(x, sigma)[row].flatten()
        weight = 0.7 / sigma[row] ** 2
        left = matrix.T @ matrix / STDS[row] ** 2 + weight * torch.eye(SIZE, dtype=torch.float64)
        right = matrix.T @ data.y[row].flatten() / STDS[row] ** 2 + weight * mean
        expected = torch.linalg.solve(left, right)
        close(Proximal(0.7, **EXACT)(prior, data, x, sigma)[row].flatten(), expected, 1e-8)
        with pytest.raises(AssertionError):
            close(Proximal(0.35, **EXACT)(prior, data, x, sigma)[row].flatten(), expected, 1e-3)


def test_the_fixed_point_of_diffpir_is_a_mode_under_the_smoothed_prior() -> None:
    """x = D_y(x) where λ (C + σ²)⁻¹ (m − x) + Aᵀ(y − A x)/σ_n² = 0, and the last step of `Renoise` stays there."""
    data, prior, lam, sigma = LIKELIHOODS["gaussian"](), smooth_prior(), 0.7, levels(0.5, 1.5)
    rows = []
    for row in range(2):
        matrix = dense_operator(data, row)
        smoothed = lam * torch.linalg.inv(prior.covariance + sigma[row] ** 2 * torch.eye(SIZE, dtype=torch.float64))
        left = smoothed + matrix.T @ matrix / STDS[row] ** 2
        right = smoothed @ prior.mean.flatten() + matrix.T @ data.y[row].flatten() / STDS[row] ** 2
        rows.append(torch.linalg.solve(left, right))
    point = torch.stack(rows).reshape(2, *SHAPE)
    target = Posterior(prior, data, Proximal(lam, **EXACT))
    close(target(point, sigma), point, 1e-8)
    close(Renoise(0.3).step(target, State(point), sigma, 0 * sigma, streams()).x, point, 1e-8)
    x = noisy(sigma)
    for _ in range(60):
        x = target(x, sigma)
    close(x, point, 1e-6)


@pytest.mark.parametrize("zeta", [0.0, 0.3, 1.0])
def test_renoising_is_the_variance_preserving_step_of_the_paper(zeta: float) -> None:
    """x'_vp = √ᾱ' x̂₀ + √(1 − ᾱ') (√(1 − ζ) ε̂ + √ζ z) in the paper's own coordinates."""
    target, sigma, sigma_next = (
        Posterior(smooth_prior(), LIKELIHOODS["gaussian"](), Proximal(1.0)),
        levels(2, 0.6),
        levels(1, 0.2),
    )
    x, z = noisy(sigma), streams().normal(zeros())
    x0 = target(x, sigma)
    keep, keep_next = (expand(1 / (1 + s**2), x) for s in (sigma, sigma_next))  # ᾱ
    found = (keep.sqrt() * x - keep.sqrt() * x0) / (1 - keep).sqrt()
    expected = keep_next.sqrt() * x0 + (1 - keep_next).sqrt() * (math.sqrt(1 - zeta) * found + math.sqrt(zeta) * z)
    got = Renoise(zeta).step(target, State(x), sigma, sigma_next, streams()).x
    close(keep_next.sqrt() * got, expected, 1e-12)


def test_renoising_nothing_is_euler() -> None:
    target = Posterior(smooth_prior(), LIKELIHOODS["gaussian"](), Proximal(1.0))
    runs = [sample(s, target, GRID, zeros(), streams()).x for s in (Renoise(0.0), Euler())]
    close(*runs, 1e-12)


def dps_move(data: Likelihood, prior: Denoiser, x: Tensor, sigma: Tensor, zeta: float) -> Tensor:
    """What the data add to a step of the prior."""
    step = lambda z: Dps(z).step(Posterior(prior, data, UNUSED), dps_state(z, x), sigma, sigma / 2, streams()).x
    return step(zeta) - step(0.0)


def dps_state(zeta: float, x: Tensor) -> State:
    start = Dps(zeta).init(Posterior(smooth_prior(), Flat(SHAPE), UNUSED), x, levels(1.0, 1.0), streams())
    return replace(start, x=x)


def test_a_step_of_dps_is_its_equation_with_a_dense_jacobian() -> None:
    data, prior, sigma, zeta = LIKELIHOODS["gaussian"](), mixture(), levels(0.3, 2.0), 0.2
    x = noisy(sigma)
    got = dps_move(data, prior, x, sigma, zeta)
    for row in range(2):
        mean, jacobian = dense_denoiser(prior, x[row : row + 1], sigma[row : row + 1])
        matrix = dense_operator(data, row)
        residual = data.y[row].flatten() - matrix @ mean
        expected = zeta * jacobian.T @ matrix.T @ residual / (residual.norm() * STDS[row])
        close(got[row].flatten(), expected, 1e-9)
        with pytest.raises(AssertionError):
            close(got[row].flatten(), expected * STDS[row], 1e-3)


@pytest.mark.parametrize("likelihood", ["gaussian", "non_linear"])
def test_dps_descends_the_norm_of_the_whitened_residual(likelihood: str) -> None:
    """−ζ ∇ₓ ‖w(D(x))‖ by central differences, h = 1e-5: h² + ε/h = 1e-10 times the third derivative."""
    data, prior, sigma = LIKELIHOODS[likelihood](), mixture(), levels(0.3, 2.0)
    x, direction, h = noisy(sigma), draw(2, *SHAPE, seed=13), 1e-5
    norm = lambda v: residual_norm(data, prior(v, sigma))
    slope = (norm(x + h * direction) - norm(x - h * direction)) / (2 * h)
    close((dps_move(data, prior, x, sigma, 0.2) * direction).flatten(1).sum(1), -0.2 * slope, 1e-7)


def test_dps_descends_the_norm_of_joint_data_together() -> None:
    """One norm over all data sets: two copies of the data are one with a √2 smaller σ_n."""
    data, sigma = LIKELIHOODS["gaussian"](), levels(0.3, 2.0)
    sharper = replace(data, noise=Gaussian(STDS / math.sqrt(2)))
    moves = [dps_move(d, mixture(), noisy(sigma), sigma, 0.2) for d in (Joint((data, data)), sharper)]
    close(*moves, 1e-12)


@pytest.mark.parametrize("likelihood", ["poisson", "poisson_gaussian", "correlated"])
def test_dps_under_other_noise_follows_the_gradient_of_the_log_likelihood(likelihood: str) -> None:
    """Jᵀ s is the gradient of log p(y | D(x)): its central difference along a direction."""
    data, prior, sigma = LIKELIHOODS[likelihood](), mixture(), levels(0.3, 2.0)
    x, direction, h = noisy(sigma), draw(2, *SHAPE, seed=13), 1e-5
    value = lambda v: data.log_prob(prior(v, sigma))
    slope = (value(x + h * direction) - value(x - h * direction)) / (2 * h)
    move = dps_move(data, prior, x, sigma, 0.2) * expand(residual_norm(data, prior(x, sigma)) / 0.2, x)
    close((move * direction).flatten(1).sum(1), slope, 1e-6)


def test_dps_without_data_is_the_ancestral_sampler() -> None:
    for sampler in (Dps(3.0), Dps(3.0, relative=True)):
        got = sample(sampler, Posterior(smooth_prior(), Flat(SHAPE), UNUSED), GRID, zeros(), streams()).x
        expected = sample(Ancestral(), smooth_prior(), GRID, zeros(), streams()).x
        close(got, expected, 1e-12)


def test_relative_zeta_is_that_of_the_unwhitened_norm() -> None:
    """A = 1: λ_max = 1/σ_n², so that ζ_c is ζ/σ_n, row by row."""
    target = Posterior(smooth_prior(), white(Identity(SHAPE)), UNUSED)
    start = Dps(2.0, relative=True).init(target, zeros(), levels(1.0, 1.0), streams())
    close(start.length, 2.0 * STDS, 1e-12)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Proximal(0.0),
        lambda: Renoise(1.1),
        lambda: Renoise(-0.1),
        lambda: Dps(-1.0),
        lambda: Dps(float("nan")),
        lambda: Dps(1.0, eta=2.0),
        lambda: Ddrm(eta=1.5),
        lambda: Ddrm(eta_b=-0.1),
        lambda: RedDiff(0.0, 0.1, 0.0),
        lambda: RedDiff(1.0, -0.1, 0.0),
        lambda: RedDiff(1.0, 0.1, -1.0),
        lambda: RedDiff(1.0, 0.1, 0.0, betas=(0.9, 1.0)),
    ],
)
def test_a_parameter_out_of_range_is_refused_in_one_line(make: Callable) -> None:
    with pytest.raises(DiffinvError, match=r"(must be|must lie).*got") as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("sampler", [Dps(0.1), Ddrm(), RedDiff(1.0, 0.1, 0.0)])
def test_a_target_without_parts_is_refused(sampler: Sampler) -> None:
    with pytest.raises(UnsupportedError, match="prior and likelihood apart"):
        sample(sampler, white_prior(), GRID, zeros(), streams())


@pytest.mark.parametrize("sampler", [Dps(0.1), Ddrm(), RedDiff(1.0, 0.1, 0.0)])
def test_a_sampler_that_is_not_guided_ignores_the_guidance(sampler: Sampler) -> None:
    run = lambda g: sample(sampler, Posterior(smooth_prior(), LIKELIHOODS["gaussian"](), g), GRID, zeros(), streams()).x
    assert torch.equal(run(Proximal(1.0)), run(Tmpd()))


def test_tmpd_with_data_beats_no_data() -> None:
    """The guided mean is nearer to E[x₀ | x_σ, y] than the prior's."""
    sigma = levels(0.6, 4.0)
    exact = conditional_mean(smooth_prior(), DATA["blur"](), noisy(sigma), sigma)
    guided = Tmpd(**EXACT)(smooth_prior(), DATA["blur"]().likelihood, noisy(sigma), sigma)
    assert float((guided - exact).norm()) < 0.7 * float((smooth_prior()(noisy(sigma), sigma) - exact).norm())


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("diffpir", "Renoise + Proximal(CG 100, 1e-06), 20 steps"),
        ("dps", "Dps, 20 steps"),
        ("ddrm", "Ddrm, 20 steps"),
        ("ddrm_fourier", "Ddrm, 20 steps"),
        ("red_diff", "RedDiff, 20 steps"),
    ],
)
def test_a_configuration_names_the_fast_samplers(name: str, text: str) -> None:
    """`diffpir` brings its guidance; the others have none, and none is printed."""
    method = build_method(Choice(sampler=name), card())
    assert describe_method(method) == text
    assert not method.calibrated
    assert sample(method.sampler, Posterior(smooth_prior(), white(Identity(SHAPE)), UNUSED), GRID, zeros(), streams()).x.dtype


def test_a_chosen_guidance_is_kept_where_it_is_used_and_refused_where_not() -> None:
    assert build_method(Choice(sampler="diffpir", guidance="tmpd"), card()).guidance == Tmpd(100, 1e-6)
    assert build_method(Choice(guidance="proximal", iterations=7), card()).guidance == Proximal(1.0, 7, 1e-6)
    for name in ("dps", "ddrm", "red_diff"):
        with pytest.raises(ConfigError, match="would ignore the guidance 'tmpd'"):
            build_method(Choice(sampler=name, guidance="tmpd"), card())


@pytest.mark.parametrize(("method", "passes"), [("tmpd", 21), ("diffpir", 7), ("dps", 13), ("ddrm", 7), ("red_diff", 7)])
def test_the_cost_of_a_fast_method_is_foreseen(method: str, passes: int) -> None:
    """So many draws that their pilots cost nothing."""
    assert most_passes(Method(*METHODS[method], steps=6), 10**9) == pytest.approx(passes, abs=1e-3)
