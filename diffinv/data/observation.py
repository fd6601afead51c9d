"""Measured images of one object: what a file holds after everything has been checked, and what was noted on the way.

Bad pixels (DQ or mask, NaN, infinite, variance ≤ 0, saturated) get `good = False` and keep the value that the file holds.
A band is refused if more than half of its pixels are bad, if it is constant, if its PSF is missing or unusable, or if its unit
is a surface brightness: the answer is flux per output pixel.
Without a variance the noise is estimated from the sky. The sky level itself is reported and never subtracted.
Invariant: every band of a `SkyObservation` has a finite positive variance and a finite value wherever it is good.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.ndimage import binary_dilation, binary_propagation

from diffinv.core.checks import InputError
from diffinv.data.catalog import Entry, object_name
from diffinv.data.fits import Plane
from diffinv.data.given import read_bands
from diffinv.data.grids import SkyGrid
from diffinv.data.inputs import read_input
from diffinv.data.layouts import InputOptions, RawBand
from diffinv.data.psf import PointSpread, PsfKind, check_psf, check_psf_scale

MOST_BAD = 0.5
_PLATEAU = 5  # pixels that share the largest value
_MANY = 0.01  # share of the pixels
_CLEAR, _SHARE = 5.0, 0.1  # of light at the edge: in its errors, and of the mean of the image
_COUNTS = ("adu", "dn", "count", "ct", "electron", "e-", "e", "photon", "data number")
_SAME_MAGNITUDE = 1e-6
_SCALES_DIFFER = 0.05  # more than distortions and rounded cards do
_SOLID_ANGLE = re.compile(  # in lower case: sr, arcsec2, sqdeg, mas^-2, beam, …
    r"(?<![a-z])(?:sq)?(?:[munµμ]?sr|ster\w*|[munµμ]?arc ?sec\w*|asec|arc ?min\w*|mas|deg(?:ree)?s?|beam"
    r"|(?:as|rad)(?=[\s^*(_-]*2))(?![a-z])"
)
_MAD_TO_SIGMA = 1.4826022185056018  # of a normal distribution


@dataclass(frozen=True, eq=False)
class Band:
    """One image of an object in one band, by one instrument.

    name: of the band. image: (H, W), in `unit` per pixel. variance: (H, W), unit². good, saturated: (H, W) bool.
    psf: of these pixels. grid: where they are. unit: BUNIT, "" if unknown. instrument: "" if unknown. zeropoint: magnitude of
    one unit, or None. noise_correlation: (2K + 1, 2L + 1), 1 at lag 0, or None. noise_estimated: whether the variance is the
    sky's. notes: what a user should know.
    """

    name: str
    image: np.ndarray
    variance: np.ndarray
    good: np.ndarray
    saturated: np.ndarray
    psf: PointSpread
    grid: SkyGrid
    unit: str
    instrument: str
    zeropoint: float | None
    noise_correlation: np.ndarray | None
    noise_estimated: bool
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class SkyObservation:
    """Everything that was measured of one object. Bands of the same name are exposures of one band.

    sha256: of the bytes read. truths: the `TRUTH` planes of a simulation.
    """

    object_id: str
    path: Path
    bands: tuple[Band, ...]
    sha256: str
    notes: tuple[str, ...]
    truths: tuple[Plane, ...] = ()

    def exposures(self) -> dict[str, tuple[Band, ...]]:
        """Band name → its exposures, in the order of the file."""
        return {name: tuple(b for b in self.bands if b.name == name) for name in dict.fromkeys(b.name for b in self.bands)}


def read_observation(path: str | Path, options: InputOptions, *, object_id: str | None = None) -> SkyObservation:
    """A measured object from a FITS file in any of the layouts of `layouts`.

    Arguments:
        path: the file. options: what the file does not say itself. object_id: None for the file's name without suffixes.
    Returns: the observation.
    Raises: InputError, one line that names the file, the cause and the remedy.
    """
    path = Path(path)
    return observe(Entry(object_id if object_id is not None else object_name(path), path), options)


def observe(entry: Entry, options: InputOptions) -> SkyObservation:
    """What was measured of an entry, checked.

    Arguments: entry. options: what its file does not say itself.
    Raises: InputError, one line that names the file, the cause and the remedy.
    """
    file = read_input(entry, options)
    try:
        bands = check_bands(read_bands(file, options), options)
    except InputError as error:
        named = tuple(str(p) for p in (entry.path, *(options.psf or ()), options.variance) if p is not None)
        raise error if str(error).startswith(named) else InputError(f"{entry.path}: {error}") from error
    return SkyObservation(entry.object_id, entry.path, bands, file.sha256, file.notes, tuple(file.named("TRUTH")))


def check_bands(raw: Sequence[RawBand], options: InputOptions) -> tuple[Band, ...]:
    """Checked bands from raw ones: the door for arrays that do not come from a FITS file.

    Raises: InputError naming the band and the defect, or the two bands that disagree.
    """
    bands = []
    for band in raw:
        try:
            bands.append(_check_band(band, options))
        except InputError as error:
            raise InputError(f"band {band.name}: {error}") from error
    _check_agreement(bands)
    return tuple(bands)


def _check_band(raw: RawBand, options: InputOptions) -> Band:
    header = raw.header
    grid = SkyGrid.from_header(header, raw.image.shape, pixel_scale=options.pixel_scale)
    psf, psf_notes = _psf(raw)
    check_psf_scale(psf, raw.image.shape)
    if raw.psf_scale is not None and abs(raw.psf_scale / grid.pixel_scale - 1) > _SCALES_DIFFER:
        raise InputError(
            f"the PSF model is of pixels of {raw.psf_scale:.4g}″ but the image's are {grid.pixel_scale:.4g}″; give the model of "
            "this image."
        )
    unit = _unit(raw, options)
    saturated, level_notes = _saturated(raw, unit)
    good = np.isfinite(raw.image) & ~saturated
    if raw.bad is not None:
        good &= ~raw.bad
    variance, noise_notes = _variance(raw, good)
    good &= np.isfinite(variance) & (variance > 0)
    _check_pixels(raw, good)
    notes = raw.notes + psf_notes + noise_notes + level_notes + _zero_note(raw, good) + _sky_note(raw, good)
    notes += _edge_note(raw, variance, good) + _pixel_note(good, saturated)
    return Band(
        name=str(raw.name),
        image=raw.image,
        variance=variance,
        good=good,
        saturated=saturated,
        psf=psf,
        grid=grid,
        unit=unit,
        instrument=str(header.get("INSTRUME", "")).strip(),
        zeropoint=_zeropoint(header.get("ZEROPNT"), options),
        noise_correlation=_correlation(raw.correlation),
        noise_estimated=raw.variance is None,
        notes=notes if unit else (*notes, "no BUNIT: the unit is unknown and is carried through as it is"),
    )


def _psf(raw: RawBand) -> tuple[PointSpread, tuple[str, ...]]:
    if raw.psf is None:
        raise InputError("no PSF in the file; add a PSF extension, or give input.psf=FILE.")
    cards = raw.psf_header
    kind = str(cards.get("PSFKIND", PsfKind.EFFECTIVE)).strip().lower()
    if kind not in tuple(PsfKind):
        raise InputError(f"PSFKIND is {kind!r}; it must be effective (holds the pixel's response) or optical.")
    norm, oversample = cards.get("PSFNORM"), cards.get("OVERSAMP", 1.0)
    if not all(isinstance(v, (int, float)) for v in (oversample, 1.0 if norm is None else norm)):
        raise InputError(f"PSFNORM = {norm!r} and OVERSAMP = {oversample!r} must be numbers.")
    kind = PsfKind(kind)
    return check_psf(raw.psf, norm=norm, oversample=float(oversample), kind=kind, modelled=raw.psf_modelled)


def _unit(raw: RawBand, options: InputOptions) -> str:
    unit = str(raw.header.get("BUNIT", "")).strip()
    if options.unit is not None and unit and unit != options.unit:
        raise InputError(f"unit mismatch: BUNIT is {unit} but input.unit says {options.unit}; correct one of them.")
    unit = options.unit if options.unit is not None else unit
    _check_unit(unit)
    return unit


def _saturated(raw: RawBand, unit: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Flagged pixels, those at SATURATE or above, and a flat top, 5 pixels or more that share a bright largest value; notes."""
    saturated = np.zeros(raw.image.shape, dtype=bool) if raw.saturated is None else raw.saturated.copy()
    level, notes = raw.header.get("SATURATE"), ()
    if isinstance(level, (int, float)) and level > 0:
        above = raw.image >= level
        saturated |= above
        if above.any() and unit and unit.lower().rstrip("s") not in _COUNTS:
            notes = (
                f"{np.count_nonzero(above)} pixels are above SATURATE = {level:g}, taken to be in {unit}; remove the card if it "
                "is in counts of the detector",
            )
    finite = np.isfinite(raw.image)
    if finite.any():
        top, middle = raw.image[finite].max(), np.median(raw.image[finite])
        spread = _MAD_TO_SIGMA * np.median(np.abs(raw.image[finite] - middle))
        plateau = finite & (raw.image == top)
        if plateau.sum() >= _PLATEAU and spread > 0 and top - middle > 20 * spread:
            saturated |= plateau
    return saturated, notes


def _variance(raw: RawBand, good: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    if raw.variance is not None:
        if raw.variance.shape != raw.image.shape:
            raise InputError(f"the variance is {raw.variance.shape} but the image {raw.image.shape}; give one value a pixel.")
        return raw.variance, ()
    if np.unique(raw.image[good][:1000]).size < 2:
        return np.ones(raw.image.shape), ()  # a constant or empty image, refused by `_check_pixels` with the right reason
    _, sigma = sky_statistics(raw.image[good])
    if not sigma > 0:
        raise InputError("no variance, and no noise can be seen in the sky; give input.variance or input.noise_std.")
    return np.full(raw.image.shape, sigma**2), (
        f"no variance in the file: noise estimated from the sky, std {sigma:.4g} a pixel",
    )


def _check_pixels(raw: RawBand, good: np.ndarray) -> None:
    share = 1 - good.mean()
    if share > MOST_BAD:
        finite = np.isfinite(raw.image).mean()
        raise InputError(
            f"{share:.0%} of the pixels are bad ({1 - finite:.0%} not finite); more than half must be good: check DQ, VAR "
            "and WHT."
        )
    values = raw.image[good]
    if values.max() == values.min():
        raise InputError(f"the image is constant (all good pixels are {values.max():.5g}); it holds no measurement.")


def _sky_note(raw: RawBand, good: np.ndarray) -> tuple[str, ...]:
    level, sigma = sky_statistics(raw.image[good])
    return (f"sky level {level:.4g} ({level / sigma:+.2f} σ of a pixel), not subtracted",) if sigma > 0 else ()


def _zero_note(raw: RawBand, good: np.ndarray) -> tuple[str, ...]:
    """Pixels that are exactly 0 in an image that is not of whole numbers were rarely measured."""
    values = raw.image[good]
    zeros = int(np.count_nonzero(values == 0))
    if zeros < max(_PLATEAU, _MANY * values.size) or bool((values == np.round(values)).all()):
        return ()
    return (
        f"{zeros} pixels are exactly 0 and are read as data; if nothing was measured there, flag them in DQ or make them NaN",
    )


def edge_light(image: np.ndarray, variance: np.ndarray, good: np.ndarray) -> float:
    """Mean of the outermost good pixels in units of the mean of all, or 0 where it is not clear: below 5 σ, or below a tenth.

    Bad pixels that reach the edge are outside. What is outside shines into the image then, and cannot be left out of the model.
    Arguments: (H, W) each.
    """
    inside = np.pad(good, 1)
    outside = binary_propagation(np.pad(np.zeros_like(good), 1, constant_values=True), mask=~inside)
    edge = (binary_dilation(outside, np.ones((3, 3))) & inside)[1:-1, 1:-1]
    total = float(image[good].mean())
    if not edge.any() or not total > 0:
        return 0.0
    mean, error = float(image[edge].mean()), float(np.sqrt(variance[edge].sum()) / np.count_nonzero(edge))
    return mean / total if mean >= _CLEAR * error and mean >= _SHARE * total else 0.0


def _edge_note(raw: RawBand, variance: np.ndarray, good: np.ndarray) -> tuple[str, ...]:
    share = edge_light(raw.image, variance, good)
    return (f"light reaches the edge of the image, {share:.0%} of its mean: fluxes are of what is inside",) if share else ()


def _pixel_note(good: np.ndarray, saturated: np.ndarray) -> tuple[str, ...]:
    notes = () if good.all() else (f"{np.count_nonzero(~good)} bad pixels ({1 - good.mean():.2%}) have no weight",)
    return (*notes, f"{np.count_nonzero(saturated)} saturated pixels") if saturated.any() else notes


def _check_unit(unit: str) -> None:
    """Only flux per pixel scales with the area of a pixel; a unit that names an angle or a beam is per solid angle."""
    if _SOLID_ANGLE.search(unit.lower()):
        raise InputError(
            f"the unit {unit} is a surface brightness, not flux per pixel; multiply the image by the pixel area (JWST: PIXAR_SR) "
            "and the variance by its square, and set BUNIT."
        )


def _zeropoint(card: object, options: InputOptions) -> float | None:
    if card is not None and not isinstance(card, (int, float)):
        raise InputError(f"ZEROPNT is {card!r}; it must be the magnitude of one unit, a number.")
    if None not in (card, options.zeropoint) and abs(card - options.zeropoint) > _SAME_MAGNITUDE:
        raise InputError(
            f"zero point mismatch: ZEROPNT is {card:g} but input.zeropoint says {options.zeropoint:g}; correct one of them."
        )
    known = card if card is not None else options.zeropoint
    return None if known is None else float(known)


def _correlation(stamp: np.ndarray | None) -> np.ndarray | None:
    if stamp is None:
        return None
    peak = stamp[stamp.shape[0] // 2, stamp.shape[1] // 2]
    if not np.isfinite(stamp).all() or any(n % 2 == 0 for n in stamp.shape) or not peak > 0 or peak < np.abs(stamp).max():
        raise InputError("NOISECOR must be a finite correlation function with odd sides and its peak at the centre.")
    return stamp / peak


def _check_agreement(bands: Sequence[Band]) -> None:
    """Units are one for all; exposures of a band share their zero point."""
    first = bands[0]
    for band in bands[1:]:
        if band.unit != first.unit:
            raise InputError(
                f"unit mismatch: band {first.name} is in {first.unit or 'no unit'} but band {band.name} in "
                f"{band.unit or 'no unit'}; bring them to one unit."
            )
        twin = next(b for b in bands if b.name == band.name)
        if band.zeropoint != twin.zeropoint:
            raise InputError(
                f"zero point mismatch: exposures of band {band.name} have {twin.zeropoint} and {band.zeropoint}; "
                "bring them to one zero point."
            )


def sky_statistics(values: np.ndarray) -> tuple[float, float]:
    """Level and standard deviation of the sky under sources.

    Sources only add light, so that the pixels below the mode are sky: σ = 1.4826 median(mode − v | v < mode). The mode is that of
    the values within 3σ of the last one, 2.5 median − 1.5 mean (Pearson's relation), iterated to rest.

    Arguments: values: pixels in any order, finite.
    Returns: (level, standard deviation), in the unit of the values.
    References: *SExtractor: software for source extraction*, Bertin & Arnouts, 1996, A&AS 117, 393 (the mode).
    """
    mode = float(np.median(values))
    sigma = _lower_spread(values, mode)
    for _ in range(50):
        kept = values[np.abs(values - mode) < 3 * sigma]
        if kept.size < 8:
            break
        previous = mode
        mode = float(min(2.5 * np.median(kept) - 1.5 * kept.mean(), np.median(kept)))
        sigma = _lower_spread(values, mode)
        if abs(mode - previous) < 1e-3 * sigma:
            break
    return mode, sigma


def _lower_spread(values: np.ndarray, mode: float) -> float:
    below = mode - values[values < mode]
    return _MAD_TO_SIGMA * float(np.median(below)) if below.size else 0.0
