"""Denoising score matching on clean images."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from diffinv.core.linalg import expand
from diffinv.core.registry import register
from diffinv.core.rng import Rng
from diffinv.core.types import Sigma
from diffinv.losses.base import CleanBatch, Loss
from diffinv.priors.base import Denoiser
from diffinv.schedules import Schedule


def edm_weight(sigma: Sigma, sigma_data: float) -> Tensor:
    """w = (σ² + σ_d²)/(σ σ_d)²: (B,), in the inverse square of the unit of σ."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


@register("loss", "denoising_score_matching")
@dataclass(frozen=True)
class DenoisingScoreMatching(Loss):
    """`w(σ) ‖D(x + σ z, σ) − x‖² / d`, w = (σ² + σ_d²)/(σ σ_d)², σ ~ schedule, z ~ N(0, I).

    Arguments: schedule: draws σ. sigma_data: σ_d, in the unit of x.
    References: Vincent, *A Connection Between Score Matching and Denoising Autoencoders*, 2011; the weight is that of
    Karras et al. 2022, arXiv:2206.00364, eq. 8.
    """

    schedule: Schedule
    sigma_data: float

    def __call__(self, model: Denoiser, batch: CleanBatch, rng: Rng) -> Tensor:
        sigma = self.schedule.draw(rng, batch.x.shape[0]).to(batch.x)
        noisy = batch.x + expand(sigma, batch.x) * rng.normal(batch.x)
        return edm_weight(sigma, self.sigma_data) * (model(noisy, sigma) - batch.x).pow(2).flatten(1).mean(1)
