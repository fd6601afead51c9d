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
from diffinv.unmixing.pixels import PixelPlan, fit_pixels, pool_index, pooled, start_amplitude
from diffinv.unmixing.posterior_maps import Posterior, flags, given_flags, posterior, predictive_check

_WANTED = 1000.0  # squared signal-to-noise ratio (counts) of a pooled spectrum that is fitted alone
_LEAST = 100.0  # below which a block is enlarged where it lies, since its own optimum may be a peak of the noise
_WIDEST = 8  # pixels


@dataclass(frozen=True)
class UnmixingPlan:
    """The plans of the three steps. rounds: of linearisation about the field's mean. seed: of the predictive check."""

    pixels: PixelPlan
    maps: MapPlan = MapPlan()
    fields: FieldPlan = FieldPlan()
    rounds: int = 6
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Unmixed:
    """smooth: the sparse map. posterior. misfit: z of the predictive check (N,). flags: bits (N,), see `pixels`."""

    smooth: ParameterMap
    posterior: Posterior
    misfit: Tensor
    flags: Tensor


def strength(data: SpectralData) -> Tensor:
    """Squared signal-to-noise ratio of the sum over a spectrum's channels (for counts: the counts above the background), (N,)."""
    y = torch.where(data.good, data.y - data.background, 0.0)
    variance = 1 / data.noise.precision(torch.where(data.good, data.y, 1.0)).d
    return y.sum(1) ** 2 / torch.where(data.good, variance, 0.0).sum(1).clamp_min(1e-300)


def pool_factor(data: SpectralData) -> int:
    """Pixels a side to pool so that half of the spectra reach a squared signal-to-noise ratio of 1000; at most 8."""
    seen = strength(data)[data.good.any(1)]
    typical = float(seen.median()) if len(seen) else 0.0
    return _WIDEST if typical <= 0 else min(_WIDEST, max(1, math.ceil(math.sqrt(_WANTED / typical))))


def pooled_start(
    mixture: Mixture, data: SpectralData, shape: tuple[int, int], factor: int, plan: PixelPlan
) -> tuple[Tensor, Tensor]:
    """Amplitudes (N, C) of each pixel at the parameters (N, P) of the block that it lies in; faint blocks are doubled."""
    u = pooled_parameters(mixture, data, shape, factor, plan)
    parts = torch.arange(len(u)).split(plan.rows)
    shapes = lambda rows: torch.stack(mixture.shapes(u[rows]), 1)
    return torch.cat([start_amplitude(data.select(rows), shapes(rows), iterations=8) for rows in parts]), u


def pooled_parameters(mixture: Mixture, data: SpectralData, shape: tuple[int, int], factor: int, plan: PixelPlan) -> Tensor:
    """u (N, P) of the smallest block about each pixel, of `factor`, twice that, … pixels, that reaches a ratio² of 100."""
    blocks = pooled(data, shape, factor)
    index = pool_index(shape, factor)
    u = fit_pixels(mixture, blocks, plan).u[index]
    faint = strength(blocks)[index] < _LEAST
    while bool(faint.any()) and factor < _WIDEST:
        factor *= 2
        blocks, index = pooled(data, shape, factor), pool_index(shape, factor)
        needed = index[faint].unique()
        found = u.new_zeros(len(blocks.y), u.shape[1]).index_copy(0, needed, fit_pixels(mixture, blocks.select(needed), plan).u)
        u = torch.where(faint[:, None], found[index], u)
        faint = faint & (strength(blocks)[index] < _LEAST)
    return u


def unmix(mixture: Mixture, data: SpectralData, shape: tuple[int, int], plan: UnmixingPlan) -> Unmixed:
    """Posterior maps of a cube.

    Arguments: data: H·W spectra, row by row. shape: (H, W).
    """
    return unmix_from(mixture, data, shape, pooled_start(mixture, data, shape, pool_factor(data), plan.pixels), plan)


def unmix_from(
    mixture: Mixture, data: SpectralData, shape: tuple[int, int], start: tuple[Tensor, Tensor], plan: UnmixingPlan
) -> Unmixed:
    """Posterior maps from a start, amplitude (N, C) and u (N, P)."""
    smooth = fit_map(mixture, data, shape, start, plan.maps)
    found = posterior(mixture, data, shape, smooth, plan.fields, rounds=plan.rounds)
    misfit = predictive_check(mixture, data, found, Rng.for_draws(plan.seed, range(len(data.y)), 1))
    return Unmixed(smooth, found, misfit, flags(found, given_flags(mixture, data, found), misfit))
