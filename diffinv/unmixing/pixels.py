"""Maximum likelihood a pixel: Fisher scoring on all pixels at once, inside the box of the models.

    δ = (H + λ diag H)⁻¹ g,   g = Jᵀ s,   H = Jᵀ F J,   J = ∂μ/∂(A, u),

s and F score and Fisher information of the data. A variable at its bound whose gradient points out is held (projected Newton);
λ falls when a step lowers −log p and rises when it does not. Amplitudes are bounded by 0, parameters by their box: a fit that
ends at the box is flagged, since its true optimum lies where the model was not trained or does not exist.
Invariant: a pixel's fit does not depend on the pixels it is fitted with.

References: Levenberg 1944; Marquardt 1963; Bertsekas, *Projected Newton methods*, 1982.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from diffinv.core.batched import Batched, collate
from diffinv.core.checks import DiffinvError
from diffinv.noise.gaussian import Gaussian
from diffinv.noise.poisson import Poisson
from diffinv.unmixing.mixture import Mixture, SpectralData

NODATA, EXTRAPOLATED, UNCONVERGED, CHI2_BAD, FAINT = 1, 2, 4, 8, 16
_LONGEST = 0.25  # of the box, the step of a parameter at most


@dataclass(frozen=True)
class PixelPlan:
    """How pixels are fitted.

    starts: of each parameter's axis, the product of which is tried. refined: how many of the best starts are followed.
    iterations: of Fisher scoring at most. tol: step, in standard errors, below which a pixel is done. rows: pixels at once.
    """

    starts: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9)
    refined: int = 2
    iterations: int = 40
    tol: float = 1e-3
    rows: int = 8192


@dataclass(frozen=True, eq=False)
class PixelFit(Batched):
    """amplitude (N, C), u (N, P), loss −log p (N,), flags (N,) of NODATA, EXTRAPOLATED and UNCONVERGED."""

    amplitude: Tensor
    u: Tensor
    loss: Tensor
    flags: Tensor


@dataclass(frozen=True, eq=False)
class Quadratic(Batched):
    """−log p about (A, u), to second order, amplitudes eliminated.

    score: (N, P) and fisher: (N, P, P) of u at the best amplitude for each u. step: (N, C), slope: (N, C, P) of that amplitude:
    A(u') = A + step − slope (u' − u). covariance: (N, C, C) of the amplitude at given u.
    """

    score: Tensor
    fisher: Tensor
    step: Tensor
    slope: Tensor
    covariance: Tensor


def normal_equations(mixture: Mixture, data: SpectralData, amplitude: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """−log p (N,), gradient of log p (N, D) and Fisher information (N, D, D) in (A, u), D = C + P."""
    mean, jacobian = mixture.linearise(amplitude, u, data.background)
    score = data.noise.score(data.y, mean)
    weight = data.noise.precision(mean).d
    gradient = (jacobian.mT @ score[..., None])[..., 0]
    return data.loss(mean), gradient, (jacobian * weight[..., None]).mT @ jacobian


def quadratic(mixture: Mixture, data: SpectralData, amplitude: Tensor, u: Tensor, *, rows: int = 8192) -> Quadratic:
    """The expansion of −log p about a map, `rows` pixels at a time."""
    count = len(mixture.components)
    parts = []
    for some in torch.arange(len(u)).split(rows):
        _, gradient, fisher = normal_equations(mixture, data.select(some), amplitude[some], u[some])
        own, cross = _regular(fisher[:, :count, :count]), fisher[:, :count, count:]
        covariance = torch.linalg.inv(own)
        slope = covariance @ cross
        step = (covariance @ gradient[:, :count, None])[..., 0]
        score = gradient[:, count:] - (cross.mT @ step[..., None])[..., 0]
        effective = fisher[:, count:, count:] - cross.mT @ slope
        parts.append(Quadratic(score, (effective + effective.mT) / 2, step, slope, covariance))
    return collate(parts)


def _regular(fisher: Tensor) -> Tensor:
    """A Fisher matrix that can be inverted: 1e-12 of its trace, and 1 where it is zero (pixels without data), on its diagonal."""
    trace = fisher.diagonal(dim1=-2, dim2=-1).sum(-1)
    ridge = torch.where(trace > 0, 1e-12 * trace, 1.0)
    return fisher + ridge[:, None, None] * torch.eye(fisher.shape[-1]).to(fisher)


def start_amplitude(data: SpectralData, shapes: Tensor, *, iterations: int = 4) -> Tensor:
    """Non-negative amplitudes (N, C) of given spectra: from equal shares of the data's sum by multiplicative updates,

        A ← A · ⟨S, y/v⟩₊/⟨S, μ/v⟩,   v = Var[y].

    A start for what follows; for counts these are the EM steps of maximum likelihood.

    Arguments: shapes: (1|N, C, K).
    """
    y = torch.where(data.good, data.y - data.background, 0.0)
    mask = data.good.to(y.dtype)
    seen = (shapes * mask[:, None]).sum(2)
    variance = 1 / data.noise.precision(torch.where(data.good, data.y, 1.0)).d
    least = 0.5 * torch.where(data.good, variance, 0.0).sum(1, keepdim=True).sqrt()
    if isinstance(data.noise, Poisson):
        least = least.clamp_min(0.5)
    share = torch.maximum(y.sum(1, keepdim=True), least) / shapes.shape[1]
    level = torch.where(seen > 0, share / torch.where(seen > 0, seen, 1.0), 0.0)
    amplitude = level.clone()
    for _ in range(iterations if shapes.shape[1] > 1 else 1):
        model = (amplitude[:, None] @ shapes)[:, 0]
        weight = data.noise.precision(data.background + model).d
        wanted = (shapes @ (weight * y)[..., None])[..., 0].clamp_min(0)
        amplitude = amplitude * wanted / (shapes @ (weight * model)[..., None])[..., 0].clamp_min(1e-300)
    return torch.maximum(amplitude, 1e-3 * level)


def fit_pixels(mixture: Mixture, data: SpectralData, plan: PixelPlan = PixelPlan()) -> PixelFit:
    """Maximum likelihood of every pixel, from the best of several starts.

    Arguments: data: N spectra.
    Returns: the fit; pixels without good data, or whose data do not exceed the background at all, are NODATA.
    """
    return collate([_fit_rows(mixture, data.select(rows), plan) for rows in torch.arange(len(data.y)).split(plan.rows)])


def _fit_rows(mixture: Mixture, data: SpectralData, plan: PixelPlan) -> PixelFit:
    size = len(mixture.names)
    grid = torch.tensor(list(product(plan.starts, repeat=size)), dtype=data.y.dtype)
    shapes, losses = torch.stack(mixture.shapes(grid), 1), []
    for one in shapes.split(1):
        losses.append(data.loss(data.background + (start_amplitude(data, one)[:, None] @ one)[:, 0]))
    order = torch.stack(losses, 1).argsort(1)
    best: PixelFit | None = None
    for rank in range(min(plan.refined, len(grid))):
        u = grid[order[:, rank]]
        fit = descend(mixture, data, start_amplitude(data, shapes[order[:, rank]]), u, plan)
        best = fit if best is None else _better(best, fit)
    return best


def _better(first: PixelFit, second: PixelFit) -> PixelFit:
    wins = second.loss < first.loss
    choose = lambda a, b: torch.where(wins.reshape(-1, *[1] * (a.ndim - 1)), b, a)
    return PixelFit(*(choose(getattr(first, n), getattr(second, n)) for n in ("amplitude", "u", "loss", "flags")))


def descend(mixture: Mixture, data: SpectralData, amplitude: Tensor, u: Tensor, plan: PixelPlan) -> PixelFit:
    """Fisher scoring from a start, (N, C) and (N, P), to the optimum in the box.

    Raises: DiffinvError if −log p is not finite at the start.
    """
    count = amplitude.shape[1]
    x, empty = torch.cat([amplitude, u], 1), ~_informative(data)
    low, high = _bounds(count, u.shape[1], x)
    loss = data.loss(mixture.mean(amplitude, u, data.background))
    if not bool(loss.isfinite().all()):
        bad = int((~loss.isfinite()).sum())
        raise DiffinvError(f"fit: −log p is not finite in {bad} pixels at the start; check data and noise.")
    damping = torch.full_like(loss, 1e-2)
    outward, active = torch.zeros_like(x, dtype=torch.bool), ~empty
    for _ in range(plan.iterations):
        rows = active.nonzero()[:, 0]
        if not len(rows):
            break
        part, own = data.select(rows), x[rows]
        _, gradient, fisher = normal_equations(mixture, part, own[:, :count], own[:, count:])
        held = ((own <= low) & (gradient < 0)) | ((own >= high) & (gradient > 0))
        step = _solve(gradient, fisher, held, damping[rows])
        longest = torch.cat([step[:, count:].abs(), torch.zeros_like(step[:, :1])], 1).amax(1, keepdim=True) / _LONGEST
        tried = (own + step / longest.clamp_min(1.0)).clamp(low, high)
        new = part.loss(mixture.mean(tried[:, :count], tried[:, count:], part.background))
        accept = new <= loss[rows] + 1e-12 * loss[rows].abs()
        small = ((tried - own) ** 2 * fisher.diagonal(dim1=-2, dim2=-1)).sum(1) < plan.tol**2
        damping[rows] = torch.where(accept, damping[rows] * 0.2, damping[rows] * 8).clamp(1e-9, 1e9)
        x[rows] = torch.where(accept[:, None], tried, own)
        loss[rows] = torch.where(accept, new, loss[rows])
        outward[rows] = held
        active[rows] = ~small
    flags = torch.where(empty, NODATA, 0) | torch.where(outward[:, count:].any(1), EXTRAPOLATED, 0)
    return PixelFit(x[:, :count], x[:, count:], loss, flags | torch.where(active, UNCONVERGED, 0))


def _informative(data: SpectralData) -> Tensor:
    """(N,), whether a pixel has a good datum that is not zero (no counts leave every parameter free)."""
    return (data.good & (torch.where(data.good, data.y, 0.0) != 0)).any(1)


def _bounds(count: int, size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    low = like.new_zeros(count + size)
    high = torch.cat([like.new_full((count,), torch.inf), like.new_ones(size)])
    return low, high


def _solve(gradient: Tensor, fisher: Tensor, held: Tensor, damping: Tensor) -> Tensor:
    """(H + λ diag H) δ = g over the variables that are not held, δ = 0 on the others."""
    free = ~held
    diagonal = fisher.diagonal(dim1=-2, dim2=-1)
    ridge = torch.where(free & (diagonal > 0), (damping[:, None] + 1e-12) * diagonal, 1.0)
    system = torch.where(free[:, :, None] & free[:, None], fisher, 0.0)
    scale = torch.where(free & (diagonal > 0), diagonal, 1.0).rsqrt()
    system = scale[:, :, None] * (system + torch.diag_embed(ridge)) * scale[:, None]
    rhs = torch.where(free, gradient, 0.0) * scale
    return torch.linalg.solve(system, rhs[..., None])[..., 0] * scale


def pooled(data: SpectralData, shape: tuple[int, int], factor: int) -> SpectralData:
    """Spectra summed over factor × factor pixels; a pixel without good data adds neither counts nor background.

    A channel that is bad in some of a block's pixels is the sum of the others scaled to all, and bad if more than half are.

    Returns: ceil(H/factor) · ceil(W/factor) spectra.
    """
    index = pool_index(shape, factor)
    size = int(index.max()) + 1
    add = lambda values: values.new_zeros(size, values.shape[1]).index_add(0, index, values)
    whole = data.good.any(1, keepdim=True)
    used, seen = add(whole.expand_as(data.good).to(data.y.dtype)), add(data.good.to(data.y.dtype))
    good = (used > 0) & (2 * seen >= used)
    scale = torch.where(good, used / seen.clamp_min(1), 1.0)
    y = scale * add(torch.where(data.good, data.y, 0.0))
    background = add(torch.where(whole, data.background.expand_as(data.y), 0.0))
    changes = {"mask": good}
    if isinstance(data.noise, Gaussian):
        variance = torch.where(data.good, data.noise.variance(torch.zeros_like(data.y)), 0.0)
        changes["std"] = scale * add(variance).sqrt()
    noise = replace(data.noise, **changes)
    return SpectralData(y, noise, background)


def pool_index(shape: tuple[int, int], factor: int) -> Tensor:
    """Number of the block of each pixel, (H·W,)."""
    rows, columns = torch.arange(shape[0]) // factor, torch.arange(shape[1]) // factor
    return (rows[:, None] * (int(columns[-1]) + 1) + columns).flatten()
