"""Spread and skill: the squared error of the mean against the variance of the draws.

For exchangeable truth and draws  E(x̄ − x*)² = (1 + 1/M) E Var_m x_m, pixel by pixel. The statistic is the mean over objects of

    s = w · mean over pixels of [(x̄ − x*)² − (1 + 1/M) Var_m x_m],

and its null comes from relabelling, each label's mean and variance being those of the other M.
References: Fortin, Abaza, Anctil & Turcotte, *Why should ensemble spread match the RMSE of the ensemble mean?*, 2014.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffinv.core.rng import Rng
from diffinv.uncertainty.finding import Finding
from diffinv.uncertainty.nulls import exchange_test, paired


def spread_error_tables(truth: Tensor, samples: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(1 + 1/M) Var of the other labels and squared error of their mean, means over pixels: two (N, M + 1).

    Arguments: truth: (N, …). samples: (N, M, …), M ≥ 2. mask: (N, …) bool; objects without pixels get NaN.
    """
    draws = samples.shape[1]
    items = paired(truth, samples).double()
    items = (items - items.mean(1, keepdim=True)).flatten(2)
    total, square = items.sum(1, keepdim=True), items.pow(2).sum(1, keepdim=True)
    mean = (total - items) / draws
    variance = (square - items**2 - draws * mean**2) / (draws - 1)
    weight = torch.ones_like(truth, dtype=items.dtype) if mask is None else mask.to(items.dtype)
    weight = (weight.flatten(1) / weight.flatten(1).sum(1, keepdim=True))[:, None]
    return (1 + 1 / draws) * (variance * weight).sum(2), ((items - mean) ** 2 * weight).sum(2)


@dataclass(frozen=True)
class SpreadFinding(Finding):
    """statistic: mean of error² − spread², in the image's unit squared. rmse, spread: their roots over all objects."""

    rmse: float = 0.0
    spread: float = 0.0

    def extra(self) -> str:
        return f", RMSE {self.rmse:.4g}, spread {self.spread:.4g}"


def spread_skill(
    truth: Tensor, samples: Tensor, rng: Rng, *, mask: Tensor | None = None, quantity: str = "pixels"
) -> SpreadFinding:
    """Whether the spread of draws is the error of their mean, two-sided.

    Catches over- and under-confidence, and bias that is not small beside σ. Cannot catch a sampler that returns the prior, nor
    where in the image an excess and a lack cancel. Bright objects weigh most: divide truth and draws by a scale first where
    fluxes differ widely.

    Arguments: truth: (N, …). samples: (N, M, …). rng: one stream. mask: (N, …) bool, from the data alone.
    """
    spread, error = spread_error_tables(truth, samples, mask)
    outcome = exchange_test(error - spread, rng)
    rms = tuple(float(t[:, 0].nanmean().sqrt()) for t in (error, spread))
    return SpreadFinding("spread–skill", quantity, *outcome.numbers(), *samples.shape[:2], *rms)
