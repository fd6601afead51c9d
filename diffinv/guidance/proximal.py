"""Proximal guidance: the data pull the denoised image, as far as its assumed isotropic error lets them."""

from __future__ import annotations

from dataclasses import dataclass

from diffinv.core.checks import DiffinvError
from diffinv.core.linalg import expand, information_solve
from diffinv.core.registry import register
from diffinv.core.types import Image, Sigma
from diffinv.guidance.base import Guidance
from diffinv.likelihood import Likelihood
from diffinv.priors.base import Denoiser


@register("guidance", "proximal")
@dataclass(frozen=True)
class Proximal(Guidance):
    """`D_y = argmin_u −log p(y | u) + (λ/2σ²) ‖u − D‖² = D + (λ/σ² + F)⁻¹ s`: the data step of DiffPIR.

    F, s: the likelihood's Fisher information and score at D. The second form is the minimiser for linear A and Gaussian
    noise, one Gauss–Newton step towards it otherwise. With white noise σ_n it is the paper's data subproblem,
    `argmin ‖y − A u‖² + ρ ‖u − D‖²`, ρ = λ σ_n²/σ², in the noise level σ = √((1 − ᾱ)/ᾱ) of its VP process.
    Exact with λ = 1 for a prior much wider than σ, whose ∂D/∂x is the identity; for no other. Its fixed point x = D_y
    satisfies `λ ∇log p_σ(x) + ∇log p(y | x) = 0`: a mode, not a mean. Cost: one forward, no vjp; the solve sees only A.

    Arguments: lam: λ > 0, without unit; 1 in the configurations of the paper's code. iterations, tol: of the inner CG.
    Raises: DiffinvError if λ is not positive.
    References: Zhu, Zhang, Liang, Cao, Wen, Timofte & Van Gool, *Denoising Diffusion Models for Plug-and-Play Image
    Restoration*, 2023, arXiv:2305.08995, algorithm 1.
    """

    lam: float
    iterations: int = 100
    tol: float = 1e-6
    calibrated = False

    def __post_init__(self) -> None:
        if not self.lam > 0:
            raise DiffinvError(f"Proximal: lam must be > 0, got {self.lam}; it weighs the denoised image, 1 is the paper's.")

    def __call__(self, prior: Denoiser, likelihood: Likelihood, x: Image, sigma: Sigma) -> Image:
        mean = prior(x, sigma)
        variance = expand(sigma.double() ** 2 / self.lam, x)
        solved = information_solve(
            lambda v: variance * v,
            likelihood.fisher(mean).apply,
            likelihood.score(mean),
            iterations=self.iterations,
            tol=self.tol,
        )
        return mean + solved.solution
