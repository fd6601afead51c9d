"""What was measured of an entry, wherever it is: a file of its own, squares of mosaics, or a row of images.

Invariant: the hash of an input is that of the bytes that its pixels were read from.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from diffinv.core.checks import InputError
from diffinv.data.catalog import Cut, Entry, Row
from diffinv.data.fits import FitsFile, read_fits
from diffinv.data.image_rows import read_row
from diffinv.data.layouts import InputOptions
from diffinv.data.mosaics import read_cut


def read_input(entry: Entry, options: InputOptions) -> FitsFile:
    """The planes of an entry.

    Raises: InputError if they cannot be read.
    """
    if isinstance(entry.where, Cut):
        return read_cut(entry.where, options)
    if isinstance(entry.where, Row):
        return read_row(entry.path, entry.where, options)
    return read_fits(entry.path, max_pixels=options.max_pixels)


def input_digest(entry: Entry, options: InputOptions) -> str:
    """SHA-256 of the bytes that `read_input` reads; a file of its own is not decoded for it.

    Raises: InputError if they cannot be read.
    """
    return file_digest(entry.path) if entry.where is None else read_input(entry, options).sha256


def file_digest(path: Path) -> str:
    """SHA-256 of a regular file, read in blocks.

    Raises: InputError if it is missing, cannot be read, or is a directory, a device or a pipe.
    """
    try:
        if path.is_file():
            with open(path, "rb") as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest()
        cause = "a directory, a device or a pipe" if path.exists() else "no such file"
    except (OSError, ValueError) as error:
        cause = str(error)
    raise InputError(f"{path}: cannot be read ({cause}); check the path and its permissions.")
