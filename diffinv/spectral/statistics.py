"""Likelihoods of one spectrum: counts with a background that was measured elsewhere, and its maximum.

With S ~ Poisson(μ + b) in the source's region and B ~ Poisson(a b) in the background's, b a channel is taken at its own maximum
(a profile): (1 + a) b² + ((1 + a) μ − S − B) b − B μ = 0. This is XSPEC's W statistic.
Invariant: a statistic is −2 log of the likelihood ratio to the perfect model: 0 for it, about one a channel at many counts.

References: Parameter estimation in astronomy through application of the likelihood ratio, Cash, 1979; XSPEC manual, appendix B.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffinv.core.checks import DiffinvError


def cash(counts: Tensor, mean: Tensor) -> Tensor:
    """2 Σ [m − k + k log(k/m)] over the last axis; a mean of zero is possible only without counts."""
    counted = counts > 0
    logs = counts * torch.log(torch.where(counted, counts, 1.0) / torch.where(counted, mean, 1.0))
    return 2 * (mean - counts + logs).sum(-1)


def profile_background(counts: Tensor, background: Tensor, ratio: Tensor, mean: Tensor) -> Tensor:
    """The likeliest background b ≥ 0 a channel in the source's region, given the source's mean μ.

    Arguments: counts: S. background: B. ratio: a, expected background counts per one in the source's region. mean: μ.
    """
    half = 0.5 * (counts + background - (1 + ratio) * mean)
    root = torch.sqrt(half**2 + (1 + ratio) * background * mean)
    positive = (half + root) / (1 + ratio)
    other = background * mean / (root - half).clamp_min(torch.finfo(mean.dtype).tiny)  # the same root, where half < 0 cancels
    return torch.where(half >= 0, positive, other)


def w_statistic(counts: Tensor, background: Tensor, ratio: Tensor, mean: Tensor) -> Tensor:
    """The profile likelihood of source and background, summed over the last axis; arguments as `profile_background`."""
    b = profile_background(counts, background, ratio, mean)
    return cash(counts, mean + b) + cash(background, ratio * b)


@dataclass(frozen=True, eq=False)
class Maximum:
    """theta: (P,). covariance: inverse of half the statistic's Hessian, (P, P). statistic: at the maximum of the likelihood."""

    theta: Tensor
    covariance: Tensor
    statistic: float

    @property
    def errors(self) -> Tensor:
        return self.covariance.diagonal().sqrt()


def maximum_likelihood(
    statistic: Callable[[Tensor], Tensor], start: Tensor, *, iterations: int = 100, tol: float = 1e-6
) -> Maximum:
    """The least of a statistic, by damped Newton steps.

    Arguments:
        statistic: −2 log likelihood of θ (P,), twice differentiable. start: θ (P,), float64.
        iterations: at most. tol: step in standard errors below which it has converged.
    Raises: DiffinvError if it does not converge, or ends where the statistic has no minimum.
    """
    theta, value, damping = start, statistic(start), 1e-3
    for _ in range(iterations):
        gradient, hessian = torch.func.grad(statistic)(theta) / 2, torch.func.hessian(statistic)(theta) / 2
        scale = hessian.diagonal().abs()
        step = -torch.linalg.solve_ex(hessian + damping * torch.diag(scale), gradient)[0]  # not finite where singular
        trial = statistic(theta + step)
        if bool(trial <= value) and bool(trial.isfinite()):
            theta, value, damping = theta + step, trial, damping / 10
            if bool(((step * scale.sqrt()).abs() < tol).all()):
                return _maximum(statistic, theta)
        else:
            damping = 10 * damping
    raise DiffinvError(f"maximum_likelihood: no convergence in {iterations} steps from {start.tolist()}; start elsewhere.")


def _maximum(statistic: Callable[[Tensor], Tensor], theta: Tensor) -> Maximum:
    hessian = torch.func.hessian(statistic)(theta) / 2
    if not bool((torch.linalg.eigvalsh(hessian) > 0).all()):
        raise DiffinvError(f"maximum_likelihood: no minimum at {theta.tolist()}, the curvature is not positive; start elsewhere.")
    return Maximum(theta, torch.linalg.inv(hessian), float(statistic(theta)))
