"""Noise models p(y | mean): batched, with per-image and per-pixel parameters.

Invariants: score = ∂ log p(y | mean)/∂ mean has mean zero and covariance `precision(mean)` (the Fisher information of the
mean). A bad pixel has zero precision and a mask, never an infinite variance: it adds nothing to log_prob and score.
"""

from __future__ import annotations

import abc
from typing import ClassVar

from torch import Tensor

from diffinv.core.batched import Batched
from diffinv.core.rng import Rng
from diffinv.operators.base import LinearOperator


class Noise(Batched, abc.ABC):
    """A distribution of the data given their noiseless mean, (B, *data) → (B, *data).

    `quadratic` says that log p is quadratic in the mean: Gaussian noise whose covariance does not depend on it.
    """

    quadratic: ClassVar[bool] = False

    @abc.abstractmethod
    def sample(self, mean: Tensor, rng: Rng) -> Tensor:
        """One draw of the data a row: (B, *data), in the data's unit. Masked pixels are drawn too."""

    @abc.abstractmethod
    def log_prob(self, y: Tensor, mean: Tensor) -> Tensor:
        """log p(y | mean) summed over the good data: (B,), float64."""

    @abc.abstractmethod
    def score(self, y: Tensor, mean: Tensor) -> Tensor:
        """∂ log p(y | mean)/∂ mean: (B, *data)."""

    @abc.abstractmethod
    def precision(self, mean: Tensor) -> LinearOperator:
        """Fisher information of the mean, data → data, PSD."""

    @abc.abstractmethod
    def perturb(self, mean: Tensor, rng: Rng) -> Tensor:
        """A draw of N(0, precision(mean)): (B, *data)."""

    @abc.abstractmethod
    def variance(self, mean: Tensor) -> Tensor:
        """Var[y | mean] a pixel: (B, *data), +∞ where a pixel is masked (for whitening and plots only)."""

    @abc.abstractmethod
    def split(self, y: Tensor, rng: Rng, *, share: float = 0.5) -> tuple[tuple[Tensor, Noise], tuple[Tensor, Noise]]:
        """Two independent data sets with the same mean: ((y₁, noise₁), (y₂, noise₂)), or UnsupportedError saying why not.

        Arguments: y: (B, *data). share: of the Fisher information that goes to y₁; y₂ gets the rest.
        """
