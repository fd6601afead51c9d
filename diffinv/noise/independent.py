"""Noise that is independent between data elements: one density a pixel, one place for masks.

log p(y | mean) = Σ_good log p(yᵢ | meanᵢ), so that score and Fisher information are elementwise.
Invariant: whatever stands under the mask in y (NaN, ±∞) is replaced before any arithmetic, so that neither a value nor a
gradient ever sees it; the precision there is zero.
"""

from __future__ import annotations

import abc

import torch
from torch import Tensor

from diffinv.core.checks import DiffinvError
from diffinv.core.rng import Rng
from diffinv.noise.base import Noise
from diffinv.operators.algebra import Diagonal


def align(parameter: Tensor, ndim: int) -> Tensor:
    """A parameter whose leading axes are those of the data: (B,) → (B, 1, 1, 1), (B, C) → (B, C, 1, 1) for ndim 4."""
    return parameter.reshape(*parameter.shape, *[1] * (ndim - parameter.ndim))


def over(parameter: Tensor, like: Tensor) -> Tensor:
    """`align` to the axes of `like`, in its dtype."""
    return align(parameter, like.ndim).to(like.dtype)


def good_values(field: Tensor, mask: Tensor | None) -> Tensor:
    """`field` with 1 where the mask rules a pixel out, so that it can be checked and divided by."""
    return field if mask is None else torch.where(mask, align(field, mask.ndim), torch.ones_like(align(field, mask.ndim)))


def check_share(owner: str, share: float) -> None:
    """Raise DiffinvError unless 0 < share < 1."""
    if not 0 < share < 1:
        raise DiffinvError(f"{owner}.split: share must lie between 0 and 1, got {share}; ½ splits the information evenly.")


class Independent(Noise):
    """Noise independent between data elements. Final classes give four elementwise functions of good data and a mask.

    mask: (1|B, *data), True where a pixel is good, or None if all are.
    """

    mask: Tensor | None

    @abc.abstractmethod
    def density(self, y: Tensor, mean: Tensor) -> Tensor:
        """log p(yᵢ | meanᵢ), elementwise."""

    @abc.abstractmethod
    def derivative(self, y: Tensor, mean: Tensor) -> Tensor:
        """∂ log p(yᵢ | meanᵢ)/∂ meanᵢ, elementwise."""

    @abc.abstractmethod
    def information(self, mean: Tensor) -> Tensor:
        """Fisher information of meanᵢ, elementwise; may be of batch 1 if it does not depend on the mean."""

    @abc.abstractmethod
    def spread(self, mean: Tensor) -> Tensor:
        """Var[yᵢ | meanᵢ], elementwise."""

    def at(self, parameter: Tensor, like: Tensor) -> Tensor:
        """A parameter on the axes and in the dtype of `like`, 1 under the mask."""
        return good_values(over(parameter, like), self.mask)

    def _readable(self, y: Tensor, mean: Tensor) -> Tensor:
        return y if self.mask is None else torch.where(self.mask, y, mean.detach())

    def _keep(self, values: Tensor, other: float) -> Tensor:
        return values if self.mask is None else torch.where(self.mask, values, torch.full_like(values, other))

    def log_prob(self, y: Tensor, mean: Tensor) -> Tensor:
        terms = self.density(self._readable(y, mean), mean).expand(mean.shape)
        return self._keep(terms, 0.0).double().flatten(1).sum(1)

    def score(self, y: Tensor, mean: Tensor) -> Tensor:
        return self._keep(self.derivative(self._readable(y, mean), mean), 0.0)

    def _masked_information(self, mean: Tensor) -> Tensor:
        information = self.information(mean)
        return self._keep(information.expand(information.shape[0], *mean.shape[1:]), 0.0)

    def precision(self, mean: Tensor) -> Diagonal:
        return Diagonal(self._masked_information(mean))

    def perturb(self, mean: Tensor, rng: Rng) -> Tensor:
        return self._masked_information(mean).sqrt() * rng.normal(mean)

    def variance(self, mean: Tensor) -> Tensor:
        return self._keep(self.spread(mean).expand(mean.shape), torch.inf)
