"""Proper scores of draws, unbiased in their number, and a test that the truth scores as a draw would.

Energy score, a generalisation of the CRPS (`diffinv.uncertainty.metrics.crps`) to whole images:

    ES = (1/M) Σ_m ‖x_m − x*‖ − 1/(2M(M − 1)) Σ_{m≠m'} ‖x_m − x_m'‖,   E ES is lowest for the true posterior.

A score alone has no null: hard objects score worse. But under exchangeability the score of the truth among the draws is
distributed as that of a draw among the others, which relabelling turns into a test. With row sums r_j = Σ_m d_jm and total T =
Σ r_j of the distances between M + 1 labels, the score of label j is r_j/M − (T − 2 r_j)/(2M(M − 1)).
References: Gneiting & Raftery, *Strictly Proper Scoring Rules, Prediction, and Estimation*, 2007; Ferro, *Fair scores for
ensemble forecasts*, 2014.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffinv.core.rng import Rng
from diffinv.core.types import Image
from diffinv.uncertainty.finding import Finding
from diffinv.uncertainty.nulls import exchange_test, paired


def energy_score(samples: Tensor, truth: Image) -> Tensor:
    """Fair energy score of whole images: (N, M, …), M ≥ 2, and (N, …) → (N,), in the image's unit; lower is better."""
    return energy_table(truth, samples)[:, 0]


def energy_table(truth: Image, samples: Tensor) -> Tensor:
    """The energy score if label j were the truth: (N, M + 1)."""
    items = paired(truth, samples).flatten(2)
    distance = torch.cdist(items, items, compute_mode="donot_use_mm_for_euclid_dist")
    return _score(distance.double().sum(2))


def crps_table(truth: Tensor, samples: Tensor) -> Tensor:
    """The CRPS, mean over pixels, if label j were the truth: (N, M + 1)."""
    items = paired(truth, samples).double().flatten(2)
    values, where = items.sort(1)
    labels = items.shape[1]
    number = torch.arange(labels, dtype=items.dtype, device=items.device)[:, None]
    before = values.cumsum(1) - values
    after = values.sum(1, keepdim=True) - values.cumsum(1)
    sums = values * (2 * number - labels + 1) + after - before
    return _score(torch.zeros_like(items).scatter_(1, where, sums)).mean(2)


def _score(row: Tensor) -> Tensor:
    """Row sums (N, M + 1, …) of distances → scores, same shape."""
    draws = row.shape[1] - 1
    return row / draws - (row.sum(1, keepdim=True) - 2 * row) / (2 * draws * (draws - 1))


def score_test(table: Tensor, rng: Rng, *, quantity: str) -> Finding:
    """Whether the truth scores as a draw would, two-sided: `energy_table` or `crps_table` (N, M + 1).

    Catches over-confidence and bias (a worse score than a draw's) and too much width (a better one). Cannot catch a sampler
    that returns the prior: its draws score as badly as the truth.
    """
    return exchange_test(table, rng).finding("score", quantity, table.shape[0], table.shape[1] - 1)
