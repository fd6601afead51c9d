"""Gaussian fields over maps of parameters: the errors that are reported.

One step of Fisher scoring from a smooth map gives Gaussian pseudo-data, ũ_i = u_i + F_i⁻¹ s_i ~ N(u_true, F_i⁻¹), and

    u_i = m + E_i L₁ f_1i + L₂ f_2i,   f_tq independent with covariance k_t(r_ijtq),   L_t lower triangular,
    E_i = diag(e_i^β_p),   r_ijtq² = |i − i'|²/ℓ_tq² + α² (b_i − b_i')²,

with m ~ N(½, 1/12) for each parameter, as its box has it, is a prior for all parameters jointly (a linear model of
coregionalisation) with a rough and a smooth term: k₁ = exp(−r), k₂ Matérn's of ν = 5/2. What is seen has two parts in it.
e_i > 0 is how rough the smooth maps are about pixel i (`roughness`): clumps and edges get wide priors, calm regions narrow ones,
of a parameter whose data want β > 0. An edge of one parameter is an edge of what is looked at, so that e is common to all, but
how far each has it is its own; and it is no wider than an edge is seen, since beyond it the prior would be too wide and, its
height being learnt from all pixels, at the edge too narrow. b_i is the brightness (`brightness`), whose noise is not the maps':
pixels that differ in it are as if farther apart, so that a clump has values of its own within, if the data want α > 0. This is
a distance between points (x, y, b), and its kernels are covariances (a deformation of space). L, ℓ, β and α are learnt
from the data, see `field_fit`. The posterior of a block of pixels is exact given the pseudo-data in the block and in a margin
about it, beyond which the data are screened by those within: linear in the pixels too; a map of one window is exact.
The width of this posterior covers because the prior's length and height are learnt from the data; that of a sparse map does not.
m is not fixed but known from the data of all tiles, N(m̂, V_m), and u_i given m is linear in m: where a map is flat, or small,
the width is that of its mean.
Invariant: a pixel without data has the posterior that its surroundings give it, and the prior's far from them.

References: Rasmussen & Williams, *Gaussian Processes for Machine Learning*, 2006; Varin, Reid & Firth, *An overview of composite
likelihood methods*, 2011; Alvarez, Rosasco & Lawrence, *Kernels for vector-valued functions*, 2012, arXiv:1106.6251; Schmidt &
O'Hagan, *Bayesian inference for non-stationary spatial covariance structure via spatial deformations*, 2003.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from diffinv.unmixing.starlet import Starlet

_FINE, _CALM = 2, 0.1  # of the roughness: starlet scales, least value
_CENTRE, _BOX = 0.5, 1 / 12  # mean and variance of m
_NEAR = 1e-24  # r², where a root has a slope
_VAGUE = 1e-3  # information of a parameter's box, added to every pixel, so that F⁻¹ exists where there are no data


@dataclass(frozen=True)
class FieldPlan:
    """How a field is fitted and used.

    values: of a tile of the marginal likelihood, about (pixels times parameters); `tiles` of them are taken at most, evenly
    spaced. block, margin: pixels a side of what a window returns, and pixels about it that it also sees. evaluations: of the
    evidence in the search for its maximum, at most.
    pairs: of fields that stand for what the data leave open of L, ℓ, β and α, see `field_fit`; 0: the most probable field alone.
    """

    values: int = 512
    tiles: int = 48
    block: int = 8
    margin: int = 6
    evaluations: int = 100
    pairs: int = 4


def exponential(r: Tensor) -> Tensor:
    """exp(−r): continuous fields without derivatives."""
    return torch.exp(-r)


def matern(r: Tensor) -> Tensor:
    """(1 + √5 r + 5r²/3) exp(−√5 r): fields with two derivatives."""
    scaled = 5**0.5 * r
    return (1 + scaled + scaled**2 / 3) * torch.exp(-scaled)


KERNELS = (exponential, matern)


@dataclass(frozen=True, eq=False)
class Sites:
    """Pixels, as a field knows them: place (n, 2), roughness e (n,) and brightness b (n,)."""

    place: Tensor
    rough: Tensor
    bright: Tensor

    @classmethod
    def of(cls, shape: tuple[int, int], rough: Tensor, bright: Tensor) -> Sites:
        """All pixels of a map (H, W), row by row."""
        index = torch.arange(math.prod(shape), device=rough.device)
        return cls(torch.stack([index // shape[1], index % shape[1]], 1).to(rough), rough, bright)

    def __len__(self) -> int:
        return len(self.rough)

    def __getitem__(self, index: Tensor) -> Sites:
        return Sites(self.place[index], self.rough[index], self.bright[index])


@dataclass(frozen=True, eq=False)
class Field:
    """roots: L_t (2, P, P), of `KERNELS`. lengths: ℓ (2, P) in pixels. power: β (P,). warp: α ()."""

    roots: Tensor
    lengths: Tensor
    power: Tensor
    warp: Tensor

    def covariance(self, here: Sites, there: Sites) -> Tensor:
        """Of n and m pixels, (n·P, m·P), a pixel's parameters together."""
        size, parts = self.roots.shape[-1], []
        distance = (here.place[:, None] - there.place).pow(2).sum(-1)
        unlike = (self.warp * (here.bright[:, None] - there.bright)).pow(2)
        for kernel, root, lengths in zip(KERNELS, self.roots, self.lengths, strict=True):
            products = torch.einsum("pq,rq->qpr", root, root).flatten(1)
            r = (distance[..., None] / lengths**2 + unlike[..., None] + _NEAR).sqrt()
            blocks = kernel(r).flatten(0, 1) @ products
            parts.append(rearrange(blocks, "(i j) (p q) -> (i p) (j q)", i=len(here), p=size))
        scale, scale_too = ((sites.rough[:, None] ** self.power).flatten() for sites in (here, there))
        return scale[:, None] * parts[0] * scale_too + parts[1]

    def variance(self, sites: Sites) -> Tensor:
        """(n, P, P) of a pixel's parameters."""
        first, second = self.roots @ self.roots.mT
        scale = sites.rough[:, None] ** self.power
        return scale[:, :, None] * first * scale[:, None] + second


@dataclass(frozen=True, eq=False)
class FieldPosterior:
    """mean: (N, P). covariance: (N, P, P) of a pixel's parameters."""

    mean: Tensor
    covariance: Tensor


@dataclass(frozen=True, eq=False)
class PseudoData:
    """ũ (N, P), its covariance V = (F + vague)⁻¹ (N, P, P) and the sites, of the pixels of a map (H, W)."""

    value: Tensor
    covariance: Tensor
    sites: Sites
    shape: tuple[int, int]

    @classmethod
    def of(cls, u: Tensor, score: Tensor, fisher: Tensor, sites: Sites, shape: tuple[int, int]) -> PseudoData:
        """From the score and Fisher information about u."""
        covariance = torch.linalg.inv(fisher + _VAGUE * torch.eye(u.shape[1]).to(u))
        return cls(u + (covariance @ score[..., None])[..., 0], covariance, sites, shape)

    @property
    def information(self) -> Tensor:
        """1/V of each parameter, 0 where most of it is the vague term's: there ũ is a guess and no datum, (N, P)."""
        precision = 1 / self.covariance.diagonal(dim1=1, dim2=2)
        return torch.where(precision > 2 * _VAGUE, precision, 0.0)

    def window(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """Pixel numbers (n,) and the block-diagonal noise covariance (n·P, n·P) of a window."""
        index = torch.arange(math.prod(self.shape)).reshape(self.shape)[rows, columns].flatten()
        size = self.value.shape[1]
        noise = self.value.new_zeros(len(index), size, len(index), size)
        pixel = torch.arange(len(index))
        noise[pixel, :, pixel] = self.covariance[index]
        return index, noise.reshape(len(index) * size, -1)


def roughness(u: Tensor, shape: tuple[int, int]) -> Tensor:
    """e (N,): local rms of the two finest starlet scales of maps u (N, P), each in units of its rms, and 0.1 at least.

    Local: smoothed as c₁ of a starlet is, over five pixels, the width of what the finest scale makes of an edge.
    """
    starlet = Starlet(_FINE)
    squares = starlet.forward(rearrange(u, "(h w) p -> p 1 h w", h=shape[0])).pow(2).sum(1, keepdim=True)
    local = starlet.smooth(squares, 0).flatten(1).T.clamp_min(0)
    return (local / local.mean(0).clamp_min(1e-12)).mean(1).sqrt().clamp_min(_CALM)


def brightness(amplitude: Tensor, known: Tensor, shape: tuple[int, int]) -> Tensor:
    """b (N,) of amplitudes (N, C): the root of their sum, smoothed as c₁ of a starlet is, less its mean, over its rms.

    A root evens out the noise of photons; pixels that are not known (N,) have what is near.
    """
    root = filled(amplitude.sum(1).clamp_min(0).sqrt(), known, shape)
    smooth = Starlet(1).smooth(root.reshape(1, 1, *shape), 0).flatten()
    centred = smooth - smooth.mean()
    return centred / centred.pow(2).mean().sqrt().clamp_min(1e-12)


def filled(x: Tensor, known: Tensor, shape: tuple[int, int]) -> Tensor:
    """A map x (N,) with the weighted mean of the nearest pixels that are known (N,) in the place of others; zeros without any."""
    starlet, seen = Starlet(1), known.to(x).reshape(1, 1, *shape)
    sums, weights, found = x.reshape(1, 1, *shape) * seen, seen, x.reshape(1, 1, *shape) * seen
    for scale in range(max(1, max(shape) - 1).bit_length()):
        sums, weights = starlet.smooth(sums, scale), starlet.smooth(weights, scale)
        new = (seen == 0) & (weights > 0)
        found = torch.where(new, sums / torch.where(new, weights, 1.0), found)
        seen = torch.where(new, 1.0, seen)
    return found.flatten()


@dataclass(frozen=True, eq=False)
class Tile:
    """ũ (n·P,), pixels' parameters together, their sites and the covariance of noise (n·P, n·P)."""

    value: Tensor
    sites: Sites
    noise: Tensor

    @classmethod
    def of(cls, data: PseudoData, rows: slice, columns: slice) -> Tile:
        index, noise = data.window(rows, columns)
        return cls(data.value[index].flatten(), data.sites[index], noise)

    def covariance(self, field: Field) -> Tensor:
        """Of ũ given m: S = K + V."""
        return field.covariance(self.sites, self.sites) + self.noise


def log_evidence(field: Field, tiles: Sequence[Tile]) -> Tensor:
    """log ∫ N(m; ½, 1/12) Π_t N(ũ_t; H m, S_t) dm, S = K + V, H of `_common`: one mean for all tiles.

    With a mean each, how far tiles differ would say nothing of the field, whose height is then learnt from less than a tile.
    """
    size = field.roots.shape[-1]
    return _LogEvidence.apply(size, [tile.value - _CENTRE for tile in tiles], *(tile.covariance(field) for tile in tiles))


def _common(pixels: int, like: Tensor) -> Tensor:
    """H (n·P, P): what a unit of m adds to the values of pixels; like: (…, P)."""
    return torch.eye(like.shape[-1]).to(like).repeat(pixels, 1)


class _LogEvidence(torch.autograd.Function):
    """Of residuals r_t ~ N(H δ, S_t), δ ~ N(0, 1/12): with V = (12 + Σ Hᵀ S⁻¹ H)⁻¹ and δ̂ = V Σ Hᵀ S⁻¹ r,

        Σ log N(r_t; 0, S_t) + ½ δ̂ᵀ V⁻¹ δ̂ + ½ log |12 V|,   ∂/∂S = ½ (a aᵀ − S⁻¹ + S⁻¹ H V Hᵀ S⁻¹),   a = S⁻¹ (r − H δ̂).

    A third of the time of derivatives of the factors.
    """

    @staticmethod
    def forward(ctx, size: int, residuals: list[Tensor], *covariances: Tensor) -> Tensor:
        precision = torch.eye(size).to(covariances[0]) / _BOX
        shift, value = precision.new_zeros(size), precision.new_zeros(())
        saved = []
        for residual, covariance in zip(residuals, covariances, strict=True):
            root = torch.linalg.cholesky(covariance)
            common = _common(len(residual) // size, precision)
            solved = torch.cholesky_solve(torch.cat([residual[:, None], common], 1), root)
            value = value - 0.5 * residual @ solved[:, 0] - root.diagonal().log().sum()
            precision, shift = precision + common.mT @ solved[:, 1:], shift + solved[:, 1:].mT @ residual
            saved += [root, solved]
        unsure = torch.linalg.inv(precision)
        ctx.save_for_backward(unsure, unsure @ shift, *saved)
        count = sum(map(len, residuals))
        return value + 0.5 * shift @ unsure @ shift - 0.5 * (_BOX * precision).logdet() - 0.5 * count * math.log(2 * math.pi)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        unsure, middle, *saved = ctx.saved_tensors
        slopes = []
        for root, solved in zip(saved[::2], saved[1::2], strict=True):
            a, spread = solved[:, 0] - solved[:, 1:] @ middle, solved[:, 1:]
            slopes.append(0.5 * upstream * (a[:, None] * a - torch.cholesky_inverse(root) + spread @ unsure @ spread.mT))
        return None, None, *slopes


def spread_tiles(shape: tuple[int, int], side: int, most: int) -> list[tuple[slice, slice]]:
    """Tiles of about `side` pixels that cover the map, or `most` of them."""
    starts = [[k * n // max(1, round(n / side)) for k in range(max(1, round(n / side)) + 1)] for n in shape]
    spans = [[slice(a, b) for a, b in zip(ends, ends[1:], strict=False)] for ends in starts]
    every = [(rows, columns) for rows in spans[0] for columns in spans[1]]
    kept = min(most, len(every))
    return [every[(2 * k + 1) * len(every) // (2 * kept)] for k in range(kept)]


def field_posterior(data: PseudoData, field: Field, plan: FieldPlan = FieldPlan()) -> FieldPosterior:
    """Posterior mean and covariance of every pixel's parameters."""
    size, common = data.value.shape[1], mean_of(data, field, plan)
    mean, covariance = torch.empty_like(data.value), torch.empty_like(data.covariance)
    for rows in range(0, data.shape[0], plan.block):
        for columns in range(0, data.shape[1], plan.block):
            index, part, spread = _window_posterior(data, field, common, plan, rows, columns)
            mean[index] = part.reshape(-1, size)
            covariance[index] = spread
    return FieldPosterior(mean, covariance)


def mean_of(data: PseudoData, field: Field, plan: FieldPlan = FieldPlan()) -> tuple[Tensor, Tensor]:
    """m̂ (P,) and V_m (P, P), given the data of all tiles, taken as independent: V_m⁻¹ = 12 + Σ Hᵀ S⁻¹ H, S = K + V."""
    size = data.value.shape[1]
    precision = torch.eye(size).to(data.value) / _BOX
    shift = precision.new_full((size,), _CENTRE / _BOX)
    side = max(1, math.isqrt(plan.values // size))
    for rows, columns in spread_tiles(data.shape, side, math.prod(data.shape)):
        tile = Tile.of(data, rows, columns)
        common = _common(len(tile.sites), precision)
        solved = torch.cholesky_solve(common, torch.linalg.cholesky(tile.covariance(field)))
        precision, shift = precision + common.mT @ solved, shift + solved.mT @ tile.value
    covariance = torch.linalg.inv(precision)
    return covariance @ shift, (covariance + covariance.mT) / 2


def _window_posterior(
    data: PseudoData, field: Field, common: tuple[Tensor, Tensor], plan: FieldPlan, top: int, left: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Pixel numbers, mean (n·P,) and covariance (n, P, P) of one block, given the window about it and m̂, V_m."""
    size = data.value.shape[1]
    around = [slice(max(0, start - plan.margin), start + plan.block + plan.margin) for start in (top, left)]
    index, noise = data.window(*around)
    inner, _ = data.window(slice(top, top + plan.block), slice(left, left + plan.block))
    seen, wanted = data.sites[index], data.sites[inner]
    root = torch.linalg.cholesky(field.covariance(seen, seen) + noise)
    cross = field.covariance(seen, wanted)
    white = torch.linalg.solve_triangular(root, cross, upper=False)
    middle, unsure = common
    residual = (data.value[index] - middle).flatten()
    gain = torch.linalg.solve_triangular(root, residual[:, None], upper=False)
    mean = (white.mT @ gain)[:, 0] + middle.repeat(len(inner))
    pieces = white.reshape(len(white), len(inner), size)
    spread = field.variance(wanted) - torch.einsum("wnp,wnq->npq", pieces, pieces)
    lent = white.mT @ torch.linalg.solve_triangular(root, _common(len(index), unsure), upper=False)
    by_mean = (_common(len(inner), unsure) - lent).reshape(len(inner), size, size)
    spread = spread + by_mean @ unsure @ by_mean.mT
    return inner, mean, spread
