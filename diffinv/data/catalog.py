"""Which objects a run is about: a FITS file, a directory, or a catalogue (.csv, .ecsv, .fits, .parquet; HDF5 with image rows).

A catalogue has `object_id` (also `SourceID` or `id`) and `path`; or, as the ESA Cutana catalogue, `SourceID`, `RA`, `Dec`,
`diameter_pixel` or `diameter_arcsec`, and `fits_file_paths`, a list of survey mosaics, one a band, of which each object is cut.
Relative paths start at the catalogue. A directory means its FITS files; else the leaves of a HATS catalogue
(`…/Npix=*.parquet`); else the files of a MultimodalUniverse set (`healpix=*/*.hdf5`).
Invariant: the objects of one run have different names.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffinv.core.checks import InputError
from diffinv.data.tables import is_catalogue, read_catalogue

_SUFFIX = re.compile(r"\.(fits|fit|fts)(\.(gz|fz))?$", re.IGNORECASE)
_HDF5 = (".hdf5", ".h5")
_ID_NAMES = ("object_id", "sourceid", "id")
_SIZES = ("diameter_pixel", "diameter_arcsec")
_CUT = ("fits_file_paths", "ra", "dec", *_SIZES)
_SHOWN = 20


@dataclass(frozen=True)
class Cut:
    """A square of survey mosaics around a position.

    mosaics: files, one or more a band. ra, dec: ICRS, degrees. pixels: its side in pixels of the first mosaic, the others being
    cut to the same angle; or arcsec: its side as an angle. One of them is None.
    """

    mosaics: tuple[Path, ...]
    ra: float
    dec: float
    pixels: int | None = None
    arcsec: float | None = None


@dataclass(frozen=True)
class Row:
    """A row of an HDF5 file of images, from 0."""

    number: int


@dataclass(frozen=True)
class Entry:
    """One object: its name, the file that holds its observation, and where in it if not all of it."""

    object_id: str
    path: Path
    where: Cut | Row | None = None


def object_name(path: Path) -> str:
    """The file's name without the suffixes of FITS files; all of it where nothing else would be left."""
    return _SUFFIX.sub("", path.name) or path.name


def find_objects(source: str | Path) -> list[Entry]:
    """The objects of a FITS file, a directory or a catalogue, in the order of their files and rows.

    Arguments: source: the path.
    Returns: one entry an object; an empty directory or catalogue gives none.
    Raises: InputError if it is none of these, a column is missing, a row cannot be used, or two objects have the same name (the
        first 20 are listed).
    """
    source = Path(source)
    try:
        if source.is_dir():
            entries = _directory(source)
        elif source.exists():
            entries = _file(source)
        else:
            raise InputError(f"{source}: no such file or directory; give a FITS file, a directory of them, or a catalogue.")
    except OSError as error:
        raise InputError(f"{source}: cannot be read ({error.strerror}); check the path and its permissions.") from error
    _check_names(source, entries)
    return entries


def _directory(source: Path) -> list[Entry]:
    images = sorted(p for p in source.iterdir() if _SUFFIX.search(p.name) and p.is_file())
    if images:
        return [Entry(object_name(p), p) for p in images]
    leaves = [*source.glob("**/Npix=*.parquet"), *source.glob("**/Npix=*/*.parquet")] or source.glob("healpix=*/*.hdf5")
    return [entry for leaf in sorted(leaves) for entry in _file(leaf)]


def _file(source: Path) -> list[Entry]:
    if source.suffix.lower() in _HDF5:
        from diffinv.data.image_rows import row_names

        return [Entry(name, source, Row(number)) for number, name in enumerate(row_names(source, _ID_NAMES))]
    if is_catalogue(source, _ID_NAMES):
        return _catalogue(source)
    return [Entry(object_name(source), source)]


def _catalogue(source: Path) -> list[Entry]:
    columns, spelt = read_catalogue(source, (*_ID_NAMES, "path", *_CUT))
    if not spelt:
        return []
    name = next((n for n in _ID_NAMES if n in columns), None)
    cuts = "path" not in columns and "fits_file_paths" in columns
    size = next((n for n in _SIZES if n in columns), None)
    if name is None or not ("path" in columns or (cuts and size and {"ra", "dec"} <= columns.keys())):
        wanted = "object_id and path, or SourceID, RA, Dec, diameter_pixel (or diameter_arcsec) and fits_file_paths"
        raise InputError(f"{source}: needs the columns {wanted}; it has {', '.join(spelt)}.")
    rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
    entries, bad = [], []
    for number, row in enumerate(rows, start=2):
        try:
            entries.append(_cut(source, row[name], row, size) if cuts else _whole(source, row[name], row["path"]))
        except ValueError as error:
            bad.append(f"line {number}: {error}")
    if bad:
        raise InputError(f"{source}: rows that cannot be used (the header is line 1): {_listed(bad, '; ')}.")
    return entries


def _whole(source: Path, name: object, path: object) -> Entry:
    return Entry(_text(name, "object_id"), source.parent / _text(path, "path"))


def _cut(source: Path, name: object, row: Mapping[str, object], size: str) -> Entry:
    mosaics = tuple(source.parent / path for path in _paths(row["fits_file_paths"]))
    ra, dec, side = (_number(row[key], key) for key in ("ra", "dec", size))
    if not (0 <= ra <= 360 and -90 <= dec <= 90):
        raise ValueError(f"RA, Dec = {ra:g}, {dec:g} is not on the sky")
    if size == "diameter_arcsec":
        where = Cut(mosaics, ra, dec, arcsec=_positive(side, size))
    elif side == int(side):
        where = Cut(mosaics, ra, dec, pixels=int(_positive(side, size)))
    else:
        raise ValueError(f"{size} is {side:g}, not a whole number")
    return Entry(_text(name, "SourceID"), mosaics[0], where)


def _paths(value: object) -> list[str]:
    """A list of paths, or one written as JSON or as Python has it, or one path alone."""
    if isinstance(value, str) and value.strip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            try:
                value = ast.literal_eval(value.strip())
            except (ValueError, SyntaxError) as error:
                raise ValueError(f"fits_file_paths is {value[:80]!r}, not a list of paths") from error
    paths = list(value) if isinstance(value, (list, tuple)) else [value]
    if not paths:
        raise ValueError("fits_file_paths is empty")
    return [_text(path, "fits_file_paths") for path in paths]


def _text(value: object, column: str) -> str:
    """A name or a path; a whole number is a name as well."""
    text = value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else "" if value is None else str(value)
    if not text.strip():
        raise ValueError(f"{column} is empty")
    return text.strip()


def _number(value: object, column: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{column} is {value!r}, not a number")
    return number


def _positive(value: float, column: str) -> float:
    if not value > 0:
        raise ValueError(f"{column} is {value:g}; it must be > 0")
    return value


def _check_names(source: Path, entries: Sequence[Entry]) -> None:
    seen: set[str] = set()
    twice = dict.fromkeys(e.object_id for e in entries if e.object_id in seen or seen.add(e.object_id))
    if twice:
        raise InputError(f"{source}: object names must differ; more than once: {_listed(map(repr, twice), ', ')}.")


def _listed(items: Iterable[str], separator: str) -> str:
    items = list(items)
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return separator.join(items[:_SHOWN]) + more
