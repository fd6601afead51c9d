"""Quantiles of a posterior from a few draws, that cover what they say.

With M exchangeable draws the k-th order statistic sits at probability k/(M + 1), so quantile p is read at position
(M + 1)p. Plain interpolation at (M − 1)p + 1 covers 80 % of a nominal 90 % with 16 draws.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffinv.core.checks import DiffinvError


def fewest_draws(p: float) -> int:
    """The fewest draws that have a p-quantile: 19 for 5 % and 95 %."""
    return math.ceil(round(1 / min(p, 1 - p), 9)) - 1


def quantile(samples: Tensor, p: float, dim: int = 1) -> Tensor:
    """The p-quantile along `dim` at position (M + 1)p of the order statistics, linear between them.

    Raises: DiffinvError if p is outside (0, 1) or M draws cannot give it.
    """
    draws = samples.shape[dim]
    if not 0 < p < 1:
        raise DiffinvError(f"quantile: p must be inside (0, 1), got {p}.")
    if draws < fewest_draws(p):
        raise DiffinvError(f"quantile: {draws} draws cannot give p = {p:g}; at least {fewest_draws(p)} are needed.")
    position = min(max((draws + 1) * p - 1, 0.0), draws - 1.0)
    low = min(int(position + 1e-9), draws - 2) if draws > 1 else 0
    ordered = samples.sort(dim=dim).values
    lower, upper = ordered.select(dim, low), ordered.select(dim, min(low + 1, draws - 1))
    return torch.lerp(lower, upper, position - low)
