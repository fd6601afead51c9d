"""Denoising diffusion restoration: the reverse process coefficient by coefficient, in a basis that separates the data."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffinv.core.checks import DiffinvError, UnsupportedError
from diffinv.core.linalg import expand
from diffinv.core.registry import register
from diffinv.core.rng import Rng
from diffinv.core.types import Image, Sigma
from diffinv.likelihood import Likelihood
from diffinv.priors.base import Denoiser
from diffinv.samplers.base import Sampler, State, parts_of
from diffinv.samplers.spectrum import Basis, DenseBasis, Spectrum


@dataclass(frozen=True, eq=False)
class SpectralState(State):
    """A state that carries the spectrum of the data, found once in `init`."""

    spectrum: Spectrum | None = None


@register("sampler", "ddrm")
@dataclass(frozen=True)
class Ddrm(Sampler):
    """With x̄ = Vᵀ x, D̄ = Vᵀ D of the prior and the data ȳ of standard deviation δ = 1/√f (`Spectrum`), a coefficient becomes

    - unseen (f = 0): `x̄ ← D̄ + √(1 − η²) (σ'/σ)(x̄ − D̄) + η σ' z`;
    - σ' < δ, data noisier than the level: `x̄ ← D̄ + √(1 − η²) (σ'/δ)(ȳ − D̄) + η σ' z`;
    - σ' ≥ δ: `x̄ ← (1 − η_b) D̄ + η_b ȳ + √(σ'² − η_b² δ²) z`.

    It starts at N(ȳ, σ² − δ²) where δ ≤ σ, else at N(E[x₀], σ²); the paper has mean 0 there, which is the same once σ is far
    above x₀. The paper's case s_i, σ_y is δ = σ_y/s_i; its noise level σ_t is our σ. The last step, to σ' = 0, returns D.
    Exact for nothing: its conditionals would be those of x₀ known. One forward a step and one at the start, no vjp; the
    decomposition is made once. It ignores a posterior's guidance.

    Arguments: eta: η in [0, 1], share of new noise. eta_b: η_b in [0, 1], trust in the data above their noise. 0.85 and 1 are
        the paper's defaults. basis: `DenseBasis` (any quadratic data, at most 4096 pixels) or `FourierBasis`.
    Raises: DiffinvError for another η or η_b; UnsupportedError for a target that is not a Posterior, for data that are not
        quadratic, and for what the basis refuses.
    References: Kawar, Elad, Ermon & Song, *Denoising Diffusion Restoration Models*, 2022, arXiv:2201.11793, section 3.
    """

    eta: float = 0.85
    eta_b: float = 1.0
    basis: Basis = DenseBasis()
    order = None
    calibrated = False
    guided = False

    def __post_init__(self) -> None:
        for name, value in (("eta", self.eta), ("eta_b", self.eta_b)):
            if not 0 <= value <= 1:
                raise DiffinvError(f"Ddrm: {name} must lie in [0, 1], got {value}; the paper's are eta 0.85 and eta_b 1.")

    def init(self, target: Denoiser, like: Image, sigma: Sigma, rng: Rng) -> SpectralState:
        prior, likelihood = parts_of("Ddrm", target)
        spectrum = self.basis.decompose(_quadratic(likelihood), like)
        mean = spectrum.analyse(prior(expand(sigma, like) * rng.normal(like), sigma))
        z, level, spread = spectrum.analyse(rng.normal(like)), expand(sigma, mean).real, spectrum.information.rsqrt()
        seen = spread <= level
        remaining = torch.where(seen, (level**2 - spread**2).clamp_min(0).sqrt(), level)
        return SpectralState(spectrum.synthesise(torch.where(seen, spectrum.datum, mean) + remaining * z), spectrum=spectrum)

    def step(self, target: Denoiser, state: SpectralState, sigma: Sigma, sigma_next: Sigma, rng: Rng) -> SpectralState:
        prior, spectrum = parts_of("Ddrm", target)[0], state.spectrum
        x0 = prior(state.x, sigma)
        u0, u, z = (spectrum.analyse(v) for v in (x0, state.x, rng.normal(x0)))
        mean, spread = self._conditional(spectrum, u0, u, expand(sigma, u).real, expand(sigma_next, u).real)
        return SpectralState(spectrum.synthesise(mean + spread * z), x0, spectrum=spectrum)

    def _conditional(self, spectrum: Spectrum, u0: Tensor, u: Tensor, level: Tensor, level_next: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each coefficient at the next level: the three cases."""
        noise, kept = spectrum.information.rsqrt(), math.sqrt(1 - self.eta**2)
        direction = torch.where(spectrum.information > 0, (spectrum.datum - u0) / noise, (u - u0) / level)
        above = level_next >= noise
        mean = torch.where(above, (1 - self.eta_b) * u0 + self.eta_b * spectrum.datum, u0 + kept * level_next * direction)
        rest = (level_next**2 - self.eta_b**2 * noise**2).clamp_min(0).sqrt()
        return mean, torch.where(above, rest, self.eta * level_next)


def _quadratic(likelihood: Likelihood) -> Likelihood:
    if not likelihood.quadratic:
        raise UnsupportedError(
            "Ddrm: the data are not quadratic in the image (noise that is not Gaussian, or a non-linear operator), so that no "
            "basis separates them; use moment matching, or Gaussian noise with an estimated variance."
        )
    return likelihood
