"""What a configuration says about images that their files do not: names of bands, noise, PSFs.

PSFs of files of their own belong to bands by the band that they name, where they name one, else by their order.
A PSF model (`psf_models`) is taken at the middle of the image: at `InputOptions.psf_position`, or where the image's cards LTV
and LTM place it in the image that it was cut from, or in the image itself if that is most of what the model knows. LTV of 0 place
nothing: whoever cuts without care leaves them so.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from diffinv.core.checks import InputError
from diffinv.data.fits import Cards, FitsFile, Value, read_fits
from diffinv.data.layouts import InputOptions, RawBand, bands_of, images_of
from diffinv.data.psf_models import PsfModel, models_of


@dataclass(frozen=True, eq=False)
class _Given:
    """A PSF as its file has it: a model, or a stamp and its cards. band: that the file names, or None."""

    path: Path
    band: str | None
    psf: PsfModel | tuple[np.ndarray, Cards]


def read_bands(file: FitsFile, options: InputOptions) -> tuple[RawBand, ...]:
    """Every band (or exposure) of a file, with names, PSFs and variances from the options filled in.

    Raises: InputError if there is no image, or the parts do not fit together.
    """
    bands = _with_names(bands_of(file, options), options)
    return _numbered(_with_psfs(_with_noise(bands, options), options))


def _with_names(bands: tuple[RawBand, ...], options: InputOptions) -> tuple[RawBand, ...]:
    if options.bands is None:
        return bands
    if len(options.bands) != len(bands):
        raise InputError(
            f"input.bands names {len(options.bands)} bands ({', '.join(options.bands)}) but the file has {len(bands)}."
        )
    for given, band in zip(options.bands, bands, strict=True):
        if band.name and band.name != given:
            raise InputError(f"band mismatch: the file says {band.name} but input.bands says {given}; correct one of them.")
    return tuple(replace(b, name=n) for b, n in zip(bands, options.bands, strict=True))


def _numbered(bands: tuple[RawBand, ...]) -> tuple[RawBand, ...]:
    note = ("no band name in the file: bands are numbered from 1",)
    return tuple(b if b.name else replace(b, name=str(k + 1), notes=b.notes + note) for k, b in enumerate(bands))


def _with_noise(bands: tuple[RawBand, ...], options: InputOptions) -> tuple[RawBand, ...]:
    if options.variance is not None and options.noise_std is not None:
        raise InputError("both input.variance and input.noise_std are given; give one.")
    if options.variance is not None:
        planes = _variances(options.variance, options)
        _check_count("variance planes", options.variance, len(planes), len(bands))
        for plane, band in zip(planes, bands, strict=True):
            if plane.shape != band.image.shape:
                raise InputError(f"{options.variance}: the variance is {plane.shape} but the image {band.image.shape}.")
        return tuple(replace(b, variance=v) for b, v in zip(bands, planes, strict=True))
    if options.noise_std is not None:
        given = options.noise_std if isinstance(options.noise_std, tuple) else (options.noise_std,) * len(bands)
        if len(given) != len(bands):
            raise InputError(
                f"input.noise_std has {len(given)} values but the file has {len(bands)} bands; give one, or one a band."
            )
        if not all(np.isfinite(s) and s > 0 for s in given):
            raise InputError(f"input.noise_std must be finite and > 0, got {options.noise_std}.")
        return tuple(replace(b, variance=np.full(b.image.shape, float(s) ** 2)) for b, s in zip(bands, given, strict=True))
    return bands


def _variances(path: Path, options: InputOptions) -> list[np.ndarray]:
    file = read_fits(path, max_pixels=options.max_pixels)
    try:
        return [image for image, _, _ in images_of(file, ("VAR", "VARIANCE"))]
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _with_psfs(bands: tuple[RawBand, ...], options: InputOptions) -> tuple[RawBand, ...]:
    if options.psf is not None:
        found = [given for path in options.psf for given in _psfs_of(path, options)]
        _check_count("PSFs", ", ".join(map(str, options.psf)), len(found), len(bands))
        bands = tuple(_with_psf(band, given, options) for band, given in zip(bands, _in_order(found, bands), strict=True))
    said: dict[str, Value | None] = {"OVERSAMP": options.psf_oversample, "PSFKIND": options.psf_kind, "PSFNORM": options.psf_norm}
    override = {k: v for k, v in said.items() if v is not None}
    return tuple(replace(b, psf_header={**b.psf_header, **override}) for b in bands)


def _psfs_of(path: Path, options: InputOptions) -> list[_Given]:
    """The PSFs of a file: its models if there are any, else its stamps."""
    file = read_fits(path, max_pixels=options.max_pixels)
    try:
        if models := models_of(file):
            return [_Given(path, model.band, model) for model in models]
        return [_Given(path, band, (image, cards)) for image, cards, band in images_of(file, ("PSF",))]
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _in_order(given: Sequence[_Given], bands: Sequence[RawBand]) -> list[_Given]:
    """The PSF of each band: by names if all PSFs have one, else in their order.

    Raises: InputError if a PSF says that it is of another band.
    """
    left, ordered = list(given), []
    by_name = all(g.band for g in given)
    for band in bands:
        fits = [g for g in (left if by_name else left[:1]) if _may_be(g.band, band.name)]
        if not fits:
            raise InputError(
                f"{left[0].path}: the PSF is of band {left[0].band}, not of {band.name}; give the PSF of {band.name}, or correct "
                "BAND or FILTER in its header."
            )
        ordered.append(fits[0])
        left = [g for g in left if g is not fits[0]]
    return ordered


def _may_be(one: str | None, other: str | None) -> bool:
    """Whether two names may be of one band: HSC-I and i, WFC3 F814W and F814W, or one is not known."""
    first, second = (set(re.findall(r"\w+", (name or "").lower().replace("_", " "))) for name in (one, other))
    return first <= second or second <= first


def _with_psf(band: RawBand, given: _Given, options: InputOptions) -> RawBand:
    model = given.psf
    if not isinstance(model, PsfModel):
        return replace(band, psf=model[0], psf_header=model[1])
    try:
        x, y = _place(band, model, options)
        stamp = model.at(x, y)
    except InputError as error:
        raise InputError(f"{given.path}: {error}") from error
    note = f"PSF model taken at pixel ({x:g}, {y:g})" if model.span is not None else "PSF model that is the same everywhere"
    cards = {"OVERSAMP": model.oversample}
    return replace(band, psf=stamp, psf_header=cards, psf_modelled=True, psf_scale=model.pixel_scale, notes=(*band.notes, note))


def _place(band: RawBand, model: PsfModel, options: InputOptions) -> tuple[float, float]:
    """Where the middle of a band's image lies in the image that a PSF model is of.

    Raises: InputError if nothing says it.
    """
    if options.psf_position is not None:
        return options.psf_position
    if model.seam:
        raise InputError(
            "the PSF model is of two detectors in one frame, an image is of one; give input.psf_position=[x, y] in that frame."
        )
    height, width = band.image.shape
    shift = [band.header.get(key) for key in ("LTV1", "LTV2")]
    step = [band.header.get(key, 1.0) for key in ("LTM1_1", "LTM2_2")]
    if all(isinstance(v, (int, float)) for v in shift + step) and any(shift) and all(step):
        x, y = (((n + 1) / 2 - float(v)) / float(m) for n, v, m in zip((width, height), shift, step, strict=True))
        return x, y
    for size, (low, high) in zip((width, height), model.span or ()):
        if size <= (high - low) / 2:
            raise InputError(
                f"the PSF model is of an image of {high - low:.0f} pixels, this one has {size}, and nothing says where in it; "
                "give input.psf_position=[x, y], or LTV1 and LTV2."
            )
    return (width + 1) / 2, (height + 1) / 2


def _check_count(what: str, path: Path | str, given: int, needed: int) -> None:
    if given != needed:
        raise InputError(
            f"{path}: {given} {what} for {needed} bands; give one a band, as EXTVER, as a cube or as a list of files."
        )
