"""Sequential Monte Carlo: a cloud of weighted particles that is exact in the limit, whatever the guidance gets wrong.

Each particle moves by the guided kernel q and is weighted by what the guidance did to it,
`w ← w · p(x' | x) p̃(y | x') / (q(x' | x) p̃(y | x))`, p the prior's reverse kernel, p̃ a twist that tends to the likelihood.
Invariant: a cloud is never split, and its draws leave with equal weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffinv.core.checks import DiffinvError, ShapeError
from diffinv.core.linalg import dot, expand
from diffinv.core.registry import register
from diffinv.core.rng import Rng
from diffinv.core.types import Image, Sigma
from diffinv.guidance.twist import FisherBasis, Twisted, fisher_basis, moment_matching_twist
from diffinv.likelihood import Likelihood
from diffinv.priors.base import Denoiser
from diffinv.samplers.base import Sampler, State, parts_of
from diffinv.samplers.sde import stochastic_slope

RELINEARISE = 3


@dataclass(frozen=True, eq=False)
class Cloud(State):
    """Particles at (x, σ). twist: of each. previous: of the level before, or None. log_weight: (B,). log_evidence: (B,), of
    the cloud, log p(y) so far. basis: of the data's information if that does not depend on x."""

    twist: Twisted | None = None
    previous: Twisted | None = None
    log_weight: Tensor | None = None
    log_evidence: Tensor | None = None
    basis: FisherBasis | None = None


@register("sampler", "twisted_smc")
@dataclass(frozen=True)
class TwistedSmc(Sampler):
    """Particle filter with a moment-matching twist.

    `q = N(D̄_y + (σ'/σ)² (x − D̄_y), v)`, `p = N(D̄ + (σ'/σ)² (x − D̄), v)`, v = σ'² (1 − (σ'/σ)²), where D̄ and D̄_y extrapolate
    the denoised images over the step as the stochastic multistep sampler does (weak order 2). Systematic resampling when the
    effective sample size `(Σw)²/Σw²` falls below a share of the cloud, and once at the end.
    Exact as particles → ∞ (for the discretised prior); also gives log p(y). Cost a step and particle: one forward and
    `rank` vjps. `rank` must reach that of the data's Fisher information for the twist to be good: small problems.

    Arguments: particles: of a cloud, consecutive rows. rank: of the twist. threshold: share of the effective sample size.
    References: Wu, Trippe, Naesseth, Blei & Cunningham, *Practical and Asymptotically Exact Conditional Sampling in Diffusion
    Models*, 2023, arXiv:2306.17775 (there with the twist p(y | D)); Lu et al. 2022, arXiv:2211.01095 (the kernel).
    """

    particles: int = 64
    rank: int = 16
    threshold: float = 0.5
    order = None
    guided = False

    def __post_init__(self) -> None:
        if self.particles < 1 or self.rank < 1 or not 0 <= self.threshold <= 1:
            raise DiffinvError(
                f"TwistedSmc: particles {self.particles} and rank {self.rank} must be at least 1, threshold {self.threshold} "
                "between 0 and 1; 64, 16 and 0.5 are common."
            )

    @property
    def cloud(self) -> int:
        return self.particles

    def init(self, target: Denoiser, like: Image, sigma: Sigma, rng: Rng) -> Cloud:
        prior, likelihood = parts_of("TwistedSmc", target)
        if like.shape[0] % self.particles:
            raise ShapeError(f"TwistedSmc: {like.shape[0]} rows are not whole clouds of {self.particles}; give a multiple.")
        start = super().init(prior, like, sigma, rng)
        basis = None
        if likelihood.quadratic:
            basis = fisher_basis(likelihood.select(slice(None, None, self.particles)), like[:: self.particles], rank=self.rank)
            basis = basis.repeat(self.particles)
        twist = self._twist(prior, likelihood, basis, start.x, sigma)
        zero = torch.zeros_like(twist.log_prob)
        return Cloud(start.x, twist.mean, sigma, twist, None, twist.log_prob, zero, basis)

    def _twist(self, prior: Denoiser, likelihood: Likelihood, basis: FisherBasis | None, x: Image, sigma: Sigma) -> Twisted:
        steps = 0 if likelihood.quadratic else RELINEARISE
        return moment_matching_twist(prior, likelihood, self.rank if basis is None else basis, x, sigma, relinearise=steps)

    def step(self, target: Denoiser, state: Cloud, sigma: Sigma, sigma_next: Sigma, rng: Rng) -> Cloud:
        prior, likelihood = parts_of("TwistedSmc", target)
        uniform = rng.uniform(state.log_weight[:, None])[:: self.particles, 0]
        if not bool((sigma_next > 0).all()):
            state = resample(state, self.particles, uniform, threshold=1.0)
            return replace(state, x=state.twist.mean, x0=state.twist.mean)
        state = resample(state, self.particles, uniform, threshold=self.threshold)
        plain, guided = self._means(state, sigma, sigma_next)
        keep = (sigma_next / sigma) ** 2
        noise, z = sigma_next * (1 - keep).sqrt(), rng.normal(state.x)
        x = guided + expand(keep, z) * (state.x - guided) + expand(noise, z) * z
        push = expand((1 - keep) / noise, z) * (guided - plain)
        log_ratio = -dot(z, push) - dot(push, push) / 2
        twist = self._twist(prior, likelihood, state.basis, x, sigma_next)
        log_weight = state.log_weight + log_ratio + twist.log_prob - state.twist.log_prob
        return Cloud(x, twist.mean, sigma, twist, state.twist, log_weight, state.log_evidence, state.basis)

    @staticmethod
    def _means(state: Cloud, sigma: Sigma, sigma_next: Sigma) -> tuple[Image, Image]:
        """D̄ and D̄_y over the step."""
        now, before = state.twist, state.previous
        if before is None:
            return now.prior_mean, now.mean
        slope = expand(stochastic_slope(sigma, sigma_next, state.sigma0), state.x)
        extrapolate = lambda a, b: a + slope * (a - b)
        return extrapolate(now.prior_mean, before.prior_mean), extrapolate(now.mean, before.mean)


def effective_sample_size(log_weight: Tensor) -> Tensor:
    """(Σw)²/Σw² of each cloud: (objects, P) → (objects,)."""
    return torch.exp(2 * log_weight.logsumexp(1) - (2 * log_weight).logsumexp(1))


def resample(state: Cloud, particles: int, uniform: Tensor, *, threshold: float) -> Cloud:
    """Systematic resampling of the clouds whose effective sample size is below a share of their particles.

    Arguments: uniform: one number a cloud, (objects,). Ancestor j is the particle whose cumulated weight passes (u + j)/P.
    """
    log_weight = state.log_weight.unflatten(0, (-1, particles))
    poor = effective_sample_size(log_weight) <= threshold * particles * (1 + 1e-9)
    weight = log_weight.softmax(1)
    points = (uniform[:, None] + torch.arange(particles, device=weight.device)) / particles
    chosen = torch.searchsorted(weight.cumsum(1), points).clamp_max(particles - 1)
    chosen = torch.where(poor[:, None], chosen, torch.arange(particles, device=weight.device))
    first = torch.arange(len(poor), device=weight.device)[:, None] * particles
    moved = replace(state, basis=None, log_evidence=None, log_weight=None).select((first + chosen).flatten())
    gained = log_weight.logsumexp(1, keepdim=True) - math.log(particles)
    evidence = state.log_evidence.unflatten(0, (-1, particles)) + torch.where(poor[:, None], gained, 0.0)
    left = torch.where(poor[:, None], 0.0, log_weight)
    return replace(moved, basis=state.basis, log_weight=left.flatten(), log_evidence=evidence.flatten())
