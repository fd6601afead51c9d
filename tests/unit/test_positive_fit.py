"""The positive image of a first lap: it fits to within the noise, no closer, and is sharper than the data."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diffinv.core.checks import UnsupportedError
from diffinv.core.rng import Rng
from diffinv.likelihood import Observation
from diffinv.noise.gaussian import Gaussian
from diffinv.noise.poisson import Poisson
from diffinv.operators.algebra import Identity
from diffinv.operators.border import ZeroBorder
from diffinv.operators.convolution import Convolution
from diffinv.priors.analytic import FourierGaussianPrior
from diffinv.training.expectation import PositiveFit

PRIOR = FourierGaussianPrior(torch.zeros(1, 1, 16, 16), torch.ones(1, 1, 16, 16))


def points(count: int, noise: Gaussian) -> tuple[Tensor, Observation]:
    """Three points each on an empty sky, blurred and noisy."""
    rng = Rng.for_draws(3, range(count), 1)
    x = torch.zeros(count, 1, 16, 16)
    places = (rng.uniform(torch.zeros(count, 3)) * 256).long()
    x.flatten(1).scatter_(1, places, 50.0)
    axis = torch.arange(7.0) - 3
    kernel = (-(axis[:, None] ** 2 + axis**2) / 3).exp()
    blur = Convolution((kernel / kernel.sum())[None, None], 1, (16, 16), ZeroBorder())
    return x, Observation(noise.sample(blur(x), rng.spawn(1)), blur, noise)


def test_a_positive_fit_is_positive_fits_to_within_the_noise_and_sharpens() -> None:
    x, data = points(40, Gaussian(torch.full((1,), 0.3)))
    found = PositiveFit().fit(data)
    assert float(found.min()) >= 0
    chi2, of_truth = (data.residuals(image)[0].square().mean((1, 2, 3)) for image in (found, x))
    assert bool((chi2 <= of_truth.clamp_min(1) + 0.01).all())  # noise may be larger than σ says
    assert float(chi2.min()) > 0.99  # it stops there
    error = lambda images: float((images - x).square().mean())
    assert error(found) < 0.7 * error(data.y)
    alone = PositiveFit().fit(data.select([7]))
    torch.testing.assert_close(alone, found[7:8], rtol=1e-3, atol=1e-3)


def test_a_positive_fit_stays_flat_where_no_datum_looks() -> None:
    """A band that is missing, or a hole wider than the PSF, is no sky without light."""
    good = torch.ones(40, 1, 16, 16, dtype=torch.bool)
    good[:, :, :, :13] = False  # the PSF is seven pixels wide: no datum looks at the first ten columns
    _, data = points(40, Gaussian(torch.full((1,), 0.3), good))
    found = PositiveFit().fit(data)[..., :9].flatten(1)
    assert bool((found > 0).all()) and float((found / found[:, :1] - 1).abs().max()) < 1e-6
    first = torch.arange(2).reshape(1, 2, 1, 1).expand(1, 2, 8, 8) == 0
    lacking = Observation(torch.full((1, 2, 8, 8), 3.0), Identity((2, 8, 8)), Gaussian(torch.ones(1), first))
    assert float(PositiveFit().fit(lacking)[:, 1].amin()) > 1


def test_a_positive_fit_sees_no_bad_pixel_and_wants_gaussian_noise() -> None:
    good = torch.ones(40, 1, 16, 16, dtype=torch.bool)
    good[:, :, 4:6, 7] = False
    x, data = points(40, Gaussian(torch.full((1,), 0.3), good))
    broken = replace(data, y=data.y.where(good, torch.nan))
    found = PositiveFit().fit(broken)
    drawn = PositiveFit().draw(PRIOR, replace(data, y=data.y.where(good, 1e6)), Rng.for_draws(0, range(40), 1))
    assert torch.equal(found, drawn)  # whatever the prior
    assert bool(found.isfinite().all())
    with pytest.raises(UnsupportedError, match="PositiveFit: Poisson"):
        PositiveFit().fit(replace(data, noise=Poisson(torch.ones(1), torch.zeros(1))))
