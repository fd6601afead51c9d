"""Photons on a detector with read noise: y = (k + r z)/g − s, k ~ Poisson(λ), λ = g (mean + s) electrons, z ~ N(0, 1).

With n = g (y + s), p(n) = Σ_k Poisson(k; λ) N(n; k, r²), and, since k Poisson(k; λ) = λ Poisson(k − 1; λ),
∂ log p/∂λ = E[k | n]/λ − 1. `PoissonGaussian` sums the series; `HeteroscedasticGaussian` replaces the law by a Gaussian of
the same mean and variance, v = λ/g² + r²/g². Its range, with ρ = λ + r² electrons: its precision is too large by the factor
1 + 1/(2ρ) (it counts what the variance tells of the mean), 2.5 % at ρ = 20; its log-probability t standard deviations away
from the mean is off by the skewness, (t³ − 3t)/6 · λ/ρ^1.5, 0.1 at 3σ for λ/ρ^1.5 = 1/30. Below ρ = 20, use the series.
Invariant: finite at every mean. Below a floor of the rate the series' log-likelihood goes on along its tangent, and the
approximation's variance stays at the floor's; data are drawn accordingly.

References: Foi et al., *Practical Poissonian-Gaussian noise modeling and fitting for single-image raw-data*, 2008.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from diffinv.core.checks import UnsupportedError, check_positive
from diffinv.core.registry import register
from diffinv.core.rng import Rng
from diffinv.noise.independent import Independent, good_values, over
from diffinv.noise.poisson import check_counting

TABLE_TOP = 1e3
TABLE_NODES = 256
LOG_2PI = math.log(2 * math.pi)


def _mode(n: Tensor, rate: Tensor, read: Tensor) -> Tensor:
    """The k that maximises Poisson(k; λ) N(n; k, r²): w = (k + ½)/r² solves w + log w = (n + ½)/r² + log(λ/r²)."""
    z = (n + 0.5) / read**2 + rate.log() - 2 * read.log()
    v = torch.where(z < 0, z, torch.log1p(z.clamp_min(0)))
    for _ in range(8):
        v = v - (v.exp() + v - z) / (v.exp() + 1)
    return v.exp() * read**2 - 0.5


def series(n: Tensor, rate: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
    """log Σ_k Poisson(k; λ) N(n; k, r²) and E[k | n], elementwise, in float64.

    The terms are log-concave in k with curvature at least 1/r², so that all but e^{-32} of the mass lies within 8 r of the
    mode; memory is 16 r + 7 numbers an element.
    Arguments: n: electrons read. rate: λ > 0. read: r > 0, electrons; all broadcastable.
    """
    n, rate, read = torch.broadcast_tensors(n.double(), rate.double(), read.double())
    half = math.ceil(8 * float(read.detach().max())) + 3
    with torch.no_grad():
        first = (_mode(n, rate, read).floor() - half).clamp_min(0)
        k = first[..., None] + torch.arange(2 * half + 1, dtype=n.dtype, device=n.device)
    n, rate, read = n[..., None], rate[..., None], read[..., None]
    poisson = k * rate.log() - rate - torch.lgamma(k + 1)
    terms = poisson - ((n - k) / read) ** 2 / 2 - read.log() - LOG_2PI / 2
    total = torch.logsumexp(terms, -1)
    return total, ((terms - total[..., None]).exp() * k).sum(-1)


def exact_information(rate: Tensor, read: Tensor) -> Tensor:
    """Fisher information of λ, ∫ p(n) (E[k | n]/λ − 1)² dn, by the trapezoid rule: (T,), (1,) → (T,), float64.

    The integrand is smooth on the scale r, so that steps of r/3 over ±9 standard deviations (and 12 more electrons on the
    side of the skew) leave the rule's error below that of the series.
    """
    found = []
    for level in rate.double():
        width = 9 * (level + read.double() ** 2).sqrt() + 12
        n = torch.arange(float(level - width), float(level + width), float(read) / 3, dtype=torch.float64, device=rate.device)
        log_p, mean_count = series(n, level, read)
        found.append((log_p.exp() * (mean_count / level - 1) ** 2).sum() * float(read) / 3)
    return torch.stack(found)


def table_nodes(floor: float) -> Tensor:
    """log λ of the table, (T,) float64, uniform from the floor to `TABLE_TOP` electrons."""
    return torch.linspace(math.log(floor), math.log(TABLE_TOP), TABLE_NODES, dtype=torch.float64)


@lru_cache(maxsize=1024)
def information_table(read: float, floor: float) -> Tensor:
    """I(λ)(λ + r²) at the nodes, (T,) float64: near 1 where the noise is nearly Gaussian. Takes a quarter of a second."""
    rate, r = table_nodes(floor).exp(), torch.tensor(read, dtype=torch.float64)
    return exact_information(rate, r) * (rate + r**2)


@register("noise", "poisson_gaussian")
@dataclass(frozen=True, eq=False)
class PoissonGaussian(Independent):
    """y = (Poisson(g (mean + s)) + r z)/g − s, by its exact series.

    Arguments:
        gain: g in electrons per unit of the data, (1|B,).
        read_noise: r in electrons, (1|B,), > 0.
        sky: s ≥ 0, known and already subtracted from y, in the data's unit; (1|B,), (1|B, C) or up to (1|B, *data).
        mask: (1|B, *data), True where a pixel is good, or None if all are.
        floor: rate in electrons below which the log-likelihood goes on along its tangent.
    Raises: DiffinvError if gain, read noise or floor are not positive.
    The precision is the exact Fisher information, interpolated in log λ from a table of 256 quadratures that is kept
    for each r and floor; above 1000 electrons it is 1/(λ + r²).
    """

    gain: Tensor
    read_noise: Tensor
    sky: Tensor
    mask: Tensor | None = None
    floor: float = 1e-3

    def __post_init__(self) -> None:
        check_counting("PoissonGaussian", good_values(self.gain, self.mask), self.floor)
        check_positive("PoissonGaussian", "read_noise", self.read_noise, "without read noise use Poisson.")

    def _electrons(self, y: Tensor) -> Tensor:
        return self.at(self.gain, y) * (y + self.at(self.sky, y))

    def _rate(self, mean: Tensor) -> Tensor:
        return self._electrons(mean).clamp_min(self.floor)

    def sample(self, mean: Tensor, rng: Rng) -> Tensor:
        electrons = rng.poisson(self._rate(mean)) + self.at(self.read_noise, mean) * rng.normal(mean)
        return electrons / self.at(self.gain, mean) - self.at(self.sky, mean)

    def density(self, y: Tensor, mean: Tensor) -> Tensor:
        y, mean = y.double(), mean.double()
        rate, floored = self._electrons(mean), self._rate(mean)
        log_p, count = series(self._electrons(y), floored, self.at(self.read_noise, mean))
        return log_p + (rate - floored) * (count / floored - 1) + self.at(self.gain, mean).log()

    def derivative(self, y: Tensor, mean: Tensor) -> Tensor:
        y64, mean64 = y.double(), mean.double()
        rate = self._rate(mean64)
        count = series(self._electrons(y64), rate, self.at(self.read_noise, mean64))[1]
        return (self.at(self.gain, mean64) * (count / rate - 1)).to(mean.dtype)

    @cached_property
    def _table(self) -> tuple[Tensor, Tensor]:
        """log λ (T,) and I(λ)(λ + r²) (1|B, T)."""
        rows = [information_table(read, self.floor) for read in self.read_noise.tolist()]
        return table_nodes(self.floor).to(self.read_noise.device), torch.stack(rows).to(self.read_noise.device)

    def information(self, mean: Tensor) -> Tensor:
        rate, read = self._rate(mean.double()), over(self.read_noise, mean.double())
        nodes, values = self._table
        values = values.expand(mean.shape[0], -1)
        place = (rate.clamp_max(TABLE_TOP).log() - nodes[0]) / (nodes[1] - nodes[0])
        left = place.detach().floor().long().clamp(0, TABLE_NODES - 2)
        at_left, at_right = (values.gather(1, (left + i).flatten(1)).reshape(rate.shape) for i in (0, 1))
        factor = at_left + (place - left) * (at_right - at_left)
        factor = torch.where(rate > TABLE_TOP, torch.ones_like(factor), factor)
        return (self.at(self.gain, rate) ** 2 * factor / (rate + read**2)).to(mean.dtype)

    def spread(self, mean: Tensor) -> Tensor:
        return (self._rate(mean) + self.at(self.read_noise, mean) ** 2) / self.at(self.gain, mean) ** 2

    def split(self, y: Tensor, rng: Rng, *, share: float = 0.5):
        """Raises UnsupportedError: thinning needs the counts, which the read noise hides."""
        raise UnsupportedError(
            "PoissonGaussian.split: the counts under the read noise are unknown, so the data cannot be thinned exactly; "
            "use independent exposures, or Poisson where the read noise is negligible."
        )


@register("noise", "heteroscedastic_gaussian")
@dataclass(frozen=True, eq=False)
class HeteroscedasticGaussian(Independent):
    """The Gaussian approximation: y ~ N(mean, v(mean)), v = (max(λ, floor) + r²)/g², λ = g (mean + s) electrons.

    score = (y − mean)/v + v'/2 [(y − mean)²/v² − 1/v]; precision = 1/v + v'²/(2v²), v' = 1/g, or 0 below the floor.

    Arguments: as `PoissonGaussian`; all may be given per pixel.
    Raises: DiffinvError if gain, read noise or floor are not positive.
    """

    gain: Tensor
    read_noise: Tensor
    sky: Tensor
    mask: Tensor | None = None
    floor: float = 1e-3

    def __post_init__(self) -> None:
        check_counting("HeteroscedasticGaussian", good_values(self.gain, self.mask), self.floor)
        check_positive(
            "HeteroscedasticGaussian", "read_noise", good_values(self.read_noise, self.mask), "without read noise use Poisson."
        )

    def spread(self, mean: Tensor) -> Tensor:
        gain = self.at(self.gain, mean)
        electrons = (gain * (mean + self.at(self.sky, mean))).clamp_min(self.floor)
        return (electrons + self.at(self.read_noise, mean) ** 2) / gain**2

    def _slope(self, mean: Tensor) -> Tensor:
        """v'(mean)."""
        gain = self.at(self.gain, mean)
        return torch.where(gain * (mean + self.at(self.sky, mean)) > self.floor, 1 / gain, torch.zeros_like(gain))

    def sample(self, mean: Tensor, rng: Rng) -> Tensor:
        return mean + self.spread(mean).sqrt() * rng.normal(mean)

    def density(self, y: Tensor, mean: Tensor) -> Tensor:
        variance = self.spread(mean)
        return -((y - mean) ** 2 / variance + variance.log() + LOG_2PI) / 2

    def derivative(self, y: Tensor, mean: Tensor) -> Tensor:
        variance, residual = self.spread(mean), y - mean
        return residual / variance + self._slope(mean) / 2 * (residual**2 / variance - 1) / variance

    def information(self, mean: Tensor) -> Tensor:
        variance = self.spread(mean)
        return 1 / variance + (self._slope(mean) / variance) ** 2 / 2

    def split(self, y: Tensor, rng: Rng, *, share: float = 0.5):
        """Raises UnsupportedError: the variance depends on the unknown mean."""
        raise UnsupportedError(
            "HeteroscedasticGaussian.split: noise of the right variance cannot be added, for it depends on the unknown mean; "
            "use independent exposures, or Gaussian with a variance estimated beforehand."
        )
