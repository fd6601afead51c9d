"""Counting noise: y = k/g − b with k ~ Poisson(λ), λ = g (mean + b) counts.

log p = Σ k log λ − λ − log k!; score = g (k/λ − 1); precision = g²/λ. Thinning: k₁ ~ Binomial(k, α) and k − k₁ are
independent Poisson counts of rates αλ and (1 − α)λ.
Below a floor of the rate, where mean + b is zero or negative, the log-likelihood goes on along its tangent and data are
drawn at the floor: there the score still has mean zero and variance `precision`, it is the gradient of `log_prob`, and a
sampler is sent back to positive rates.
Invariant: finite at every mean; above the floor nothing is approximated.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffinv.core.checks import DiffinvError, check_positive
from diffinv.core.registry import register
from diffinv.core.rng import Rng
from diffinv.noise.independent import Independent, check_share, good_values


def check_counting(owner: str, gain: Tensor, floor: float) -> None:
    """Raise DiffinvError unless the gain and the floor of the rate are positive."""
    check_positive(owner, "gain", gain, "give the counts (electrons, photons) per unit of the data.")
    if not floor > 0:
        raise DiffinvError(f"{owner}: floor must be > 0 counts, got {floor}; it is the smallest rate that is told from zero.")


@register("noise", "poisson")
@dataclass(frozen=True, eq=False)
class Poisson(Independent):
    """y = Poisson(g (mean + b))/g − b.

    Arguments:
        gain: g in counts per unit of the data, (1|B,), (1|B, C) or up to (1|B, *data).
        background: b ≥ 0, known and already subtracted from y, in the data's unit; shaped like gain.
        mask: (1|B, *data), True where a pixel is good, or None if all are.
        floor: rate in counts below which the log-likelihood goes on along its tangent; the largest precision is g²/floor.
            Lower it where real rates are fainter.
    Raises: DiffinvError if gain or floor are not positive.
    """

    gain: Tensor
    background: Tensor
    mask: Tensor | None = None
    floor: float = 1e-3

    def __post_init__(self) -> None:
        check_counting("Poisson", good_values(self.gain, self.mask), self.floor)

    def _counts(self, y: Tensor) -> Tensor:
        return self.at(self.gain, y) * (y + self.at(self.background, y))

    def sample(self, mean: Tensor, rng: Rng) -> Tensor:
        counts = rng.poisson(self._counts(mean).clamp_min(self.floor))
        return counts / self.at(self.gain, mean) - self.at(self.background, mean)

    def density(self, y: Tensor, mean: Tensor) -> Tensor:
        k, rate = self._counts(y), self._counts(mean)
        floored = rate.clamp_min(self.floor)
        return k * floored.log() - floored - torch.lgamma(k.clamp_min(-0.5) + 1) + (rate - floored) * (k / floored - 1)

    def derivative(self, y: Tensor, mean: Tensor) -> Tensor:
        floored = self._counts(mean).clamp_min(self.floor)
        return self.at(self.gain, mean) * (self._counts(y) / floored - 1)

    def information(self, mean: Tensor) -> Tensor:
        return self.at(self.gain, mean) ** 2 / self._counts(mean).clamp_min(self.floor)

    def spread(self, mean: Tensor) -> Tensor:
        return self._counts(mean).clamp_min(self.floor) / self.at(self.gain, mean) ** 2

    def split(self, y: Tensor, rng: Rng, *, share: float = 0.5) -> tuple[tuple[Tensor, Poisson], tuple[Tensor, Poisson]]:
        """Binomial thinning: k₁ ~ Bin(k, share), k₂ = k − k₁; gains share·g and (1 − share)·g.

        Raises: DiffinvError if good data are not whole counts ≥ 0.
        """
        check_share("Poisson", share)
        counts = self.whole_counts(y)
        kept = rng.binomial(counts, share)
        halves = ((kept, share), (counts - kept, 1 - share))
        return tuple((self._thinned(y, k, part), replace(self, gain=self.gain * part)) for k, part in halves)

    def _thinned(self, y: Tensor, counts: Tensor, share: float) -> Tensor:
        return self._keep(counts / (share * self.at(self.gain, y)) - self.at(self.background, y), torch.nan)

    def whole_counts(self, y: Tensor) -> Tensor:
        """k (B, *data) as whole numbers, 0 where masked. Raises: DiffinvError if good data are not whole counts ≥ 0."""
        counts = self._keep(self._counts(y), 0.0)
        whole = counts.round()
        if bool(((counts - whole).abs() > 1e-2 + 1e-5 * whole).any()) or bool((whole < 0).any()):
            raise DiffinvError("Poisson: the data are not whole counts; check gain and background, or give raw counts.")
        return whole
