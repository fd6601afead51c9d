"""Gaussian fields over maps of parameters: the errors that are reported.

One step of Fisher scoring from a smooth map gives Gaussian pseudo-data, ũ_i = u_i + F_i⁻¹ s_i ~ N(u_true, F_i⁻¹), and

    u_i = m + L f_i,   f_q independent with covariance exp(−|i − i'|/ℓ_q),   L lower triangular,

is a prior for all parameters jointly (a linear model of coregionalisation). m, L and ℓ maximise the marginal likelihood of the
pseudo-data (type II), summed over tiles as if these were independent: unbiased estimating equations at a cost linear in the
pixels. The posterior of a block of pixels is exact given the pseudo-data in the block and in a margin about it, beyond which the
data are screened by those within: linear in the pixels too; a map of one window is exact.
The width of this posterior covers because the prior's length and height are learnt from the data; that of a sparse map does not.
Invariant: a pixel without data has the posterior that its surroundings give it, and the prior's far from them.

References: Rasmussen & Williams, *Gaussian Processes for Machine Learning*, 2006; Varin, Reid & Firth, *An overview of composite
likelihood methods*, 2011; Alvarez, Rosasco & Lawrence, *Kernels for vector-valued functions*, 2012, arXiv:1106.6251.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_VAGUE = 1e-3  # information of a parameter's box, added to every pixel, so that F⁻¹ exists where there are no data


@dataclass(frozen=True)
class FieldPlan:
    """How a field is fitted.

    tile: pixels a side of the tiles of the marginal likelihood, of which `tiles` are taken at most, evenly spaced.
    block, margin: pixels a side of what a window returns, and pixels about it that it also sees. iterations: of L-BFGS.
    """

    tile: int = 16
    tiles: int = 16
    block: int = 16
    margin: int = 8
    iterations: int = 20


@dataclass(frozen=True, eq=False)
class Field:
    """mean: m (P,). root: L (P, P). length: ℓ (P,) in pixels."""

    mean: Tensor
    root: Tensor
    length: Tensor

    def covariance(self, distance: Tensor) -> Tensor:
        """(n, m) pixel distances → (n·P, m·P), a pixel's parameters together."""
        kernels = torch.exp(-distance[..., None] / self.length)
        product = torch.einsum("nmq,pq,rq->npmr", kernels, self.root, self.root)
        return product.reshape(len(distance) * len(self.mean), -1)


@dataclass(frozen=True, eq=False)
class FieldPosterior:
    """mean: (N, P). covariance: (N, P, P) of a pixel's parameters."""

    mean: Tensor
    covariance: Tensor


@dataclass(frozen=True, eq=False)
class PseudoData:
    """ũ (N, P) and its covariance V = (F + vague)⁻¹ (N, P, P), of pixels at places (N, 2) (row, column), on a map (H, W)."""

    value: Tensor
    covariance: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, u: Tensor, score: Tensor, fisher: Tensor, shape: tuple[int, int]) -> PseudoData:
        """From the score and Fisher information about u."""
        covariance = torch.linalg.inv(fisher + _VAGUE * torch.eye(u.shape[1]).to(u))
        return cls(u + (covariance @ score[..., None])[..., 0], covariance, shape)

    def window(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Pixel numbers (n,), places (n, 2) and the block-diagonal noise covariance (n·P, n·P) of a window."""
        index = torch.arange(math.prod(self.shape)).reshape(self.shape)[rows, columns].flatten()
        places = torch.stack([index // self.shape[1], index % self.shape[1]], 1).to(self.value)
        size = self.value.shape[1]
        noise = self.value.new_zeros(len(index), size, len(index), size)
        pixel = torch.arange(len(index))
        noise[pixel, :, pixel] = self.covariance[index]
        return index, places, noise.reshape(len(index) * size, -1)


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return (a[:, None] - b).pow(2).sum(-1).clamp_min(1e-30).sqrt()


def fit_field(data: PseudoData, plan: FieldPlan = FieldPlan()) -> Field:
    """Mean, heights, correlations and lengths of greatest (composite) marginal likelihood."""
    windows = [data.window(rows, columns) for rows, columns in _tiles(data.shape, plan)]
    parts = [(data.value[index].flatten(), _distance(places, places), noise) for index, places, noise in windows]
    theta = _initial(data).requires_grad_(True)
    optimiser = torch.optim.LBFGS([theta], max_iter=plan.iterations, line_search_fn="strong_wolfe", tolerance_change=1e-5)
    count = sum(len(value) for value, _, _ in parts)

    def closure() -> Tensor:
        optimiser.zero_grad()
        field = _unpack(theta, data.value.shape[1])
        loss = -sum(log_evidence(field, *part) for part in parts) / count
        loss.backward()
        return loss

    optimiser.step(closure)
    return _unpack(theta.detach(), data.value.shape[1])


def log_evidence(field: Field, value: Tensor, distance: Tensor, noise: Tensor) -> Tensor:
    """log N(ũ; m, K + V) of one tile, pixels' parameters together."""
    root = torch.linalg.cholesky(field.covariance(distance) + noise)
    residual = value - field.mean.repeat(len(distance))
    white = torch.linalg.solve_triangular(root, residual[:, None], upper=False)
    return -0.5 * white.pow(2).sum() - root.diagonal().log().sum() - 0.5 * len(value) * math.log(2 * math.pi)


def _tiles(shape: tuple[int, int], plan: FieldPlan) -> list[tuple[slice, slice]]:
    """Tiles that cover the map, or `plan.tiles` of them."""
    starts = [[k * n // max(1, round(n / plan.tile)) for k in range(max(1, round(n / plan.tile)) + 1)] for n in shape]
    spans = [[slice(a, b) for a, b in zip(ends, ends[1:], strict=False)] for ends in starts]
    every = [(rows, columns) for rows in spans[0] for columns in spans[1]]
    kept = min(plan.tiles, len(every))
    return [every[(2 * k + 1) * len(every) // (2 * kept)] for k in range(kept)]


def _initial(data: PseudoData) -> Tensor:
    """Packed parameters to start from: weighted mean, a third of the spread of the good data, no correlation, ℓ = 8 pixels."""
    size = data.value.shape[1]
    precision = 1 / data.covariance.diagonal(dim1=1, dim2=2)
    mean = (precision * data.value).sum(0) / precision.sum(0)
    excess = (precision * (data.value - mean) ** 2).sum(0) / precision.sum(0) - len(data.value) / precision.sum(0)
    height = excess.clamp_min(1e-4).sqrt()
    lower = torch.diag(height.log())
    rows, columns = torch.tril_indices(size, size)
    return torch.cat([mean, lower[rows, columns], torch.full((size,), math.log(8.0)).to(mean)])


def _unpack(theta: Tensor, size: int) -> Field:
    mean, lower, length = theta.split([size, size * (size + 1) // 2, size])
    rows, columns = torch.tril_indices(size, size)
    root = theta.new_zeros(size, size).index_put((rows, columns), lower)
    return Field(mean, root.tril(-1) + torch.diag(root.diagonal().exp()), length.exp())


def field_posterior(data: PseudoData, field: Field, plan: FieldPlan = FieldPlan()) -> FieldPosterior:
    """Posterior mean and covariance of every pixel's parameters."""
    size = data.value.shape[1]
    mean, covariance = torch.empty_like(data.value), torch.empty_like(data.covariance)
    for rows in range(0, data.shape[0], plan.block):
        for columns in range(0, data.shape[1], plan.block):
            index, part, spread = _window_posterior(data, field, plan, rows, columns)
            mean[index] = part.reshape(-1, size)
            covariance[index] = spread
    return FieldPosterior(mean, covariance)


def _window_posterior(data: PseudoData, field: Field, plan: FieldPlan, top: int, left: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pixel numbers, mean (n·P,) and covariance (n, P, P) of one block, given the window about it."""
    size = data.value.shape[1]
    around = [slice(max(0, start - plan.margin), start + plan.block + plan.margin) for start in (top, left)]
    index, places, noise = data.window(*around)
    inner, targets, _ = data.window(slice(top, top + plan.block), slice(left, left + plan.block))
    root = torch.linalg.cholesky(field.covariance(_distance(places, places)) + noise)
    cross = field.covariance(_distance(places, targets))
    white = torch.linalg.solve_triangular(root, cross, upper=False)
    residual = (data.value[index] - field.mean).flatten()
    gain = torch.linalg.solve_triangular(root, residual[:, None], upper=False)
    mean = (white.mT @ gain)[:, 0] + field.mean.repeat(len(inner))
    pieces = white.reshape(len(white), len(inner), size)
    spread = field.root @ field.root.mT - torch.einsum("wnp,wnq->npq", pieces, pieces)
    return inner, mean, spread
