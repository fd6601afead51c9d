"""Spectra of X-ray telescopes: OGIP PHA/PI files of type I with their background, response and grouping.

Expected counts in channel k of the source's region are exposure · areascal_k · Σ_e photons_e · area_e · redistribution_ek, plus
the background b_k; the background file expects b_k · (t_b a_b s_b)/(t_s a_s s_s), of exposures t, AREASCAL a and BACKSCAL s.
Invariant: counts are whole and ≥ 0, as a Poisson likelihood needs; a file that holds something else is refused.

References: The OGIP spectral file format, Arnaud, George & Tennant, 1992 (OGIP/92-007, 92-007a).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffinv.core.checks import InputError
from diffinv.data.fits import Table, read_fits
from diffinv.data.guard import readable
from diffinv.data.response_files import Rmf, find_table
from diffinv.spectral.response import Binning

_ROUNDING = 1e-3  # of a count, in which a rate times the exposure may miss a whole number


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Counts of one region.

    channel: numbers, (C,). counts: whole numbers in float64, (C,). exposure: s. area_scale, back_scale: AREASCAL and
    BACKSCAL, (C,). quality: 0 is good, (C,). grouping: 1 starts a group, −1 goes on, 0 stands alone, (C,).
    background, rmf, arf: files that the header names, beside this one, or None.
    """

    path: Path
    channel: np.ndarray
    counts: np.ndarray
    exposure: float
    area_scale: np.ndarray
    back_scale: np.ndarray
    quality: np.ndarray
    grouping: np.ndarray
    background: Path | None
    rmf: Path | None
    arf: Path | None


def read_spectrum(path: str | Path) -> Spectrum:
    """A PHA or PI file of type I, of counts or of a rate.

    Raises: InputError if it is no such file, its counts are negative, fractional or not finite, or its exposure is not > 0.
    """
    with readable(path, "a spectrum"):
        file = read_fits(path)
        table = find_table(file, ("SPECTRUM",), ("CHANNEL",), "a spectrum (PHA, PI)")
        channel = table.columns["CHANNEL"]
        if channel.ndim > 1 or "SPEC_NUM" in table.columns:
            raise InputError(
                f"{path}: many spectra in one table (PHA type II); extract one as type I, for instance with dmtype2split."
            )
        exposure = float(table.header.get("EXPOSURE", np.nan))
        if not exposure > 0:
            raise InputError(f"{path}: EXPOSURE is {exposure:g}; give seconds > 0.")
        counts = check_counts(str(path), _counts(file.path, table, exposure))
        scales = {name: _values(table, name, 1.0) for name in ("AREASCAL", "BACKSCAL")}
        for name, values in scales.items():
            if not (np.isfinite(values) & (values > 0)).all():
                raise InputError(f"{path}: {name} must be > 0, got {values[~(values > 0)][0]:g}; correct the header.")
        named = [_beside(file.path, table.header.get(key)) for key in ("BACKFILE", "RESPFILE", "ANCRFILE")]
        quality, grouping = (_values(table, name, 0).astype(np.int64) for name in ("QUALITY", "GROUPING"))
        numbers = channel.astype(np.int64)
        return Spectrum(file.path, numbers, counts, exposure, scales["AREASCAL"], scales["BACKSCAL"], quality, grouping, *named)


def check_counts(owner: str, counts: np.ndarray, *, other: str = "data with a variance") -> np.ndarray:
    """The counts as whole numbers in float64; NaN is not a count. other: what may be given in the place of counts.

    Raises: InputError that names the first bad value and its place.
    """
    counts = np.asarray(counts, np.float64)
    whole = np.round(counts)
    bad = ~((np.abs(counts - whole) <= _ROUNDING) & (whole >= 0))
    if bad.any():
        place = tuple(int(i) for i in np.argwhere(bad)[0])
        raise InputError(
            f"{owner}: {int(bad.sum())} values are no counts, the first is {counts[place]:g} at {place}; a Poisson likelihood "
            f"needs whole numbers ≥ 0: give raw counts (no background subtracted, no rate), or {other}."
        )
    return whole


def background_ratio(source: Spectrum, background: Spectrum) -> np.ndarray:
    """Background counts expected in the background's file per one in the source's region, (C,).

    Raises: InputError if the two do not have the same channels.
    """
    if not np.array_equal(source.channel, background.channel):
        raise InputError(
            f"{background.path}: channels {_span(background)}, but the source {source.path} has {_span(source)}; give a "
            "background in the same channels."
        )
    of = [s.exposure * s.area_scale * s.back_scale for s in (background, source)]
    return of[0] / of[1]


def check_channels(spectrum: Spectrum, rmf: Rmf) -> None:
    """Raise InputError unless spectrum and RMF have the same channels."""
    if not np.array_equal(spectrum.channel, rmf.channel):
        there = f"{rmf.channel[0]}–{rmf.channel[-1]} ({len(rmf.channel)})"
        raise InputError(
            f"{spectrum.path}: channels {_span(spectrum)}, but the response {rmf.path} has {there}; give the response of this "
            "spectrum."
        )


def grouped(spectrum: Spectrum, rmf: Rmf, first: float, last: float) -> Binning:
    """The file's own groups: of those good channels (QUALITY 0) whose bounds overlap [first, last] keV.

    Raises: InputError if no channel is left, or the channels are not the response's.
    """
    check_channels(spectrum, rmf)
    groups = np.cumsum(spectrum.grouping >= 0) - 1
    keep = (spectrum.quality == 0) & (rmf.high > first) & (rmf.low < last)
    if not keep.any():
        raise InputError(
            f"{spectrum.path}: no good channel in {first:g}–{last:g} keV; widen the range, or clear QUALITY if it is not meant."
        )
    labels = np.full(len(groups), -1)
    labels[keep] = np.unique(groups[keep], return_inverse=True)[1]
    return Binning(labels)


def _counts(path: Path, table: Table, exposure: float) -> np.ndarray:
    if "COUNTS" in table.columns:
        return table.columns["COUNTS"]
    if "RATE" in table.columns:
        return table.columns["RATE"].astype(np.float64) * exposure
    raise InputError(f"{path}: SPECTRUM has neither COUNTS nor RATE; it has {', '.join(table.columns)}.")


def _values(table: Table, name: str, default: float) -> np.ndarray:
    """A column, or the header's one value for all channels."""
    if name in table.columns:
        return table.columns[name].astype(np.float64)
    return np.full(len(table.columns["CHANNEL"]), float(table.header.get(name, default)))


def _beside(path: Path, name: object) -> Path | None:
    text = str(name or "").strip()
    return None if text.lower() in ("", "none") else path.parent / Path(text).name


def _span(spectrum: Spectrum) -> str:
    return f"{spectrum.channel[0]}–{spectrum.channel[-1]} ({len(spectrum.channel)})"
