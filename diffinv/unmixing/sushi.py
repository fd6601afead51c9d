"""SUSHI: maps of barycentric weights, sparse in starlets, by proximal alternating linearised minimisation (PALM).

    min over A ≥ 0, λ:  −log p(y | Σ_c A_c S_c(λ_c)) + Σ_s w_s |W_s λ|,   S_c(λ) the decoder of an autoencoder, Σ_a λ_ca = 1.

Components take turns, each with what the others have come to as its background. A step of λ descends along its gradient with a
step of 1/L, thresholds its starlet details and projects onto Σ λ = 1; a step of A is the same without a penalty, projected onto
A ≥ 0. The threshold of a scale and an anchor is k times the noise in the details of the *gradient*, from the median of their
absolute values, so that it follows the data and not the map. What it gives are spectra, not parameters: those need an inversion
of each pixel's spectrum afterwards, and there are no errors.
Differences from the paper: L is the largest eigenvalue of Fisher's information in each pixel, and at least a twentieth of its
median over the map, in place of a bound; thresholds are soft, without reweighting.
Invariant: amplitudes stay ≥ 0 and weights add up to 1.

References: Lascar, Bobin & Acero, *SUSHI: semi-blind unmixing of hyperspectral images*, 2024; Bolte, Sabach & Teboulle, *Proximal
alternating linearized minimization*, 2014.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from torch import Tensor
from torch.func import jvp

from diffinv.unmixing.mixture import SpectralData
from diffinv.unmixing.starlet import Starlet

Decoder = Callable[[Tensor], Tensor]  # weights (N, a) → spectra (N, K)
_MAD = 0.6744897501960817  # of a standard normal variable
_LEAST = 0.05  # of the median of L: where a component is faint a step by its own would be noise


@dataclass(frozen=True)
class SushiPlan:
    """strength: k, in standard deviations. scales: of the starlets. iterations: of λ and A in turn. step: of 1/L."""

    strength: float = 1.0
    scales: int = 4
    iterations: int = 60
    step: float = 0.5


@dataclass(frozen=True, eq=False)
class WeightMaps:
    """Of C components. weights: λ_c (N, a_c). spectra: S_c (N, K). amplitude: (N, C). loss: −log p after each iteration."""

    weights: tuple[Tensor, ...]
    spectra: tuple[Tensor, ...]
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
    decoders: Sequence[Decoder],
    data: SpectralData,
    shape: tuple[int, int],
    start: Sequence[tuple[Tensor, Tensor]],
    plan: SushiPlan,
) -> WeightMaps:
    """The maps of all components. Arguments: start: λ (N, a) and A (N,) of each."""
    transform, losses = Starlet(plan.scales), []
    maps = [(weights, amplitude, decoder(weights)) for decoder, (weights, amplitude) in zip(decoders, start, strict=True)]
    mean = lambda parts: sum((amplitude[:, None] * spectra for _, amplitude, spectra in parts), data.background)
    for _ in range(plan.iterations):
        for k, decoder in enumerate(decoders):
            own = replace(data, background=mean([*maps[:k], *maps[k + 1 :]]))
            maps[k] = _updated(decoder, own, shape, transform, maps[k], plan)
        losses.append(float(data.loss(mean(maps)).sum()))
    weights, amplitude, spectra = zip(*maps, strict=True)
    return WeightMaps(weights, spectra, torch.stack(amplitude, 1), tuple(losses))


def _updated(
    decoder: Decoder,
    data: SpectralData,
    shape: tuple[int, int],
    transform: Starlet,
    before: tuple[Tensor, Tensor, Tensor],
    plan: SushiPlan,
) -> tuple[Tensor, Tensor, Tensor]:
    """λ, A and S of one component after a step of each of the first two."""
    weights, amplitude, _ = before
    image = lambda v: rearrange(v, "(h w) k -> k 1 h w", h=shape[0])
    gradient, information = _slopes(decoder, data, weights, amplitude)
    length = plan.step / torch.maximum(information, _LEAST * information.median()).clamp_min(1e-12)
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
    return weights, (amplitude + slope / curvature.clamp_min(1e-300)).clamp_min(0), spectra


def _slopes(decoder: Decoder, data: SpectralData, weights: Tensor, amplitude: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of log p in λ within Σ λ = 1, (N, a), and the largest eigenvalue of its Fisher information, (N,)."""
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
    return gradient, torch.linalg.matrix_norm(fisher, 2)
