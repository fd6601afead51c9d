"""Cubes of spectra, from whatever instrument, as one record.

Read are IFU cubes (DATA and STAT of MUSE, SCI with VAR or ERR, an image of three axes), count cubes that `encode_cube` wrote, and
remote-sensing scenes as MATLAB or NumPy arrays. The spectral axis becomes bounds of channels that grow along axis 0: a
wavelength in Angstrom, an energy in keV, or the number of the band where the file does not say.
Bad values (NaN, inf, flagged, of variance ≤ 0 or not finite) are masked and hold 0; a cube keeps which they are.
Invariant: data, variance and mask have one shape (K, H, W), and a masked value has no say.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from scipy import io as scipy_io

from diffinv.core.checks import InputError
from diffinv.data.fits import Cards, FitsFile, Plane, Table, celestial_cards, encode_fits, read_fits
from diffinv.data.guard import readable
from diffinv.data.ogip import check_counts
from diffinv.spectral.base import BAND, Grid

_SPECTRAL_CARD = re.compile(r"WCSAXES|(CTYPE|CUNIT|CRPIX|CRVAL|CDELT|CROTA)3|(PC|CD)(3_\d|\d_3)")
_UNITS = {"angstrom": (1.0, "Angstrom"), "nm": (10.0, "Angstrom"), "um": (1e4, "Angstrom"), "micron": (1e4, "Angstrom")}
_UNITS |= {"m": (1e10, "Angstrom"), "kev": (1.0, "keV"), "ev": (1e-3, "keV"), "mev": (1e3, "keV"), "": (1.0, BAND)}


@dataclass(frozen=True, eq=False)
class Cube:
    """Spectra on an image.

    data: (K, H, W) in `bunit`, 0 where masked. variance: its variance, same shape, or None for counts and where unknown.
    mask: True where good. low, high: bounds of the channels in `unit` (keV, Angstrom or band), (K,).
    axis: CTYPE of the spectral axis ("AWAV" is in air, "WAVE" in vacuum), "" if unknown. wcs: celestial cards, or empty.
    exposure: s of a count cube, else None.
    Raises: InputError if shapes differ, or channels do not grow.
    """

    data: np.ndarray
    variance: np.ndarray | None
    mask: np.ndarray
    low: np.ndarray
    high: np.ndarray
    unit: str
    bunit: str = ""
    axis: str = ""
    wcs: Cards = field(default_factory=dict)
    exposure: float | None = None

    def __post_init__(self) -> None:
        shapes = [self.mask.shape, *([] if self.variance is None else [self.variance.shape])]
        if self.data.ndim != 3 or any(s != self.data.shape for s in shapes) or self.low.shape != self.data.shape[:1]:
            raise InputError(
                f"a cube needs data (K, H, W), variance and mask of its shape and K channels; got data {self.data.shape}, "
                f"variance and mask {shapes}, channels {self.low.shape}."
            )
        if not self.data.size:
            raise InputError(f"a cube of {self.data.shape} channels, rows and columns holds nothing; give one that does.")
        if not (self.high > self.low).all() or not (np.diff(self.low) > 0).all():
            raise InputError("the channels of a cube must grow along its first axis; reverse the cube.")

    @property
    def centre(self) -> np.ndarray:
        """Middle of each channel, (K,)."""
        return 0.5 * (self.low + self.high)

    @property
    def empty(self) -> np.ndarray:
        """(H, W), True for a pixel without any good value."""
        return ~self.mask.any(0)

    def grid(self) -> Grid:
        """The channels as a grid of bins.

        Raises: InputError if there are gaps between the channels.
        """
        gaps = np.flatnonzero(np.abs(self.low[1:] - self.high[:-1]) > 1e-6 * self.high[:-1])
        if len(gaps):
            raise InputError(f"the cube's channels are no grid: there is a gap after channel {gaps[0]}.")
        return Grid(torch.from_numpy(np.append(self.low, self.high[-1])), self.unit)

    def counts(self) -> np.ndarray:
        """The data as whole counts, for a Poisson likelihood.

        Raises: InputError if a good value is negative or fractional.
        """
        other = "a cube with a variance, or cube.noise_std"
        return check_counts(f"cube ({self.bunit or 'no unit'})", self.data, other=other)


def read_cube(path: str | Path, file: FitsFile | None = None) -> Cube:
    """A FITS cube. Arguments: path. file: what it holds, if it has been read.

    Raises: InputError if there is no image of three axes, its variance is of another shape, or its axes cannot be read.
    """
    with readable(path, "a cube"):
        file = read_fits(path) if file is None else file
        plane = _science(file)
        header = plane.header
        low, high, unit, axis = _channels(header, len(plane.data))
        wcs = celestial_cards({k: v for k, v in header.items() if not _SPECTRAL_CARD.fullmatch(k)}) or {}
        bounds = next((t for t in file.tables if t.name == "EBOUNDS"), None)
        if bounds is not None:
            low, high, unit, axis = bounds.columns["E_MIN"], bounds.columns["E_MAX"], str(bounds.header["AXISUNIT"]), ""
        variance, bad = _variance(file, plane.data.shape), _flags(file, plane.data.shape)
        if low[0] > low[-1]:
            low, high = low[::-1], high[::-1]
            data, variance, bad = plane.data[::-1], None if variance is None else variance[::-1], bad[::-1]
        else:
            data = plane.data
        exposure = header.get("EXPOSURE") if bounds is not None else None
        return masked_cube(data, variance, ~bad, low, high, unit, bunit=str(header.get("BUNIT", "")).strip(), axis=axis, wcs=wcs,
                           exposure=exposure)  # fmt: skip


def masked_cube(
    data: np.ndarray,
    variance: np.ndarray | None,
    mask: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    unit: str,
    **record: object,
) -> Cube:
    """A cube whose values that are not finite, or whose variance is not, are masked too; arguments as of `Cube`."""
    good = mask & np.isfinite(data)
    if variance is not None:
        good &= np.isfinite(variance) & (variance > 0)
        variance = np.where(good, variance, 0.0)
    return Cube(np.where(good, data, 0.0), variance, good, low, high, unit, **record)


def encode_cube(cube: Cube) -> bytes:
    """A cube as FITS: DATA, STAT (if there is a variance), DQ, and the bounds of the channels in EBOUNDS."""
    cards = {**cube.wcs, "BUNIT": cube.bunit} | ({} if cube.exposure is None else {"EXPOSURE": cube.exposure})
    parts: list[Plane | Table] = [Plane("PRIMARY", None, {}), Plane("DATA", cube.data, cards)]
    if cube.variance is not None:
        parts.append(Plane("STAT", cube.variance, dict(cube.wcs)))
    parts.append(Plane("DQ", (~cube.mask).astype(np.uint8), dict(cube.wcs)))
    columns = {"CHANNEL": np.arange(len(cube.low), dtype=np.int32), "E_MIN": cube.low, "E_MAX": cube.high}
    return encode_fits([*parts, Table("EBOUNDS", columns, {"AXISUNIT": cube.unit})])


def read_array_cube(path: str | Path, name: str | None = None, *, bands_axis: int = -1) -> Cube:
    """A scene from a .mat or .npz file.

    Arguments: path. name: of the array; None takes the only one of three axes. bands_axis: the array's axis of bands.
    Raises: InputError if the file cannot be read, or does not hold one such array.
    """
    path = Path(path)
    arrays = _arrays(path)
    fitting = [n for n, a in arrays.items() if a.ndim == 3 and a.dtype.kind in "fiu"]
    if name is None and len(fitting) == 1:
        name = fitting[0]
    if name not in fitting:
        known = ", ".join(f"{n} {a.shape}" for n, a in arrays.items()) or "none"
        raise InputError(f"{path}: needs the name of an array of three axes; its arrays are: {known}.")
    data = np.moveaxis(arrays[name], bands_axis, 0).astype(np.float64)
    return masked_cube(data, None, np.ones(data.shape, bool), *_numbered(len(data)), BAND)


def _arrays(path: Path) -> Mapping[str, np.ndarray]:
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        return {n: a for n, a in scipy_io.loadmat(path).items() if not n.startswith("__") and isinstance(a, np.ndarray)}
    except (OSError, ValueError, NotImplementedError, KeyError, TypeError, zipfile.BadZipFile) as error:
        cause = " ".join(str(error).split())[:160]
        raise InputError(f"{path}: cannot be read as {path.suffix or 'a MATLAB file'} ({cause}); write it again.") from error


def _science(file: FitsFile) -> Plane:
    for name in ("DATA", "SCI"):
        for plane in file.named(name):
            if plane.data.ndim == 3:
                return plane
    found = [p for p in file.planes if p.data is not None and p.data.ndim == 3]
    if len(found) != 1:
        shapes = ", ".join(f"{p.name or 'primary'} {p.data.shape}" for p in file.planes if p.data is not None) or "no image"
        raise InputError(f"{file.path}: needs one image of three axes, or DATA or SCI; it has {shapes}.")
    return found[0]


def _variance(file: FitsFile, shape: tuple[int, ...]) -> np.ndarray | None:
    for name, power in (("STAT", 1), ("VAR", 1), ("VARIANCE", 1), ("ERR", 2), ("ERROR", 2)):
        for plane in file.named(name):
            if plane.data.shape != shape:
                raise InputError(f"{file.path}: {name} is {plane.data.shape}, but the data are {shape}; give one value each.")
            return np.asarray(plane.data, np.float64) ** power
    return None


def _flags(file: FitsFile, shape: tuple[int, ...]) -> np.ndarray:
    for plane in file.named("DQ"):
        if plane.data.shape != shape:
            raise InputError(f"{file.path}: DQ is {plane.data.shape}, but the data are {shape}; give one flag each.")
        return plane.data != 0
    return np.zeros(shape, bool)


def _numbered(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of channels that are their numbers, from 1."""
    number = np.arange(1.0, count + 1)
    return number - 0.5, number + 0.5


def _channels(header: Cards, count: int) -> tuple[np.ndarray, np.ndarray, str, str]:
    """Bounds of the channels from the WCS of axis 3, their unit, and CTYPE3."""
    axis = str(header.get("CTYPE3", "")).strip().upper()
    text = str(header.get("CUNIT3", "")).strip()
    if text.lower() not in _UNITS:
        raise InputError(f"CUNIT3 is {text!r}; expected Angstrom, nm, um, m, keV or eV.")
    scale, unit = _UNITS[text.lower()]
    if unit == BAND:
        return *_numbered(count), BAND, axis
    step = float(header.get("CD3_3", float(header.get("CDELT3", 1.0)) * float(header.get("PC3_3", 1.0))))
    if any(float(header.get(f"{kind}{i}_{j}", 0.0)) for kind in ("CD", "PC") for i, j in ((3, 1), (3, 2), (1, 3), (2, 3))):
        raise InputError("the spectral axis is mixed with the celestial ones (CD3_1, …); resample the cube.")
    if step == 0 or not np.isfinite(step):
        raise InputError(f"the step of the spectral axis is {step}; correct CD3_3 or CDELT3.")
    reference, start = float(header.get("CRPIX3", 0.0)), float(header.get("CRVAL3", 0.0))
    offset = (np.arange(count + 1) + 0.5 - reference) * step
    edges = start * np.exp(offset / start) if axis.endswith("-LOG") else start + offset
    edges = edges * scale
    return np.minimum(edges[:-1], edges[1:]), np.maximum(edges[:-1], edges[1:]), unit, axis
