"""Which channels of a cube are used, and how noisy they are where the file's variance cannot be right.

The variance of an IFU cube may hold what differs between exposures (seeing, pointing, calibration), which multiplies a whole
spectrum and is no noise between its channels. Where lines are fitted, the scatter about the continuum is measured instead.
Invariant: the data are not changed.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from diffinv.core.checks import InputError
from diffinv.data.cubes import Cube

_MAD = 0.6744897501960817  # of a standard normal variable
_FEWEST = 10  # channels that a scatter is measured from

Range = tuple[float, float]


def inside(cube: Cube, ranges: Sequence[Range]) -> np.ndarray:
    """(K,), True for channels whose middle lies in one of the ranges, in the unit of the cube's axis.

    Raises: InputError if a range holds no channel.
    """
    rows = [(cube.centre >= low) & (cube.centre <= high) for low, high in ranges]
    for (low, high), row in zip(ranges, rows, strict=True):
        if not row.any():
            raise InputError(
                f"no channel of the cube lies in {low:g}–{high:g} {cube.unit}; it has {cube.low[0]:g}–{cube.high[-1]:g}."
            )
    return np.any(rows, axis=0)


def cut(cube: Cube, window: Range) -> Cube:
    """The channels of one range. Raises: InputError if there are none."""
    kept = inside(cube, [window])
    variance = None if cube.variance is None else cube.variance[kept]
    axis = {"low": cube.low[kept], "high": cube.high[kept]}
    return replace(cube, data=cube.data[kept], variance=variance, mask=cube.mask[kept], **axis)


def with_scatter(cube: Cube, ranges: Sequence[Range]) -> Cube:
    """The cube with one variance a pixel: of its values in `ranges` about a straight line.

    σ = MAD/0.6745 · √(n/(n − 2)), n good channels, the line's slope through the medians of both halves: blind to what lies
    outside the ranges and to a few bad values within.

    References: Tukey, *Exploratory data analysis*, 1977 (the resistant line).

    A pixel with fewer than 10 good channels there, or without scatter, is masked.

    Arguments: ranges: without lines, in the unit of the axis.
    Raises: InputError if no pixel is left.
    """
    kept = inside(cube, ranges)
    good = cube.mask[kept]
    spread = _spread(cube.centre[kept], np.where(good, cube.data[kept], np.nan))
    count = good.sum(0)
    known = (count >= _FEWEST) & (spread > 0)
    if not known.any():
        raise InputError(
            f"no pixel has {_FEWEST} good channels that scatter in the ranges given, at most {count.max()} of {len(good)} good; "
            "give wider ranges."
        )
    mask = cube.mask & known
    return replace(cube, mask=mask, variance=np.where(mask, spread**2, 0.0))


def _spread(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """σ of spectra (K, …) with NaN where they are not good, on the axis x (K,): (…), NaN where there are too few."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of pixels without a good channel
        seen = np.where(np.isnan(y), np.nan, x.reshape(-1, *[1] * (y.ndim - 1)))
        above = seen > np.nanmedian(seen, axis=0)
        (x_low, y_low), (x_high, y_high) = (
            (np.nanmedian(np.where(side, seen, np.nan), axis=0), np.nanmedian(np.where(side, y, np.nan), axis=0))
            for side in (~above, above)
        )
        residual = y - (y_high - y_low) / (x_high - x_low) * seen
        count = np.isfinite(y).sum(0)
        scatter = np.nanmedian(np.abs(residual - np.nanmedian(residual, axis=0)), axis=0)
        return scatter / _MAD * np.sqrt(count / (count - 2.0))
