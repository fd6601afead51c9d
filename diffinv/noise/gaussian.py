"""Gaussian noise with a known standard deviation a pixel: y = mean + σ z.

log p = −Σ_good [(y − mean)²/2σ² + log σ + ½ log 2π]; score = (y − mean)/σ²; precision = 1/σ².
Splitting: with ω ~ N(0, σ²), y + τω and y − ω/τ are independent, for their covariance is σ² − σ² = 0 (R2R).
Invariant: σ > 0 in every good pixel; σ under the mask is never used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from diffinv.core.checks import check_positive
from diffinv.core.registry import register
from diffinv.core.rng import Rng
from diffinv.noise.independent import Independent, check_share, good_values


@register("noise", "gaussian")
@dataclass(frozen=True, eq=False)
class Gaussian(Independent):
    """White or per-pixel Gaussian noise, y = mean + σ z.

    Arguments:
        std: σ in the data's unit; its leading axes are those of the data: (1|B,), (1|B, C), …, (1|B, *data), or
            broadcastable (1|B, 1, 1, 1). Values under the mask are ignored (0, NaN and ∞ are allowed there).
        mask: (1|B, *data), True where a pixel is good, or None if all are.
    Raises: DiffinvError if σ is not finite and positive in a good pixel.
    """

    std: Tensor
    mask: Tensor | None = None
    quadratic = True

    def __post_init__(self) -> None:
        remedy = "mask the pixel, or give the measured noise level (a noiseless likelihood has no density)."
        check_positive("Gaussian", "std", good_values(self.std, self.mask), remedy)

    def sample(self, mean: Tensor, rng: Rng) -> Tensor:
        return mean + self._keep(self.at(self.std, mean).expand(mean.shape), 0.0) * rng.normal(mean)

    def density(self, y: Tensor, mean: Tensor) -> Tensor:
        std = self.at(self.std, mean)
        return -(((y - mean) / std) ** 2) / 2 - std.log() - math.log(2 * math.pi) / 2

    def derivative(self, y: Tensor, mean: Tensor) -> Tensor:
        return (y - mean) / self.at(self.std, mean) ** 2

    def information(self, mean: Tensor) -> Tensor:
        return self.at(self.std, mean) ** -2

    def spread(self, mean: Tensor) -> Tensor:
        return self.at(self.std, mean) ** 2

    def split(self, y: Tensor, rng: Rng, *, share: float = 0.5) -> tuple[tuple[Tensor, Gaussian], tuple[Tensor, Gaussian]]:
        """y₁ = y + τω, y₂ = y − ω/τ with ω ~ N(0, σ²) and τ² = (1 − share)/share; σ₁² = σ²/share, σ₂² = σ²/(1 − share).

        References: Pang, Zheng, Quan, Ji, *Recorrupted-to-Recorrupted*, CVPR 2021.
        """
        check_share("Gaussian", share)
        tau = math.sqrt((1 - share) / share)
        omega = self.at(self.std, y) * rng.normal(y)
        first = replace(self, std=self.std / math.sqrt(share))
        second = replace(self, std=self.std / math.sqrt(1 - share))
        return (y + tau * omega, first), (y - omega / tau, second)
