"""Factors by which intervals of a posterior are stretched so that they hold the truth as often as they say.

An interval [l, u] about its median c becomes [c − f (c − l), c + f (u − c)]. A value x needs the factor

    r = (x − c)/(u − c) above c, (c − x)/(c − l) below.

With L_i(f) the share of values of object i that need more than f, conformal risk control takes

    f̂ = min{f : (Σ_i L_i(f) + 1)/(N + 1) ≤ α},    and then E L ≤ α for the next object,

whatever the sampler does, and E L ≥ α − 2/(N + 1) where r has no ties. For one value an object it is split conformal prediction;
for many pixels it aims at α − (1 − α)/N outside, so that fewer than 20 objects make 95 % and more of 90 %. f̂ < 1 narrows
intervals that were too wide. The promise is marginal, over objects like those of the fit, and over fits. One that holds for this
fit with probability 1 − δ is RCPS: the smallest f whose mean of L_i(f) is below what `allowed_risk` allows of N objects.
References: Angelopoulos, Bates, Fisch, Lei & Schuster, *Conformal Risk Control*, 2022, arXiv:2208.02814; Romano, Patterson &
Candès, *Conformalized Quantile Regression*, 2019, arXiv:1905.03222.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diffinv.core.checks import DiffinvError
from diffinv.uncertainty.conformal import allowed_risk


def needed_factor(truth: Tensor, low: Tensor, middle: Tensor, high: Tensor) -> Tensor:
    """r of every value, same shape, ≥ 0; infinite where an interval without width misses.

    Arguments: truth, and the lower end, the median and the upper end of its intervals, of one shape and unit.
    """
    offset = (truth - middle).double()
    half = torch.where(offset > 0, high - middle, middle - low).double()
    return torch.where(offset == 0, 0.0, offset.abs() / half.clamp_min(0))


def fewest_objects(alpha: float, delta: float | None = None) -> int:
    """The fewest objects that can promise E L ≤ α: 9 for 0.1; 22 with probability 0.9."""
    if delta is None:
        return math.ceil(1 / alpha - 1e-9) - 1
    return math.ceil(math.log(delta) / math.log1p(-alpha) - 1e-9)


def smallest_factor(needed: Sequence[Tensor], alpha: float, delta: float | None = None) -> float:
    """f̂ of N objects.

    Arguments: needed: r of the values of each object, (n_i,) with n_i ≥ 1. alpha: share of values outside that is allowed, 0 … 1.
        delta: probability with which this fit may break the promise; None for a promise on average over fits.
    Raises: DiffinvError for too few objects, or if no finite factor keeps the promise.
    """
    if not 0 < alpha < 1:
        raise DiffinvError(f"smallest_factor: alpha must lie inside (0, 1), got {alpha}.")
    objects = len(needed)
    if objects < fewest_objects(alpha, delta):
        raise DiffinvError(
            f"smallest_factor: {objects} objects cannot promise {alpha:g} outside; at least {fewest_objects(alpha, delta)} are "
            "needed."
        )
    allowed = (objects + 1) * alpha * (1 + 1e-12) - 1 if delta is None else objects * allowed_risk(alpha, delta, objects)
    values = torch.cat([r.double().flatten() for r in needed])
    weight = torch.cat([torch.full((r.numel(),), 1 / r.numel(), dtype=torch.float64) for r in needed])
    values, order = values.sort()
    outside = weight.sum() - weight[order].cumsum(0)  # Σ_i L_i at f = values[k], where values differ
    enough = outside <= allowed + 1e-9
    factor = float(values[int(enough.double().argmax())])
    if not math.isfinite(factor):
        raise DiffinvError("smallest_factor: some intervals have no width and miss; give more draws or look at the sampler.")
    return factor


def stretched(low: Tensor, middle: Tensor, high: Tensor, factor: Tensor | float) -> tuple[Tensor, Tensor]:
    """[c − f (c − l), c + f (u − c)], shapes and unit as given. factor: a number, or one a value."""
    return middle - factor * (middle - low), middle + factor * (high - middle)
