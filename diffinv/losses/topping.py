"""Noisy images at a higher noise level: what a diffusion prior can be shown of data that were never clean.

Data y = x + n, n ~ N(0, Σ), are topped up with known noise to x_σ = x + σ z, σ² above the largest eigenvalue of Σ:

    x_σ = y + (σ² − Σ)^½ z,    t = y − Σ (σ² − Σ)^(−½) z,    z ~ N(0, I)

t is recorrupted data: its noise is independent of that of x_σ, because their covariance is Σ − Σ = 0. Hence
`E[t | x_σ] = E[x | x_σ]`, and t is a target as good as x but for its variance, Σ/c with c = 1 − Σ/σ².
For white noise c [D − t] = c D + (1 − c) x_σ − y, which is ambient Tweedie: the two methods are one.
Invariant: x_σ has the noise σ² I exactly, and t none of it.

References: Pang et al., *Recorrupted-to-Recorrupted*, CVPR 2021; Daras, Dimakis & Daskalakis, *Consistent Diffusion Meets
Tweedie*, 2024, arXiv:2404.10177.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import singledispatch

import torch
from torch import Tensor

from diffinv.core.checks import UnsupportedError
from diffinv.core.linalg import expand
from diffinv.core.rng import Rng
from diffinv.core.types import Image, Sigma
from diffinv.likelihood import Observation
from diffinv.losses.base import MeasuredBatch
from diffinv.noise.base import Noise
from diffinv.noise.correlated import CorrelatedGaussian
from diffinv.noise.gaussian import Gaussian
from diffinv.noise.independent import over
from diffinv.reconstructors.observed import require_identity
from diffinv.reconstructors.units import observation_in_units


@dataclass(frozen=True)
class Topped:
    """Images x_σ and recorrupted targets t, both (B, *image), and c: (B, *image) or broadcastable to it, in (0, 1)."""

    x: Image
    target: Image
    c: Tensor


@singledispatch
def floor(noise: Noise, like: Image) -> Sigma:
    """√λ_max(Σ), the level that x_σ must exceed: (B,) float64, in the unit of the data; `like` (B, *image).

    Raises: UnsupportedError for noise that is not Gaussian of a known covariance.
    """
    raise UnsupportedError(
        f"ambient: {type(noise).__name__} is not Gaussian noise of known covariance, so that data cannot be topped up to a "
        "white level; learn by expectation maximisation."
    )


@singledispatch
def top_up(noise: Noise, y: Image, sigma: Sigma, rng: Rng) -> Topped:
    """x_σ and t of data y (B, *image) at levels σ (B,) float64, above `floor`."""
    raise UnsupportedError(f"ambient: {type(noise).__name__} has no rule to be topped up.")


def _rows(values: Tensor, like: Image) -> Sigma:
    return values.flatten(1).amax(1).double().expand(like.shape[0])


@floor.register
def _(noise: Gaussian, like: Image) -> Sigma:
    return _rows(over(noise.std, like), like)


@top_up.register
def _(noise: Gaussian, y: Image, sigma: Sigma, rng: Rng) -> Topped:
    variance = over(noise.std, y).double() ** 2
    level = expand(sigma.double() ** 2, variance)
    added = (level - variance).sqrt()
    z = rng.normal(y)
    return Topped(y + added.to(y) * z, y - (variance / added).to(y) * z, (1 - variance / level).to(y))


@floor.register
def _(noise: CorrelatedGaussian, like: Image) -> Sigma:
    return _rows(over(noise.std, like), like) * _rows(noise.spectrum, like).sqrt()


@top_up.register
def _(noise: CorrelatedGaussian, y: Image, sigma: Sigma, rng: Rng) -> Topped:
    """Σ = D R T Rᵀ D, T on a torus: with a² = σ²/max D², x_σ = y + D R (a² − T)^½ z + (σ² − a² D²)^½ z' and
    t = y − D R T (a² − T)^(−½) z, whose noise is independent of that of x_σ too, without an inverse of R T Rᵀ."""
    std = over(noise.std, y).double()
    largest = _rows(std, y)
    spectrum = noise.spectrum.double()
    room = expand((sigma / largest) ** 2, spectrum) - spectrum
    waves = torch.fft.fft2(rng.normal(y.new_empty(*y.shape[:-2], *spectrum.shape[-2:])).double())
    field = lambda factor: torch.fft.ifft2(factor * waves).real[..., : y.shape[-2], : y.shape[-1]]
    rest = expand(sigma**2, std) * (1 - (std / expand(largest, std)) ** 2)
    x = y + (std * field(room.sqrt())).to(y) + rest.clamp_min(0).sqrt().to(y) * rng.normal(y)
    c = 1 - (floor(noise, y) / sigma) ** 2
    return Topped(x, y - (std * field(spectrum / room.sqrt())).to(y), expand(c, y))


def direct(owner: str, batch: MeasuredBatch) -> Observation:
    """The data of images that were seen as they are, in the unit of the image: y = x + n.

    Raises: UnsupportedError for another operator than s I, and for masked data.
    """
    data = batch.observation
    scale = require_identity(owner, data)
    if not bool(batch.good.all()):
        raise UnsupportedError(
            f"{owner}: some data are masked, and what is missing has no noise level; use the masked loss, or expectation "
            "maximisation."
        )
    return data if bool((scale == 1).all()) else observation_in_units(data, scale)
