"""One tiny closed-form prior a registered name, in float64, with its exact mean and covariance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffinv.priors.analytic import FourierGaussianPrior, GaussianPrior, LowRankGaussianPrior, MixturePrior
from diffinv.priors.base import Denoiser

SHAPE = (2, 3, 4)
SIZE = 24


@dataclass(frozen=True)
class PriorCase:
    """prior; mean: (1, *SHAPE) and covariance (SIZE, SIZE) of the images."""

    prior: Denoiser
    mean: Tensor
    covariance: Tensor


def images(count: int) -> Tensor:
    """(count, *SHAPE), all different."""
    return torch.sin(torch.arange(count * SIZE, dtype=torch.float64) * 1.7).reshape(count, *SHAPE)


def covariance() -> Tensor:
    """A full covariance with eigenvalues between 0.2 and about 3."""
    factor = torch.cos(torch.arange(SIZE * SIZE, dtype=torch.float64) ** 1.3).reshape(SIZE, SIZE)
    return factor @ factor.mT / SIZE + 0.2 * torch.eye(SIZE, dtype=torch.float64)


def even_spectrum() -> Tensor:
    """(1, *SHAPE), positive and even."""
    row, column = torch.fft.fftfreq(3, dtype=torch.float64), torch.fft.fftfreq(4, dtype=torch.float64)
    power = 2 * torch.exp(-5 * (row[:, None].abs() + column[None].abs()))
    return torch.stack([power + 0.1, 0.5 * power + 0.3])[None]


def gaussian() -> PriorCase:
    return PriorCase(GaussianPrior(images(1), covariance()), images(1), covariance())


def gaussian_fourier() -> PriorCase:
    prior = FourierGaussianPrior(images(1), even_spectrum())
    eye = torch.eye(SIZE, dtype=torch.float64).reshape(SIZE, *SHAPE)
    dense = torch.fft.ifft2(even_spectrum() * torch.fft.fft2(eye)).real.flatten(1)
    return PriorCase(prior, images(1), dense)


def gaussian_low_rank() -> PriorCase:
    factor = torch.cos(torch.arange(SIZE * 3, dtype=torch.float64) ** 1.3).reshape(SIZE, 3)
    rest = torch.tensor(0.3, dtype=torch.float64)
    dense = factor @ factor.mT + 0.3 * torch.eye(SIZE, dtype=torch.float64)
    return PriorCase(LowRankGaussianPrior(images(1), factor, rest), images(1), dense)


def mixture(component: Tensor) -> PriorCase:
    """Three components of one covariance, () or (SIZE, SIZE)."""
    means, weights = images(3), torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    mean = torch.einsum("k,k...->...", weights, means)[None]
    spread = (means - mean).flatten(1)
    dense = component if component.ndim else component * torch.eye(SIZE, dtype=torch.float64)
    return PriorCase(MixturePrior(means, weights, component), mean, dense + (spread.mT * weights) @ spread)


CASES: dict[str, Callable[[], PriorCase]] = {
    "gaussian": gaussian,
    "gaussian_fourier": gaussian_fourier,
    "gaussian_low_rank": gaussian_low_rank,
    "mixture": lambda: mixture(torch.tensor(0.4, dtype=torch.float64)),
}

VARIANTS: dict[str, Callable[[], PriorCase]] = {"mixture, full covariance": lambda: mixture(covariance())}
