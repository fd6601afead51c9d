"""Numbers that a training needs and nobody wrote down, estimated from the data: unit of the network, noise, brightness.

All are taken from at most `SAMPLE` rows, spread evenly over the data, so that they are the same in every process and every
time; each is written to the run's record.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from diffinv.core.checks import DiffinvError, InputError, UnsupportedError
from diffinv.core.rng import Rng
from diffinv.likelihood import Observation
from diffinv.losses.base import MeasuredBatch
from diffinv.noise.estimate import exposure_difference, wavelet_mad
from diffinv.noise.gaussian import Gaussian
from diffinv.noise.unknown import UnknownLevel
from diffinv.operators.fourier import Visibilities
from diffinv.reconstructors.backprojected import BackProjection
from diffinv.reconstructors.observed import good_data, linear
from diffinv.training.sources import Source

SAMPLE, _CHUNK, _PIXELS, _ROWS = 256, 32, 4096, 8192
_BRIGHT = 0.99
_NOISE, _UNSEEN = 0x2015, 1e-5  # seed; of the best-known pixel's weight


def evenly(length: int, count: int) -> Tensor:
    """At most `count` row numbers, spread evenly: int64."""
    return torch.linspace(0, length - 1, min(count, length)).round().long()


def take(source: Source, index: Tensor) -> MeasuredBatch:
    """Rows of a source of measurements. Raises InputError for other sources."""
    batch = source.batch(index, Rng.for_draws(0, index, 1))
    if not isinstance(batch, MeasuredBatch):
        raise InputError(f"data: the source gives {type(batch).__name__}; reconstructors learn from MeasuredBatch.")
    return batch


def _batches(source: Source) -> Iterator[MeasuredBatch]:
    for index in evenly(len(source), SAMPLE).split(_CHUNK):
        yield take(source, index)


def fingerprint(source: Source) -> str:
    """SHA-256 of the number of rows and, of those sampled, of data, noise and instrument: a resumed training knows them by it."""
    digest = hashlib.sha256(str(len(source)).encode())
    for index in evenly(len(source), SAMPLE).split(_CHUNK):
        batch = source.batch(index, Rng.for_draws(0, index, 1))
        parts = [batch.x]
        if isinstance(batch, MeasuredBatch):
            parts = [t for each in (batch.observation, batch.second) if each is not None for t in each.tensors()]
        for part in parts:
            digest.update(part.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def image_scale(source: Source) -> float:
    """Median over rows of the rms of the back-projected image, noise and gaps included, as a reconstructor gets to see it.

    Raises: DiffinvError if it is not positive.
    """
    found = [_rough(batch.observation).square().flatten(1).mean(1).sqrt() for batch in _batches(source)]
    scale = float(torch.cat(found).median())
    if not 0 < scale < float("inf"):
        raise DiffinvError(f"data.scale: the images' rms is {scale:.4g}; look at the data, or give the scale as a number.")
    return scale


def prior_scale(source: Source) -> float:
    """Median over rows of the rms of the image itself, which a prior is to take for 1, in the image's unit.

    The mean square of the back-projection less that of the back-projected noise, over the pixels that a good datum looks at:
    noise and gaps do not count, for a sampler brings every object to an rms of 1 without them. A blur's loss of power stays in,
    and noise of unknown level, which is that of images that are taken as they are.
    Raises: DiffinvError if noise is all that is seen.
    """
    found, start = [], 0
    for batch in _batches(source):
        data, rows = batch.observation, Rng.for_draws(_NOISE, range(start, start + len(batch.observation.y)), 1)
        good = good_data(data)
        y, power = data.y.where(good, 0.0), _rough(data).square()
        if not isinstance(data.noise, UnknownLevel):
            power = power - _rough(replace(data, y=(data.noise.sample(y, rows) - y).where(good, 0.0))).square()
        reached = data.operator.adjoint(good.to(y))
        known = (reached.abs() > _UNSEEN * reached.abs().flatten(1).amax(1)[:, None, None, None]).double()
        found.append((power * known).flatten(1).sum(1) / known.flatten(1).sum(1).clamp_min(1))
        start += len(y)
    square = float(torch.cat(found).median())
    if not 0 < square < float("inf"):
        raise DiffinvError(
            f"data.scale: the images' mean square less that of their noise is {square:.4g}, there is next to nothing but noise "
            "in them; give the rms of the images themselves as a number."
        )
    return square**0.5


def brightness(source: Source) -> float:
    """99th percentile of |back-projected image| over pixels (some thousands a row) and rows, in the image's unit."""
    found = [_rough(batch.observation).abs().flatten(1) for batch in _batches(source)]
    values = torch.cat([v[:, :: v.shape[1] // _PIXELS | 1].flatten() for v in found])  # an odd stride, to meet every column
    return float(values.kthvalue(max(1, round(_BRIGHT * len(values)))).values)


def _rough(observation: Observation) -> Tensor:
    linear("data.scale: auto", observation, "give data.scale as a number.")
    with torch.no_grad():
        return BackProjection()(observation).double()


def sampling_weight(source: Source) -> Tensor:
    """One over the share of rows in which a datum is good, 0 where it is good in none: (1, *data), over at most 8,192 rows."""
    total, rows = torch.zeros(()), evenly(len(source), _ROWS)
    for index in rows.split(_CHUNK):
        total = total + good_data(take(source, index).observation).double().sum(0, keepdim=True)
    share = total / len(rows)
    return torch.where(share > 0, 1 / share, 0.0).float()


def noise_std(source: Source) -> tuple[Tensor, str]:
    """σ a channel (C,) in the data's unit, and how it was found: from two exposures, or from the finest detail of one.

    Raises: UnsupportedError for data that are no images, whose finest detail is not noise.
    """
    found, method = [], "wavelet MAD"
    for batch in _batches(source):
        if batch.observation.y.ndim != 4 or isinstance(batch.observation.operator, Visibilities):
            raise UnsupportedError(
                f"noise.std: auto reads the finest detail of images, and these data are {tuple(batch.observation.y.shape)}; give "
                "the level as a number (for noise of unknown level, identifiability.noise_level and the loss's start)."
            )
        first = _open(batch.observation)
        if batch.second is None:
            found.append(wavelet_mad(first))
        else:
            method = "difference of the exposures"
            channels = first.flatten(0, 1), _open(batch.second).flatten(0, 1)
            found.append(exposure_difference(*channels).unflatten(0, first.shape[:2]))
    std = torch.cat(found).nanmedian(0).values
    if not bool(((std > 0) & std.isfinite()).all()):
        raise DiffinvError(f"noise.std: auto finds {std.tolist()}, no noise at all; give the level as a number.")
    return std, method


def _open(observation: Observation) -> Tensor:
    """y with NaN where it is not good."""
    return observation.y.where(good_data(observation), torch.nan)


def white_twin(observation: Observation, level: float | None) -> tuple[Observation, float]:
    """The observation with white Gaussian noise in place of another kind, and its σ in the unit of its data.

    Arguments: level: σ, or None for the rms over good data of the noise's own standard deviation at the data.
    Raises: UnsupportedError if neither is known.
    """
    good, noise = good_data(observation), observation.noise
    if level is None:
        if isinstance(noise, UnknownLevel):
            raise UnsupportedError("identifiability: the noise is of unknown level; give identifiability.noise_level.")
        level = float(noise.variance(observation.y)[good].mean().sqrt())
    mask = None if bool(good.all()) else good
    return Observation(observation.y, observation.operator, Gaussian(torch.tensor([level]), mask)), level
