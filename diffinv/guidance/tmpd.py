"""Tweedie moment projected diffusion: a diagonal covariance for x₀ given x_σ, read off the denoiser's Jacobian."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffinv.core.linalg import expand, information_solve
from diffinv.core.registry import register
from diffinv.core.types import Image, Sigma
from diffinv.guidance.base import Guidance, denoise_with_vjp
from diffinv.likelihood import Likelihood
from diffinv.priors.base import Denoiser


@register("guidance", "tmpd")
@dataclass(frozen=True)
class Tmpd(Guidance):
    """`D_y = D + σ² Jᵀ Aᵀ (Σ_y + A diag(r) Aᵀ)⁻¹ (y − A D)`, J = ∂D/∂x, r = σ² Jᵀ1 its row sums (TMPD).

    With F, s of the likelihood at D: `D_y = D + σ² Jᵀ u`, `u = (I + F diag r)⁻¹ s`; Gauss–Newton for a non-linear operator
    or noise that is not Gaussian. Exact for a Gaussian prior with a diagonal covariance. Cost: one forward and two vjps; the
    solve sees only A.
    σ² J is the covariance of x₀ given x_σ, so that its row and column sums agree; the vjp gives the latter. The paper's
    fast form puts the row sums of A J Aᵀ in the data's space; there A is a mask, and both agree for a diagonal J. Here they
    are taken in the image's space, which stays exact for any A. A sum below zero counts as zero (ε σ², ε of the dtype): such
    a pixel is not damped by the covariance, and priors whose pixels are strongly anticorrelated make TMPD overshoot.

    Arguments: iterations, tol: of the inner CG, which needs no network call.
    References: Boys, Girolami, Pidstrigach, Reich, Mosca & Akyildiz, *Tweedie Moment Projected Diffusions for Inverse
    Problems*, 2023, arXiv:2310.06721.
    """

    iterations: int = 100
    tol: float = 1e-6
    calibrated = False

    def __call__(self, prior: Denoiser, likelihood: Likelihood, x: Image, sigma: Sigma) -> Image:
        mean, vjp = denoise_with_vjp(prior, x, sigma)
        variance = expand(sigma.double() ** 2, x)
        row_sums = torch.maximum(variance * vjp(torch.ones_like(x)), torch.finfo(x.dtype).eps * variance)
        solved = information_solve(
            lambda v: row_sums * v,
            likelihood.fisher(mean).apply,
            likelihood.score(mean),
            iterations=self.iterations,
            tol=self.tol,
        )
        return mean + variance * vjp(solved.solution / row_sums)
