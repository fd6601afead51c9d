"""One tiny noise a registered name, in float64: two images with different parameters, and some pixels masked.

Rates stay above 0.2 counts (the floor of the case that goes to negative means), so that z-tests of a few thousand draws
see enough photons to be Gaussian.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffinv.noise.base import Noise
from diffinv.noise.correlated import CorrelatedGaussian
from diffinv.noise.gamma import Gamma
from diffinv.noise.gaussian import Gaussian
from diffinv.noise.photon import HeteroscedasticGaussian, PoissonGaussian
from diffinv.noise.poisson import Poisson

SHAPE = (2, 3, 4)


@dataclass(frozen=True)
class NoiseCase:
    """noise; mean: (2, *SHAPE); splits: whether `split` is supported."""

    noise: Noise
    mean: Tensor
    splits: bool = True


def two(*values: float) -> Tensor:
    """Parameters of the two images, (2,)."""
    return torch.tensor(values, dtype=torch.float64)


def ramp(low: float, high: float, batch: int = 2) -> Tensor:
    """(batch, *SHAPE), from low to high, different in every element."""
    size = batch * torch.Size(SHAPE).numel()
    order = (torch.arange(size) * 17) % size
    return (low + (high - low) * order.double() / (size - 1)).reshape(batch, *SHAPE)


def mask() -> Tensor:
    """Three bad pixels in the first image, one in the second."""
    good = torch.ones(2, *SHAPE, dtype=torch.bool)
    good[0, 0, 1, 2] = good[0, 1, 1, 2] = good[0, 1, 2, 0] = good[1, 0, 0, 3] = False
    return good


def correlation() -> Tensor:
    """Correlation functions of two images by lag, (2, 1, 3, 5)."""
    rows = torch.tensor([[0.4, 1.0, 0.4], [0.2, 1.0, 0.2]], dtype=torch.float64)
    columns = torch.tensor([[0.1, 0.4, 1.0, 0.4, 0.1], [0.0, 0.3, 1.0, 0.3, 0.0]], dtype=torch.float64)
    return torch.einsum("bi,bj->bij", rows, columns)[:, None]


def spectrum() -> Tensor:
    """Spectrum of periodic noise on the data's own grid, (2, 1, 3, 4)."""
    row, column = torch.fft.fftfreq(3, dtype=torch.float64), torch.fft.fftfreq(4, dtype=torch.float64)
    frequency = (row[:, None] ** 2 + column[None] ** 2).sqrt()
    return (0.2 + torch.exp(-two(3.0, 6.0)[:, None, None] * frequency))[:, None]


def embedded(good: Tensor | None) -> CorrelatedGaussian:
    return CorrelatedGaussian.from_correlation(two(0.7, 2.0), correlation(), SHAPE[1:], white=0.1, mask=good)


CASES: dict[str, Callable[[], NoiseCase]] = {
    "gaussian": lambda: NoiseCase(Gaussian(ramp(0.5, 3), mask()), ramp(-2, 5)),
    "gaussian_correlated": lambda: NoiseCase(embedded(mask()), ramp(-2, 5)),
    "poisson": lambda: NoiseCase(Poisson(two(2, 5), two(0.3, 0.1), mask()), ramp(-0.2, 4)),
    "poisson_gaussian": lambda: NoiseCase(
        PoissonGaussian(two(2, 0.7), two(0.6, 1.5), ramp(0, 0.5, 1), mask(), floor=0.2), ramp(-1, 6), splits=False
    ),
    "heteroscedastic_gaussian": lambda: NoiseCase(
        HeteroscedasticGaussian(two(2, 5), two(0.6, 1.5), ramp(0, 0.5, 1), mask()), ramp(-1, 6), splits=False
    ),
    "gamma": lambda: NoiseCase(Gamma(two(1, 4), two(0.5, 0.1), mask()), ramp(-0.5, 6)),
}

VARIANTS: dict[str, Callable[[], NoiseCase]] = {
    "gaussian, white": lambda: NoiseCase(Gaussian(two(0.5, 3)), ramp(-2, 5)),
    "gaussian_correlated, embedded": lambda: NoiseCase(embedded(None), ramp(-2, 5)),
    "gaussian_correlated, periodic": lambda: NoiseCase(CorrelatedGaussian(two(0.7, 2), spectrum()), ramp(-2, 5)),
}
