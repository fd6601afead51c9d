"""Split Gibbs sampling: the prior and the data take turns, coupled by a Gaussian of width ρ that the noise levels anneal."""

from __future__ import annotations

from dataclasses import dataclass

from diffinv.core.checks import DiffinvError
from diffinv.core.registry import register
from diffinv.core.rng import Rng
from diffinv.core.types import Sigma
from diffinv.priors.base import Denoiser
from diffinv.samplers.base import State, parts_of
from diffinv.samplers.half_step import HalfStep
from diffinv.samplers.sde import StochasticMultistep
from diffinv.samplers.split import Descent, Split


@register("sampler", "split_gibbs")
@dataclass(frozen=True)
class SplitGibbs(Split):
    """`z ~ N(z; x, ρ²) p(y | z)`, then `x ~ N(x; z, ρ²) p(x)`: PnP-DM, also DPnP.

    Gibbs sampling of π(x, z) ∝ p(x) N(x; z, ρ²) p(y | z). The second draw is that of a denoising posterior: the prior's
    reverse diffusion started at z with σ = ρ. The grid's levels are ρ, one round of `sweeps` each; the last positive one
    is where the chain ends, and x is the draw.
    Exact for any prior and likelihood as ρ → 0, sweeps → ∞ and levels → ∞. At a fixed ρ the x of π follow
    p(x) ∫ N(z; x, ρ²) p(y | z) dz: for linear Gaussian data, the posterior of data with noise Σ_y + ρ² A Aᵀ, which is wider.
    In a direction that the data do not see, a sweep moves x by about ρ: a small ρ mixes slowly, and only the larger levels
    before it explore. Not calibrated: it would be on grids that anneal slowly enough for the problem, which no default does.
    Cost a step: sweeps × the descent's calls, 20 (the paper's code: a hundred Euler steps at most); no vjp.

    Arguments: descent: inner sampler of the prior. sweeps: a level. half_step: the draw of z.
    Raises: DiffinvError unless sweeps ≥ 1.
    References: Wu, Sun, Chen, Zhang, Yue & Bouman, *Principled Probabilistic Imaging using Diffusion Models as Plug-and-Play
    Priors*, 2024, arXiv:2405.18782, algorithm 1; Xu & Chi, *Provably Robust Score-Based Diffusion Posterior Sampling for
    Plug-and-Play Image Reconstruction*, 2024, arXiv:2403.17042; Vono, Dobigeon & Chainais, *Split-and-Augmented Gibbs Sampler*,
    2019, arXiv:1804.05809.
    """

    descent: Descent = Descent(StochasticMultistep(), levels=20)
    sweeps: int = 1
    half_step: HalfStep = HalfStep()
    calibrated = False

    def __post_init__(self) -> None:
        if self.sweeps < 1:
            raise DiffinvError(f"SplitGibbs: sweeps must be at least 1, got {self.sweeps}.")

    def step(self, target: Denoiser, state: State, sigma: Sigma, sigma_next: Sigma, rng: Rng) -> State:
        prior, likelihood = parts_of("SplitGibbs", target)
        x = state.x
        for sweep in range(self.sweeps):
            stream = rng.spawn(sweep)
            z = self.half_step(likelihood, x, sigma, stream.spawn(0)).image
            x = self.descent(prior, z, sigma, stream.spawn(1))
        return State(x)
