"""Noise models against brute force: normalisation, series, dense covariances, floors and refusals."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diffinv.core.checks import DiffinvError, ShapeError
from diffinv.core.linalg import dense
from diffinv.core.rng import Rng
from diffinv.noise.base import Noise
from diffinv.noise.correlated import CorrelatedGaussian
from diffinv.noise.gamma import Gamma
from diffinv.noise.gaussian import Gaussian
from diffinv.noise.photon import HeteroscedasticGaussian, PoissonGaussian, exact_information, information_table, series
from diffinv.noise.poisson import Poisson
from tests.cases.noise import SHAPE, correlation, mask, ramp

F64 = torch.float64


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


CONTINUOUS: dict[str, tuple[Noise, Tensor]] = {
    "gaussian": (Gaussian(t(0.7)), torch.linspace(-10, 14, 40001, dtype=F64)),
    "poisson-gaussian": (PoissonGaussian(t(2), t(0.8), t(0.1)), torch.linspace(-6, 30, 40001, dtype=F64)),
    "heteroscedastic": (HeteroscedasticGaussian(t(2), t(0.8), t(0.1)), torch.linspace(-20, 24, 40001, dtype=F64)),
    "gamma": (Gamma(t(3), t(0.1)), torch.linspace(0, 60, 40001, dtype=F64)),
}


@pytest.mark.parametrize("name", CONTINUOUS)
@pytest.mark.parametrize("mean", [0.2, 2.0])
def test_a_density_integrates_to_one(name: str, mean: float) -> None:
    noise, y = CONTINUOUS[name]
    pixels = y.reshape(-1, 1, 1, 1)
    mass = noise.log_prob(pixels, torch.full_like(pixels, mean)).exp().sum() * (y[1] - y[0])
    assert abs(float(mass) - 1) <= 1e-6


def test_poisson_probabilities_add_to_one() -> None:
    noise = Poisson(t(3), t(0.2))
    y = (torch.arange(200, dtype=F64) / 3 - 0.2).reshape(-1, 1, 1, 1)
    assert abs(float(noise.log_prob(y, torch.full_like(y, 2.0)).exp().sum()) - 1) <= 1e-12


@pytest.mark.parametrize("read", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("rate", [1e-3, 1.0, 30.0, 400.0])
def test_the_windowed_series_equals_the_whole_sum(read: float, rate: float) -> None:
    """Data from 6 r below zero to far above the rate; both sums in float64 with terms up to 1e4, hence 1e-10."""
    n = torch.linspace(-6 * read, 2 * rate + 40, 101, dtype=F64)
    k = torch.arange(3000, dtype=F64)
    terms = k * math.log(rate) - rate - torch.lgamma(k + 1) - ((n[:, None] - k) / read) ** 2 / 2
    whole = torch.logsumexp(terms, 1) - math.log(read * math.sqrt(2 * math.pi))
    value, count = series(n, t(rate), t(read))
    torch.testing.assert_close(value, whole, rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(count, (torch.softmax(terms, 1) * k).sum(1), rtol=1e-10, atol=1e-12)


def test_the_information_of_a_faint_pixel_is_that_of_zero_or_one_photon() -> None:
    """λ → 0: p = N₀ + λ (N₁ − N₀), so I = ∫ N₁²/N₀ − 1 = e^{1/r²} − 1."""
    for read in (0.8, 1.5, 4.0):
        exact = float(exact_information(t(1e-6), t(read)))
        assert exact == pytest.approx(math.exp(1 / read**2) - 1, rel=1e-4)


def test_the_information_without_read_noise_is_that_of_poisson() -> None:
    assert float(exact_information(t(5.0), t(0.1))) == pytest.approx(1 / 5, rel=1e-6)


@pytest.mark.parametrize("read", [0.3, 1.0, 3.0, 10.0])
def test_the_interpolated_information_is_the_integral(read: float) -> None:
    """Linear interpolation in log λ over 256 nodes: h²/8 · |d² log I/d log λ²| ≤ 3.6e-4 · a few."""
    rates = torch.logspace(-2.9, 3.5, 60, dtype=F64)
    noise = PoissonGaussian(t(2), t(read), t(0.0))
    got = noise.information((rates / 2).reshape(1, 1, 1, -1)).flatten() / 4
    torch.testing.assert_close(got, exact_information(rates, t(read)), rtol=1e-3, atol=0)


def test_copies_of_a_detector_share_its_table() -> None:
    """Samplers select and repeat rows at every step; the quadratures of a read noise are done once."""
    mean = torch.ones(2, 1, 1, 1, dtype=F64)
    PoissonGaussian(t(2), torch.tensor([0.7, 1.1], dtype=F64), t(0.1)).information(mean)
    before = information_table.cache_info().misses
    other = PoissonGaussian(t(3), torch.tensor([0.7, 1.1], dtype=F64), t(0.1))
    other.select([1, 0]).repeat(2).information(mean.repeat(2, 1, 1, 1))
    assert information_table.cache_info().misses == before
    PoissonGaussian(t(2), t(1.2), t(0.1)).information(mean)
    assert information_table.cache_info().misses == before + 1


def test_the_gaussian_approximation_errs_as_its_docstring_says() -> None:
    """Precision: factor 1 + 1/(2ρ). log p at t standard deviations: (t³ − 3t)/6 · λ/ρ^1.5, to second order in the skewness."""
    for rate, read in ((20.0, 1.0), (100.0, 3.0), (400.0, 5.0)):
        exact, near = PoissonGaussian(t(1), t(read), t(0)), HeteroscedasticGaussian(t(1), t(read), t(0))
        mean, rho = torch.full((1, 1, 1, 1), rate, dtype=F64), rate + read**2
        ratio = float(near.information(mean) / exact.information(mean))
        assert ratio == pytest.approx(1 + 1 / (2 * rho), abs=2 / rho**1.5)
        skewness = rate / rho**1.5
        for away in (-2.0, 1.0, 3.0):
            y = mean + away * math.sqrt(rho)
            error = float(exact.log_prob(y, mean) - near.log_prob(y, mean))
            assert error == pytest.approx((away**3 - 3 * away) / 6 * skewness, abs=5 * skewness**2)


FLOORED: list[Noise] = [
    Poisson(t(2), t(0.1)),
    PoissonGaussian(t(2), t(0.8), t(0.1)),
    HeteroscedasticGaussian(t(2), t(0.8), t(0.1)),
    Gamma(t(3), t(0.1)),
]


@pytest.mark.parametrize("noise", FLOORED)
@pytest.mark.parametrize("mean", [-1e4, -0.3, 0.0, 1e4])
def test_every_mean_is_finite_and_a_negative_one_is_pulled_up(noise: Noise, mean: float) -> None:
    means = torch.full((1, 1, 1, 3), mean, dtype=F64)
    y = noise.sample(torch.full_like(means, 2.0), Rng([1])).clamp_min(0.9)
    score = noise.score(y, means)
    for value in (noise.log_prob(y, means), score, noise.precision(means)(means), noise.variance(means)):
        assert bool(value.isfinite().all())
    if mean < 0:
        assert bool((score > 0).all())


def dense_covariance(row: int, std: float, white: float) -> Tensor:
    """The covariance of one image from the correlation by lag, entry by entry."""
    stamp = correlation()[row, 0]
    sites = [(c, i, j) for c in range(SHAPE[0]) for i in range(SHAPE[1]) for j in range(SHAPE[2])]
    matrix = torch.zeros(len(sites), len(sites), dtype=F64)
    for a, (c, i, j) in enumerate(sites):
        for b, (d, k, m) in enumerate(sites):
            if c == d and abs(i - k) <= 1 and abs(j - m) <= 2:
                matrix[a, b] = (1 - white) * stamp[1 + i - k, 2 + j - m]
            matrix[a, b] += white * (a == b)
    return std**2 * matrix


def correlated(good: Tensor | None) -> CorrelatedGaussian:
    return CorrelatedGaussian.from_correlation(t(0.7, 2.0), correlation(), SHAPE[1:], white=0.1, mask=good)


@pytest.mark.parametrize("good", [None, mask()])
def test_correlated_noise_equals_its_dense_covariance(good: Tensor | None) -> None:
    mean, noise = ramp(-2, 5), correlated(good)
    y = noise.sample(mean, Rng([1, 2]))
    for row, std in enumerate((0.7, 2.0)):
        keep = torch.ones(24, dtype=torch.bool) if good is None else good[row].flatten()
        covariance = dense_covariance(row, std, 0.1)[keep][:, keep]
        one = noise.select([row])
        law = torch.distributions.MultivariateNormal(mean[row].flatten()[keep], covariance)
        got = one.log_prob(y[row : row + 1], mean[row : row + 1])
        torch.testing.assert_close(got[0], law.log_prob(y[row].flatten()[keep]), rtol=1e-9, atol=1e-9)
        precision = dense(one.precision(mean[row : row + 1]), mean[row : row + 1])[keep][:, keep]
        torch.testing.assert_close(precision, torch.linalg.inv(covariance), rtol=1e-7, atol=1e-7)


def test_a_periodic_noise_is_not_the_embedded_one() -> None:
    """Power of the test above: wrapping the correlation around the stamp moves the precision by more than 5 %."""
    embedded = correlated(None).select([0])
    small = torch.zeros(1, 1, 3, 4, dtype=F64)
    small[..., [0, 1, 2], :] = 0.9 * correlation()[0, 0, [1, 2, 0]][:, [2, 3, 4, 1]]
    small[..., 0, 0] += 0.1
    symmetric = (small + small.flip(-1).roll(1, -1)) / 2
    wrapped = CorrelatedGaussian(t(0.7), torch.fft.fft2(symmetric).real)
    x = torch.ones(1, *SHAPE, dtype=F64)
    a, b = embedded.precision(x)(x), wrapped.precision(x)(x)
    assert float((a - b).norm() / a.norm()) > 0.05


def test_periodic_noise_without_mask_needs_no_iteration() -> None:
    """Its precision equals the inverse of its circulant covariance, to rounding."""
    spectrum = torch.fft.fft2(torch.tensor([[1.0, 0.3, 0.1, 0.3], [0.2, 0, 0, 0], [0.2, 0, 0, 0]], dtype=F64)).real[None, None]
    noise, x = CorrelatedGaussian(t(2.0), spectrum), torch.zeros(1, 1, 3, 4, dtype=F64)
    eye = torch.eye(12, dtype=F64).reshape(12, 1, 3, 4)
    covariance = 4 * torch.fft.ifft2(spectrum * torch.fft.fft2(eye)).real.flatten(1)
    torch.testing.assert_close(dense(noise.precision(x), x) @ covariance, torch.eye(12, dtype=F64), rtol=1e-12, atol=1e-12)


def test_a_large_stamp_leaves_out_only_a_constant() -> None:
    """5 520 pixels: the difference of two log-probabilities is still −(r₁ᵀPr₁ − r₀ᵀPr₀)/2."""
    noise = CorrelatedGaussian.from_correlation(t(0.7), correlation()[:1], (69, 80), white=0.2)
    y = noise.sample(torch.zeros(1, 1, 69, 80, dtype=F64), Rng([5]))
    means = [torch.zeros_like(y), torch.full_like(y, 0.1)]
    quadratic = [((y - m) * noise.precision(m)(y - m)).sum() / 2 for m in means]
    difference = noise.log_prob(y, means[1]) - noise.log_prob(y, means[0])
    torch.testing.assert_close(difference[0], quadratic[0] - quadratic[1], rtol=1e-9, atol=1e-6)


def test_single_precision_solves_reach_their_tolerance() -> None:
    good = torch.rand(1, 1, 40, 40, generator=torch.Generator().manual_seed(0)) > 0.1
    noise = CorrelatedGaussian.from_correlation(t(0.7), correlation()[:1], (40, 40), white=0.1, mask=good)
    v = torch.sin(torch.arange(1600, dtype=F64)).reshape(1, 1, 40, 40)
    exact = noise.whiten(v)
    error = (noise.to(torch.float32).whiten(v.float()) - exact).norm() / exact.norm()
    assert float(error) <= 3e-5  # 1e-6 times the condition number, at most 30


def test_an_impossible_correlation_is_refused() -> None:
    """A box of 3 × 3 lags has the spectrum (1 + 2 cos a)(1 + 2 cos b), lowest 3 · (1 + 2 cos π) = −3: white > 3/4."""
    stamp = torch.ones(1, 1, 3, 3, dtype=F64)
    with pytest.raises(DiffinvError, match=r"falls to -3.*white > 0\.75"):
        CorrelatedGaussian.from_correlation(t(1.0), stamp, (8, 8), white=0.7)
    assert float(CorrelatedGaussian.from_correlation(t(1.0), stamp, (8, 8), white=0.76).spectrum.min()) > 0
    for wrong, reason in ((3e-6 * stamp, "3e-06 at lag 0, not 1; divide it"), (stamp.clone(), "between opposite lags")):
        wrong[..., 0, 0] *= 0.9
        with pytest.raises(DiffinvError, match=reason):
            CorrelatedGaussian.from_correlation(t(1.0), wrong, (8, 8), white=0.9)
    with pytest.raises(ShapeError, match="odd sides"):
        CorrelatedGaussian.from_correlation(t(1.0), torch.ones(1, 1, 2, 3), (8, 8), white=0.5)
    with pytest.raises(ShapeError, match="must not be smaller"):
        CorrelatedGaussian(t(1.0), torch.ones(1, 1, 4, 4, dtype=F64)).whiten(torch.zeros(1, 1, 5, 4, dtype=F64))


def test_a_lopsided_spectrum_is_refused() -> None:
    with pytest.raises(DiffinvError, match="even"):
        CorrelatedGaussian(t(1.0), t(1, 2, 3, 4).reshape(1, 1, 1, 4))


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_an_unusable_sigma_is_refused_unless_it_is_masked(bad: float) -> None:
    std = torch.ones(1, 1, 2, 2, dtype=F64)
    std[0, 0, 1, 1] = bad
    with pytest.raises(DiffinvError, match="mask the pixel"):
        Gaussian(std)
    noise = Gaussian(std, torch.tensor([[[[True, True], [True, False]]]]))
    zero = torch.zeros(3, 1, 2, 2, dtype=F64)
    for value in (noise.sample(zero, Rng([1, 2, 3])), noise.score(zero, zero + 1), noise.perturb(zero, Rng([1, 2, 3]))):
        assert bool(value.isfinite().all())


@pytest.mark.parametrize("shape", [(2,), (2, 3), (2, 3, 1, 1), (2, 1, 4, 5), (1, 3, 4, 5)])
def test_leading_axes_of_sigma_are_those_of_the_data(shape: tuple[int, ...]) -> None:
    std = torch.arange(1, math.prod(shape) + 1, dtype=F64).reshape(shape)
    variance = Gaussian(std).variance(torch.zeros(2, 3, 4, 5, dtype=F64))
    full = std.reshape(*shape, *[1] * (4 - len(shape))).expand(2, 3, 4, 5)
    assert torch.equal(variance, full**2)


REFUSED: list[Callable[[], object]] = [
    lambda: Poisson(t(0), t(1)),
    lambda: Poisson(t(1), t(1), floor=0.0),
    lambda: PoissonGaussian(t(1), t(0), t(1)),
    lambda: HeteroscedasticGaussian(t(-1), t(1), t(1)),
    lambda: Gamma(t(0), t(1)),
    lambda: Gamma(t(1), t(0)),
    lambda: CorrelatedGaussian(t(0), torch.ones(1, 1, 2, 2)),
    lambda: Gaussian(t(1)).split(torch.zeros(1, 1, 2, 2), Rng([1]), share=1.0),
    lambda: Poisson(t(1), t(0)).split(torch.full((1, 1, 2, 2), 0.5), Rng([1])),
    lambda: Poisson(t(1), t(0)).split(torch.full((1, 1, 2, 2), -1.0), Rng([1])),
]


@pytest.mark.parametrize("make", REFUSED)
def test_an_impossible_noise_is_refused_in_one_line(make: Callable[[], object]) -> None:
    with pytest.raises(DiffinvError) as error:
        make()
    assert "\n" not in str(error.value)


def test_thinned_counts_are_whole_and_add_up() -> None:
    noise, mean = Poisson(t(4), t(0.5)), torch.full((1, 1, 8, 8), 3.0, dtype=F64)
    y = noise.sample(mean, Rng([1]))
    (first, one), (second, two) = noise.split(y, Rng([2]), share=0.25)
    counts = [half.gain * (part + 0.5) for part, half in ((first, one), (second, two))]
    assert float(one.gain) == 1.0
    assert all(float((c - c.round()).abs().max()) <= 1e-12 for c in counts)
    torch.testing.assert_close(counts[0] + counts[1], 4 * (y + 0.5), rtol=1e-12, atol=1e-12)
