"""How FITS files are laid out: from HDUs to raw bands, nothing judged yet.

* observation file, HST, JWST: every `SCI`; LSST, HSC: every `IMAGE`;
* anything else: the one image with two or three axes, (y, x) or (band, y, x), in the primary HDU or an extension;
* with `InputOptions.hdu`: the HDU of that number in the file, or all HDUs of that name.
Each comes with its companions, matched by EXTVER and of one shape with it: `VAR`, `VARIANCE` or `ERR`, `DQ` and `MASK` (planes
are the bits named by MP_* cards), `WHT`, `PSF`, `NOISECOR`. Image planes may be cubes. What the file does not say comes from
`InputOptions` (`given`), and what neither says stays None. A weight of 0 is no datum; the others may be times or inverse
variances, which files do not say, and are not used.

DQ: every non-zero value is bad (`InputOptions.dq_bits` selects bits); JWST flags good pixels too, so that there bit 0
(DO_NOT_USE) decides. Mask planes: BAD, SAT, NO_DATA, EDGE, CR and UNMASKEDNAN are bad; DETECTED, INTRP, SUSPECT and the like are
not (`InputOptions.mask_planes` replaces the list).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from diffinv.core.checks import InputError
from diffinv.data.fits import MAX_PIXELS, Cards, FitsFile, Plane

BAD_PLANES = ("BAD", "SAT", "NO_DATA", "EDGE", "CR", "UNMASKEDNAN")
_SATURATION_BITS = {"HST": 256 | 2048, "JWST": 2}
_INTEGERS = ("DQ", "MASK")
_COMPANIONS = ("VAR", "VARIANCE", "ERR", "DQ", "MASK", "WHT", "PSF", "NOISECOR")
_IN_PUPIL = re.compile(r"F\d+[NMW]$")  # of NIRCam and NIRISS: within a broad FILTER, or beside CLEAR
_GRISM = re.compile(r"(GR150[CR]|GRISM\w*|G\d{3}[LM]?)$")  # of NIRISS, NIRCam, and ACS and WFC3
_NO_FILTER = ("", "CLEAR", "CLEAR1L", "CLEAR2L", "CLEAR1S", "CLEAR2S", "N/A")


@dataclass(frozen=True)
class InputOptions:
    """What a configuration says about input files. None: the file itself must say it (or, for the noise, the sky).

    psf: FITS files with a PSF a band, together. variance: one with a plane a band. noise_std: σ of a pixel, one number or one a
    band, in the image's unit.
    psf_oversample, psf_kind, psf_norm: override OVERSAMP, PSFKIND, PSFNORM. psf_position: FITS pixel (x, y) of the image of a PSF
    model at which the object's middle lies. bands: names, in order of the planes.
    mixing: data band → prior band → weight, in flux per frequency, of bands that the prior does not have. unit: BUNIT.
    pixel_scale: arcsec. zeropoint: magnitude of one unit. dq_bits: bits of DQ that mean bad. mask_planes: names of mask planes
    that mean bad. hdu: which HDU holds the image, by number in the file (0: primary, tables count) or by name.
    max_pixels: limit on what is read.
    """

    psf: tuple[Path, ...] | None = None
    psf_oversample: float | None = None
    psf_kind: str | None = None
    psf_norm: float | None = None
    psf_position: tuple[float, float] | None = None
    variance: Path | None = None
    noise_std: float | tuple[float, ...] | None = None
    bands: tuple[str, ...] | None = None
    mixing: Mapping[str, Mapping[str, float]] | None = None
    unit: str | None = None
    pixel_scale: float | None = None
    zeropoint: float | None = None
    dq_bits: int | None = None
    mask_planes: tuple[str, ...] | None = None
    hdu: int | str | None = None
    max_pixels: int = MAX_PIXELS


@dataclass(frozen=True, eq=False)
class RawBand:
    """One band as the file holds it, unchecked.

    name: or None. image: (H, W). header: cards that describe it. variance: (H, W), unit², or None. bad: (H, W) bool or None.
    saturated: (H, W) bool or None. psf: the stamp and its cards, or None; psf_modelled: a model's, whose source is at the middle
    of the stamp; psf_scale: of the pixels that the model is of, arcsec, or None. correlation: of the noise, (2K + 1, 2L + 1),
    or None.
    """

    name: str | None
    image: np.ndarray
    header: Cards
    variance: np.ndarray | None = None
    bad: np.ndarray | None = None
    saturated: np.ndarray | None = None
    psf: np.ndarray | None = None
    psf_header: Cards = field(default_factory=dict)
    psf_modelled: bool = False
    psf_scale: float | None = None
    correlation: np.ndarray | None = None
    notes: tuple[str, ...] = ()


def bands_of(file: FitsFile, options: InputOptions) -> tuple[RawBand, ...]:
    """Every band (or exposure) of a file, as it says itself; of the options, those that say how to read it.

    Raises: InputError if there is no image, or the parts do not fit together.
    """
    return tuple(_bands(file, _image_planes(file, options.hdu), options))


def images_of(file: FitsFile, names: Sequence[str]) -> list[tuple[np.ndarray, Cards, str | None]]:
    """(image, cards, band or None) of the planes called one of `names` in a file, else of its first image or cube.

    Raises: InputError if there is none.
    """
    planes = [p for name in names for p in file.named(name)] or [_first_image(file)]
    found = []
    for plane in planes:
        images, cards = _images(plane), plane.header if len(planes) > 1 else {**file.primary, **plane.header}
        found += [(image, plane.header, header_band(cards, k, len(images))) for k, image in enumerate(images)]
    return found


def _image_planes(file: FitsFile, hdu: int | str | None) -> list[Plane]:
    """The HDUs that hold the measured image: the chosen ones, or all called SCI or IMAGE, or the only image there is."""
    if hdu is not None:
        return _chosen(file, hdu)
    found = {name: planes for name in ("SCI", "IMAGE") if (planes := file.named(name))}
    if len(found) > 1:
        raise InputError("the file has both SCI and IMAGE; say which one to read with input.hdu.")
    if found:
        return next(iter(found.values()))
    first = _first_image(file, skip=_COMPANIONS)
    twins = [p for p in file.planes if p.data is not None and p.name not in _COMPANIONS and p.data.shape == first.data.shape]
    if len(twins) > 1:
        raise InputError(f"HDUs {_listed(twins)} hold images of one shape; choose with input.hdu, or call exposures SCI.")
    return [first]


def _bands(file: FitsFile, planes: Sequence[Plane], options: InputOptions) -> list[RawBand]:
    """The bands of the image planes, each with the companions of its EXTVER."""
    parts = {name: _matched(file, planes, name, options) for name in _COMPANIONS}
    bands: list[RawBand] = []
    for number, plane in enumerate(planes):
        own = {name: found[number] for name, found in parts.items()}
        header = {**file.primary, **plane.header}
        _check_direct(header)
        images, stamps = _images(plane), _images(own["PSF"]) if own["PSF"] else []
        variance = _alike(own["VAR"] or own["VARIANCE"], plane) or [_square(e) for e in _alike(own["ERR"], plane)]
        bad, saturated, notes = _flags(own["DQ"], own["MASK"], plane, header, options)
        bad, notes = _without_weight(own["WHT"], plane, bad, notes)
        if stamps and len(stamps) != len(images):
            name = f"{plane.name},{plane.extver}"
            raise InputError(f"PSF,{plane.extver} has {len(stamps)} stamps but {name} {len(images)} bands; give one a band.")
        if options.hdu is not None and (used := [f"{n},{plane.extver}" for n, p in own.items() if p]):
            notes += (f"input.hdu: {plane.name},{plane.extver} is read with {', '.join(used)}",)
        for k, image in enumerate(images):
            bands.append(
                RawBand(
                    header_band(header, k, len(images)),
                    image,
                    header,
                    variance=variance[k] if variance else None,
                    bad=bad[k] if bad else None,
                    saturated=saturated[k] if saturated else None,
                    psf=stamps[k] if stamps else None,
                    psf_header=own["PSF"].header if own["PSF"] else {},
                    correlation=_images(own["NOISECOR"])[0] if own["NOISECOR"] else None,
                    notes=notes,
                )
            )
    return bands


def _check_direct(header: Cards) -> None:
    """Raise InputError for an image through a grism: each source is a spectrum there."""
    for key in ("FILTER", "FILTER1", "FILTER2", "PUPIL"):
        value = str(header.get(key, "")).strip().upper()
        if _GRISM.match(value):
            raise InputError(f"{key} is {value}, a grism: sources are spectra there; give a direct image.")


def _flags(
    dq: Plane | None, mask: Plane | None, image: Plane, header: Cards, options: InputOptions
) -> tuple[list[np.ndarray], list[np.ndarray], tuple[str, ...]]:
    """(bad, saturated, notes), an array a band or none at all; DQ and MASK add up where there are both."""
    bad: list[np.ndarray] = []
    saturated: list[np.ndarray] = []
    notes: tuple[str, ...] = ()
    if dq is not None:
        bits, notes = _dq_bits(header, options)
        full = _SATURATION_BITS.get(str(header.get("TELESCOP", "")).strip().upper(), 0)
        flags = [f.astype(np.int64) for f in _alike(dq, image)]
        bad, saturated = [(f & bits) != 0 for f in flags], [(f & full) != 0 for f in flags]
    if mask is not None:
        bits, full, chosen = _mask_bits({**header, **mask.header}, options)
        flags = [f.astype(np.int64) for f in _alike(mask, image)]
        none = [np.zeros(f.shape, dtype=bool) for f in flags]
        bad = [b | ((f & bits) != 0) for b, f in zip(bad or none, flags, strict=True)]
        saturated = [s | ((f & full) != 0) for s, f in zip(saturated or none, flags, strict=True)]
        notes += (f"bad mask planes: {', '.join(chosen)}",)
    return bad, saturated, notes


def _without_weight(
    weight: Plane | None, image: Plane, bad: list[np.ndarray], notes: tuple[str, ...]
) -> tuple[list[np.ndarray], tuple[str, ...]]:
    """(bad, notes), with what no exposure saw: a weight that is not > 0."""
    if weight is None:
        return bad, notes
    unseen = [~(w > 0) for w in _alike(weight, image)]
    count = sum(int(u.sum()) for u in unseen)
    notes += (f"{count} pixels have no weight in WHT",) if count else ()
    return [b | u for b, u in zip(bad or unseen, unseen, strict=True)], notes


def _mask_bits(header: Cards, options: InputOptions) -> tuple[int, int, list[str]]:
    """(bits that are bad, bit of saturation, names of the bad planes) of a MASK."""
    planes = {k[3:]: int(v) for k, v in header.items() if k.startswith("MP_")}
    if not planes:
        raise InputError("MASK has no MP_* cards that name its bits; add them, or call it DQ if all that is not zero is bad.")
    if unknown := set(options.mask_planes or ()) - set(planes):
        raise InputError(f"mask plane {sorted(unknown)[0]} is unknown; the file has {', '.join(sorted(planes))}.")
    chosen = [p for p in (options.mask_planes or BAD_PLANES) if p in planes]
    return sum(1 << planes[p] for p in chosen), 1 << planes["SAT"] if "SAT" in planes else 0, chosen


def _first_image(file: FitsFile, *, skip: Sequence[str] = ()) -> Plane:
    for plane in file.planes:
        if plane.data is not None and plane.name not in skip and plane.data.squeeze().ndim in (2, 3):
            return plane
    raise InputError("no image: no HDU has two or three axes; give a file with SCI, IMAGE or a plain image.")


def _chosen(file: FitsFile, hdu: int | str) -> list[Plane]:
    """By number as in the file (0 is the primary HDU, tables count), or all of a name."""
    with_data = [p for p in file.planes if p.data is not None]
    found = file.named(hdu.upper()) if isinstance(hdu, str) else [p for p in with_data if p.hdu == hdu]
    if not found:
        raise InputError(f"input.hdu = {hdu}: no such image; the file has {_listed(with_data) or 'none'}.")
    return found


def _listed(planes: Sequence[Plane]) -> str:
    return ", ".join(f"{p.hdu} {p.name}" for p in planes)


def _images(plane: Plane) -> list[np.ndarray]:
    """The (y, x) images of a plane or a cube, in float64; flags stay integers."""
    data = plane.data
    while data.ndim > 2 and data.shape[0] == 1:
        data = data[0]
    if data.ndim not in (2, 3):
        raise InputError(f"{plane.name},{plane.extver} has {data.ndim} axes {data.shape}; give (y, x) or (band, y, x).")
    images = list(data) if data.ndim == 3 else [data]
    return images if plane.name in _INTEGERS else [image.astype(np.float64) for image in images]


def _matched(file: FitsFile, images: Sequence[Plane], name: str, options: InputOptions) -> list[Plane | None]:
    """The planes called `name`, one an EXTVER of the images, or all None; those of images that were not chosen may be there."""
    versions = [p.extver for p in images]
    planes = [p for p in file.named(name) if p not in images]
    if not planes:
        return [None] * len(images)
    wanted = [p for p in planes if options.hdu is None or p.extver in versions]
    if sorted(p.extver for p in wanted) != sorted(versions):
        there = sorted(p.extver for p in planes)
        raise InputError(f"{name} has EXTVER {there} but {images[0].name} has {sorted(versions)}; give one a band.")
    found = {p.extver: p for p in wanted}
    return [found[v] for v in versions]


def _alike(plane: Plane | None, image: Plane) -> list[np.ndarray]:
    """The images of `plane`, which must have the shape of `image`; none if there is no plane."""
    if plane is None:
        return []
    if plane.data.squeeze().shape != image.data.squeeze().shape:
        raise InputError(
            f"{plane.name},{plane.extver} is {plane.data.shape} but {image.name} {image.data.shape}; give planes of one shape."
        )
    return _images(plane)


def _square(error: np.ndarray) -> np.ndarray:
    """ERR → VAR; a negative error is no error and stays negative."""
    return np.where(error > 0, error**2, -np.abs(error))


def _dq_bits(header: Cards, options: InputOptions) -> tuple[int, tuple[str, ...]]:
    if options.dq_bits is not None:
        return options.dq_bits, (f"bad DQ bits: {options.dq_bits}",)
    if str(header.get("TELESCOP", "")).strip().upper() == "JWST":
        return 1, ("bad DQ bits: 1 (JWST DO_NOT_USE)",)
    return -1, ()


def header_band(header: Cards, number: int, count: int) -> str | None:
    """BAND, BANDn of a cube (from 1, or from 0 where there is a BAND0), or a filter card; of JWST's two wheels the narrower.

    Raises: InputError if a cube names some of its planes only.
    """
    if count > 1:
        first = 0 if "BAND0" in header else 1
        missing = [k for k in range(first, first + count) if f"BAND{k}" not in header]
        if 0 < len(missing) < count:
            raise InputError(f"BAND{missing[0]} is missing: the header names other planes of the cube; name all {count} or none.")
        value = header.get(f"BAND{number + first}")
        return str(value).strip() if value is not None else None
    pupil = str(header.get("PUPIL", "")).strip().upper()
    if _IN_PUPIL.match(pupil) and str(header.get("BAND", "")).strip().upper() in _NO_FILTER:
        return pupil
    for key in ("BAND", "FILTER", "FILTER1", "FILTER2"):
        value = str(header.get(key, "")).strip()
        if value.upper() not in _NO_FILTER:
            return value
    return None
