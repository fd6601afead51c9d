"""Recorrupted-to-recorrupted: one measurement split into two that are independent, the first to see, the second to be met."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from diffinv.core.registry import register
from diffinv.core.rng import Rng
from diffinv.likelihood import Observation
from diffinv.losses.base import Loss, MeasuredBatch, data_risk, mean_good, truth
from diffinv.reconstructors.observed import whole


@register("loss", "recorrupted")
@dataclass(frozen=True)
class Recorrupted(Loss):
    """`‖A f(y₁, A) − y₂‖²` a datum, for (y₁, y₂) = one measurement split into two with independent noise (R2R, GR2R).

    Gaussian noise: y₁ = y + τω, y₂ = y − ω/τ, ω ~ N(0, Σ); Poisson: binomial thinning; Gamma: a beta split
    (`Noise.split`). Oracle: `‖A (f(y₁, A) − x)‖²` a datum, of data y₁ noisier than y: a trained model is therefore used on
    several y₁ and averaged (`RecorruptedAverage`). As share → 1 the loss tends to SURE.

    Arguments: share: of the Fisher information that stays in y₁; τ² = (1 − share)/share.
    References: Pang et al., *Recorrupted-to-Recorrupted*, CVPR 2021; Monroy, Bacca & Tachella, *Generalized
    Recorrupted-to-Recorrupted*, 2025, arXiv:2412.04648.
    """

    share: float
    unbiased = True

    def check(self, batch: MeasuredBatch) -> None:
        self._split(batch, Rng.for_draws(0, range(batch.data.y.shape[0]), 1))

    def __call__(self, model: nn.Module, batch: MeasuredBatch, rng: Rng) -> Tensor:
        first, target = self._split(batch, rng)
        return mean_good((first.operator(model(first)) - target.where(batch.good, 0.0)) ** 2, batch.good)

    def oracle(self, model: nn.Module, batch: MeasuredBatch, rng: Rng) -> Tensor:
        return data_risk(model, self._split(batch, rng)[0], truth(batch, "Recorrupted"))

    def _split(self, batch: MeasuredBatch, rng: Rng) -> tuple[Observation, Tensor]:
        data = batch.data
        (y, noise), (target, _) = data.noise.split(data.y, rng, share=self.share)
        return whole(Observation(y, data.operator, noise)), target
