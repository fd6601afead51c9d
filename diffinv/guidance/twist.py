"""Twists: estimates of p(y | x_σ) that steer a particle filter, with the posterior's denoiser that follows from them.

Laplace's method on ∫ N(x₀; D, C) p(y | x₀) dx₀, C = σ² ∂D/∂x, at the point D + d that Gauss–Newton steps lead to:
`log p̃(y | x_σ) = log p(y | D + d) − ½ dᵀC⁻¹d − ½ log det(I + C F)`, `(C⁻¹ + F) d = s + F (x̂ − D)`, with F and s the Fisher
information and score at the last point x̂. For linear Gaussian data one step from x̂ = D is exact for that integral.
All of it happens in the range of F, r dimensions with an orthonormal basis Q: `S = Qᵀ C Q`, `G = Qᵀ F Q`, `d = C Q u`,
`(I + G S) u = g`, `dᵀC⁻¹d = uᵀSu`, so that a twist costs r products with C.
Invariant: as σ → 0 the twist tends to p(y | x), whatever C and r, so that a filter's last weights are exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffinv.core.batched import Batched
from diffinv.core.linalg import expand, leading_eigenvectors
from diffinv.core.rng import Rng
from diffinv.core.types import Image, Sigma
from diffinv.guidance.base import denoise_with_vjp
from diffinv.likelihood import Likelihood
from diffinv.priors.base import Denoiser


@dataclass(frozen=True, eq=False)
class Twisted(Batched):
    """What a twist says at (x, σ): prior_mean D and mean D + d (B, *image), log_prob log p̃(y | x) (B,) float64."""

    prior_mean: Image
    mean: Image
    log_prob: Tensor


@dataclass(frozen=True, eq=False)
class FisherBasis(Batched):
    """Orthonormal directions that data inform on: vectors Q (1|B, r, n), and information G (1|B, r, r) in them."""

    vectors: Tensor
    information: Tensor

    @property
    def rank(self) -> int:
        """r, the largest of the batch."""
        return self.vectors.shape[1]


def fisher_basis(likelihood: Likelihood, x: Image, *, rank: int) -> FisherBasis:
    """The range of the Fisher information at x (B, *image), exact if its rank is at most `rank`, else its leading directions.

    The random subspace is the same for every row and run: it is part of the method, not of the draws.
    """
    rows, size = x.shape[0], x[0].numel()
    block = min(size, rank + 4)
    probes = Rng.for_draws(0, range(block), 1).normal(x.new_zeros(block, size))
    product = lambda v: _fisher(likelihood, x, v)
    values, vectors = leading_eigenvectors(product, probes.expand(rows, block, size))
    kept = values > size * torch.finfo(x.dtype).eps * values.amax(1, keepdim=True)
    width = max(1, min(rank, int(kept.sum(1).max())))
    values = torch.where(kept, values, 0.0)[:, :width]
    return FisherBasis(torch.where(kept[..., None], vectors, 0.0)[:, :width], torch.diag_embed(values))


def _fisher(likelihood: Likelihood, x: Image, v: Tensor) -> Tensor:
    """F(x) on k vectors a row: (B, *image), (B, k, n) → (B, k, n)."""
    times = v.shape[1]
    wide = likelihood.repeat(times).fisher(x.repeat_interleave(times, 0))
    return wide.apply(v.reshape(-1, *x.shape[1:])).reshape(v.shape)


def moment_matching_twist(
    prior: Denoiser, likelihood: Likelihood, basis: FisherBasis | int, x: Image, sigma: Sigma, *, relinearise: int = 0
) -> Twisted:
    """The twist at (x, σ): one forward pass and r vjps of the prior.

    Arguments: basis: where the information does not depend on x; else its rank r, for a basis at D. relinearise:
    Gauss–Newton steps after the first, without network calls; 0 is exact for linear Gaussian data.
    A learned Jacobian is neither symmetric nor PSD: S is made so.
    """
    mean, vjp = denoise_with_vjp(prior, x, sigma)
    basis = fisher_basis(likelihood, mean, rank=basis) if isinstance(basis, int) else basis
    variance = expand(sigma.double() ** 2, x)
    directions = basis.vectors.expand(len(x), *basis.vectors.shape[1:])
    products = [variance * vjp(directions[:, k].reshape(x.shape)) for k in range(basis.rank)]
    columns = torch.stack([p.flatten(1) for p in products], 1).double()
    vectors = directions.double()
    covariance = _psd(vectors @ columns.mT)
    information, shift = basis.information.double(), torch.zeros_like(mean)
    for number in range(1 + relinearise):
        point = mean + shift
        if number:
            information = _psd(vectors @ _fisher(likelihood, point, directions).double().mT)
        pull = (likelihood.score(point).flatten(1).double()[:, None] @ vectors.mT)[:, 0]
        pull = pull + _apply(information, _apply(vectors, shift.flatten(1).double()))
        solved = torch.linalg.solve(torch.eye(basis.rank, device=x.device) + information @ covariance, pull)
        shift = _apply(columns.mT, solved).to(x.dtype).reshape(x.shape)
    curvature = torch.linalg.slogdet(torch.eye(basis.rank, device=x.device) + information @ covariance)[1]
    penalty = (solved * _apply(covariance, solved)).sum(1)
    return Twisted(mean, mean + shift, likelihood.log_prob(mean + shift) - (penalty + curvature) / 2)


def _apply(matrix: Tensor, vector: Tensor) -> Tensor:
    """(B, i, j), (B, j) → (B, i)."""
    return (matrix @ vector[..., None])[..., 0]


def _psd(matrix: Tensor) -> Tensor:
    """The nearest symmetric PSD matrix."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    return (vectors * values.clamp_min(0)[:, None]) @ vectors.mT
