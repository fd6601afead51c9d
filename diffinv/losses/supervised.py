"""What needs more than one noisy measurement of an image: its truth, or a second exposure."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from diffinv.core.checks import UnsupportedError
from diffinv.core.registry import register
from diffinv.core.rng import Rng
from diffinv.losses.base import Loss, MeasuredBatch, mean_good, truth
from diffinv.reconstructors.observed import clean_data, good_data


@register("loss", "supervised")
@dataclass(frozen=True)
class Supervised(Loss):
    """`‖f(y, A) − x‖² / d`, d pixels an image: the twin that every other loss is measured against."""

    unbiased = True

    def check(self, batch: MeasuredBatch) -> None:
        truth(batch, "Supervised")

    def __call__(self, model: nn.Module, batch: MeasuredBatch, rng: Rng) -> Tensor:
        return (model(batch.data) - truth(batch, "Supervised")).square().flatten(1).mean(1)

    def oracle(self, model: nn.Module, batch: MeasuredBatch, rng: Rng) -> Tensor:
        return self(model, batch, rng)


@register("loss", "noise2noise")
@dataclass(frozen=True)
class Noise2Noise(Loss):
    """`‖A₂ f(y₁, A₁) − y₂‖²` a datum, for two exposures with independent noise; any noise with E[y₂ | x] = A₂ x.

    Oracle: `‖A₂ (f(y₁, A₁) − x)‖²` a datum. The two operators may differ (dithered exposures).
    References: Lehtinen et al., *Noise2Noise: Learning Image Restoration without Clean Data*, 2018, arXiv:1803.04189.
    """

    unbiased = True

    def check(self, batch: MeasuredBatch) -> None:
        if batch.second is None:
            raise UnsupportedError("Noise2Noise: one exposure a row; give a second with independent noise, or use R2R or SURE.")

    def __call__(self, model: nn.Module, batch: MeasuredBatch, rng: Rng) -> Tensor:
        self.check(batch)
        second = batch.second
        residual = second.operator(model(batch.data)) - clean_data(second)
        return mean_good(residual**2, good_data(second))

    def oracle(self, model: nn.Module, batch: MeasuredBatch, rng: Rng) -> Tensor:
        second = batch.second
        error = second.operator(model(batch.data)) - second.operator(truth(batch, "Noise2Noise"))
        return mean_good(error**2, good_data(second))
