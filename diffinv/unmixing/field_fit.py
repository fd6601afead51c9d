"""What the data say of a field: its heights, correlations, lengths and the part of the roughness, with their errors.

θ = (log-diagonal and lower entries of L₁, L₂; log ℓ; β; log α) has the posterior

    log p(θ | ũ) = log p(ũ | θ) − ½ Σ_k ((θ_k − θ⁰_k)/w_k)²,   log p(ũ | θ) of tiles that share m, see `fields.log_evidence`.

Tiles are taken as independent given m: unbiased estimating equations at a cost that does not grow with the map. θ⁰ are half of
the spread of the good data to each term, as far as it is known (`known_spread`), lengths of 8 and 16 pixels, β = ½ and
α = e⁻¹ an rms of brightness; w is wide: factors of e and 2 in heights and lengths, 1 in β, e in α.
Maps of few counts leave θ open, and the most probable field alone gives too small errors. With H the second derivatives of
−log p at the maximum θ̂, p(θ | ũ) ≈ N(θ̂, H⁻¹), and this is replaced by points in pairs, θ̂ ± √D R q_j with R Rᵀ = H⁻¹ and q_j
orthonormal in a random direction of D dimensions, which have its mean and, on average over directions, its covariance (Laplace's
approximation with antithetic directions); each is then moved along its line to where p is as low as it says, which follows a p
that is skewed, as Rue et al. do. The posterior of the maps is the mixture of those of the fields. H is that of tiles taken as
independent: where fields are longer than a tile, θ is known somewhat less well than it says. Of maps of a few dozen noisy pixels,
the mixture is up to a seventh too wide in σ and the most probable field a tenth too narrow.
Invariant: an answer is the same each time; directions come from a fixed seed.

References: Rasmussen & Williams, *Gaussian Processes for Machine Learning*, 2006, §5; Varin, Reid & Firth, *An overview of
composite likelihood methods*, 2011; Rue, Martino & Chopin, *Approximate Bayesian inference for latent Gaussian models*, 2009.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffinv.core.checks import DiffinvError
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
_POWER, _WARP = 0.5, -1.0  # β, log α
_STARTS = (1.0, 0.5, 0.25)  # lengths from which to look for the maximum, the likeliest of them: too long ones find a lesser one
_HEIGHT, _LENGTH, _BEND = 1.0, 0.7, 1.0  # w of log-heights, log ℓ, and β and log α
_SPREAD = 1 / 24  # τ, variance of maps that nothing is known of: half of a box's
_LEAST = 1e-60  # of sums of powers of precisions
_GAIN = 1e-3  # nats; also w of a step, and nats a w of a slope
_STEP = 0.02  # w, of differences
_SECANTS = 5
_WALL = 1e30
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
        centre = torch.cat([*[lower] * len(KERNELS), *lengths, full(size, _POWER), full(1, _WARP)])
        wide = [full(size * len(KERNELS), _LENGTH), full(size + 1, _BEND)]
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
        lower, length, power, warp = theta.split([terms * entries, terms * self.size, self.size, 1])
        rows, columns = torch.tril_indices(self.size, self.size, device=theta.device)
        roots = []
        for packed in lower.split(entries):
            root = theta.new_zeros(self.size, self.size).index_put((rows, columns), packed)
            roots.append(root.tril(-1) + torch.diag(root.diagonal().exp()))
        return Field(torch.stack(roots), length.exp().reshape(terms, self.size), power, warp[0].exp())


def known_spread(value: Tensor, precision: Tensor) -> Tensor:
    """Variance of maps (P,) of which data (N, P) with errors of `precision` p (N, P), 0 without a datum, are given.

    By moments, with the precision that faint pixels deserve: with v̄ the weighted mean,

        x = Σ p² ((v − v̄)² − 1/p + 1/Σp) / (d Σp²),   s² = 2/(d² Σp²) + 2 x₊² Σp⁴/(Σp²)²,   d = 1 − 2 Σp³/(Σp Σp²) + Σp²/(Σp)²,

    has the mean of the variance and, by noise and by so many pixels, the error s. Returned is the mean of N(x, s²) times
    N(0, τ²) above 0, τ = `_SPREAD`: a map that its noise hides is not called flat, and one without data is about as flat as τ.
    """
    v, p = value.double(), precision.double()
    sums = [p.pow(k).sum(0) for k in range(1, 5)]
    one, two, three, four = (part.clamp_min(_LEAST) for part in sums)
    mean = (p * v).sum(0) / one
    share = (1 - 2 * three / (one * two) + two / one**2).clamp_min(_LEAST)
    x = ((p * (v - mean)).pow(2).sum(0) - sums[0] + sums[1] / one) / (share * two)
    variance = 2 / (share**2 * two) + 2 * x.clamp_min(0) ** 2 * four / two**2
    held = _SPREAD**2 / (_SPREAD**2 + variance)
    x, s = x * held, (variance * held).sqrt()
    hazard = torch.exp(-0.5 * (x / s) ** 2 - torch.special.log_ndtr(x / s)) / math.sqrt(2 * math.pi)
    return (x + s * hazard).clamp_min(1e-3 * s).to(value)


def fit_field(data: PseudoData, plan: FieldPlan = FieldPlan()) -> FittedField:
    """The most probable field, and `plan.pairs` pairs about it."""
    hyper = _Hyperprior.of(data)
    side = max(1, math.isqrt(plan.values // hyper.size))
    tiles = [Tile.of(data, rows, columns) for rows, columns in spread_tiles(data.shape, side, plan.tiles)]
    loss = lambda theta: -log_evidence(hyper.field(theta), tiles) - hyper.log_prob(theta)
    starts = [hyper.shorter(factor) for factor in _STARTS]
    losses = [_loss_or_infinity(loss, theta).item() for theta in starts]
    if math.isinf(min(losses)):
        raise DiffinvError(
            "field: the pseudo-data of the maps are not finite, or too precise for their covariance to be inverted."
        )
    best = _minimise(loss, starts[losses.index(min(losses))], hyper.width, plan.evaluations)
    field = hyper.field(best)
    if not plan.pairs:
        return FittedField(field, (field,))
    steps = antithetic(laplace_root(loss, best, hyper.width), plan.pairs)
    return FittedField(field, tuple(hyper.field(point) for point in contour(loss, best, steps)))


def contour(loss: Callable[[Tensor], Tensor], best: Tensor, steps: Sequence[Tensor]) -> list[Tensor]:
    """θ̂ + t δ of each step, p lower there by e^(D/2), as it is at √D σ of a Gaussian: t = 1 if p is one.

    The nearest of a few secants of a parabola through θ̂, t ≤ 2, and never where the tiles' covariance is none in floating point.
    """
    with torch.no_grad():
        least, wanted, points = loss(best).item(), len(best) / 2, []
        for step in steps:
            t, beyond, tried = 1.0, math.inf, [(math.inf, 0.0)]
            for _ in range(_SECANTS):
                rise = max(_loss_or_infinity(loss, best + t * step).item() - least, 1e-3 * wanted)
                tried.append((abs(math.log(rise / wanted)), t))
                if math.isinf(rise):
                    t, beyond = t / 2, t
                else:
                    t = min(2.0, t * math.sqrt(wanted / rise), (t + beyond) / 2)
            points.append(best + min(tried)[1] * step)
    return points


def _loss_or_infinity(loss: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor:
    try:
        value = loss(theta)
    except torch.linalg.LinAlgError:
        return theta.new_tensor(torch.inf)
    return torch.where(value.isfinite(), value, torch.inf)


def _minimise(loss: Callable[[Tensor], Tensor], start: Tensor, width: Tensor, evaluations: int) -> Tensor:
    """By L-BFGS in units of w, until a step gains less than `_GAIN`; the best point seen.

    A step to where the field is no covariance in floating point is taken for a high wall, from which the line search turns back.
    """
    z, least, best = torch.zeros_like(start).requires_grad_(True), torch.inf, start
    optimiser = torch.optim.LBFGS(
        [z],
        max_iter=evaluations,
        max_eval=evaluations,
        line_search_fn="strong_wolfe",
        tolerance_change=_GAIN,
        tolerance_grad=_GAIN,
    )

    def closure() -> float:
        nonlocal least, best
        optimiser.zero_grad()
        value = _loss_or_infinity(loss, start + width * z)
        if not value.isfinite():
            z.grad = torch.zeros_like(z)
            return _WALL
        value.backward()
        if (here := value.item()) < least:
            least, best = here, (start + width * z).detach()
        return here

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
