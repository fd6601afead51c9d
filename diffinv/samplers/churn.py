"""The stochastic sampler of EDM: a little noise is added before each step of the ODE, and forgets the errors made so far."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from diffinv.core.checks import DiffinvError
from diffinv.core.linalg import expand
from diffinv.core.registry import register
from diffinv.core.rng import Rng
from diffinv.core.types import Sigma
from diffinv.priors.base import Denoiser
from diffinv.samplers.base import Sampler, State

_MOST = math.sqrt(2) - 1


@register("sampler", "churned_heun")
@dataclass(frozen=True)
class ChurnedHeun(Sampler):
    """`x̂ = x + √(σ̂² − σ²) S_noise z`, σ̂ = (1 + γ)σ, then Heun's step in σ from σ̂ to σ': `x ← x̂ + (σ' − σ̂)(d + d')/2`.

    d = (x̂ − D(x̂, σ̂))/σ̂ and d' the same at σ' after Euler's step. γ = min(S_churn ln(σ/σ'), √2 − 1) for s_min ≤ σ ≤ s_max,
    else 0. The paper has γ = min(S_churn/N, √2 − 1) for N steps; a step does not know N, and with ln(σ/σ') in the place of 1/N
    the noise added over a grid does not depend on how it is cut (the same where the grid is even in ln σ, S_churn being the
    paper's over ln(σ₀/σ_min)). The last step, to σ = 0, is not churned and is Euler's.
    Order 2 (weak), for the noise that is added is exactly the forward process if s_noise = 1; two denoiser calls a step, one
    for the last. Not calibrated: the default churn draws 5 % too wide with 32 levels.

    Arguments: s_churn: noise a unit of ln σ; 3.8 is the paper's 40 for ImageNet-64 over ln(80/0.002). s_noise: 1 is exact; the
    paper's 1.003 to 1.007 makes up for a network that removes too much noise, and widens the draws. s_min, s_max: levels that
    are churned, in the unit of the image; all, as in the authors' code (the paper's 0.05 and 50 are for images of σ_d = 0.5).
    Raises: DiffinvError for a negative s_churn, s_noise or s_min.
    References: Karras, Aittala, Aila & Laine, *Elucidating the Design Space of Diffusion-Based Generative Models*, 2022,
    arXiv:2206.00364, algorithm 2 and table 5.
    """

    s_churn: float = 3.8
    s_noise: float = 1.0
    s_min: float = 0.0
    s_max: float = math.inf
    order = 2
    calibrated = False

    def __post_init__(self) -> None:
        if not (self.s_churn >= 0 and self.s_noise >= 0 and 0 <= self.s_min <= self.s_max):
            raise DiffinvError(
                f"ChurnedHeun: s_churn {self.s_churn} and s_noise {self.s_noise} must be >= 0, and 0 <= s_min {self.s_min} <= "
                f"s_max {self.s_max}; s_churn = 0 is Heun's ODE sampler."
            )

    def _gamma(self, sigma: Sigma, sigma_next: Sigma) -> Sigma:
        churned = (sigma >= self.s_min) & (sigma <= self.s_max) & (sigma_next > 0)
        steps = torch.log(sigma / torch.where(sigma_next > 0, sigma_next, sigma))
        return torch.where(churned, (self.s_churn * steps).clamp_max(_MOST), torch.zeros_like(sigma))

    def step(self, target: Denoiser, state: State, sigma: Sigma, sigma_next: Sigma, rng: Rng) -> State:
        raised = sigma * (1 + self._gamma(sigma, sigma_next))
        x = state.x + self.s_noise * expand((raised**2 - sigma**2).sqrt(), state.x) * rng.normal(state.x)
        x0 = target(x, raised)
        if not bool((sigma_next > 0).all()):
            return State(x0 + expand(sigma_next / raised, x) * (x - x0), x0)
        slope, move = (x - x0) / expand(raised, x), expand(sigma_next - raised, x)
        euler = x + move * slope
        slope_next = (euler - target(euler, sigma_next)) / expand(sigma_next, x)
        return State(x + move * (slope + slope_next) / 2, x0)
