"""Pseudo-inverse guidance: an isotropic covariance for x₀ given x_σ."""

from __future__ import annotations

from dataclasses import dataclass

from diffinv.core.linalg import expand, information_solve
from diffinv.core.registry import register
from diffinv.core.types import Image, Sigma
from diffinv.guidance.base import Guidance, denoise_with_vjp
from diffinv.likelihood import Likelihood
from diffinv.priors.base import Denoiser


@register("guidance", "pseudo_inverse")
@dataclass(frozen=True)
class PseudoInverse(Guidance):
    """`D_y = D + σ² (∂D/∂x)ᵀ Aᵀ (Σ_y + r² A Aᵀ)⁻¹ (y − A D)`, r² = σ² σ_d²/(σ² + σ_d²) (ΠGDM).

    Exact for a white Gaussian prior of standard deviation σ_d. Cost: one forward and one vjp; the solve sees only A.
    With F, s of the likelihood: `Aᵀ(Σ_y + r²AAᵀ)⁻¹(y − AD) = (I + r²F)⁻¹ s`.

    Arguments: sigma_data: σ_d, in the unit of x. iterations, tol: of the inner CG, which needs no network call.
    References: Song, Vahdat, Mardani & Kautz, *Pseudoinverse-Guided Diffusion Models for Inverse Problems*, ICLR 2023.
    """

    sigma_data: float
    iterations: int = 100
    tol: float = 1e-6
    calibrated = False

    def __call__(self, prior: Denoiser, likelihood: Likelihood, x: Image, sigma: Sigma) -> Image:
        mean, vjp = denoise_with_vjp(prior, x, sigma)
        square = sigma.double() ** 2
        r2 = expand(square * self.sigma_data**2 / (square + self.sigma_data**2), x)
        fisher = likelihood.fisher(mean)
        solved = information_solve(
            lambda v: r2 * v, fisher.apply, likelihood.score(mean), iterations=self.iterations, tol=self.tol
        )
        return mean + expand(square, x) * vjp(solved.solution / r2)
