"""PSFs that change over an image, at the place of an object: PSFEx polynomials, and grids as STDPSF and stpsf write them.

PSFEx: a table PSF_DATA whose PSF_MASK holds one stamp a term, P(x, y) = Σ_{j ≤ d} Σ_{i ≤ d − j} P_ij u^i v^j with
u = (x − POLZERO1)/POLSCAL1 and v the same of y.
Grids: a cube of stamps with their places in the header, between them bilinear; beyond the outermost, these.
Stamps are of the effective PSF, OVERSAMP stamp pixels a pixel of the image. Places are FITS pixels of the image that the model
was made of: the middle of the first is (1, 1).

References: Bertin, *Automated morphometry with SExtractor and PSFEx*, 2011, ASP Conf. 442, 435; Anderson & King 2006, ACS ISR
2006-01 (library PSFs); the cards of both grids as photutils and stpsf read and write them.
"""

from __future__ import annotations

import abc
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from diffinv.core.checks import InputError
from diffinv.data.fits import Cards, FitsFile, Plane, Table
from diffinv.data.layouts import header_band

_BEYOND = 0.1  # of the range that the model knows
_LIBRARY_OVERSAMPLE, _NO_PLACE = 4.0, 9999.0  # of every STDPSF
_NUMBER = r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*"
_PLACE = re.compile(rf"^\({_NUMBER},{_NUMBER}\)$")


class PsfModel(abc.ABC):
    """A PSF for every place.

    oversample: stamp pixels an image pixel. span: the range of x and of y that it knows, ((x₀, x₁), (y₀, y₁)), or None if it is
    the same everywhere; x₀ = x₁ if it does not change along x. band: that its file names, or None. pixel_scale: of the image,
    arcsec, or None if its file does not say it.
    """

    oversample: float
    band: str | None
    pixel_scale: float | None
    span: tuple[tuple[float, float], tuple[float, float]] | None

    @abc.abstractmethod
    def _stamp(self, x: float, y: float) -> np.ndarray:
        """(S, T) at a place."""

    @property
    def seam(self) -> bool:
        """Whether it is of several detectors, whose images do not say by their own pixels where they lie."""
        return False

    def at(self, x: float, y: float) -> np.ndarray:
        """The stamp (S, T) at a place, of the model's own normalisation.

        Raises: InputError for a place that is more than a tenth of its range outside of it.
        """
        for name, place, (low, high) in zip("xy", (x, y), self.span or ()):
            slack = _BEYOND * (high - low)
            if low < high and not low - slack <= place <= high + slack:
                raise InputError(
                    f"the PSF model knows {name} from {low:g} to {high:g}, not {place:g}; check input.psf_position, and that the "
                    "model is of this image."
                )
        return self._stamp(x, y)


@dataclass(frozen=True, eq=False)
class PolynomialPsf(PsfModel):
    """PSFEx. terms: (T, S, S'), in the order of the sum above. zero, scale: of (x, y). degree: d."""

    terms: np.ndarray
    zero: tuple[float, float]
    scale: tuple[float, float]
    degree: int
    oversample: float
    band: str | None = None
    pixel_scale: float | None = None

    @property
    def span(self) -> tuple[tuple[float, float], tuple[float, float]] | None:
        if self.degree == 0:
            return None
        (x, y), (wide, high) = self.zero, self.scale
        return (x - wide / 2, x + wide / 2), (y - high / 2, y + high / 2)

    def _stamp(self, x: float, y: float) -> np.ndarray:
        u, v = ((p - z) / s for p, z, s in zip((x, y), self.zero, self.scale, strict=True))
        powers = [u**i * v**j for j in range(self.degree + 1) for i in range(self.degree + 1 - j)]
        return np.tensordot(powers, self.terms, 1)


@dataclass(frozen=True, eq=False)
class GridPsf(PsfModel):
    """Stamps (N, M, S, S') at the rows y (N,) and columns x (M,) of a grid, both rising; a place that stands there twice is the
    seam of two detectors, on either side of which the PSF is another."""

    stamps: np.ndarray
    x: np.ndarray
    y: np.ndarray
    oversample: float
    band: str | None = None
    pixel_scale: float | None = None

    @property
    def span(self) -> tuple[tuple[float, float], tuple[float, float]] | None:
        if self.stamps.shape[:2] == (1, 1):
            return None
        return (float(self.x[0]), float(self.x[-1])), (float(self.y[0]), float(self.y[-1]))

    @property
    def seam(self) -> bool:
        return any((np.diff(places) == 0).any() for places in (self.x, self.y))

    def _stamp(self, x: float, y: float) -> np.ndarray:
        (row, low), (column, left) = _between(self.y, y), _between(self.x, x)
        weights = np.outer([low, 1 - low], [left, 1 - left])
        rows, columns = np.minimum([row, row + 1], len(self.y) - 1), np.minimum([column, column + 1], len(self.x) - 1)
        return np.tensordot(weights, self.stamps[np.ix_(rows, columns)], 2)


def _between(places: np.ndarray, place: float) -> tuple[int, float]:
    """The last grid place before `place`, and its weight."""
    place = float(np.clip(place, places[0], places[-1]))
    before = int(np.clip(np.searchsorted(places, place, "right") - 1, 0, max(len(places) - 2, 0)))
    if len(places) == 1:
        return 0, 1.0
    return before, float((places[before + 1] - place) / (places[before + 1] - places[before]))


def models_of(file: FitsFile) -> list[PsfModel]:
    """The PSF models of a file, in its order; none if it holds no model but plain stamps.

    Raises: InputError for a model that cannot be read, or depends on more than the place.
    """
    found: list[PsfModel] = [
        replace(_psfex(table), band=header_band(table.header, 0, 1))
        for table in file.tables
        if table.name == "PSF_DATA" and "PSF_MASK" in table.columns
    ]
    for plane in file.planes:
        if plane.data is not None and "NXPSFS" in plane.header:
            found.append(replace(_library(plane), band=header_band(plane.header, 0, 1)))
        elif plane.data is not None and "DET_YX0" in plane.header:
            found.append(replace(_simulated(plane), band=header_band(plane.header, 0, 1)))
    return found


def _number(cards: Cards, name: str, default: float | None = None) -> float:
    value = cards.get(name, default)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not np.isfinite(value):
        raise InputError(f"PSF model: {name} is {value!r}; it must be a number.")
    return float(value)


def _psfex(table: Table) -> PolynomialPsf:
    cards = table.header
    try:
        terms = np.asarray(table.columns["PSF_MASK"], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError("PSFEx model: PSF_MASK does not hold numbers of one shape; the file is damaged.") from error
    terms = terms[0] if len(terms) == 1 else terms
    terms = terms[None] if terms.ndim == 2 else terms
    axes = int(_number(cards, "POLNAXIS", 0))
    names = [str(cards.get(f"POLNAME{k}", "")).strip().upper() for k in range(1, axes + 1)]
    if terms.ndim != 3 or names not in ([], *_pairs(names)):
        raise InputError(
            f"PSFEx model: depends on {', '.join(names) or 'nothing'} with terms of shape {terms.shape}; give one that is "
            "constant, or depends on x and y of the image."
        )
    groups = {int(_number(cards, f"POLGRP{k}", 1)) for k in range(1, axes + 1)}
    if len(groups) > 1:
        raise InputError("PSFEx model: x and y are in polynomials of their own; fit one in both (PSFVAR_GROUPS 1,1).")
    degree = int(_number(cards, "POLDEG1")) if axes else 0
    if degree < 0 or len(terms) != (degree + 1) * (degree + 2) // 2:
        raise InputError(f"PSFEx model: {len(terms)} terms do not make a polynomial of degree {degree}; the file is damaged.")
    zero, scale = ([_number(cards, f"{key}{k}", d) for k in (1, 2)] for key, d in (("POLZERO", 0.0), ("POLSCAL", 1.0)))
    step = _number(cards, "PSF_SAMP", 1.0)
    if not (step > 0 and min(scale) > 0):
        raise InputError(f"PSFEx model: PSF_SAMP = {step:g} and POLSCAL = {scale} must be > 0; the file is damaged.")
    return PolynomialPsf(terms, (zero[0], zero[1]), (scale[0], scale[1]), degree, 1 / step)


def _pairs(names: Sequence[str]) -> list[list[str]]:
    """`names` if they are x and y of the image by any of SExtractor's measures."""
    place = len(names) == 2 and all(re.fullmatch(rf"{axis}\w*_IMAGE", n) for axis, n in zip("XY", names, strict=True))
    return [list(names)] if place else []


def _library(plane: Plane) -> GridPsf:
    """STDPSF: the places stand in IPSFX01, … and JPSFY01, …, or as lists in IPSFXA5, IPSFXB5, … and JPSFYA5, …."""
    columns, rows = (int(_number(plane.header, key)) for key in ("NXPSFS", "NYPSFS"))
    x, y = _listed(plane.header, "IPSFX", columns), _listed(plane.header, "JPSFY", rows)
    stamps = np.asarray(plane.data, dtype=np.float64)
    stamps = stamps[None] if stamps.ndim == 2 else stamps
    if stamps.ndim != 3 or len(stamps) != columns * rows or not (_rises(x) and _rises(y)):
        raise InputError(_no_grid(columns * rows, columns, rows, plane))
    clean = np.array([_without_dividers(stamp) for stamp in stamps])
    return GridPsf(clean.reshape(rows, columns, *stamps.shape[1:]), x, y, _LIBRARY_OVERSAMPLE)


def _without_dividers(stamp: np.ndarray) -> np.ndarray:
    """Without the lines of one negative number that divide detectors in some libraries, along the border of a stamp."""
    stamp = stamp.copy()
    for line in (stamp[0], stamp[-1], stamp[:, 0], stamp[:, -1]):
        if (line <= 0).all() and np.median(line) < 0 and len(set(line[line < 0])) == 1:
            line[:] = 0
    return stamp


def _rises(places: np.ndarray) -> bool:
    """Whether places rise, apart from those within that stand there twice."""
    steps = np.diff(places)
    seams = steps == 0
    return bool((steps >= 0).all() and not seams[:1].any() and not seams[-1:].any() and not (seams[1:] & seams[:-1]).any())


def _no_grid(number: int, columns: int, rows: int, plane: Plane) -> str:
    return (
        f"PSF grid: {number} places with {columns} x and {rows} y do not make a grid of the data {plane.data.shape}; "
        "give one detector a file."
    )


def _listed(cards: Mapping[str, object], key: str, count: int) -> np.ndarray:
    """(count,) places; the cards of some libraries go on with 9999."""
    lists = [cards[name] for name in sorted(cards) if re.fullmatch(rf"{key}(\d\d|[A-Z]\d)", name)]
    try:
        found = [float(number) for text in lists for number in str(text).split()]
    except ValueError:
        found = []
    while len(found) > count and found[-1] == _NO_PLACE:
        found.pop()
    if len(found) != count:
        raise InputError(f"PSF grid: the cards {key}… hold {len(found)} places for {count}; the file is damaged.")
    return np.array(found)


def _simulated(plane: Plane) -> GridPsf:
    """stpsf: DET_YX0, DET_YX1, … = "(y, x)" from 0, in any order, and OVERSAMP; FOV″ are FOVPIXEL pixels."""
    places = []
    for k in range(1 if plane.data.ndim == 2 else len(plane.data)):
        found = _PLACE.match(str(plane.header.get(f"DET_YX{k}", "")).strip())
        if not found:
            raise InputError(f"PSF grid: DET_YX{k} is {plane.header.get(f'DET_YX{k}')!r}; it must be a place, (y, x).")
        places.append((float(found[2]) + 1, float(found[1]) + 1))
    oversample = _number(plane.header, "OVERSAMP")
    scale = None
    if {"FOV", "FOVPIXEL"} <= plane.header.keys():
        scale = _number(plane.header, "FOV") / max(_number(plane.header, "FOVPIXEL"), 1)
    stamps = np.asarray(plane.data, dtype=np.float64)
    stamps = stamps[None] if stamps.ndim == 2 else stamps
    x, y = (np.array(sorted(set(values))) for values in zip(*places, strict=True))
    number = {place: k for k, place in enumerate(places)}
    if stamps.ndim != 3 or not len(stamps) == len(places) == len(number) == len(x) * len(y) or not oversample > 0:
        raise InputError(_no_grid(len(places), len(x), len(y), plane))
    order = np.array([[number[a, b] for a in x] for b in y])
    return GridPsf(stamps[order], x, y, oversample, pixel_scale=scale)
