"""Tiny inverse problems on 4×4 pixels: priors and likelihoods of every kind, for two images with different parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffinv.core.rng import Rng
from diffinv.guidance.proximal import Proximal
from diffinv.likelihood import Flat, Joint, Likelihood, Observation
from diffinv.noise.correlated import CorrelatedGaussian
from diffinv.noise.gaussian import Gaussian
from diffinv.noise.photon import PoissonGaussian
from diffinv.noise.poisson import Poisson
from diffinv.operators.algebra import compose
from diffinv.operators.convolution import PeriodicConvolution
from diffinv.operators.detector import Arcsinh
from diffinv.priors.analytic import MixturePrior
from diffinv.priors.base import Denoiser
from diffinv.schedules import LogUniform
from tests.cases.guidance import SHAPE, SIZE, blur, kernels, smooth_prior
from tests.cases.operators import draw, positive
from tests.contracts.test_guidance import levels

GRID = LogUniform(1e-2, 1e2).grid(6)
EXACT = {"iterations": 80, "tol": 1e-13}
UNUSED = Proximal(1.0)
STDS = levels(0.1, 0.3)


class Still:
    """Stands in for `Rng`: all normals are 0."""

    def normal(self, like: Tensor) -> Tensor:
        return torch.zeros_like(like)


def streams(seed: int = 3) -> Rng:
    return Rng.for_draws(seed, [7, 9], 1)


def zeros() -> Tensor:
    return torch.zeros(2, *SHAPE, dtype=torch.float64)


def mixture() -> MixturePrior:
    """Its Jacobian depends on x: a Gaussian would hide a Jacobian taken at the wrong place."""
    return MixturePrior(draw(3, *SHAPE, seed=9), levels(0.2, 0.5, 0.3), 0.3 * smooth_prior().covariance)


def white(operator) -> Observation:
    return Observation(draw(2, *operator.out_shape, seed=20), operator, Gaussian(STDS))


def counts(operator=None) -> Observation:
    y = torch.floor(3 * positive(2, *SHAPE, seed=4))
    return Observation(y, operator or blur(kernels()), Poisson(levels(2.0, 5.0), levels(0.5, 0.3)))


def electrons() -> Observation:
    return Observation(
        2 + draw(2, *SHAPE, seed=6), blur(kernels()), PoissonGaussian(levels(2, 3), levels(0.6, 1.5), levels(0.5, 1))
    )


def correlated(operator) -> Observation:
    row, column = torch.fft.fftfreq(4, dtype=torch.float64), torch.fft.fftfreq(4, dtype=torch.float64)
    spectrum = 0.2 + torch.exp(-5 * (row[:, None] ** 2 + column**2).sqrt())
    return Observation(draw(2, *SHAPE, seed=21), operator, CorrelatedGaussian(STDS, spectrum[None, None]))


def periodic() -> PeriodicConvolution:
    return PeriodicConvolution(kernels(), 1, SHAPE[1:])


LIKELIHOODS: dict[str, Callable[[], Likelihood]] = {
    "gaussian": lambda: white(blur(kernels())),
    "poisson": counts,
    "poisson_gaussian": electrons,
    "correlated": lambda: correlated(periodic()),
    "joint": lambda: Joint((white(blur(kernels())), counts(), correlated(periodic()))),
    "non_linear": lambda: white(compose(Arcsinh(SHAPE, levels(0.4, 1.0)), blur(kernels()))),
    "flat": lambda: Flat(SHAPE),
}


def dense_denoiser(prior: Denoiser, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """D (n,) and ∂D/∂x (n, n) of one row."""
    return prior(x, sigma).flatten(), torch.func.jacrev(lambda v: prior(v, sigma))(x).reshape(SIZE, SIZE)


def dense_operator(data: Observation, row: int) -> Tensor:
    """A of one row, (m, n), by its columns."""
    eye = torch.eye(SIZE, dtype=torch.float64).reshape(SIZE, *SHAPE)
    return data.operator.select([row])(eye).flatten(1).T
