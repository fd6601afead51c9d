"""From spectra of pixels to posterior maps, in one call.

Pooled pixels give a start, the sparse map gives the point about which the data are taken to second order, and the Gaussian field
gives what is reported: mean, errors and flags of every pixel.
Invariant: a pixel without data is filled by its surroundings and flagged NODATA.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffinv.core.rng import Rng
from diffinv.unmixing.fields import FieldPlan
from diffinv.unmixing.maps import MapPlan, ParameterMap, fit_map
from diffinv.unmixing.mixture import Mixture, SpectralData
from diffinv.unmixing.pixels import NODATA, PixelPlan, fit_pixels, pool_index, pooled, start_amplitude
from diffinv.unmixing.posterior_maps import Posterior, flags, posterior, predictive_check

_WANTED = 1000.0  # squared signal-to-noise ratio (counts) of a pooled spectrum that is fitted alone
_WIDEST = 8  # pixels


@dataclass(frozen=True)
class UnmixingPlan:
    """The plans of the three steps. rounds: of linearisation about the field's mean. seed: of the predictive check."""

    pixels: PixelPlan
    maps: MapPlan = MapPlan()
    fields: FieldPlan = FieldPlan()
    rounds: int = 1
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Unmixed:
    """smooth: the sparse map. posterior. misfit: z of the predictive check (N,). flags: bits (N,), see `pixels`."""

    smooth: ParameterMap
    posterior: Posterior
    misfit: Tensor
    flags: Tensor


def pool_factor(data: SpectralData) -> int:
    """Pixels a side to pool so that half of the spectra reach a squared signal-to-noise ratio of 1000; at most 8."""
    y = torch.where(data.good, data.y - data.background, 0.0)
    total = (y**2 * data.noise.precision(torch.where(data.good, data.y, 1.0)).d).sum(1)
    seen = total[data.good.any(1)]
    typical = float(seen.median()) if len(seen) else 0.0
    return _WIDEST if typical <= 0 else min(_WIDEST, max(1, math.ceil(math.sqrt(_WANTED / typical))))


def pooled_start(
    mixture: Mixture, data: SpectralData, shape: tuple[int, int], factor: int, plan: PixelPlan
) -> tuple[Tensor, Tensor]:
    """Amplitudes (N, C) of each pixel at the parameters (N, P) of the block that it lies in."""
    u = fit_pixels(mixture, pooled(data, shape, factor), plan).u[pool_index(shape, factor)]
    parts = torch.arange(len(u)).split(plan.rows)
    shapes = lambda rows: torch.stack(mixture.shapes(u[rows]), 1)
    return torch.cat([start_amplitude(data.select(rows), shapes(rows), iterations=8) for rows in parts]), u


def unmix(mixture: Mixture, data: SpectralData, shape: tuple[int, int], plan: UnmixingPlan) -> Unmixed:
    """Posterior maps of a cube.

    Arguments: data: H·W spectra, row by row. shape: (H, W).
    """
    start = pooled_start(mixture, data, shape, pool_factor(data), plan.pixels)
    smooth = fit_map(mixture, data, shape, start, plan.maps)
    found = posterior(mixture, data, shape, smooth, plan.fields, rounds=plan.rounds)
    misfit = predictive_check(mixture, data, found, Rng.for_draws(plan.seed, range(len(data.y)), 1))
    given = torch.where(data.good.any(1), 0, NODATA)
    return Unmixed(smooth, found, misfit, flags(found.u, given, misfit))
