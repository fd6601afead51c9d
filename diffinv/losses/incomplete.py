"""Denoising score matching from images with missing parts: pixels (`MaskedAmbient`) or spatial frequencies (`SpectralAmbient`).

What is seen of an image is topped up to a noise level as in `topping`; what is not seen is hidden from the denoiser (pixels), or
filled from a Gaussian (frequencies). Neither input is the x_σ of a diffusion: the first denoiser is E[x | part of x_σ], the
second is right where the fill is. Both are starts for expectation maximisation, not priors, and posterior samples made with
them are inexact.
Invariant: the expected gradient is that of the oracle, the risk of the same input on what is seen, with the truth as target.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffinv.core.checks import DiffinvError, UnsupportedError
from diffinv.core.linalg import expand
from diffinv.core.registry import register
from diffinv.core.rng import Rng
from diffinv.core.types import Sigma
from diffinv.likelihood import Observation
from diffinv.losses.ambient import AtLevel
from diffinv.losses.base import Loss, MeasuredBatch, truth
from diffinv.losses.denoising import edm_weight
from diffinv.losses.derivative import ForwardMode
from diffinv.noise.gaussian import Gaussian
from diffinv.operators.algebra import Identity
from diffinv.priors.base import Denoiser
from diffinv.reconstructors.observed import require_diagonal
from diffinv.reconstructors.spectra import coefficients
from diffinv.schedules import Schedule


@register("loss", "masked_ambient")
@dataclass(frozen=True)
class MaskedAmbient(Loss):
    """`w(σ) ‖A [D(Ã x_σ, σ, Ã) − t]‖² / |A|`, Ã = B A hides more than A: the hidden pixels are met with data never shown.

    x_σ = y + (σ² − σ_n²)^½ z where Ã shows it; t = y where Ã hides, and the recorrupted y − σ_n² (σ² − σ_n²)^(−½) z where it
    shows. Its minimiser is E[x | Ã x_σ], if every pixel is seen under each Ã by some A; without B it would be free on what
    A hides. Not a score. Oracle: the same with x for t.

    Arguments: schedule: a row draws the levels above its noise. sigma_data: σ_d. kept: probability that B keeps a pixel.
    The model is called with (x, σ, mask), 0 where the mask is False. Noise independent of the pixel's neighbours.
    Raises: UnsupportedError for an operator that mixes pixels, or noise that is not independent Gaussian.
    References: Daras et al., *Ambient Diffusion: Learning Clean Distributions from Corrupted Data*, 2023, arXiv:2305.19256.
    """

    schedule: Schedule
    sigma_data: float
    kept: float
    unbiased = True

    def __post_init__(self) -> None:
        if not 0 < self.kept < 1:
            raise DiffinvError(f"MaskedAmbient: kept is {self.kept}; give a probability between 0 and 1, 0.9 or so.")

    def check(self, batch: MeasuredBatch) -> None:
        _, _, variance = _pixels(batch)
        if not bool((self.schedule.above(variance.flatten(1).amax(1).sqrt()) > 0).all()):
            raise UnsupportedError("MaskedAmbient: a row has more noise than every level of the schedule; raise sigma_max.")

    def __call__(self, model: nn.Module, batch: MeasuredBatch, rng: Rng) -> Tensor:
        return self._risk(model, batch, rng, None)

    def oracle(self, model: nn.Module, batch: MeasuredBatch, rng: Rng) -> Tensor:
        return self._risk(model, batch, rng, truth(batch, "MaskedAmbient"))

    def _risk(self, model: nn.Module, batch: MeasuredBatch, rng: Rng, x: Tensor | None) -> Tensor:
        y, seen, variance = _pixels(batch)
        sigma, share = self.schedule.draw_above(rng, variance.flatten(1).amax(1).sqrt())
        added = (expand(sigma**2, variance) - variance).sqrt().to(y)
        z = rng.normal(y)
        shown = seen & (rng.uniform(y) < self.kept)
        found = model((y + added * z).where(shown, 0.0), sigma.to(y), shown)
        target = torch.where(shown, y - (variance.to(y) / added) * z, y) if x is None else x
        error = (found - target).square().where(seen, 0.0).flatten(1).sum(1) / seen.flatten(1).sum(1).clamp_min(1)
        return (share * edm_weight(sigma, self.sigma_data)).to(error) * error


def _pixels(batch: MeasuredBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Data in the unit of the image, where they are seen, and their variance (float64, 0 where not): (B, *image) each."""
    scale = require_diagonal("MaskedAmbient", batch.observation)
    noise = batch.observation.noise
    if not isinstance(noise, Gaussian):
        raise UnsupportedError(f"MaskedAmbient: {type(noise).__name__} is not independent Gaussian noise; use EM.")
    y = batch.data.y
    seen = batch.good & (scale != 0).expand(y.shape)
    unit = torch.where(seen, scale.expand(y.shape), 1.0)
    variance = noise.variance(torch.zeros_like(y)).where(seen, 0.0).double() / unit.double() ** 2
    return (y / unit).where(seen, 0.0), seen, variance


@dataclass(frozen=True, eq=False)
class Fill:
    """What stands where nothing is seen: N(m, S + σ²) a frequency. mean: (1, C, H, W). spectrum: S (1, C, H, W), as in
    `FourierGaussianPrior`. variances: (M, 1|C, H, W), those of the coefficients of some rows of the data (∞ where unseen), from
    which the probability P(σ) that a frequency is used at a level is counted."""

    mean: Tensor
    spectrum: Tensor
    variances: Tensor

    def probability(self, sigma: Sigma) -> Tensor:
        """P (B, 1|C, H, W), at least 1/M."""
        used = self.variances[None] < (sigma.double() ** 2)[:, None, None, None, None]
        return used.double().mean(1).clamp_min(1 / len(self.variances))


@register("loss", "spectral_ambient")
@dataclass(frozen=True, eq=False)
class SpectralAmbient(Loss):
    """`w(σ) Σ_used (|D̂_k − ȳ_k|² − v_k + 2 v_k Re ∂D̂_k/∂x̂_k)/P_k / d`: GSURE in the Fourier basis, for blurs and k-space.

    ȳ = ŷ/ĥ has the variance v_k = σ_n²/|ĥ_k|², which is the coefficient of the divergence. At a level σ the frequencies with
    v_k < σ² are used, and topped up to σ²; the others are filled with N(m_k, S_k + σ²). Each counts by the inverse of the
    probability P_k that it is used, so that on average over instruments all count alike. Exact for `MaskedFourier`; a blur is
    taken for one on the torus.
    Biased as a prior: the fill is independent of the image, so that x_σ is not a noisy image, and the minimiser is the mean of
    x given such an input. Oracle: `w(σ) Σ_used |D̂_k − x̂_k|²/P_k / d` for the same input.

    Arguments: schedule, sigma_data. fill: of what is not used.
    Raises: UnsupportedError for other operators, and noise that is not stationary Gaussian.
    References: Kawar, Elata, Michaeli & Elad, *GSURE-Based Diffusion Model Training with Corrupted Data*, 2023,
    arXiv:2305.13128 (there without fill).
    """

    schedule: Schedule
    sigma_data: float
    fill: Fill
    unbiased = True

    def check(self, batch: MeasuredBatch) -> None:
        coefficients("SpectralAmbient", batch.observation)

    def __call__(self, model: Denoiser, batch: MeasuredBatch, rng: Rng) -> Tensor:
        sigma, x, datum, weight, variance = self._level(batch, rng)
        omega = _inverse((variance * weight).sqrt() * torch.fft.fft2(rng.rademacher(x), norm="ortho")).to(x)
        seen = Observation(x, Identity(tuple(x.shape[1:])), Gaussian(torch.ones(1, dtype=x.dtype)))
        u, along = ForwardMode()(AtLevel(model, sigma.to(x)), seen, omega, torch.ones_like(sigma))
        risk = weight * ((torch.fft.fft2(u, norm="ortho") - datum).abs() ** 2 - variance)
        total = risk.flatten(1).sum(1) + 2 * (omega * along).flatten(1).sum(1)
        return (edm_weight(sigma, self.sigma_data) / x[0].numel()).to(total) * total

    def oracle(self, model: Denoiser, batch: MeasuredBatch, rng: Rng) -> Tensor:
        sigma, x, _, weight, _ = self._level(batch, rng)
        error = torch.fft.fft2(model(x, sigma.to(x)) - truth(batch, "SpectralAmbient"), norm="ortho").abs() ** 2
        return (edm_weight(sigma, self.sigma_data) / x[0].numel()).to(x) * (weight * error).flatten(1).sum(1)

    def _level(self, batch: MeasuredBatch, rng: Rng) -> tuple[Sigma, Tensor, Tensor, Tensor, Tensor]:
        """σ, the input (B, *image), ȳ, the weights 1/P where used, and v, both 0 where not: (B, C, H, W)."""
        datum, variance = coefficients("SpectralAmbient", batch.observation)
        sigma = self.schedule.draw(rng, datum.shape[0])
        level = expand(sigma**2, variance)
        used = variance < level
        kept = variance.where(used, 0.0)
        like = torch.zeros_like(datum.real, dtype=batch.observation.y.dtype)
        mean = torch.fft.fft2(self.fill.mean.double(), norm="ortho")
        amount = torch.where(used, level - kept, self.fill.spectrum.double() + level).sqrt()
        centre = torch.where(used, datum, mean)
        x = _inverse(centre + amount * torch.fft.fft2(rng.normal(like).double(), norm="ortho"))
        weight = (1 / self.fill.probability(sigma)).expand(used.shape).where(used, 0.0)
        return sigma, x.to(like), datum.where(used, 0.0), weight, kept


def _inverse(u: Tensor) -> Tensor:
    return torch.fft.ifft2(u, norm="ortho").real
