"""Decoupled annealing: x₀ is drawn afresh at each noise level and noised again, so that early errors are not carried along."""

from __future__ import annotations

from dataclasses import dataclass

from diffinv.core.checks import DiffinvError
from diffinv.core.linalg import expand
from diffinv.core.registry import register
from diffinv.core.rng import Rng
from diffinv.core.types import Sigma
from diffinv.priors.base import Denoiser
from diffinv.samplers.base import State, parts_of
from diffinv.samplers.half_step import HalfStep
from diffinv.samplers.ode import Euler
from diffinv.samplers.split import Descent, Split


@register("sampler", "daps")
@dataclass(frozen=True)
class Daps(Split):
    """`x̂₀ = ODE(x, σ)`, `x₀ ~ N(x₀; x̂₀, r²) p(y | x₀)`, `x ← x₀ + σ' z`, r = ratio · σ.

    The paper takes p(x₀ | x_σ) ≈ N(x̂₀, r² I) around the end x̂₀ of the prior's probability-flow ODE, with r = σ. It is exact
    for no prior: x̂₀ is not E[x₀ | x_σ], and Cov[x₀ | x_σ] is not r² I. In directions without data the draws are too wide.
    `daps_matched` has neither flaw for Gaussian priors. Where the paper runs Langevin steps of a tuned rate, the half-step
    draws exactly for linear Gaussian data and adjusts its chain for others.
    Cost a step: the descent's calls, 5 as published; no vjp.

    Arguments: descent: of the ODE. ratio: r/σ, 1 in the authors' code. half_step: the draw of x₀.
    Raises: DiffinvError unless ratio > 0.
    References: Zhang, Chu, Berner, Meng, Anandkumar & Song, *Improving Diffusion Inverse Problem Solving with Decoupled Noise
    Annealing*, 2024, arXiv:2407.01521, algorithm 1.
    """

    descent: Descent = Descent(Euler(), levels=5)
    ratio: float = 1.0
    half_step: HalfStep = HalfStep()
    calibrated = False

    def __post_init__(self) -> None:
        if not self.ratio > 0:
            raise DiffinvError(f"Daps: ratio r/σ must be > 0, got {self.ratio}; the authors use 1.")

    def step(self, target: Denoiser, state: State, sigma: Sigma, sigma_next: Sigma, rng: Rng) -> State:
        prior, likelihood = parts_of("Daps", target)
        end = self.descent(prior, state.x, sigma, rng.spawn(0))
        x0 = self.half_step(likelihood, end, self.ratio * sigma, rng.spawn(1)).image
        return State(x0 + expand(sigma_next, x0) * rng.normal(x0), x0, sigma)
