"""The sampler of DiffPIR: keep part of the noise that the denoiser found, and draw the rest anew."""

from __future__ import annotations

import math
from dataclasses import dataclass

from diffinv.core.checks import DiffinvError
from diffinv.core.linalg import expand
from diffinv.core.registry import register
from diffinv.core.rng import Rng
from diffinv.core.types import Sigma
from diffinv.priors.base import Denoiser
from diffinv.samplers.base import Sampler, State


@register("sampler", "diffpir")
@dataclass(frozen=True)
class Renoise(Sampler):
    """`x ← D_y + σ' (√(1 − ζ) ε̂ + √ζ z)`, ε̂ = (x − D_y)/σ.

    The paper's VP step `√ᾱ' D_y + √(1 − ᾱ') (√(1 − ζ) ε̂ + √ζ z)`, ε̂ = (x_vp − √ᾱ D_y)/√(1 − ᾱ), divided by √ᾱ', with
    x_vp = √ᾱ x and σ² = (1 − ᾱ)/ᾱ. With `Proximal` guidance it is DiffPIR. ζ = 0 is DDIM; ζ > 0 renews the same share of
    the noise at every step, however small the step: it has no limit in the number of steps, and no order. Exact for nothing.
    One call of the target a step.

    Arguments: zeta: ζ in [0, 1], the share of the noise's variance that is new. The configurations
        of the paper's code take 0.1 for blur and super-resolution, 1 for missing pixels.
    Raises: DiffinvError for another ζ.
    References: Zhu et al., *Denoising Diffusion Models for Plug-and-Play Image Restoration*, 2023, arXiv:2305.08995,
    algorithm 1.
    """

    zeta: float
    order = None
    calibrated = False

    def __post_init__(self) -> None:
        if not 0 <= self.zeta <= 1:
            raise DiffinvError(f"Renoise: zeta must lie in [0, 1], got {self.zeta}; it is a share of the noise's variance.")

    def step(self, target: Denoiser, state: State, sigma: Sigma, sigma_next: Sigma, rng: Rng) -> State:
        x, x0 = state.x, target(state.x, sigma)
        kept, new = sigma_next / sigma * math.sqrt(1 - self.zeta), sigma_next * math.sqrt(self.zeta)
        return State(x0 + expand(kept, x) * (x - x0) + expand(new, x) * rng.normal(x), x0)
