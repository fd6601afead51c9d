"""Diffusion posterior sampling: a step of the prior, then a gradient step on the residual of the denoised image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffinv.core.checks import DiffinvError
from diffinv.core.linalg import dot, expand, power_iteration
from diffinv.core.registry import register
from diffinv.core.rng import Rng
from diffinv.core.types import Image, Sigma
from diffinv.guidance.base import denoise_with_vjp
from diffinv.likelihood import Likelihood
from diffinv.priors.base import Denoiser
from diffinv.samplers.base import Sampler, State, parts_of
from diffinv.samplers.sde import ancestral_step

POWER = 20  # iterations for λ_max: a few per cent


def residual_norm(likelihood: Likelihood, x: Image) -> Tensor:
    """‖w‖ a row, w the whitened residuals of every data set together: (B,), float64; 0 without data."""
    zero = torch.zeros(x.shape[0], dtype=torch.float64, device=x.device)
    return sum((dot(w, w) for w in likelihood.residuals(x)), zero).sqrt()


def noise_unit(likelihood: Likelihood, x: Image, rng: Rng) -> Tensor:
    """1/√λ_max(F) at x, by the power method: (B,), 0 without data."""
    information = power_iteration(likelihood.fisher(x).apply, rng.normal(x), iterations=POWER)
    return torch.where(information > 0, information.clamp_min(torch.finfo(x.dtype).tiny).rsqrt(), 0.0)


@dataclass(frozen=True, eq=False)
class DpsState(State):
    """A state with the length ζ of each row's data step, (B,), float64."""

    length: Tensor | None = None


@register("sampler", "dps")
@dataclass(frozen=True)
class Dps(Sampler):
    """`x ← x' + ζ Jᵀ s/‖w‖`, x' the `Ancestral` step of the prior alone; J = ∂D/∂x, s the likelihood's score at D.

    w are the whitened residuals `(y − A D)/√Var` of all the data sets. For independent Gaussian noise
    `−Jᵀ s/‖w‖ = ∇ₓ ‖w‖`, also for a non-linear A: this is `x ← x' − ζ ∇ₓ ‖Σ_y^(-1/2)(y − A D)‖`. For any other noise
    (Poisson, correlated, …) it remains the paper's rule read as a step along the score of the likelihood, of length ζ/‖w‖.
    White noise σ_n: ζ = σ_n ζ_c with the ζ_c of the paper's code, which takes `ζ_c ∇ₓ ‖y − A D‖`, and ζ = 2 σ_n ζ' with that
    of its algorithm 1, `ζ'/‖y − A D‖ · ∇ₓ ‖y − A D‖²`. There x is variance preserving, x_vp = x/√(1 + σ²) for images on
    [−1, 1]: to give the same path, the ζ of x would grow as √((1 + σ²)(1 + σ'²)); here it is one number, in x.
    With `relative`, ζ counts in the noise of the best measured direction, 1/√λ_max(F) at the first D: that is ζ_c wherever
    ‖A‖ = 1, and the same number serves bright and faint data.
    Exact for nothing, and its strength grows with the number of steps (1000 in the paper). One forward and one vjp a step,
    one forward at the start; it ignores a posterior's guidance.

    Arguments: zeta: ζ ≥ 0, in the unit of x squared, or of x if relative; it has to be tuned to operator, noise and number of
        steps (the paper's code: ζ_c = 0.3 or 0.5 at σ_n = 0.05). eta: as in `Ancestral`; 1 is the paper's. relative: see above.
    Raises: DiffinvError for a negative ζ or η outside [0, 1]; UnsupportedError for a target that is not a Posterior.
    References: Chung, Kim, McCann, Klasky & Ye, *Diffusion Posterior Sampling for General Noisy Inverse Problems*, 2022,
    arXiv:2209.14687, algorithm 1.
    """

    zeta: float
    eta: float = 1.0
    relative: bool = False
    order = None
    calibrated = False
    guided = False

    def __post_init__(self) -> None:
        if not self.zeta >= 0:
            raise DiffinvError(f"Dps: zeta must be >= 0, got {self.zeta}; it scales the data's step.")
        if not 0 <= self.eta <= 1:
            raise DiffinvError(f"Dps: eta must lie in [0, 1], got {self.eta}; 1 is the paper's.")

    def init(self, target: Denoiser, like: Image, sigma: Sigma, rng: Rng) -> DpsState:
        prior, likelihood = parts_of("Dps", target)
        noise = expand(sigma, like)
        mean = prior(noise * rng.normal(like), sigma)
        x, length = mean + noise * rng.normal(like), torch.full_like(sigma, self.zeta)
        return DpsState(x, length=length * noise_unit(likelihood, mean, rng) if self.relative else length)

    def step(self, target: Denoiser, state: DpsState, sigma: Sigma, sigma_next: Sigma, rng: Rng) -> DpsState:
        prior, likelihood = parts_of("Dps", target)
        x0, vjp = denoise_with_vjp(prior, state.x, sigma)
        norm = residual_norm(likelihood, x0)
        size = state.length / torch.where(norm == 0, 1.0, norm)
        x = ancestral_step(state.x, x0, sigma, sigma_next, eta=self.eta, rng=rng)
        return DpsState(x + expand(size, x) * vjp(likelihood.score(x0)), x0, length=state.length)
