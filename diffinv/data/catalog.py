"""Which objects a run is about: one FITS file, a directory of them, or a CSV catalogue with `object_id` and `path`.

Invariant: the objects of one run have different names.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from diffinv.core.checks import InputError

_SUFFIX = re.compile(r"\.(fits|fit|fts)(\.(gz|fz))?$", re.IGNORECASE)
_ID_NAMES = ("object_id", "sourceid", "id")
_SHOWN = 20


@dataclass(frozen=True)
class Entry:
    """One object: its name, and the file that holds its observation."""

    object_id: str
    path: Path


def object_name(path: Path) -> str:
    """The file's name without the suffixes of FITS files; all of it where nothing else would be left."""
    return _SUFFIX.sub("", path.name) or path.name


def find_objects(source: str | Path) -> list[Entry]:
    """The objects of a FITS file, a directory (its FITS files, not those of its folders) or a .csv catalogue, sorted by file.

    Arguments: source: the path.
    Returns: one entry an object; an empty directory or catalogue gives none.
    Raises: InputError if it is none of these, a column is missing, or two objects have the same name (the first 20 are listed).
    """
    source = Path(source)
    try:
        if source.is_dir():
            paths = sorted(p for p in source.iterdir() if _SUFFIX.search(p.name) and p.is_file())
            entries = [Entry(object_name(p), p) for p in paths]
        elif source.suffix.lower() == ".csv":
            entries = _read_csv(source)
        elif source.exists():
            entries = [Entry(object_name(source), source)]
        else:
            raise InputError(f"{source}: no such file or directory; give a FITS file, a directory of them, or a .csv catalogue.")
    except OSError as error:
        raise InputError(f"{source}: cannot be read ({error.strerror}); check the path and its permissions.") from error
    _check_names(source, entries)
    return entries


def _read_csv(source: Path) -> list[Entry]:
    try:
        with open(source, newline="", encoding="utf-8-sig") as handle:
            reader = csv.DictReader(handle)
            columns = {name.strip().lower(): name for name in reader.fieldnames or ()}
            rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{source}: not a CSV catalogue ({error}); write it as UTF-8 with a header line.") from error
    if not columns and not rows:
        return []
    name = next((columns[n] for n in _ID_NAMES if n in columns), None)
    if name is None or "path" not in columns:
        raise InputError(f"{source}: needs the columns object_id and path, has {', '.join(columns.values()) or 'none'}.")
    bad = [n for n, row in enumerate(rows, start=2) if not (row[name] or "").strip() or not (row[columns["path"]] or "").strip()]
    if bad:
        raise InputError(f"{source}: object_id or path is empty on {_listed('line', map(str, bad))}; fill or remove them.")
    return [Entry(row[name].strip(), source.parent / row[columns["path"]].strip()) for row in rows]


def _check_names(source: Path, entries: list[Entry]) -> None:
    seen: set[str] = set()
    twice = dict.fromkeys(e.object_id for e in entries if e.object_id in seen or seen.add(e.object_id))
    if twice:
        raise InputError(f"{source}: object names must differ; more than once: {_listed('', map(repr, twice))}.")


def _listed(what: str, items: Iterable[str]) -> str:
    items = list(items)
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return f"{what} {', '.join(items[:_SHOWN])}{more}".strip()
