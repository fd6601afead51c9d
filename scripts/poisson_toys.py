"""Counting-noise inverse problems of eight pixels, and what says whether draws of their posterior are honest.

Smooth: x ~ N(1, C) on a line of eight pixels, C = 0.3² R, R = 0.95 exp(−r²/(2·1.5²)) + 0.05 I. Range: a mixture over brightness,
x ~ Σ_f w_f N(f s, 0.1² R), f from 0.5 to 4.5, w ∝ 1/f, s a profile with mean 1: nine to one between bright and faint. Either is
blurred by (0.25, 0.55, 0.2) with nothing beyond the ends; y is Poisson with g counts a unit, or Poisson–Gaussian with a sky of
0.5 units and read noise of 1 electron. A rate is negative with probability 1e-4 a pixel at most, where the noise model's floor is
not a density any more.

Simulation-based calibration: truth x*, data y* of it, M draws of p(x | y*). If they are right, the rank of t(x*) among t(x_m)
is uniform on 0 … M for every t, also for a t that depends on y (Modrák et al. 2023): `log-likelihood` catches draws that
ignore the data, which flux, pixel and projection cannot. Tested by χ² of 16 bins and by the Kolmogorov–Smirnov distance of the
rank's distribution function; the smallest p-value of all, times their number, is the row's (Bonferroni).
Coverage: the interval from the k-th to the (M + 1 − k)-th of M draws holds the truth with probability 1 − 2k/(M + 1).
Invariant: truths, data and streams of a problem are the same for every method.

References: Talts, Betancourt, Simpson, Vehtari & Gelman, *Validating Bayesian Inference Algorithms with Simulation-Based
Calibration*, 2018, arXiv:1804.06788; Modrák, Moon, Kim, Bürkner, Huurre, Faltejsková, Gelman & Vehtari, *Simulation-Based
Calibration Checking for Bayesian Computation: The Choice of Test Quantities Shapes Sensitivity*, 2023, arXiv:2211.02383.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from scipy.stats import chi2, kstwo
from torch import Tensor

from diffinv.core.rng import Rng
from diffinv.core.types import Image
from diffinv.likelihood import Observation
from diffinv.noise.photon import PoissonGaussian
from diffinv.noise.poisson import Poisson
from diffinv.operators.spectral import BandMixing
from diffinv.priors.analytic import GaussianPrior, MixturePrior

PIXELS, READ_NOISE, SKY = 8, 1.0, 0.5
PROFILE = (0.7, 0.9, 1.1, 1.3, 1.3, 1.1, 0.9, 0.7)
CHUNK, BINS = 32, 16
F64 = torch.float64

Prior = GaussianPrior | MixturePrior
# Draws of p(x | y), one a row of `like` (rows, *image), from one stream a row.
Draw = Callable[[Prior, Observation, Image, Rng], Image]


def correlation() -> Tensor:
    """R, (8, 8)."""
    axis = torch.arange(PIXELS, dtype=F64)
    return 0.95 * torch.exp(-((axis[:, None] - axis) ** 2) / (2 * 1.5**2)) + 0.05 * torch.eye(PIXELS, dtype=F64)


def smooth() -> GaussianPrior:
    """N(1, 0.3² R). Pixels are kept as channels, so that an operator is a matrix."""
    return GaussianPrior(torch.ones(1, PIXELS, 1, 1, dtype=F64), 0.3**2 * correlation())


def bright_and_faint() -> MixturePrior:
    """Brightness nearly log-uniform: neighbouring components are one standard deviation apart."""
    flux = torch.linspace(0.5, 4.5, 41, dtype=F64)
    means = flux[:, None] * torch.tensor(PROFILE, dtype=F64)
    return MixturePrior(means[..., None, None], 1 / flux, 0.1**2 * correlation())


def blur() -> BandMixing:
    """A point-spread function that is not symmetric."""
    ones = torch.ones(PIXELS, dtype=F64)
    matrix = torch.diag(0.55 * ones) + torch.diag(0.25 * ones[1:], 1) + torch.diag(0.2 * ones[1:], -1)
    return BandMixing(matrix[None], (1, 1))


def poisson(gain: float) -> Poisson:
    return Poisson(torch.tensor([gain], dtype=F64), torch.zeros(1, dtype=F64))


def poisson_gaussian(gain: float) -> PoissonGaussian:
    return PoissonGaussian(*(torch.tensor([value], dtype=F64) for value in (gain, READ_NOISE, SKY)))


@dataclass(frozen=True)
class Problem:
    """prior of x, and noise of y = blur(x) + noise."""

    prior: Prior
    noise: Poisson | PoissonGaussian

    def data(self, truth: Image, rng: Rng) -> Observation:
        """Data drawn for each truth."""
        return Observation(self.noise.sample(blur()(truth), rng), blur(), self.noise)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "Poisson, 1 count": lambda: Problem(smooth(), poisson(1.0)),
    "Poisson, 4 counts": lambda: Problem(smooth(), poisson(4.0)),
    "Poisson, 20 counts": lambda: Problem(smooth(), poisson(20.0)),
    "Poisson, 200 counts": lambda: Problem(smooth(), poisson(200.0)),
    "Poisson–Gaussian, 4 electrons": lambda: Problem(smooth(), poisson_gaussian(4.0)),
    "Poisson–Gaussian, 20 electrons": lambda: Problem(smooth(), poisson_gaussian(20.0)),
    "range 9:1, Poisson, 1 count": lambda: Problem(bright_and_faint(), poisson(1.0)),
    "range 9:1, Poisson, 4 counts": lambda: Problem(bright_and_faint(), poisson(4.0)),
    "range 9:1, Poisson, 20 counts": lambda: Problem(bright_and_faint(), poisson(20.0)),
    "range 9:1, Poisson–Gaussian, 4 electrons": lambda: Problem(bright_and_faint(), poisson_gaussian(4.0)),
}


def half_variance(likelihood: Observation) -> Observation:
    """The same data told to have half their noise variance: g → 2g, r → √2 r."""
    model = replace(likelihood.noise, gain=2 * likelihood.noise.gain)
    if isinstance(model, PoissonGaussian):
        model = replace(model, read_noise=math.sqrt(2) * model.read_noise)
    return replace(likelihood, noise=model)


@dataclass(frozen=True)
class Trials:
    """truth (T, n), draws (T, M, n), and log p(y | ·) of both: (T,), (T, M)."""

    truth: Tensor
    draws: Tensor
    truth_log: Tensor
    draws_log: Tensor

    @property
    def statistics(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Name → t of the truth (T,) and of the draws (T, M)."""
        weights = torch.cos(2.4 * torch.arange(PIXELS, dtype=F64) ** 1.3)
        return {
            "flux": (self.truth.sum(1), self.draws.sum(2)),
            "pixel": (self.truth[:, PIXELS // 2], self.draws[:, :, PIXELS // 2]),
            "projection": (self.truth @ weights, self.draws @ weights),
            "log-likelihood": (self.truth_log, self.draws_log),
        }

    @property
    def ranks(self) -> dict[str, Tensor]:
        """Name → how many draws lie below the truth, (T,)."""
        return {name: (draws < truth[:, None]).sum(1) for name, (truth, draws) in self.statistics.items()}


def simulate(problem: Problem, draw: Draw, *, trials: int, draws: int, seed: int) -> Trials:
    """Truth and data anew for every trial, and M draws each."""
    parts = []
    for first in range(0, trials, CHUNK):
        ids = range(first, min(first + CHUNK, trials))
        like, single = torch.zeros(len(ids), PIXELS, 1, 1, dtype=F64), Rng.for_draws(seed, ids, 1)
        truth = problem.prior.sample(like, single.spawn(1))
        data = problem.data(truth, single.spawn(2))
        wide = replace(data, y=data.y.repeat_interleave(draws, 0))
        x = draw(problem.prior, wide, like.repeat_interleave(draws, 0), Rng.for_draws(seed, ids, draws).spawn(3))
        log = wide.log_prob(x).reshape(len(ids), draws)
        parts.append((truth.flatten(1), x.reshape(len(ids), draws, PIXELS), data.log_prob(truth), log))
    return Trials(*(torch.cat(column) for column in zip(*parts, strict=True)))


def chi_square(rank: Tensor, draws: int) -> float:
    """p-value of the χ² test that ranks are uniform on 0 … M; M + 1 must be a multiple of the 16 bins."""
    counts = torch.bincount(rank * BINS // (draws + 1), minlength=BINS).double()
    expected = len(rank) / BINS
    return float(chi2.sf(((counts - expected) ** 2 / expected).sum().item(), BINS - 1))


def distance(rank: Tensor, draws: int) -> float:
    """sup_r |F_T(r) − (r + 1)/(M + 1)| of T ranks; 95 % of uniform ones stay below 1.36/√T."""
    levels = torch.arange(draws + 1)
    return float(((rank[:, None] <= levels).double().mean(0) - (levels + 1) / (draws + 1)).abs().max())


def coverage(trials: Trials) -> tuple[float, float, float]:
    """Share of pixels inside the interval of about 90 %, its standard error over trials, and its nominal value."""
    count = trials.draws.shape[1]
    k = round(0.05 * (count + 1))
    ordered = trials.draws.sort(1).values
    inside = ((trials.truth > ordered[:, k - 1]) & (trials.truth < ordered[:, count - k])).double().mean(1)
    return float(inside.mean()), float(inside.std() / math.sqrt(len(inside))), 1 - 2 * k / (count + 1)


def report(trials: Trials) -> dict[str, float]:
    """One row: the smallest p-value times their number, the largest distance × √T, coverage, sharpness."""
    size, draws = trials.draws.shape[:2]
    distances = {name: distance(rank, draws) for name, rank in trials.ranks.items()}
    p_values = [chi_square(rank, draws) for rank in trials.ranks.values()]
    p_values += [float(kstwo.sf(value, size)) for value in distances.values()]
    inside, error, _ = coverage(trials)
    return {
        "SBC p": min(1.0, len(p_values) * min(p_values)),
        "worst χ² p": min(p_values[: len(distances)]),
        "worst KS·√T": max(distances.values()) * math.sqrt(size),
        "coverage": inside,
        "±": error,
        "std/prior std": float(trials.draws.std(1).mean() / trials.truth.std(0).mean()),
    }
