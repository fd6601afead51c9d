"""Multi-look speckle: y = mean · Gamma(L, 1/L), the mean intensity of L looks at a coherent scene.

log p = L log L − log Γ(L) + (L − 1) log y − L log mean − L y/mean; score = L (y − mean)/mean²; precision = L/mean².
Splitting: with b ~ Beta(αL, (1 − α)L), y b/α and y (1 − b)/(1 − α) are independent, of αL and (1 − α)L looks.
Below a floor of the mean the log-likelihood goes on along its tangent, and data are drawn at the floor: there the score
still has mean zero and variance `precision`, and a sampler is sent back to positive means.
Invariant: finite at every mean.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffinv.core.checks import DiffinvError, check_positive
from diffinv.core.registry import register
from diffinv.core.rng import Rng
from diffinv.noise.independent import Independent, check_share, over


@register("noise", "gamma")
@dataclass(frozen=True, eq=False)
class Gamma(Independent):
    """y = mean · Gamma(L, 1/L).

    Arguments:
        looks: L > 0, (1|B,) or (1|B, C), …, without unit.
        floor: smallest mean that the density is trusted at, (1|B,), in the data's unit, > 0.
        mask: (1|B, *data), True where a pixel is good, or None if all are.
    Raises: DiffinvError if looks or floor are not finite and positive.
    """

    looks: Tensor
    floor: Tensor
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        check_positive("Gamma", "looks", self.looks, "it is the number of averaged intensities, 1 for a single look.")
        check_positive(
            "Gamma", "floor", self.floor, "give an intensity well below the faintest that matters, in the data's unit."
        )

    def _floored(self, mean: Tensor) -> tuple[Tensor, Tensor]:
        """L and max(mean, floor)."""
        return over(self.looks, mean), torch.maximum(mean, over(self.floor, mean))

    def sample(self, mean: Tensor, rng: Rng) -> Tensor:
        looks, floored = self._floored(mean)
        return floored * rng.gamma(looks.expand(mean.shape)) / looks

    def density(self, y: Tensor, mean: Tensor) -> Tensor:
        looks, floored = self._floored(mean)
        log_data = torch.xlogy(looks - 1, y.clamp_min(0)) + torch.xlogy(looks, looks) - torch.lgamma(looks)
        tangent = (mean - floored) * looks * (y - floored) / floored**2
        return log_data - looks * (floored.log() + y / floored) + tangent

    def derivative(self, y: Tensor, mean: Tensor) -> Tensor:
        looks, floored = self._floored(mean)
        return looks * (y - floored) / floored**2

    def information(self, mean: Tensor) -> Tensor:
        looks, floored = self._floored(mean)
        return looks / floored**2

    def spread(self, mean: Tensor) -> Tensor:
        looks, floored = self._floored(mean)
        return floored**2 / looks

    def split(self, y: Tensor, rng: Rng, *, share: float = 0.5) -> tuple[tuple[Tensor, Gamma], tuple[Tensor, Gamma]]:
        """y₁ = y b/share, y₂ = y (1 − b)/(1 − share), b ~ Beta(share L, (1 − share) L). Raises: as `intensities`."""
        check_share("Gamma", share)
        y, looks = self.intensities(y), over(self.looks, y).expand(y.shape)
        b = rng.beta(share * looks, (1 - share) * looks)
        first, second = replace(self, looks=self.looks * share), replace(self, looks=self.looks * (1 - share))
        return (y * b / share, first), (y * (1 - b) / (1 - share), second)

    def intensities(self, y: Tensor) -> Tensor:
        """The data (B, *data), 0 where masked. Raises: DiffinvError if a good one is negative."""
        good = self._keep(y, 0.0)
        if bool((good < 0).any()):
            raise DiffinvError(
                f"Gamma: an intensity of {float(good.min()):.4g}; speckle is never negative, mask it or take another noise."
            )
        return good
