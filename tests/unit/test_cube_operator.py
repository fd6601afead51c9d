"""Maps of parameters as images: the operator's derivatives, and posteriors by the package's samplers beside Laplace's."""

from __future__ import annotations

import torch

from diffinv.core.rng import Rng
from diffinv.engine.draws import Method
from diffinv.engine.reconstruct import reconstruct
from diffinv.likelihood import Observation
from diffinv.noise.poisson import Poisson
from diffinv.priors.analytic import FourierGaussianPrior
from diffinv.schedules import LogUniform
from diffinv.unmixing.cube_operator import SpectralMaps
from tests.unit.test_unmixing_fit import BOTH, CHANNELS, F64, HOT

SIDE = 4
NOISE = Poisson(torch.ones(1, dtype=F64), torch.zeros(1, dtype=F64), floor=1e-9)


def operator(total: float) -> SpectralMaps:
    return SpectralMaps(HOT, torch.full((1, 1), total, dtype=F64), torch.zeros(1, CHANNELS, dtype=F64), (SIDE, SIDE))


def field() -> FourierGaussianPrior:
    """ln A of σ 0.3 and u of σ 0.08 about ½, correlated over a pixel or two."""
    away = torch.minimum(torch.arange(SIDE), SIDE - torch.arange(SIDE)).double()
    shape = torch.fft.fft2(torch.exp(-(away[:, None] ** 2 + away**2) / 3)).real.clamp_min(1e-3)
    spectrum = shape / shape.mean() * torch.tensor([0.3, 0.08, 0.08], dtype=F64).square()[:, None, None]
    mean = torch.tensor([0.0, 0.5, 0.5], dtype=F64)[:, None, None].expand(3, SIDE, SIDE)
    return FourierGaussianPrior(mean[None].contiguous(), spectrum[None])


def test_a_pixel_of_the_cube_is_its_mixture() -> None:
    amplitude, background = torch.tensor([[200.0, 50.0], [10.0, 1.0]], dtype=F64), torch.ones(1, CHANNELS, dtype=F64)
    maps = SpectralMaps(BOTH, amplitude, background, (2, 3))
    assert maps.in_shape == (5, 2, 3) and maps.out_shape == (CHANNELS, 2, 3)
    x = 0.3 + 0.4 * Rng([1]).uniform(torch.empty(1, 2, 5, 2, 3, dtype=F64))[0]
    logs, u = x[1, :2, 1, 2], x[1, 2:, 1, 2]
    expected = BOTH.mean((amplitude[1] * logs.exp())[None], u[None], background)[0]
    torch.testing.assert_close(maps(x)[1, :, 1, 2], expected)


def test_the_posterior_under_a_gaussian_prior_is_laplaces_where_the_data_are_good() -> None:
    """4,000 counts a pixel: means to 0.35 σ in each of 48 values, of which the draws' own noise is 0.1, widths to 10 %."""
    prior, maps, draws = field(), operator(4000.0), 128
    x = prior.sample(torch.zeros(1, 3, SIDE, SIDE, dtype=F64), Rng([2]))
    likelihood = Observation(NOISE.sample(maps(x), Rng([3])), maps, NOISE)
    precision = torch.linalg.inv(_dense(prior))
    about, mean = x.flatten(), prior.mean.flatten()
    for _ in range(8):
        image = about.reshape(1, 3, SIDE, SIDE)
        information = _columns(likelihood.fisher(image).apply, len(about))
        step = likelihood.score(image).flatten() - precision @ (about - mean)
        about = about + torch.linalg.solve(information + precision, step)
    width = torch.linalg.inv(information + precision).diagonal().sqrt()
    method = Method(steps=24, schedule=LogUniform(1e-3, 1.0))
    found = reconstruct(likelihood, prior, draws=draws, seed=0, method=method).samples[0].flatten(1).double()
    assert float(((found.mean(0) - about) / width).abs().max()) < 0.35
    assert abs(float((found.std(0) / width).mean()) - 1) < 0.1
    assert float((width / torch.linalg.inv(precision).diagonal().sqrt()).max()) < 0.6  # what the data say, not the prior


def _dense(prior: FourierGaussianPrior) -> torch.Tensor:
    """The covariance, column by column."""
    return _columns(lambda basis: torch.fft.ifft2(prior.spectrum * torch.fft.fft2(basis)).real, prior.mean.numel())


def _columns(product, size: int) -> torch.Tensor:
    basis = torch.eye(size, dtype=F64).reshape(size, 3, SIDE, SIDE)
    return torch.cat([product(row[None]).reshape(1, size) for row in basis]).T
