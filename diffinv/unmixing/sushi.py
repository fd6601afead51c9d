"""SUSHI: maps of barycentric weights, sparse in starlets, by proximal alternating linearised minimisation (PALM).

    min over A ≥ 0, λ:  −log p(y | A S(λ)) + Σ_s w_s |W_s λ|,   S(λ) the decoder of an autoencoder, Σ_a λ_a = 1.

A step of λ descends along its gradient with a step of 1/L, thresholds its starlet details and projects onto Σ λ = 1; a step of A
is the same without a penalty, projected onto A ≥ 0. The threshold of a scale and an anchor is k times the noise in the details of
the *gradient*, from the median of their absolute values, so that it follows the data and not the map. What it gives are spectra,
not parameters: those need an inversion of each pixel's spectrum afterwards, and there are no errors.
Differences from the paper: L is the largest diagonal of Fisher's information over anchors, a pixel, and its map smoothed, in
place of a bound; thresholds are soft, without reweighting.
Invariant: amplitudes stay ≥ 0 and weights add up to 1.

References: Lascar, Bobin & Acero, *SUSHI: semi-blind unmixing of hyperspectral images*, 2024; Bolte, Sabach & Teboulle, *Proximal
alternating linearized minimization*, 2014.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import jvp

from diffinv.unmixing.mixture import SpectralData
from diffinv.unmixing.starlet import Starlet

Decoder = Callable[[Tensor], Tensor]  # weights (N, a) → spectra (N, K)
_MAD = 0.6744897501960817  # of a standard normal variable


@dataclass(frozen=True)
class SushiPlan:
    """strength: k, in standard deviations. scales: of the starlets. iterations: of λ and A in turn. step: of 1/L."""

    strength: float = 1.0
    scales: int = 4
    iterations: int = 60
    step: float = 0.5


@dataclass(frozen=True, eq=False)
class WeightMaps:
    """weights: λ (N, a). amplitude: (N,). loss: −log p after each iteration."""

    weights: Tensor
    amplitude: Tensor
    loss: tuple[float, ...]


def project(weights: Tensor) -> Tensor:
    """The nearest λ with Σ λ = 1: (N, a)."""
    return weights + (1 - weights.sum(1, keepdim=True)) / weights.shape[1]


def thresholds(transform: Starlet, gradient: Tensor, strength: float) -> Tensor:
    """k · MAD/0.6745 of each scale of the starlet details of maps (a, 1, H, W): (a, scales, 1, 1)."""
    details = transform.forward(gradient)
    return strength * details.abs().flatten(2).median(2).values[..., None, None] / _MAD


def palm(
    decoder: Decoder, data: SpectralData, shape: tuple[int, int], start: tuple[Tensor, Tensor], plan: SushiPlan
) -> WeightMaps:
    """One component's maps. Arguments: start: λ (N, a) and A (N,)."""
    transform, (weights, amplitude), losses = Starlet(plan.scales), start, []
    image = lambda v: v.T.reshape(-1, 1, *shape)
    for _ in range(plan.iterations):
        gradient, information, spectra = _slopes(decoder, data, weights, amplitude)
        length = plan.step / information.clamp_min(1e-12)
        moved = image(weights + length[:, None] * gradient)
        limits = thresholds(transform, image(length[:, None] * gradient), plan.strength)
        details = transform.forward(moved)
        kept = details.sign() * (details.abs() - limits).clamp_min(0)
        coarse = moved - details.sum(1, keepdim=True)
        weights = project((coarse + kept.sum(1, keepdim=True)).flatten(1).T)
        spectra = decoder(weights)
        mean = data.background + amplitude[:, None] * spectra
        slope = (spectra * data.noise.score(data.y, mean)).sum(1)
        curvature = (spectra**2 * data.noise.precision(mean).d).sum(1)
        amplitude = (amplitude + slope / curvature.clamp_min(1e-300)).clamp_min(0)
        losses.append(float(data.loss(data.background + amplitude[:, None] * spectra).sum()))
    return WeightMaps(weights, amplitude, tuple(losses))


def _slopes(decoder: Decoder, data: SpectralData, weights: Tensor, amplitude: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of log p in λ within Σ λ = 1, (N, a), the largest eigenvalue of its Fisher information (N,), and the spectra."""
    slopes, spectra = [], None
    for k in range(weights.shape[1]):
        direction = torch.full_like(weights, -1 / weights.shape[1])
        direction[:, k] += 1
        spectra, slope = jvp(decoder, (weights,), (direction,))
        slopes.append(amplitude[:, None] * slope)
    jacobian = torch.stack(slopes, -1)
    mean = data.background + amplitude[:, None] * spectra
    gradient = (jacobian.mT @ data.noise.score(data.y, mean)[..., None])[..., 0]
    fisher = (jacobian * data.noise.precision(mean).d[..., None]).mT @ jacobian
    return gradient, torch.linalg.matrix_norm(fisher, 2), spectra
