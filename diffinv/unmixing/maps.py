"""Maps of parameters, sparse in starlets: the fit of all pixels together.

    min over A ≥ 0, u:  −log p(y | A, u) + κ Σ_p Σ_j Σ_i √(ψ_j² ⋆ F_pp)_i |W_j u_p|_i

with F the Fisher information of u at each pixel once its amplitudes are eliminated: √(ψ_j² ⋆ F) is the standard deviation of the
starlet coefficient of the gradient, so that κ is a number of standard deviations, the same for all parameters, scales and
brightnesses. Each round takes −log p to second order and solves the convex problem that results by a primal–dual splitting
whose steps follow F. The coarse scale is free.
κ is chosen by Stein's unbiased estimate of the error (û − u)ᵀ F (û − u) of the last quadratic problem,

    (ũ − û)ᵀ F (ũ − û) − n + 2 tr ∂û/∂ũ,   ũ = u + F⁻¹ s ~ N(u_true, F⁻¹).

Invariant: u stays in the box of the models; κ = 0 gives the maximum-likelihood fit of each pixel there; pixels without
information take the values of their surroundings.

References: Chambolle & Pock, *A first-order primal-dual algorithm*, 2011; Stein 1981; Ramani, Blu & Unser 2008.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from einops import rearrange
from torch import Tensor

from diffinv.core.rng import Rng
from diffinv.unmixing.mixture import Mixture, SpectralData
from diffinv.unmixing.pixels import Quadratic, quadratic
from diffinv.unmixing.starlet import Starlet

_PROBE = 0.1  # standard errors, the step of the finite difference in Stein's estimate
_SPREAD = 12.0  # information of a parameter that is uniform in its box: 1/Var


@dataclass(frozen=True)
class MapPlan:
    """How maps are fitted.

    scales: of the starlets. rounds: of linearisation at most. iterations: of the splitting a round. kappas: among which Stein's
    estimate chooses. tol: mean step of a round, in standard errors, that ends it. probes: of the trace. seed: of the probes.
    """

    scales: int = 5
    rounds: int = 6
    iterations: int = 80
    kappas: Sequence[float] = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0)
    tol: float = 0.02
    probes: int = 2
    seed: int = 0


@dataclass(frozen=True)
class ParameterMap:
    """amplitude (N, C), u (N, P) of pixels in row-major order; kappa; risk: Stein's estimate for each of the plan's κ."""

    amplitude: Tensor
    u: Tensor
    kappa: float
    risk: tuple[float, ...]


@dataclass(frozen=True)
class Splitting:
    """argmin over u of ½ uᵀ F u − qᵀ u + Σ w|Φ u|, for maps of one shape.

    Arguments: transform. shape: (H, W). fisher: F, (N, P, P).
    """

    transform: Starlet
    shape: tuple[int, int]
    fisher: Tensor

    def weights(self) -> Tensor:
        """√(ψ_j² ⋆ F_pp), (P, scales, H, W)."""
        return self.transform.energy(self._images(self.fisher.diagonal(dim1=-2, dim2=-1)[None])).sqrt()

    def solve(self, q: Tensor, weights: Tensor, start: tuple[Tensor, Tensor], iterations: int) -> tuple[Tensor, Tensor]:
        """Arguments: q: (B, N, P). weights: (P, scales, H, W). start: u (B, N, P) and dual (B, P, scales, H, W).

        Returns: u and dual of the last iteration, of the same shapes.
        """
        level = self.fisher.diagonal(dim1=-2, dim2=-1).mean(0).clamp_min(1e-12)  # dual step over primal step, ‖Φ‖ ≤ 1
        inverse = torch.linalg.inv(self.fisher + torch.diag(level))
        u, dual = start
        ahead = u
        for _ in range(iterations):
            rise = rearrange(self.transform.forward(self._images(ahead)), "(b p) s h w -> b p s h w", b=len(q))
            dual = dual + level[:, None, None, None] * rise
            dual = torch.maximum(torch.minimum(dual, weights), -weights)
            pull = rearrange(self.transform.adjoint(dual.flatten(0, 1)), "(b p) 1 h w -> b (h w) p", b=len(q))
            new = (inverse @ (q - pull + level * u)[..., None])[..., 0]
            ahead, u = 2 * new - u, new
        return u, dual

    def _images(self, u: Tensor) -> Tensor:
        """(B, N, P) → (B P, 1, H, W)."""
        return rearrange(u, "b (h w) p -> (b p) 1 h w", h=self.shape[0])

    def zeros(self, batch: int) -> Tensor:
        """A dual to start with."""
        return self.fisher.new_zeros(batch, self.fisher.shape[-1], self.transform.scales, *self.shape)

    def penalty(self, u: Tensor, weights: Tensor) -> Tensor:
        """Σ w|Φ u| of (N, P)."""
        return (weights * self.transform.forward(self._images(u[None])).abs()).sum()


def fit_map(
    mixture: Mixture, data: SpectralData, shape: tuple[int, int], start: tuple[Tensor, Tensor], plan: MapPlan = MapPlan()
) -> ParameterMap:
    """The map at the κ of least estimated error.

    Arguments: data: H·W spectra, row by row. start: amplitude (N, C) and u (N, P), finite everywhere.
    """
    middle = sorted(plan.kappas)[len(plan.kappas) // 2]
    first = fit_map_at(mixture, data, shape, start, middle, plan)
    step = quadratic(mixture, data, first.amplitude, first.u)
    risk = risks(Splitting(Starlet(plan.scales), shape, step.fisher), step, first.u, plan)
    kappa = plan.kappas[min(range(len(risk)), key=risk.__getitem__)]
    best = first if kappa == middle else fit_map_at(mixture, data, shape, (first.amplitude, first.u), kappa, plan)
    return replace(best, risk=tuple(risk))


def fit_map_at(
    mixture: Mixture, data: SpectralData, shape: tuple[int, int], start: tuple[Tensor, Tensor], kappa: float, plan: MapPlan
) -> ParameterMap:
    """The map at a given κ. The objective never rises: a round that would raise it is shortened, and then ends the fit.

    The weights are those of the last round's F; the objective of a round has that round's weights at both ends.
    """
    amplitude, u = start
    dual: Tensor | None = None
    for _ in range(plan.rounds):
        step = quadratic(mixture, data, amplitude, u)
        split = Splitting(Starlet(plan.scales), shape, step.fisher)
        weights = kappa * split.weights()
        q = step.score + (step.fisher @ u[..., None])[..., 0]
        found, dual = split.solve(q[None], weights, (u[None], split.zeros(1) if dual is None else dual), plan.iterations)
        objective = partial(_objective, mixture, data, split, weights)
        before, moved, length = objective(amplitude, u), found[0] - u, 1.0
        while length > 0.05:
            tried = (u + length * moved).clamp(0, 1)
            new = (amplitude + step.step - (step.slope @ (tried - u)[..., None])[..., 0]).clamp_min(0)
            if objective(new, tried) <= before:
                break
            length /= 2
        else:
            break
        moved = tried - u
        amplitude, u = new, tried
        size = moved[:, None] @ step.fisher @ moved[..., None]
        if float(size.mean() / u.shape[1]) < plan.tol**2:
            break
    return ParameterMap(amplitude, u, kappa, ())


def _objective(mixture: Mixture, data: SpectralData, split: Splitting, weights: Tensor, amplitude: Tensor, u: Tensor) -> float:
    return float(data.loss(mixture.mean(amplitude, u, data.background)).sum() + split.penalty(u, weights))


def risks(split: Splitting, step: Quadratic, u: Tensor, plan: MapPlan) -> list[float]:
    """Stein's estimate, a number for each κ of the plan, for the quadratic problem about u."""
    q = step.score + (step.fisher @ u[..., None])[..., 0]
    root = torch.linalg.cholesky(step.fisher + 1e-9 * _SPREAD * torch.eye(u.shape[1]).to(u))
    z = Rng.for_draws(plan.seed, [0], plan.probes).normal(u.expand(plan.probes, *u.shape))
    kicks = (root @ z[..., None])[..., 0]
    target = q[None] + torch.cat([torch.zeros_like(u)[None], _PROBE * kicks])
    state = (u.expand_as(target), split.zeros(len(target)))
    weights, found = split.weights(), {}
    for kappa in sorted(plan.kappas):
        state = split.solve(target, kappa * weights, state, plan.iterations)
        away = step.score + (step.fisher @ (u - state[0][0])[..., None])[..., 0]  # F (ũ − û)
        misfit = (away * _whitened(step.fisher, away)).sum()
        trace = ((state[0][1:] - state[0][0]) * kicks).sum() / (_PROBE * plan.probes)
        found[kappa] = float(misfit - u.numel() + 2 * trace)
    return [found[kappa] for kappa in plan.kappas]


def _whitened(fisher: Tensor, v: Tensor) -> Tensor:
    """F⁻¹ v, zero along directions without information."""
    values, vectors = torch.linalg.eigh(fisher)
    kept = values > 1e-9 * _SPREAD
    inverse = torch.where(kept, 1 / torch.where(kept, values, 1.0), 0.0)
    return (vectors @ (inverse * (vectors.mT @ v[..., None])[..., 0])[..., None])[..., 0]
