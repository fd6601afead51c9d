"""Catalogues as named columns: .csv, .ecsv, .fits and .parquet, a column read only if it is asked for.

Values come as the file has them: text from .csv and .ecsv, numbers and lists from .fits and .parquet, None where there is none.
Invariant: all columns of a catalogue are equally long.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from diffinv.core.checks import InputError
from diffinv.data.fits import read_fits
from diffinv.data.headers import read_headers

SUFFIXES = (".csv", ".ecsv", ".parquet")
_FITS = re.compile(r"\.(fits|fit|fts)$", re.IGNORECASE)

Columns = Mapping[str, Sequence[object]]


def is_catalogue(path: Path, names: Sequence[str]) -> bool:
    """Whether a file is a catalogue: by its suffix, or a FITS table with one of the columns `names` and no image."""
    if path.suffix.lower() in SUFFIXES:
        return True
    if not _FITS.search(path.name):
        return False
    try:
        cards = [header.cards for header in read_headers(path)]
    except InputError:
        return False  # whoever reads it as an image says what is wrong
    if any(c.get("NAXIS", 0) and c.get("XTENSION", "IMAGE") == "IMAGE" or c.get("ZIMAGE") for c in cards):
        return False
    return any(str(c.get(f"TTYPE{k + 1}", "")).lower() in names for c in cards for k in range(int(c.get("TFIELDS", 0))))


def read_catalogue(path: Path, names: Sequence[str]) -> tuple[Columns, tuple[str, ...]]:
    """The columns of a catalogue whose names, in lower case, are among `names`.

    Returns: lower-case name → values, and the names of all its columns as it spells them.
    Raises: InputError if it cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet(path, names)
    return _text(path, names, ecsv=suffix == ".ecsv") if suffix in SUFFIXES else _fits(path, names)


def _text(path: Path, names: Sequence[str], *, ecsv: bool) -> tuple[Columns, tuple[str, ...]]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as handle:
            lines = list(handle)
        comments = [line for line in lines if ecsv and line.startswith("#")]
        comma = not ecsv or any(re.match(r"#\s*delimiter:\s*['\"]?,", line) for line in comments)
        reader = csv.DictReader(lines[len(comments) :], delimiter="," if comma else " ")
        spelt = {name.strip().lower(): name for name in reader.fieldnames or ()}
        rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a CSV catalogue ({error}); write it as UTF-8 with a header line.") from error
    return {name: [row[key] for row in rows] for name, key in spelt.items() if name in names}, tuple(spelt.values())


def _fits(path: Path, names: Sequence[str]) -> tuple[Columns, tuple[str, ...]]:
    tables = [table.columns for table in read_fits(path).tables if table.columns]
    found = next((t for t in tables if {name.lower() for name in t} & set(names)), {})
    return {name.strip().lower(): list(c) for name, c in found.items() if name.strip().lower() in names}, tuple(found)


def _parquet(path: Path, names: Sequence[str]) -> tuple[Columns, tuple[str, ...]]:
    try:
        from diffinv.data.parquet import parquet_columns
    except ModuleNotFoundError as error:
        raise InputError(f"{path}: pyarrow is not installed; pip install 'diffinv[parquet]'.") from error
    return parquet_columns(path, names)
