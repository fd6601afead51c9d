"""What every sampler promises: its order, measured without Monte Carlo, and rows that do not see each other."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diffinv.core.checks import UnsupportedError
from diffinv.core.rng import Rng
from diffinv.likelihood import Flat
from diffinv.posterior import Posterior
from diffinv.priors.analytic import GaussianPrior
from diffinv.priors.base import Denoiser
from diffinv.samplers.base import Sampler, sample
from diffinv.samplers.ode import Euler, Heun, Multistep
from diffinv.samplers.sde import Ancestral, StochasticMultistep
from diffinv.schedules import LogUniform
from tests.cases.guidance import CASES as GUIDANCES
from tests.cases.guidance import DATA
from tests.cases.samplers import CASES, SHAPE, SIZE, VARIANTS, gaussian
from tests.contracts.checks import close
from tests.probe import ProbeRng, probe, probe_sampler, relative

ALL = {**CASES, **VARIANTS}
Streams = Callable[[int, list[int], int], Rng]
# The ends of the grid leave errors below what 256 steps leave: mean √λ/σ_max = 1e-5, covariance σ_min²/λ = 2e-7.
WIDE = LogUniform(1e-4, 1e5)
SHORT = LogUniform(1e-2, 1e2)


DIFFUSIONS = [name for name, make in ALL.items() if make().order is not None]
SPLIT = [name for name, make in ALL.items() if not make().guided]


@pytest.fixture(params=ALL)
def any_sampler(request: pytest.FixtureRequest) -> Sampler:
    return ALL[request.param]()


@pytest.fixture(params=DIFFUSIONS)
def sampler(request: pytest.FixtureRequest) -> Sampler:
    """One that integrates a differential equation, so that it has an order."""
    return ALL[request.param]()


def posterior_error(sampler: Sampler, steps: int) -> float:
    """Relative error of the mean plus that of the covariance, both exact."""
    target = gaussian()
    mean, covariance = probe_sampler(sampler, target, WIDE.grid(steps), SHAPE)
    return relative(mean, target.mean.flatten()) + relative(covariance, target.covariance)


def check_order(sampler: Sampler) -> None:
    """log₂ of the error's fall when the steps go from 128 to 256 is at least the declared order − 0.4."""
    coarse, fine = posterior_error(sampler, 128), posterior_error(sampler, 256)
    measured = math.log2(coarse / fine)
    assert measured >= sampler.order - 0.4, f"order {measured:.2f}, declared {sampler.order}"
    assert fine < 0.1, f"error {fine:.2f} with 256 steps"


def posterior() -> Posterior:
    """The blurred images of the guidance's case: batch 2."""
    case = GUIDANCES["moment_matching"]()
    return Posterior(case.prior, DATA["blur"]().likelihood, case.guidance)


def of_rows(target: Posterior, rows: list[int]) -> Posterior:
    return Posterior(target.prior, target.likelihood.select(rows), target.guidance)


def check_row_alone(sampler: Sampler, streams: Streams = Rng.for_draws) -> None:
    """An image alone, with its own streams, gives the draws that it gives in the batch."""
    target, grid = posterior(), SHORT.grid(6)
    both = sample(sampler, target, grid, torch.zeros(2, *SHAPE, dtype=torch.float64), streams(3, [7, 9], 1)).x
    for row, image in enumerate((7, 9)):
        like = torch.zeros(1, *SHAPE, dtype=torch.float64)
        close(sample(sampler, of_rows(target, [row]), grid, like, streams(3, [image], 1)).x, both[row : row + 1], 1e-12)


def check_rows_differ(sampler: Sampler, streams: Streams = Rng.for_draws) -> None:
    """Draws of one image are different draws: none closer than a tenth of the prior's own size, without data."""
    like = torch.zeros(4, *SHAPE, dtype=torch.float64)
    draws = sample(sampler, without_data(), SHORT.grid(6), like, streams(0, [5], 4)).x.flatten(1)
    distance = torch.cdist(draws, draws) + 1e9 * torch.eye(4, dtype=torch.float64)
    assert float(distance.min()) > 0.1 * float(gaussian().covariance.trace().sqrt())


def without_data() -> Posterior:
    return Posterior(gaussian(), Flat(SHAPE), GUIDANCES["moment_matching"]().guidance)


def test_a_sampler_has_its_declared_order(sampler: Sampler) -> None:
    check_order(sampler)


def test_a_row_alone_equals_the_row_in_a_batch(any_sampler: Sampler) -> None:
    check_row_alone(any_sampler)


def test_draws_of_a_calibrated_sampler_differ(any_sampler: Sampler) -> None:
    if any_sampler.calibrated:
        check_rows_differ(any_sampler)


def test_the_same_seed_gives_the_same_draws_and_another_seed_others(any_sampler: Sampler) -> None:
    like = torch.zeros(4, *SHAPE, dtype=torch.float64)
    run = lambda seed: sample(any_sampler, without_data(), SHORT.grid(6), like, Rng.for_draws(seed, [0], 4)).x
    first, again, other = (run(seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert float((first - other).abs().max()) > 0


@pytest.mark.parametrize("name", SPLIT)
def test_a_split_sampler_refuses_a_target_without_parts(name: str) -> None:
    like = torch.zeros(4, *SHAPE, dtype=torch.float64)
    with pytest.raises(UnsupportedError, match="prior and likelihood"):
        sample(ALL[name](), gaussian(), SHORT.grid(3), like, Rng.for_draws(0, [0], 4))


def exact_posterior(row: int) -> GaussianPrior:
    """p(x₀ | y) of one image of the blur, dense: (C⁻¹ + AᵀA/σ_y²)⁻¹."""
    prior, (precision, pull) = GUIDANCES["moment_matching"]().prior, DATA["blur"]().information(row)
    inverse = torch.linalg.inv(prior.covariance)
    covariance = torch.linalg.inv(inverse + precision)
    mean = covariance @ (inverse @ prior.mean.flatten() + pull)
    return GaussianPrior(mean.reshape(1, *SHAPE), (covariance + covariance.T) / 2)


@pytest.mark.parametrize("row", [0, 1])
def test_guided_draws_equal_draws_with_the_exact_posterior_denoiser(sampler: Sampler, row: int) -> None:
    """To the tolerance of the inner solves, amplified by 8 steps."""
    guided = probe_sampler(sampler, of_rows(posterior(), [row]), SHORT.grid(8), SHAPE)
    exact = probe_sampler(sampler, exact_posterior(row), SHORT.grid(8), SHAPE)
    assert relative(guided[0], exact[0]) < 1e-8
    assert relative(guided[1], exact[1]) < 1e-8


def test_probing_agrees_with_monte_carlo(sampler: Sampler) -> None:
    """Mean and covariance of 20,000 draws, |z| < 4.8 over 16 means and 136 second moments."""
    draws = 20000
    like = torch.zeros(draws, *SHAPE, dtype=torch.float64)
    x = sample(sampler, gaussian(), SHORT.grid(5), like, Rng.for_draws(4, [0], draws)).x.flatten(1)
    mean, covariance = probe_sampler(sampler, gaussian(), SHORT.grid(5), SHAPE)
    centred = x - mean
    products = torch.einsum("bi,bj->bij", centred, centred).flatten(1) - covariance.flatten()
    for values in (centred, products):
        assert float((values.mean(0) / values.std(0)).abs().max()) * math.sqrt(draws) < 4.8


def test_probing_finds_the_covariance_of_a_known_affine_map() -> None:
    matrix = gaussian().covariance

    def run(like: Tensor, rng: ProbeRng) -> Tensor:
        step = rng.spawn(1)
        twice = rng.spawn(2).normal(like) + rng.spawn(2).normal(like)
        return 3 + (step.normal(like).flatten(1) @ matrix).reshape(like.shape) + 2 * step.normal(like) + twice

    mean, covariance = probe(run, SHAPE)
    close(mean, torch.full((SIZE,), 3.0, dtype=torch.float64), 1e-14)
    close(covariance, matrix.T @ matrix + 8 * torch.eye(SIZE, dtype=torch.float64), 1e-13)


class Counting(Denoiser):
    """The Gaussian, counting its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.prior, self.calls = gaussian(), 0

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.calls += 1
        return self.prior(x, sigma)


@pytest.mark.parametrize(
    ("sampler", "calls"), [(Euler(), 6), (Heun(), 10), (Multistep(), 6), (Ancestral(), 6), (StochasticMultistep(), 6)]
)
def test_a_sampler_calls_the_denoiser_as_often_as_it_says(sampler: Sampler, calls: int) -> None:
    target, done = Counting(), []
    like = torch.zeros(2, *SHAPE, dtype=torch.float64)
    state = sample(sampler, target, SHORT.grid(5), like, Rng.for_draws(0, [0, 1], 1), progress=done.append)
    assert target.calls == calls
    assert done == [1, 2, 3, 4, 5]
    assert state.x0 is not None and state.x0.shape == state.x.shape


def test_the_last_step_returns_the_denoised_image(sampler: Sampler) -> None:
    like = torch.zeros(2, *SHAPE, dtype=torch.float64)
    state = sample(sampler, gaussian(), SHORT.grid(5), like, Rng.for_draws(0, [0, 1], 1))
    assert torch.equal(state.x, state.x0)


def test_a_sampler_keeps_float32_and_needs_no_gradient(any_sampler: Sampler) -> None:
    target, like = posterior(), torch.zeros(2, *SHAPE)
    single = Posterior(target.prior.to(torch.float32), target.likelihood.to(torch.float32), target.guidance)
    draws = sample(any_sampler, single, SHORT.grid(5), like, Rng.for_draws(0, [0, 1], 1)).x
    assert draws.dtype == torch.float32
    assert bool(draws.isfinite().all())
    assert not draws.requires_grad


def test_ancestral_without_noise_is_euler() -> None:
    like = torch.zeros(2, *SHAPE, dtype=torch.float64)
    runs = [sample(s, gaussian(), SHORT.grid(7), like, Rng.for_draws(0, [0, 1], 1)).x for s in (Ancestral(eta=0.0), Euler())]
    close(*runs, 1e-12)


def test_the_ode_samplers_follow_the_exact_flow() -> None:
    """x(0) = m + Q √(λ/(λ + σ_max²)) Qᵀ (x(σ_max) − m): Heun at 512 steps, row by row."""
    target, like = gaussian(), torch.zeros(3, *SHAPE, dtype=torch.float64)
    grid = LogUniform(1e-4, 1e2).grid(512)
    rng = Rng.for_draws(0, [0], 3)
    start = Heun().init(target, like, grid[0].expand(3), rng.spawn(0)).x
    shrink = (target.eigenvalues / (target.eigenvalues + grid[0] ** 2)).sqrt()
    coordinates = (start - target.mean).flatten(1) @ target.eigenvectors
    expected = target.mean + ((coordinates * shrink) @ target.eigenvectors.T).reshape(like.shape)
    close(sample(Heun(), target, grid, like, rng).x, expected, 1e-3)
