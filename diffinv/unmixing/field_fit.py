"""What the data say of a field: its heights, correlations, lengths and the part of the roughness, with their errors.

θ = (log-diagonal and lower entries of L₁, L₂; log ℓ; β) has the posterior

    log p(θ | ũ) = log p(ũ | θ) − ½ Σ_k ((θ_k − θ⁰_k)/w_k)²,   log p(ũ | θ) of tiles that share m, see `fields.log_evidence`.

Tiles are taken as independent given m: unbiased estimating equations at a cost that does not grow with the map. θ⁰ are half of
the spread of the good data to each term and lengths of 8 and 16 pixels; w is wide: factors of e and 2 in heights and lengths.
Maps of few counts leave θ open, and the most probable field alone gives too small errors. With H the second derivatives of
−log p at the maximum θ̂, p(θ | ũ) ≈ N(θ̂, H⁻¹), and this is replaced by points in pairs, θ̂ ± √D R q_j with R Rᵀ = H⁻¹ and q_j
orthonormal in a random direction of D dimensions, which have its mean and, on average over directions, its covariance (Laplace's
approximation with antithetic directions). The posterior of the maps is the mixture of those of the fields. H is that of tiles
taken as independent: where fields are longer than a tile, θ is known somewhat less well than it says.
Invariant: an answer is the same each time; directions come from a fixed seed.

References: Rasmussen & Williams, *Gaussian Processes for Machine Learning*, 2006, §5; Varin, Reid & Firth, *An overview of
composite likelihood methods*, 2011; Rue, Martino & Chopin, *Approximate Bayesian inference for latent Gaussian models*, 2009.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffinv.core.rng import Rng
from diffinv.unmixing.fields import (
    KERNELS,
    Field,
    FieldPlan,
    FieldPosterior,
    PseudoData,
    Tile,
    field_posterior,
    log_evidence,
    spread_tiles,
)

_LENGTHS = (8.0, 16.0)  # pixels
_POWER = 0.5  # β
_HEIGHT, _LENGTH, _BEND = 1.0, 0.7, 1.0  # w of log-heights, log ℓ and β
_STEP = 0.02  # w, of differences
_SEED = 0


@dataclass(frozen=True, eq=False)
class FittedField:
    """best: at θ̂. likely: the points that stand for p(θ | ũ); `best` alone if none were asked for."""

    best: Field
    likely: tuple[Field, ...]

    def posterior(self, data: PseudoData, plan: FieldPlan = FieldPlan()) -> FieldPosterior:
        """Mean and covariance of the mixture of the posteriors of `likely`."""
        found = [field_posterior(data, field, plan) for field in self.likely]
        means = torch.stack([part.mean for part in found])
        gaps = means - means.mean(0)
        between = torch.einsum("knp,knq->npq", gaps, gaps) / len(gaps)
        return FieldPosterior(means.mean(0), torch.stack([part.covariance for part in found]).mean(0) + between)


@dataclass(frozen=True, eq=False)
class _Hyperprior:
    """N(θ⁰, w²), both (D,), for maps of `size` parameters."""

    centre: Tensor
    width: Tensor
    size: int

    @classmethod
    def of(cls, data: PseudoData) -> _Hyperprior:
        size = data.value.shape[1]
        precision = data.information
        total = precision.sum(0).clamp_min(1e-300)
        mean = (precision * data.value).sum(0) / total
        excess = ((precision * (data.value - mean) ** 2).sum(0) - (precision > 0).sum(0)) / total
        heights = (excess.clamp_min(1e-4) / 2).sqrt()
        rows, columns = torch.tril_indices(size, size, device=mean.device)
        lower = torch.diag(heights.log())[rows, columns]
        widths = torch.where(rows == columns, _HEIGHT, heights[rows])
        lengths = [torch.full((size,), math.log(value)).to(mean) for value in _LENGTHS]
        centre = torch.cat([*[lower] * len(KERNELS), *lengths, torch.full((1,), _POWER).to(mean)])
        wide = [torch.full((size * len(KERNELS),), _LENGTH).to(mean), torch.full((1,), _BEND).to(mean)]
        return cls(centre, torch.cat([*[widths] * len(KERNELS), *wide]), size)

    def log_prob(self, theta: Tensor) -> Tensor:
        """But for a constant."""
        return -0.5 * ((theta - self.centre) / self.width).pow(2).sum()

    def field(self, theta: Tensor) -> Field:
        terms, entries = len(KERNELS), self.size * (self.size + 1) // 2
        lower, length, power = theta.split([terms * entries, terms * self.size, 1])
        rows, columns = torch.tril_indices(self.size, self.size, device=theta.device)
        roots = []
        for packed in lower.split(entries):
            root = theta.new_zeros(self.size, self.size).index_put((rows, columns), packed)
            roots.append(root.tril(-1) + torch.diag(root.diagonal().exp()))
        return Field(torch.stack(roots), length.exp().reshape(terms, self.size), power)


def fit_field(data: PseudoData, plan: FieldPlan = FieldPlan()) -> FittedField:
    """The most probable field, and `plan.pairs` pairs about it."""
    hyper = _Hyperprior.of(data)
    side = max(1, math.isqrt(plan.values // hyper.size))
    tiles = [Tile.of(data, rows, columns) for rows, columns in spread_tiles(data.shape, side, plan.tiles)]
    loss = lambda theta: -log_evidence(hyper.field(theta), tiles) - hyper.log_prob(theta)
    best = _minimise(loss, hyper.centre, sum(len(tile.value) for tile in tiles), plan.iterations)
    field = hyper.field(best)
    if not plan.pairs:
        return FittedField(field, (field,))
    points = antithetic(laplace_root(loss, best, hyper.width), plan.pairs)
    return FittedField(field, tuple(hyper.field(best + point) for point in points))


def _minimise(loss: Callable[[Tensor], Tensor], start: Tensor, count: int, iterations: int) -> Tensor:
    """By L-BFGS, of loss/count."""
    theta = start.clone().requires_grad_(True)
    optimiser = torch.optim.LBFGS([theta], max_iter=iterations, line_search_fn="strong_wolfe", tolerance_change=1e-5)

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = loss(theta) / count
        value.backward()
        return value

    optimiser.step(closure)
    return theta.detach()


def laplace_root(loss: Callable[[Tensor], Tensor], best: Tensor, width: Tensor) -> Tensor:
    """R (D, D), R Rᵀ = H⁻¹: W times the symmetric root in units of w, which has no signs or order of eigenvectors to choose.

    H is by differences of slopes; no direction is wider than its prior.
    """

    def slope(theta: Tensor) -> Tensor:
        at = theta.clone().requires_grad_(True)
        return torch.autograd.grad(loss(at), at)[0] * width

    here = slope(best)
    curvature = torch.stack([slope(best + step) - here for step in torch.diag(_STEP * width)]) / _STEP
    values, vectors = torch.linalg.eigh((curvature + curvature.T) / 2)
    return width[:, None] * (vectors / values.clamp_min(1.0).sqrt()) @ vectors.T


def antithetic(root: Tensor, count: int) -> list[Tensor]:
    """±√D R q_j of `count` orthonormal directions, or D if that is fewer."""
    size = len(root)
    ways = torch.linalg.qr(Rng([_SEED]).normal(root.new_empty(1, size, min(count, size)))[0]).Q
    return [sign * size**0.5 * (root @ way) for way in ways.T for sign in (1, -1)]
