"""A directory or a catalogue of FITS files as rows: one file a row, all with the same bands, shapes and unit.

Every file is read once before the training, so that a bad one is found before the first step; what fits into `KEPT` bytes
stays in memory, and the rest is read again when its turn comes.
Columns: `y` (bands, H, W); `good`, True where finite, unflagged and of positive variance; `variance` and `psf` where the files
have them; and extra extensions by their names. PSFs smaller than the largest are padded with zeros around their centre.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from diffinv.core.checks import InputError
from diffinv.data.catalog import find_objects
from diffinv.data.fits import read_fits
from diffinv.data.given import read_bands
from diffinv.data.layouts import InputOptions, RawBand
from diffinv.data.psf import PsfKind, check_psf
from diffinv.data.rows import Column, Rows

KEPT = 2**30
_SHOWN = 20


class EmptyImage(InputError):
    """A file without a good pixel."""


@dataclass(frozen=True, eq=False)
class _Shelf:
    """The files that are rows, in their order, and the arrays of those that are kept in memory."""

    options: InputOptions
    extra: tuple[str, ...]
    paths: list[Path] = field(default_factory=list)
    kept: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)

    def row(self, number: int) -> dict[str, np.ndarray]:
        known = self.kept.get(number)
        return _read_row(self.paths[number], self.options, self.extra)[0] if known is None else known


def open_fits_rows(
    source: Path, options: InputOptions, extra: Sequence[str] = (), *, empty: list[Path] | None = None
) -> tuple[Rows, str]:
    """The rows of a directory or a catalogue, and their BUNIT ("" if they have none).

    Arguments: source. options: what the files do not say themselves. extra: names of further extensions that hold images.
    empty: takes the files without a good pixel, which are then left out; None: they are errors.
    Raises: InputError with a line for each bad file (the first 20).
    """
    entries = find_objects(source)
    if any(entry.where is not None for entry in entries):
        raise InputError(f"{source}: a catalogue of mosaics or image rows; training reads a file a row, or an array file.")
    paths = tuple(entry.path for entry in entries)
    if not paths:
        raise InputError(f"{source}: no FITS files to learn from; give a directory of them, a catalogue, or an array file.")
    shelf = _Shelf(options, tuple(extra))
    first: tuple[dict, tuple[str, ...]] | None = None
    stamps, size, problems = (0, 0), 0, []
    for path in paths:
        try:
            arrays, labels = _read_row(path, options, shelf.extra)
            first = (arrays, labels) if first is None else first
            _check_alike(path, arrays, labels, shelf.paths[0] if shelf.paths else path, *first)
        except InputError as error:
            if empty is not None and isinstance(error, EmptyImage):
                empty.append(path)
                continue
            problems.append(str(error) if str(error).startswith(str(path)) else f"{path}: {error}")
            continue
        if "psf" in arrays:
            stamps = tuple(max(n, m) for n, m in zip(stamps, arrays["psf"].shape[-2:], strict=True))
        size += sum(a.nbytes for a in arrays.values())
        if size <= KEPT:
            shelf.kept[len(shelf.paths)] = arrays
        shelf.paths.append(path)
    if not shelf.paths and not problems:
        raise InputError(f"{source}: none of its {len(paths)} files has a good pixel; look at their flags and variances.")
    if problems:
        more = [f"{source}: and {len(problems) - _SHOWN} more bad files"] if len(problems) > _SHOWN else []
        raise InputError("\n".join([*problems[:_SHOWN], *more]))
    return Rows(source, _columns(shelf, first[0], stamps)), first[1][-1]


def _columns(shelf: _Shelf, first: Mapping[str, np.ndarray], stamps: tuple[int, int]) -> dict[str, Column]:
    count = len(shelf.paths)
    shapes = {name: (count, *a.shape) for name, a in first.items()}
    if "psf" in first:
        shapes["psf"] = (count, first["psf"].shape[0], *(n + 1 - n % 2 for n in stamps))

    def reader(name: str):
        def read(index: np.ndarray | None) -> np.ndarray:
            rows = [shelf.row(int(n))[name] for n in (range(count) if index is None else index)]
            return np.stack([_padded(a, shapes["psf"][-2:]) for a in rows] if name == "psf" else rows)

        return read

    return {name: Column(shape, first[name].dtype, reader(name)) for name, shape in shapes.items()}


def _read_row(path: Path, options: InputOptions, extra: Sequence[str]) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """The arrays of a file, and its band names followed by its unit."""
    file = read_fits(path, max_pixels=options.max_pixels)
    bands = read_bands(file, options)
    if len({band.image.shape for band in bands}) > 1:
        raise InputError(f"{path}: its bands have different shapes; bring them to one grid.")
    arrays = {"y": np.stack([b.image for b in bands]).astype(np.float32)}
    good = np.stack([_good(band) for band in bands])
    if not good.any():
        raise EmptyImage(f"{path}: no good pixel (flagged, not finite, or variance ≤ 0); leave the file out.")
    arrays["good"] = good
    if all(band.variance is not None for band in bands):
        arrays["variance"] = np.stack([b.variance for b in bands]).astype(np.float64)
    if all(band.psf is not None for band in bands):
        stamps = [_kernel(path, band) for band in bands]
        size = tuple(max(n) + 1 - max(n) % 2 for n in zip(*(s.shape for s in stamps), strict=True))
        arrays["psf"] = np.stack([_padded(s, size) for s in stamps]).astype(np.float32)
    for name in extra:
        planes = file.named(name.upper())
        if not planes:
            raise InputError(f"{path}: has no image extension {name}; it has {', '.join(p.name for p in file.planes)}.")
        images = [np.atleast_3d(p.data.T).T for p in planes]  # (H, W) → (1, H, W)
        arrays[name] = np.concatenate(images).astype(np.float32)
    units = {str(band.header.get("BUNIT", "")).strip() for band in bands}
    if len(units) > 1:
        raise InputError(f"{path}: its bands are in different units ({', '.join(sorted(units))}); bring them to one.")
    return arrays, (*(str(band.name) for band in bands), units.pop())


def _good(band: RawBand) -> np.ndarray:
    good = np.isfinite(band.image)
    for flags in (band.bad, band.saturated):
        if flags is not None:
            good &= ~flags
    if band.variance is not None:
        if band.variance.shape != band.image.shape:
            raise InputError(f"the variance is {band.variance.shape} but the image {band.image.shape}; give one value a pixel.")
        good &= np.isfinite(band.variance) & (band.variance > 0)
    return good


def _kernel(path: Path, band: RawBand) -> np.ndarray:
    """The PSF on the data's pixels, its source at (kh // 2, kw // 2)."""
    cards = band.psf_header
    kind, oversample = str(cards.get("PSFKIND", PsfKind.EFFECTIVE)).strip().lower(), cards.get("OVERSAMP", 1.0)
    if oversample != 1 or kind != PsfKind.EFFECTIVE:
        raise InputError(
            f"{path}: the PSF has OVERSAMP = {oversample} and PSFKIND = {kind}; training wants the effective PSF on the "
            "pixels of the data."
        )
    psf, _ = check_psf(band.psf, norm=cards.get("PSFNORM"), oversample=1.0, kind=PsfKind.EFFECTIVE)
    if any(c != n // 2 for c, n in zip(psf.centre, psf.stamp.shape, strict=True)):
        raise InputError(f"{path}: the PSF of even size is centred between pixels; give a stamp of odd size.")
    return psf.stamp


def _padded(stamps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(…, kh, kw) in a stamp of `size`, centre on centre."""
    before = [n // 2 - k // 2 for n, k in zip(size, stamps.shape[-2:], strict=True)]
    after = [n - k - b for n, k, b in zip(size, stamps.shape[-2:], before, strict=True)]
    return np.pad(stamps, [(0, 0)] * (stamps.ndim - 2) + list(zip(before, after, strict=True)))


def _check_alike(
    path: Path, arrays: dict, labels: tuple[str, ...], other: Path, known: dict, known_labels: tuple[str, ...]
) -> None:
    if labels != known_labels:
        raise InputError(f"{path}: bands and unit {labels}, but {other} has {known_labels}; learn from files of one kind.")
    if arrays.keys() != known.keys():
        raise InputError(f"{path}: holds {', '.join(arrays)}, but {other} {', '.join(known)}; learn from files of one kind.")
    for name in arrays.keys() - {"psf"}:
        if arrays[name].shape != known[name].shape:
            raise InputError(
                f"{path}: {name} is {arrays[name].shape}, but {known[name].shape} in {other}; cut the images to one size."
            )
