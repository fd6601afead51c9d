"""Noise of which nothing is known but that it is independent between data and has mean zero: a mask, and refusals.

It serves the losses that never ask for a level (UNSURE, splitting, a second exposure); all others are refused by it.
Invariant: no number about the noise leaves this class, but for a variance of 1 that stands for "good".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from diffinv.core.checks import UnsupportedError
from diffinv.core.rng import Rng
from diffinv.noise.independent import Independent


@dataclass(frozen=True, eq=False)
class UnknownLevel(Independent):
    """y = mean + independent noise of unknown size.

    Arguments: mask: (1|B, *data), True where a datum is good, or None if all are.
    """

    mask: Tensor | None = None

    @staticmethod
    def _refuse(what: str) -> NoReturn:
        raise UnsupportedError(
            f"noise of unknown level has no {what}; give its level (noise.kind: gaussian with std: auto estimates it), or use "
            "unsure, splitting, noise2noise or another loss that does not ask for it."
        )

    def sample(self, mean: Tensor, rng: Rng) -> Tensor:
        self._refuse("draws")

    def density(self, y: Tensor, mean: Tensor) -> Tensor:
        self._refuse("density")

    def derivative(self, y: Tensor, mean: Tensor) -> Tensor:
        self._refuse("score")

    def information(self, mean: Tensor) -> Tensor:
        self._refuse("precision")

    def spread(self, mean: Tensor) -> Tensor:
        """1, which says no more than that the datum is good."""
        return torch.ones_like(mean)

    def split(self, y: Tensor, rng: Rng, *, share: float = 0.5) -> NoReturn:
        self._refuse("exact split")
