"""Decoupled annealing with the prior's own covariance: a draw of p(x₀ | x_σ), conditioned on the data, noised again."""

from __future__ import annotations

from dataclasses import dataclass

from diffinv.core.linalg import expand
from diffinv.core.registry import register
from diffinv.core.rng import Rng
from diffinv.core.types import Sigma
from diffinv.guidance.base import Gmres, InformationSolver, denoise_with_vjp
from diffinv.priors.base import Denoiser
from diffinv.samplers.base import State, parts_of
from diffinv.samplers.sde import StochasticMultistep
from diffinv.samplers.split import Descent, Split


@register("sampler", "daps_matched")
@dataclass(frozen=True)
class DapsMatched(Split):
    """`w ~ p(x₀ | x_σ)`, `x₀ = w + (C⁻¹ + F)⁻¹ (s(D) − F (w − D) + perturb)`, `x ← x₀ + σ' z`, C = σ² ∂D/∂x.

    DAPS with centre D = D(x, σ) and covariance C. The noise N(0, C) that perturb-and-solve needs comes from the prior's
    reverse diffusion, w − D, rather than from a square root of C; with η ~ N(0, F), `(w − D) + (C⁻¹ + F)⁻¹ (η − F (w − D))` has
    covariance (C⁻¹ + F)⁻¹ (Matheron's rule). F, s and η are those of the likelihood at D: Gauss–Newton where it is not
    quadratic. Where the data say nothing, x₀ = w keeps the prior's whole shape.
    Exact for any Gaussian prior and linear Gaussian data, to the error of the descent and of the solve; every level then
    has the marginal p(x_σ | y) exactly, whatever the number of levels. For other priors the moment-matching approximation.
    Cost a step: the descent's calls, 20, one forward and as many vjps as the solver makes products, at most 13.

    Arguments: descent: draws w. solver: of (C⁻¹ + F) d = s; its residual is a calibration parameter.
    References: Zhang et al., *Improving Diffusion Inverse Problem Solving with Decoupled Noise Annealing*, 2024,
    arXiv:2407.01521; Rozet et al. 2024, arXiv:2405.13712 (C); Hoffman & Ribak, *Constrained Realizations of Gaussian Fields*,
    1991 (conditioning a draw).
    """

    descent: Descent = Descent(StochasticMultistep(), levels=20)
    solver: InformationSolver = Gmres(iterations=12, tol=1e-3)

    def step(self, target: Denoiser, state: State, sigma: Sigma, sigma_next: Sigma, rng: Rng) -> State:
        prior, likelihood = parts_of("DapsMatched", target)
        w = self.descent(prior, state.x, sigma, rng.spawn(0))
        mean, vjp = denoise_with_vjp(prior, state.x, sigma)
        variance, fisher = expand(sigma.double() ** 2, mean), likelihood.fisher(mean)
        pull = likelihood.score(mean) - fisher(w - mean) + likelihood.perturb(mean, rng.spawn(1))
        x0 = w + self.solver(lambda v: variance * vjp(v), fisher.apply, pull).solution
        return State(x0 + expand(sigma_next, x0) * rng.normal(x0), x0, sigma)
