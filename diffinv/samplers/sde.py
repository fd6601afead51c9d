"""Stochastic samplers of the reverse-time SDE."""

from __future__ import annotations

from dataclasses import dataclass

from diffinv.core.linalg import expand
from diffinv.core.registry import register
from diffinv.core.rng import Rng
from diffinv.core.types import Sigma
from diffinv.priors.base import Denoiser
from diffinv.samplers.base import Sampler, State


@register("sampler", "ancestral")
@dataclass(frozen=True)
class Ancestral(Sampler):
    """`x ← D + (σ'/σ)√(1 − τ) (x − D) + σ' √τ z`, τ = η (1 − (σ'/σ)²).

    η = 1 is the exact reverse kernel p(x_σ' | x_σ, x₀ = D) of the forward process (DDPM); η = 0 is DDIM.
    Order 1, one denoiser call a step. Noise added late forgets the errors of early steps.
    References: Ho, Jain & Abbeel, *Denoising Diffusion Probabilistic Models*, 2020, arXiv:2006.11239; Song, Meng & Ermon
    2020, arXiv:2010.02502, eq. 16.
    """

    eta: float = 1.0
    order = 1

    def step(self, target: Denoiser, state: State, sigma: Sigma, sigma_next: Sigma, rng: Rng) -> State:
        x, x0 = state.x, target(state.x, sigma)
        ratio = sigma_next / sigma
        tau = self.eta * (1 - ratio**2)
        drift = expand(ratio * (1 - tau).sqrt(), x) * (x - x0)
        return State(x0 + drift + expand(sigma_next * tau.sqrt(), x) * rng.normal(x), x0)
