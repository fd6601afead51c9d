"""Guidance: how a prior's denoiser and a likelihood become the posterior's denoiser, E[x₀ | x_σ, y].

Every method estimates `D_y = D + σ² ∇ₓ log p(y | x_σ)` with its own assumption on Cov[x₀ | x_σ].
"""

from __future__ import annotations

import abc
from dataclasses import dataclass

import torch
from torch import Tensor

from diffinv.core.linalg import Solve, information_gmres, information_solve
from diffinv.core.recycling import RecycledResiduals
from diffinv.core.types import Image, LinearMap, Sigma
from diffinv.likelihood import Likelihood
from diffinv.priors.base import Denoiser

_INNER_TOL = 0.05  # of a preconditioner's solve: beyond it, the model's own error rules


class Guidance(abc.ABC):
    """E[x₀ | x_σ, y] from prior, likelihood, x (B, *image) and σ (B,).

    `calibrated` says whether the method claims draws of the posterior, up to its stated approximations.
    """

    calibrated: bool

    @abc.abstractmethod
    def __call__(self, prior: Denoiser, likelihood: Likelihood, x: Image, sigma: Sigma) -> Image:
        """The posterior's denoiser at (x, σ)."""


class InformationSolver(abc.ABC):
    """Solves (C⁻¹ + F) d = s given products with C and F."""

    @property
    @abc.abstractmethod
    def products(self) -> int:
        """Products with C at most."""

    @abc.abstractmethod
    def __call__(self, covariance: LinearMap, fisher: LinearMap, score: Tensor) -> Solve:
        """d (B, *image) with its residual."""


@dataclass(frozen=True)
class ConjugateGradients(InformationSolver):
    """CG preconditioned with C: one C and one F product an iteration; C must be symmetric PSD.

    Arguments: iterations: at most. tol: a row stops at √(rᵀCr/sᵀCs) ≤ tol.
    """

    iterations: int
    tol: float

    @property
    def products(self) -> int:
        return self.iterations + 1

    def __call__(self, covariance: LinearMap, fisher: LinearMap, score: Tensor) -> Solve:
        return information_solve(covariance, fisher, score, iterations=self.iterations, tol=self.tol)


@dataclass(frozen=True)
class Gmres(InformationSolver):
    """GMRES on (I + F C) u = s, d = C u: for a learned Jacobian that is not symmetric or not PSD.

    Arguments: iterations: size of the Krylov space, one product with C and one with F each. tol: relative residual below
    which a row counts as solved. inner: 0, or products with F alone at the first iteration, cheap beside a network's C, for a
    preconditioner: the same system with C replaced by diag(C·1 ≥ 0), which costs one product with C and is the same at every
    iteration. Its solves share what they learn of it, so that each may have one product fewer than the one before, but one.

    The row sums say where in the image the prior leaves room, which is most of what makes blurred sources on an empty sky
    converge slowly (`benchmarks/solvers`). For stationary priors they are a constant, and masks or uneven noise gain nothing.
    """

    iterations: int
    tol: float
    inner: int = 0

    @property
    def products(self) -> int:
        return self.iterations + (self.inner > 0)

    def __call__(self, covariance: LinearMap, fisher: LinearMap, score: Tensor) -> Solve:
        limits = {"iterations": self.iterations, "tol": self.tol}
        if not self.inner:
            return information_gmres(covariance, fisher, score, **limits)
        room = covariance(torch.ones_like(score)).clamp_min(0)
        model = RecycledResiduals(lambda u: u + fisher(room * u), directions=self.inner, tol=_INNER_TOL)
        return information_gmres(covariance, fisher, score, **limits, preconditioner=model)


def denoise_with_vjp(prior: Denoiser, x: Image, sigma: Sigma) -> tuple[Image, LinearMap]:
    """D(x, σ) and v ↦ (∂D/∂x)ᵀ v, sharing one forward pass.

    The pullback is not itself differentiable: torch then takes its fused backward kernels, which makes a product with a
    network's Jacobian 2–3 times cheaper than through `torch.func.vjp`.
    """
    with torch.enable_grad():
        point = x.detach().requires_grad_()
        mean = prior(point, sigma)

    def pullback(v: Tensor) -> Tensor:
        return torch.autograd.grad(mean, point, v, retain_graph=True)[0]

    return mean.detach(), pullback
