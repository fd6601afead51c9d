"""Closed-form Gaussian EM: the likelihood never falls, the fixed points are exact, for blurred, noisy and masked data."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diffinv.core.checks import DiffinvError, UnsupportedError
from diffinv.core.rng import Rng
from diffinv.likelihood import Observation
from diffinv.noise.correlated import CorrelatedGaussian
from diffinv.noise.gaussian import Gaussian
from diffinv.noise.poisson import Poisson
from diffinv.operators.algebra import Diagonal, Identity, Scaled
from diffinv.operators.border import ZeroBorder
from diffinv.operators.convolution import Convolution, PeriodicConvolution
from diffinv.operators.sampling import Mask
from diffinv.priors.analytic import FourierGaussianPrior, LowRankGaussianPrior
from diffinv.reconstructors.spectra import transfer_of
from diffinv.training.gaussian import fourier_em, low_rank_em

F64 = torch.float64
SHAPE = (2, 8, 6)


def power() -> Tensor:
    """(1, *SHAPE), even."""
    row, column = torch.fft.fftfreq(8, dtype=F64), torch.fft.fftfreq(6, dtype=F64)
    k = (row[:, None] ** 2 + column[None] ** 2).sqrt()
    return torch.stack([4 * torch.exp(-6 * k) + 0.05, 2 * torch.exp(-3 * k)])[None]


def stationary(count: int, seed: int = 0) -> Tensor:
    prior = FourierGaussianPrior(torch.full((1, *SHAPE), 1.5, dtype=F64), power())
    return prior.sample(torch.zeros(count, *SHAPE, dtype=F64), Rng.for_draws(seed, range(count), 1))


def blurred(count: int, seed: int = 0) -> Observation:
    """A PSF and a noise level of each image's own."""
    width = 0.5 + Rng.for_draws(9, range(count), 1).uniform(torch.zeros(count, 1, 1, 1, dtype=F64))
    axis = torch.arange(5, dtype=F64) - 2
    kernel = torch.exp(-(axis[:, None] ** 2 + axis**2) / 2 / width**2)
    operator = PeriodicConvolution(kernel / kernel.sum((-2, -1), keepdim=True), 2, SHAPE[1:])
    noise = Gaussian(torch.linspace(0.1, 0.4, count, dtype=F64))
    return Observation(
        noise.sample(operator(stationary(count, seed)), Rng.for_draws(seed + 50, range(count), 1)), operator, noise
    )


def rises(values: tuple[float, ...]) -> bool:
    """Up to the rounding of a sum of this size."""
    return all(b >= a - 1e-9 * abs(a) for a, b in zip(values, values[1:], strict=False)) and values[-1] > values[0]


def test_the_likelihood_rises_and_the_spectrum_is_that_of_the_images() -> None:
    """Within 5 of the standard deviations that the data allow (Cramér–Rao), where these are below 10 %."""
    data = [blurred(600), blurred(600, seed=1)]
    fit = fourier_em(data, laps=20, mean_image=False)
    assert rises(fit.log_likelihood)
    assert isinstance(fit.prior, FourierGaussianPrior)
    blurs, levels = transfer_of(data[0].operator).abs() ** 2, data[0].noise.std[:, None, None, None] ** 2
    information = 2 * ((blurs * power() / (blurs * power() + levels)) ** 2).sum(0, keepdim=True)
    error = (2 / information).sqrt()  # of ln S at a frequency that is its own mirror image; 1/√2 of it at the others
    clear = error < 0.1
    ratio = (fit.prior.spectrum.double() / power())[clear]
    assert int(clear.sum()) >= 30
    assert float(((ratio - 1) / error[clear]).abs().max()) <= 5
    assert abs(float(ratio.mean()) - 1) <= 0.04
    assert abs(float(fit.prior.mean.mean()) - 1.5) <= 0.1


def test_without_noise_and_blur_the_first_lap_gives_the_moments_of_the_images() -> None:
    x = stationary(50)
    data = Observation(x, Identity(SHAPE), Gaussian(torch.full((1,), 1e-6, dtype=F64)))
    fit = fourier_em([data], laps=1, mean_image=True)
    torch.testing.assert_close(fit.prior.mean.double(), x.mean(0, keepdim=True), rtol=1e-5, atol=1e-5)
    expected = torch.fft.fft2(x - x.mean(0), norm="ortho").abs().square().mean(0, keepdim=True)
    torch.testing.assert_close(fit.prior.spectrum.double(), expected, rtol=1e-5, atol=1e-8)


def test_white_noise_has_the_closed_maximum() -> None:
    """With one noise level, S = max(mean |ŷ|² − v, 0), reached where it is well above 0."""
    y = stationary(400) + 0.5 * Rng.for_draws(3, range(400), 1).normal(torch.zeros(400, *SHAPE, dtype=F64))
    fit = fourier_em([Observation(y, Identity(SHAPE), Gaussian(torch.tensor([0.5], dtype=F64)))], laps=300, mean_image=True)
    best = torch.fft.fft2(y - y.mean(0), norm="ortho").abs().square().mean(0, keepdim=True) - 0.25
    clear = best > 0.1
    torch.testing.assert_close(fit.prior.spectrum.double()[clear], best[clear], rtol=1e-3, atol=1e-4)


def test_correlated_noise_is_told_from_the_images() -> None:
    spectrum = (0.2 + 3 * power()[:, :1] / power().max()).expand(1, 1, 8, 6)
    noise = CorrelatedGaussian(torch.tensor([0.7], dtype=F64), spectrum)
    y = noise.sample(stationary(1500), Rng.for_draws(4, range(1500), 1))
    right = fourier_em([Observation(y, Identity(SHAPE), noise)], laps=60, mean_image=False).prior.spectrum.double()
    white = Gaussian(torch.tensor([0.7], dtype=F64))
    wrong = fourier_em([Observation(y, Identity(SHAPE), white)], laps=60, mean_image=False).prior.spectrum.double()
    bright = power() > 0.3
    error = lambda found: float((found / power() - 1)[bright].abs().mean())
    assert error(right) <= 0.06
    assert error(wrong) >= 2 * error(right)


def test_frequencies_that_nobody_sees_follow_the_power_law_of_the_others() -> None:
    """A blur of 2.5 pixels hides most frequencies; as white there as the data, they would have up to 30 times their power."""
    axis = torch.fft.fftfreq(32, dtype=F64)
    squares = axis[:, None] ** 2 + axis**2
    true = (50 * (1 + squares / 0.06**2) ** -1.75)[None, None]
    prior = FourierGaussianPrior(torch.zeros(1, 1, 32, 32, dtype=F64), true)
    x = prior.sample(torch.zeros(300, 1, 32, 32, dtype=F64), Rng.for_draws(0, range(300), 1))
    reach = torch.arange(21, dtype=F64) - 10
    kernel = torch.exp(-(reach[:, None] ** 2 + reach**2) / 2 / 2.5**2)[None, None]
    operator, noise = PeriodicConvolution(kernel / kernel.sum(), 1, (32, 32)), Gaussian(torch.tensor([0.05], dtype=F64))
    data = Observation(noise.sample(operator(x), Rng.for_draws(1, range(300), 1)), operator, noise)
    spectrum = fourier_em([data], laps=10, mean_image=False).prior.spectrum.double()
    unseen = transfer_of(operator).abs() ** 2 * true < 1e-3 * 0.05**2
    assert float(unseen.double().mean()) > 0.7
    ratio = spectrum[unseen] / true[unseen]
    assert float(ratio.min()) > 0.7 and float(ratio.max()) < 1.4


def test_a_channel_that_a_row_does_not_show_is_a_datum_less() -> None:
    """Masked in two rows of three, whatever stands there, it has the spectrum and the mean of the rows that show it."""
    data = blurred(600)
    shown = torch.arange(600) % 3 == 0
    mask = torch.ones(600, *SHAPE, dtype=torch.bool)
    mask[~shown, 1] = False
    partly = replace(data, y=data.y.where(mask, torch.nan), noise=replace(data.noise, mask=mask))
    found = fourier_em([partly], laps=200, mean_image=True)
    assert rises(found.log_likelihood)
    whole, some = (fourier_em([d], laps=200, mean_image=True).prior for d in (data, data.select(shown.nonzero()[:, 0])))
    for channel, expected in ((0, whole), (1, some)):
        torch.testing.assert_close(found.prior.mean[:, channel], expected.mean[:, channel], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(found.prior.spectrum[:, channel], expected.spectrum[:, channel], rtol=1e-2, atol=1e-6)


def test_a_channel_that_is_rarely_shown_learns_from_its_rows_and_one_that_never_is_is_refused() -> None:
    """The closed maximum of white noise, of the 12 rows that show it; none of them is among those that the start is made of."""
    noise = Gaussian(torch.tensor([0.5], dtype=F64))
    y = noise.sample(stationary(600), Rng.for_draws(3, range(600), 1))
    mask = torch.zeros(600, *SHAPE, dtype=torch.bool)
    mask[:, 0] = True
    with pytest.raises(DiffinvError, match="no row shows channel 1"):
        fourier_em([Observation(y, Identity(SHAPE), replace(noise, mask=mask))], laps=1, mean_image=True)
    mask[1::50, 1] = True
    fit = fourier_em([Observation(y.where(mask, 0.0), Identity(SHAPE), replace(noise, mask=mask))], laps=300, mean_image=True)
    shown = y[1::50, 1]
    best = torch.fft.fft2(shown - shown.mean(0), norm="ortho").abs().square().mean(0) - 0.25
    clear = best > 0.1
    torch.testing.assert_close(fit.prior.spectrum[0, 1].double()[clear], best[clear], rtol=1e-3, atol=1e-4)


def test_the_unit_of_the_data_is_that_of_the_operator() -> None:
    """A gain of 1e-6, and the noise in its unit: the same images."""
    x, gain = stationary(60), 1e-6
    white = 0.3 * Rng.for_draws(3, range(60), 1).normal(x)
    number = lambda value: torch.tensor([value], dtype=F64)
    seen = lambda g: Observation(g * (x + white), Scaled(number(g), Identity(SHAPE)), Gaussian(number(0.3 * g)))
    small, plain = (fourier_em([seen(g)], laps=5, mean_image=True).prior for g in (gain, 1.0))
    torch.testing.assert_close(small.spectrum, plain.spectrum, rtol=1e-3, atol=1e-6)


def test_a_blur_on_the_sky_is_taken_for_one_on_the_torus() -> None:
    kernel = torch.rand(1, 1, 3, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    expected = transfer_of(PeriodicConvolution(kernel, 2, SHAPE[1:]))
    torch.testing.assert_close(transfer_of(Convolution(kernel, 2, SHAPE[1:], ZeroBorder())), expected)
    wide = torch.nn.functional.pad(kernel, (4, 4, 6, 6))  # 15 × 11, larger than the image
    torch.testing.assert_close(transfer_of(Convolution(wide, 2, SHAPE[1:], ZeroBorder())), expected)


def factors() -> tuple[Tensor, Tensor]:
    factor = 2 * torch.cos(torch.arange(48 * 3, dtype=F64) ** 1.3).reshape(48, 3) / 48**0.5 * 3
    return torch.linspace(-1, 1, 48, dtype=F64).reshape(1, 1, 8, 6), factor


def low_rank(count: int) -> Tensor:
    mean, factor = factors()
    prior = LowRankGaussianPrior(mean, factor, torch.tensor(0.05, dtype=F64))
    return prior.sample(torch.zeros(count, 1, 8, 6, dtype=F64), Rng.for_draws(2, range(count), 1))


def masked(count: int) -> Observation:
    x = low_rank(count)
    std = 0.05 + 0.3 * Rng.for_draws(5, range(count), 1).uniform(x)
    mask = Rng.for_draws(6, range(count), 1).uniform(x) < 0.5
    noise = Gaussian(std, mask)
    return Observation(noise.sample(x, Rng.for_draws(7, range(count), 1)).where(mask, torch.nan), Mask(mask), noise)


def test_masked_images_give_their_covariance() -> None:
    """Half of the pixels and uneven noise, against the covariance of the 1,500 images themselves, which is 6 % off the truth."""
    data, x = masked(1500), low_rank(1500)
    clean = replace(data, y=data.y.nan_to_num())
    fit = low_rank_em([clean.select(slice(0, 700)), clean.select(slice(700, 1500))], rank=3, laps=20)
    assert rises(fit.log_likelihood)
    mean, factor = factors()
    size = (factor @ factor.T).norm()
    assert float((fit.prior.covariance.double() - torch.cov(x.flatten(1).T)).norm() / size) <= 0.06
    assert abs(float(fit.prior.rest) - 0.05) <= 0.005
    assert float((fit.prior.mean.double() - mean).abs().max()) <= 0.15


def test_the_likelihood_of_low_rank_em_is_that_of_the_dense_gaussian() -> None:
    data = masked(20)
    clean = replace(data, y=data.y.nan_to_num())
    fit = low_rank_em([clean], rank=2, laps=3)
    covariance, total = fit.prior.covariance.double(), 0.0
    for y, mask, std in zip(clean.y, data.operator.mask, data.noise.std, strict=True):
        seen = mask.flatten()
        dense = covariance[seen][:, seen] + torch.diag(std.flatten()[seen] ** 2)
        mean = fit.prior.mean.double().flatten()[seen]
        total += float(torch.distributions.MultivariateNormal(mean, dense).log_prob(y.flatten()[seen]))
    assert abs(total - fit.log_likelihood[-1]) <= 1e-3 * abs(total)  # the prior is float32


def test_weights_are_units() -> None:
    x = low_rank(40)
    weight = torch.linspace(0.5, 2, 48, dtype=F64).reshape(1, 1, 8, 6)
    plain = Observation(x, Identity((1, 8, 6)), Gaussian(torch.full((1,), 0.2, dtype=F64)))
    weighed = Observation(weight * x, Diagonal(weight), Gaussian(0.2 * weight))
    one, other = (low_rank_em([d], rank=2, laps=3).prior.covariance for d in (plain, weighed))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_what_is_not_diagonal_is_refused() -> None:
    data = masked(10)
    with pytest.raises(UnsupportedError, match="low_rank_em for masks"):
        fourier_em([data], laps=1, mean_image=True)
    with pytest.raises(UnsupportedError, match="use low_rank_em"):
        fourier_em([Observation(low_rank(2), Identity((1, 8, 6)), data.noise.select([0, 1]))], laps=1, mean_image=True)
    with pytest.raises(UnsupportedError, match="mixes pixels"):
        low_rank_em([blurred(10)], rank=2, laps=1)
    counts = Observation(low_rank(8), Identity((1, 8, 6)), Poisson(torch.ones(1), torch.ones(1)))
    with pytest.raises(UnsupportedError, match="Poisson"):
        low_rank_em([counts], rank=2, laps=1)
    with pytest.raises(DiffinvError, match="rank 10 of 48"):
        low_rank_em([replace(data, y=data.y.nan_to_num())], rank=10, laps=1)
    with pytest.raises(DiffinvError, match="one"):
        fourier_em([blurred(2), Observation(low_rank(2), Identity((1, 8, 6)), Gaussian(torch.ones(1)))], laps=1, mean_image=True)
