"""Images in the rows of an HDF5 file, as the MultimodalUniverse has them.

    object_id (N), image_array (N, C, H, W), image_band (N, C), image_scale (N, C) arcsec a pixel;
    optional image_ivar (N, C, H, W), image_mask (N, [C,] H, W) True where good, image_psf_fwhm (N, C) arcsec.

There are no stamps of PSFs: one is a Gaussian of `image_psf_fwhm`, which the product says, unless `input.psf` gives better.
A row is read alone. Invariant: its hash is that of the values read.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from diffinv.core.checks import InputError
from diffinv.data.catalog import Row
from diffinv.data.fits import FitsFile, Plane
from diffinv.data.layouts import InputOptions
from diffinv.data.psf import gaussian_stamp
from diffinv.data.rows import Column, Rows, open_arrays

_IMAGES, _OTHERS = "image_array", ("image_band", "image_scale", "image_ivar", "image_mask", "image_psf_fwhm")
_PSF_FWHMS = 3  # half the side of a stamp, in FWHM


def row_names(path: Path, names: Sequence[str]) -> list[str]:
    """The objects' names, from the first column whose name in lower case is one of `names`; rows are counted without one.

    Raises: InputError if the file holds no images by row.
    """
    file = open_arrays(path)
    images = file.column(_IMAGES)
    if len(images.shape) != 4:
        raise InputError(f"{path}: {_IMAGES} is {images.shape}; expected (objects, bands, height, width).")
    column = next((c for name, c in file.columns.items() if name.lower() in names), None)
    if column is None:
        return [f"{path.stem}-{number}" for number in range(images.shape[0])]
    return [_text(value) for value in np.asarray(column.read(None)).ravel()[: images.shape[0]]]


def read_row(path: Path, row: Row, options: InputOptions) -> FitsFile:
    """The bands of one row, as SCI, VAR, DQ and PSF planes of EXTVER 1, 2, …

    Raises: InputError if its arrays do not fit together.
    """
    file = open_arrays(path)
    images = file.column(_IMAGES)
    if math.prod(images.shape[1:]) > options.max_pixels:
        raise InputError(f"{path}: {images.shape[1:]} pixels an object, over max_pixels = {options.max_pixels}.")
    values = {_IMAGES: _one(file, _IMAGES, images, row.number)}
    values |= {n: _one(file, n, file.columns[n], row.number) for n in _OTHERS if n in file.columns}
    digest = hashlib.sha256(f"{row.number}".encode())
    for name, value in values.items():
        digest.update(f"{name}{value.dtype.str}{value.shape}".encode() + np.ascontiguousarray(value).tobytes())
    planes = [Plane("PRIMARY", None, {}, history=())]
    for number in range(values[_IMAGES].shape[0]):
        planes += _band(path, values, number, options)
    return FitsFile(path, digest.hexdigest(), tuple(planes), (), _notes(values, options))


def _one(file: Rows, name: str, column: Column, number: int) -> np.ndarray:
    if number >= column.shape[0]:
        raise InputError(f"{file.path}: {name} has {column.shape[0]} rows; expected more than {number}.")
    if name == "image_band":
        values = np.asarray(column.read(np.array([number])))[0].ravel()
        return np.array([_text(value) for value in values])
    return file.read(name, np.array([number]))[0]


def _band(path: Path, values: dict[str, np.ndarray], number: int, options: InputOptions) -> list[Plane]:
    image, cards = values[_IMAGES][number], {}
    if "image_band" in values:
        cards["BAND"] = str(_of(path, values, "image_band", number))
    if "image_scale" in values:
        cards["PIXSCALE"] = float(_of(path, values, "image_scale", number))
    planes = [Plane("SCI", image, cards, number + 1)]
    if "image_ivar" in values:
        weight = np.asarray(_of(path, values, "image_ivar", number), np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            planes.append(Plane("VAR", np.where(weight > 0, 1 / weight, 0.0), {}, number + 1))
    if "image_mask" in values:
        mask = values["image_mask"]
        good = _of(path, values, "image_mask", number) if mask.ndim == 3 else mask
        planes.append(Plane("DQ", (np.asarray(good) == 0).astype(np.int32), {}, number + 1))
    if "image_psf_fwhm" in values and options.psf is None:
        planes.append(_psf(path, values, number, cards.get("PIXSCALE", options.pixel_scale)))
    return planes


def _of(path: Path, values: dict[str, np.ndarray], name: str, number: int) -> np.ndarray:
    """What an array says of a band."""
    found = np.atleast_1d(values[name])
    if number >= len(found):
        raise InputError(f"{path}: {name} has {len(found)} bands; {_IMAGES} has {values[_IMAGES].shape[0]}.")
    return found[number]


def _psf(path: Path, values: dict[str, np.ndarray], number: int, scale: float | None) -> Plane:
    fwhm = float(_of(path, values, "image_psf_fwhm", number))
    if scale is None or not (fwhm > 0 and math.isfinite(fwhm) and scale > 0):
        raise InputError(f"{path}: image_psf_fwhm is {fwhm:g} and the pixel scale {scale}; both must be > 0 arcsec.")
    pixels = fwhm / scale
    return Plane("PSF", gaussian_stamp(pixels, 2 * math.ceil(_PSF_FWHMS * pixels) + 1), {"PSFNORM": 1.0}, number + 1)


def _notes(values: dict[str, np.ndarray], options: InputOptions) -> tuple[str, ...]:
    if "image_psf_fwhm" not in values or options.psf is not None:
        return ()
    fwhms = ", ".join(f"{fwhm:.3g}" for fwhm in np.atleast_1d(values["image_psf_fwhm"]))
    return (f"PSF: Gaussian of image_psf_fwhm = {fwhms} arcsec; the file has no stamp",)


def _text(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
