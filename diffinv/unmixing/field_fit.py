"""What the data say of a field: its heights, correlations, lengths and the part of the roughness, with their errors.

θ = (log-diagonal and lower entries of L₁, L₂; log ℓ; β) has the posterior

    log p(θ | ũ) = log p(ũ | θ) − ½ Σ_k ((θ_k − θ⁰_k)/w_k)²,   log p(ũ | θ) of tiles that share m, see `fields.log_evidence`.

Tiles are taken as independent given m: unbiased estimating equations at a cost that does not grow with the map. θ⁰ are half of
the spread of the good data to each term, as far as it is known (`known_spread`), and lengths of 8 and 16 pixels; w is wide:
factors of e and 2 in heights and lengths.
Maps of few counts leave θ open, and the most probable field alone gives too small errors. With H the second derivatives of
−log p at the maximum θ̂, p(θ | ũ) ≈ N(θ̂, H⁻¹), and this is replaced by points in pairs, θ̂ ± √D R q_j with R Rᵀ = H⁻¹ and q_j
orthonormal in a random direction of D dimensions, which have its mean and, on average over directions, its covariance (Laplace's
approximation with antithetic directions); each is then moved along its line to where p is as low as it says, which follows a p
that is skewed. The posterior of the maps is the mixture of those of the fields. H is that of tiles taken as independent: where
fields are longer than a tile, θ is known somewhat less well than it says.
Invariant: an answer is the same each time; directions come from a fixed seed.

References: Rasmussen & Williams, *Gaussian Processes for Machine Learning*, 2006, §5; Varin, Reid & Firth, *An overview of
composite likelihood methods*, 2011; Rue, Martino & Chopin, *Approximate Bayesian inference for latent Gaussian models*, 2009.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
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
_STARTS = (1.0, 0.5, 0.25)  # lengths from which to look for the maximum, the likeliest of them: too long ones find a lesser one
_HEIGHT, _LENGTH, _BEND = 1.0, 0.7, 1.0  # w of log-heights, log ℓ and β
_MOST = 0.25  # variance of values in [0, 1]
_GAIN = 1e-3  # nats; also w of a step, and nats a w of a slope
_STEP = 0.02  # w, of differences
_SECANTS = 4
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
        heights = (known_spread(data.value, precision) / 2).sqrt()
        rows, columns = torch.tril_indices(size, size, device=heights.device)
        lower = torch.diag(heights.log())[rows, columns]
        widths = torch.where(rows == columns, _HEIGHT, heights[rows])
        full = lambda count, value: torch.full((count,), value).to(heights)
        lengths = [full(size, math.log(value)) for value in _LENGTHS]
        centre = torch.cat([*[lower] * len(KERNELS), *lengths, full(size, _POWER)])
        wide = [full(size * len(KERNELS), _LENGTH), full(size, _BEND)]
        return cls(centre, torch.cat([*[widths] * len(KERNELS), *wide]), size)

    def log_prob(self, theta: Tensor) -> Tensor:
        """But for a constant."""
        return -0.5 * ((theta - self.centre) / self.width).pow(2).sum()

    def shorter(self, factor: float) -> Tensor:
        """θ⁰ with all lengths times `factor`."""
        first = len(KERNELS) * self.size * (self.size + 1) // 2
        theta = self.centre.clone()
        theta[first : first + len(KERNELS) * self.size] += math.log(factor)
        return theta

    def field(self, theta: Tensor) -> Field:
        terms, entries = len(KERNELS), self.size * (self.size + 1) // 2
        lower, length, power = theta.split([terms * entries, terms * self.size, self.size])
        rows, columns = torch.tril_indices(self.size, self.size, device=theta.device)
        roots = []
        for packed in lower.split(entries):
            root = theta.new_zeros(self.size, self.size).index_put((rows, columns), packed)
            roots.append(root.tril(-1) + torch.diag(root.diagonal().exp()))
        return Field(torch.stack(roots), length.exp().reshape(terms, self.size), power)


def known_spread(value: Tensor, precision: Tensor) -> Tensor:
    """Variance of maps (P,) of which data (N, P) with errors of `precision` (N, P), 0 without a datum, are given.

    By moments, x = (Σ p (v − v̄)² − n)/Σ p, with the error s = √(2n)/Σ p that noise gives it: the mean of N(x, s²) above 0, so
    that a map whose noise hides it is not called flat. No more than 1/4, the most of values in [0, 1], and this without data.
    """
    total, count = precision.sum(0).clamp_min(1e-300), (precision > 0).sum(0)
    mean = (precision * value).sum(0) / total
    x, s = ((precision * (value - mean) ** 2).sum(0) - count) / total, (2 * count.clamp_min(1)).sqrt() / total
    hazard = torch.exp(-0.5 * (x / s) ** 2 - torch.special.log_ndtr(x / s)) / math.sqrt(2 * math.pi)
    return (x + s * hazard).clamp(1e-12, _MOST)


def fit_field(data: PseudoData, plan: FieldPlan = FieldPlan()) -> FittedField:
    """The most probable field, and `plan.pairs` pairs about it."""
    hyper = _Hyperprior.of(data)
    side = max(1, math.isqrt(plan.values // hyper.size))
    tiles = [Tile.of(data, rows, columns) for rows, columns in spread_tiles(data.shape, side, plan.tiles)]
    loss = lambda theta: -log_evidence(hyper.field(theta), tiles) - hyper.log_prob(theta)
    start = min((hyper.shorter(factor) for factor in _STARTS), key=lambda theta: _loss_or_infinity(loss, theta).item())
    best = _minimise(loss, start, hyper.width, plan.iterations)
    field = hyper.field(best)
    if not plan.pairs:
        return FittedField(field, (field,))
    steps = antithetic(laplace_root(loss, best, hyper.width), plan.pairs)
    return FittedField(field, tuple(hyper.field(point) for point in contour(loss, best, steps)))


def contour(loss: Callable[[Tensor], Tensor], best: Tensor, steps: Sequence[Tensor]) -> list[Tensor]:
    """θ̂ + t δ of each step, p lower there by e^(D/2), as it is at √D σ of a Gaussian: t = 1 if p is one.

    By secants of a parabola through θ̂, t ≤ 2, and never where the field is no covariance in floating point.
    """
    with torch.no_grad():
        least, wanted, points = loss(best).item(), len(best) / 2, []
        for step in steps:
            t, known, beyond = 1.0, 0.0, math.inf
            for _ in range(_SECANTS):
                rise = _loss_or_infinity(loss, best + t * step).item() - least
                if math.isinf(rise):
                    t, beyond = (known + t) / 2, t
                else:
                    known, t = t, min(2.0, t * math.sqrt(wanted / max(rise, 1e-3 * wanted)), (t + beyond) / 2)
            points.append(best + known * step)
    return points


def _loss_or_infinity(loss: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor:
    try:
        return loss(theta).nan_to_num(torch.inf)
    except torch.linalg.LinAlgError:
        return theta.new_tensor(torch.inf)


def _minimise(loss: Callable[[Tensor], Tensor], start: Tensor, width: Tensor, iterations: int) -> Tensor:
    """By L-BFGS in units of w, until a step gains less than `_GAIN`; the best point seen."""
    z, least, best = torch.zeros_like(start).requires_grad_(True), torch.inf, start
    optimiser = torch.optim.LBFGS(
        [z], max_iter=iterations, line_search_fn="strong_wolfe", tolerance_change=_GAIN, tolerance_grad=_GAIN
    )

    def closure() -> Tensor:
        nonlocal least, best
        optimiser.zero_grad()
        value = loss(start + width * z)
        value.backward()
        if (here := value.item()) < least:
            least, best = here, (start + width * z).detach()
        return value

    with suppress(torch.linalg.LinAlgError):  # a step too far, to where the field is no covariance in floating point
        optimiser.step(closure)
    return best


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
