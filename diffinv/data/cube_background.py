"""The background of a count cube from the spectrum of a region without source.

    b_k = s t/t_b · w_k · Σ_G n / Σ_G a w

n: counts of the region, w: widths of channels in keV, a: AREASCAL, s: area of a pixel over that of the region, t and t_b:
exposures. G: the group of channels about k, neighbours that are joined until they hold 20 counts, within which the rate a keV
is one: an empty channel of a short spectrum is no channel without background.
Invariant: a group's counts are kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from diffinv.core.checks import InputError
from diffinv.data.ogip import Spectrum, check_channels
from diffinv.data.response_files import Rmf
from diffinv.spectral.response import Binning

_COUNTS_A_GROUP = 20


@dataclass(frozen=True, eq=False)
class Background:
    """expected: counts a pixel in the channels of the cube, (K,). counts: those of the region. groups: of channels."""

    expected: np.ndarray
    counts: int
    groups: int


def background_of(spectrum: Spectrum, rmf: Rmf, binning: Binning, *, area: float, exposure: float) -> Background:
    """Arguments: binning: channels of the response into those of the cube. area: of a pixel over that of the region. exposure: s.

    Raises: InputError if the channels are not the response's, a used one is not good, or they hold fewer than 20 counts.
    """
    check_channels(spectrum, rmf)
    used = binning.labels >= 0
    bad = used & (spectrum.quality != 0)
    if bad.any():
        raise InputError(f"{spectrum.path}: {int(bad.sum())} channels of the cube have QUALITY ≠ 0; narrow cube.energies.")
    counts, width = binning.sum(spectrum.counts), binning.sum(rmf.high - rmf.low)
    seen = binning.sum((rmf.high - rmf.low) * spectrum.area_scale)
    total = int(counts.sum())
    if total < _COUNTS_A_GROUP:
        raise InputError(f"{spectrum.path}: {total} counts in the cube's channels, too few for a spectrum; give a number.")
    group = _groups(counts)
    rate = np.bincount(group, counts) / np.bincount(group, seen)
    return Background(area * exposure / spectrum.exposure * width * rate[group], total, int(group.max()) + 1)


def _groups(counts: np.ndarray) -> np.ndarray:
    """Number of each channel's group; what is left at the end joins the last one."""
    group, number, held = np.zeros(len(counts), int), 0, 0.0
    for k, own in enumerate(counts):
        group[k] = number
        held += own
        if held >= _COUNTS_A_GROUP:
            number, held = number + 1, 0.0
    return np.minimum(group, number - 1)
