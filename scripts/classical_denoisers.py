"""Classical denoisers as reconstructors, each with one constant that is chosen by SURE on the training images.

* Gaussian smoothing: its width.
* Wiener: none; the power spectrum is that of the training images less the noise's.
* Starlet: details shrunk towards 0 by k σ_j (soft), or cut below k σ_j (hard; SURE is not valid for it, as it jumps), with σ_j
  the noise of scale j, from draws of the noise.
All are fixed functions of the data after that, in units of the noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from baselines import Starlet
from torch import Tensor
from torch.nn import functional

from diffinv.core.rng import Rng
from diffinv.likelihood import Observation
from diffinv.losses.base import MeasuredBatch
from diffinv.losses.sure import Sure
from diffinv.noise.base import Noise
from diffinv.reconstructors.base import Reconstructor

SCALES, DRAWS = 4, 512


class Same(Reconstructor):
    """f(y) = y: a risk of 1 by definition."""

    def forward(self, observation: Observation) -> Tensor:
        return observation.y


class Smoothed(Reconstructor):
    """f(y) = G ∗ y, a Gaussian of standard deviation `width` pixels; no light outside."""

    def __init__(self, width: float) -> None:
        super().__init__()
        axis = torch.arange(-8.0, 9.0)
        self.kernel = torch.exp(-(axis**2) / (2 * width**2))
        self.kernel = self.kernel / self.kernel.sum()

    def forward(self, observation: Observation) -> Tensor:
        y = functional.conv2d(observation.y, self.kernel.reshape(1, 1, -1, 1), padding=(8, 0))
        return functional.conv2d(y, self.kernel.reshape(1, 1, 1, -1), padding=(0, 8))


class Wiener(Reconstructor):
    """f(y) = F⁻¹ S/(S + P) F y, P of the noise and S = max(mean |F y|² − P, 0) of training images and their mirror images."""

    def __init__(self, y: Tensor, noise: Noise) -> None:
        super().__init__()
        power = lambda v: torch.fft.fft2(v, norm="ortho").abs().square().mean(0, keepdim=True)
        total, level = power(y), power(_draws(y, noise))
        total = (total + total.transpose(-2, -1)) / 2
        total = (total + total.flip(-1).roll(1, -1)) / 2
        self.gain = ((total - level) / total).clamp(0, 1)

    def forward(self, observation: Observation) -> Tensor:
        return torch.fft.ifft2(self.gain * torch.fft.fft2(observation.y)).real


class Shrunk(Reconstructor):
    """f(y) = c_J + Σ_j T(w_j, k σ_j) over the starlet details w_j of y and its coarse part c_J."""

    def __init__(self, factor: float, y: Tensor, noise: Noise, *, hard: bool) -> None:
        super().__init__()
        self.transform, self.hard = Starlet(SCALES, coarse=True), hard
        self.threshold = factor * self.transform.forward(_draws(y, noise))[:, :SCALES].std((0, 2, 3), keepdim=True)

    def forward(self, observation: Observation) -> Tensor:
        parts = self.transform.forward(observation.y)
        details, coarse = parts[:, :SCALES], parts[:, SCALES:]
        shrunk = details.sign() * (details.abs() - self.threshold).clamp_min(0)
        kept = details.where(details.abs() > self.threshold, 0.0) if self.hard else shrunk
        return coarse + kept.sum(1, keepdim=True)


def _draws(y: Tensor, noise: Noise) -> Tensor:
    return noise.sample(torch.zeros(DRAWS, *y.shape[1:]), Rng.for_draws(31, range(DRAWS), 1))


@torch.no_grad()
def by_sure(make: Callable[[float], Reconstructor], values: Sequence[float], data: Observation) -> tuple[Reconstructor, float]:
    """The one with the lowest mean SURE on the data, and its constant."""
    rng = lambda: Rng.for_draws(32, range(data.y.shape[0]), 1)
    risk = {value: float(Sure()(make(value), MeasuredBatch(data), rng()).mean()) for value in values}
    best = min(risk, key=risk.get)
    return make(best), best
