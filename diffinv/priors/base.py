"""Denoisers: D(x, σ) = E[x₀ | x₀ + σ z = x], variance exploding everywhere.

Score: (D − x)/σ². Covariance: Cov[x₀ | x] = σ² ∂D/∂x (Tweedie's formulas; Efron, *Tweedie's Formula and Selection Bias*, 2011).
Invariants: σ → 0 gives the identity, σ → ∞ the prior mean.
"""

from __future__ import annotations

import abc

from torch import nn

from diffinv.core.types import Image, Sigma


class Denoiser(nn.Module, abc.ABC):
    """E[x₀ | x₀ + σ z = x]."""

    @abc.abstractmethod
    def forward(self, x: Image, sigma: Sigma) -> Image:
        """(B, *image), (B,) → (B, *image), in the unit of x."""
