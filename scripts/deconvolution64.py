"""Benchmark B1b: Gaussian deconvolution of signals of 64 samples, and the joint coverage of a method's draws.

x is a random walk from zero whose jumps have variance ¼, so C_ij = ¼ (1 + min(i, j)), and y = A x + n with A the valid part of
a convolution with a 13-tap Gaussian of σ = 2 samples, n white at 25 dB below the mean expected power of A x. The posterior is
N(m, S), known exactly. Joint HPD coverage of draws x_1 … x_M: the truth is covered at level p if its energy
E = (x − m)ᵀ S⁻¹ (x − m), −2 log posterior density up to a constant, is among the ⌈pM⌉ smallest of the draws' energies.
Exact draws are exchangeable with the truth and cover ⌈pM⌉/(M + 1): .882 with 50 draws at p = .9.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffinv.core.rng import Rng
from diffinv.priors.analytic import GaussianPrior
from diffinv.uncertainty.quantiles import quantile

LENGTH, JUMP_VARIANCE, TAPS, BLUR_SIGMA, SNR_DB = 64, 0.25, 13, 2.0, 25.0
SHAPE = (1, 1, LENGTH)
DATA_SHAPE = (1, 1, LENGTH - TAPS + 1)


def prior() -> GaussianPrior:
    """The random walk, images (1, 1, 64)."""
    index = torch.arange(LENGTH, dtype=torch.float64)
    covariance = JUMP_VARIANCE * (1 + torch.minimum(index[:, None], index[None]))
    return GaussianPrior(torch.zeros(1, *SHAPE, dtype=torch.float64), covariance)


def matrix() -> Tensor:
    """A (52, 64): each row is the unit-sum kernel, one sample further than the row above."""
    offset = torch.arange(TAPS, dtype=torch.float64) - TAPS // 2
    kernel = torch.exp(-(offset**2) / (2 * BLUR_SIGMA**2))
    rows = torch.zeros(DATA_SHAPE[-1], LENGTH, dtype=torch.float64)
    for k, row in enumerate(rows):
        row[k : k + TAPS] = kernel / kernel.sum()
    return rows


def noise_std() -> float:
    """σ_y: mean over the data of E[(A x)²], over 10^(25/10)."""
    blur = matrix()
    power = (blur @ prior().covariance @ blur.mT).diagonal().mean()
    return math.sqrt(float(power) / 10 ** (SNR_DB / 10))


@dataclass(frozen=True)
class Trials:
    """T truths with their data and exact posteriors: truth, mean (T, 64), y (T, 52), covariance S (64, 64) of all."""

    truth: Tensor
    y: Tensor
    mean: Tensor
    covariance: Tensor

    def energy(self, x: Tensor) -> Tensor:
        """(x − m)ᵀ S⁻¹ (x − m) of (T, M, 64): (T, M), float64."""
        gap = (x.double() - self.mean[:, None]).mT
        return torch.linalg.solve_triangular(torch.linalg.cholesky(self.covariance), gap, upper=False).pow(2).sum(1)

    def exact_draws(self, draws: int, rng: Rng) -> Tensor:
        """(T, M, 64) from the posterior itself. Arguments: rng: T streams."""
        z = rng.normal(torch.empty(len(self.y), draws, LENGTH, dtype=torch.float64))
        return self.mean[:, None] + z @ torch.linalg.cholesky(self.covariance).mT


def make_trials(rng: Rng) -> Trials:
    """One trial a stream of `rng`."""
    model, blur, std = prior(), matrix(), noise_std()
    truth = model.sample(torch.empty(len(rng), *SHAPE, dtype=torch.float64), rng.spawn(0)).flatten(1)
    clean = truth @ blur.mT
    y = clean + std * rng.spawn(1).normal(clean)
    mean, covariance = model.posterior(blur, y, torch.tensor(std**2, dtype=torch.float64))
    return Trials(truth, y, mean.flatten(1), covariance)


def covered(trials: Trials, draws: Tensor, level: float = 0.9) -> Tensor:
    """Whether each truth lies in the joint HPD region that its draws (T, M, 64) estimate: (T,) bool."""
    last = math.ceil(round(level * draws.shape[1], 9))
    edge = trials.energy(draws).kthvalue(last, dim=1).values
    return trials.energy(trials.truth[:, None])[:, 0] <= edge


def pixel_coverage(trials: Trials, draws: Tensor, level: float = 0.9) -> Tensor:
    """Exact posterior mass in each sample's central interval, averaged over samples: (T,)."""
    std = trials.covariance.diagonal().sqrt()
    low, high = (quantile(draws.double(), p) for p in ((1 - level) / 2, (1 + level) / 2))
    mass = torch.special.ndtr((high - trials.mean) / std) - torch.special.ndtr((low - trials.mean) / std)
    return mass.mean(1)


def expected_coverage(draws: int, level: float = 0.9) -> float:
    """Joint coverage of exact draws: ⌈pM⌉/(M + 1)."""
    return math.ceil(round(level * draws, 9)) / (draws + 1)
