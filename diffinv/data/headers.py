"""The headers and small tables of FITS files that this package wrote, without their images.

A product holds megabytes of images around a table of a few hundred bytes. Its headers say where each HDU lies, so that a walk
over them reads a few kilobytes. Only what `diffinv.data.fits.encode_fits` writes is understood; `read_fits` reads the rest.
Invariant: a file that is cut short within an HDU, or goes on after its last, is an error, although no image was read. One that
is cut between two HDUs is a FITS file; which HDUs it must have is for the caller to say.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np

from diffinv.core.checks import InputError
from diffinv.data.checksums import ones_complement_sum
from diffinv.data.fits import MAX_HDUS, Value

_BLOCK, _CARD = 2880, 80
_MOST_BLOCKS = 1000  # of one header
_SIZES = 12  # cards at the start of a header that say how long the data are, for up to 6 axes
_FORMATS = {"D": ">f8", "E": ">f4", "K": ">i8", "J": ">i4", "I": ">i2", "B": "u1"}


@dataclass(frozen=True)
class Header:
    """One HDU. text: its header. start, end: of its data, bytes."""

    text: bytes
    start: int
    end: int

    @cached_property
    def cards(self) -> Mapping[str, Value]:
        """Keyword → value, strings that go on over several cards whole."""
        return _cards(self.text)

    @property
    def name(self) -> str:
        """EXTNAME, looked up without reading the other cards."""
        place = self.text.find(b"EXTNAME = ")
        card = b"" if place % _CARD else self.text[place + 10 : place + _CARD]
        return str(_value(card.decode("ascii", "replace")) or "")


def read_headers(path: Path, start: int = 0, size: int | None = None) -> list[Header]:
    """The headers of every HDU of the FITS file that is all of a file, or `size` bytes of it from `start`.

    Raises: InputError if the file cannot be read, is no FITS file of this package, or is not as long as its headers say.
    """
    try:
        with open(path, "rb") as stream:
            end = os.fstat(stream.fileno()).st_size if size is None else start + size
            return _walk(path, stream, start, end)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions.") from error
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: a header cannot be read ({error}); write the file again.") from error


def _walk(path: Path, stream: BinaryIO, place: int, end: int) -> list[Header]:
    headers: list[Header] = []
    while place < end and len(headers) < MAX_HDUS:
        stream.seek(place)
        text = _header_text(path, stream)
        start = place + len(text)
        place = start + -(-_data_bytes(_cards(text[: _SIZES * _CARD])) // _BLOCK) * _BLOCK
        headers.append(Header(text, start, place))
    if not headers or place != end:
        raise InputError(f"{path}: {end} bytes, but its headers say {place}; it is damaged, write it again.")
    return headers


def _header_text(path: Path, stream: BinaryIO) -> bytes:
    text = b""
    for _ in range(_MOST_BLOCKS):
        block = stream.read(_BLOCK)
        if len(block) < _BLOCK or not (text or block.startswith((b"SIMPLE  =", b"XTENSION="))):
            break
        text += block
        if block.rstrip()[-3:] == b"END" and (len(block.rstrip()) - 3) % _CARD == 0:
            return text
    raise InputError(f"{path}: a header is cut short or is none; the file is damaged, write it again.")


def _cards(text: bytes) -> dict[str, Value]:
    cards: dict[str, Value] = {}
    last = ""
    for k in range(0, len(text), _CARD):
        card = text[k : k + _CARD].decode("ascii")
        keyword = card[:8].rstrip()
        value = _value(card[10:]) if card[8:10] == "= " or keyword == "CONTINUE" else None
        if keyword == "CONTINUE" and isinstance(value, str):
            cards[last] = str(cards[last])[:-1] + value
        elif value is not None and keyword not in cards:
            cards[keyword], last = value, keyword
    return cards


def _value(text: str) -> Value | None:
    text = text.strip()
    if text.startswith("'"):
        quoted = re.match(r"'((?:[^']|'')*)'", text)
        return quoted[1].replace("''", "'").rstrip() if quoted else None
    text = text.partition("/")[0].strip()
    if text in ("T", "F"):
        return text == "T"
    try:
        return int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text.replace("D", "E"))
    except ValueError:
        return None


def _data_bytes(cards: Mapping[str, Value]) -> int:
    """Of an image or a table with its heap, without padding."""
    sizes = [int(cards[f"NAXIS{k + 1}"]) for k in range(int(cards["NAXIS"]))]
    if not sizes:
        return 0
    if min(sizes) < 0:
        raise ValueError(f"axes {sizes[:5]} are impossible")
    return abs(int(cards["BITPIX"])) // 8 * int(cards.get("GCOUNT", 1)) * (int(cards.get("PCOUNT", 0)) + math.prod(sizes))


def read_plane(path: Path, header: Header) -> np.ndarray:
    """The image of an HDU in float32, native-endian.

    Raises: InputError if it fails its checksum, or is no image of that type.
    """
    cards = header.cards
    axes = int(cards["NAXIS"]) if cards.get("BITPIX") == -32 and cards.get("XTENSION") == "IMAGE" else 0
    shape = tuple(int(cards[f"NAXIS{k}"]) for k in range(axes, 0, -1))
    data = _data(path, header)
    if len(shape) < 2:
        raise InputError(f"{path}: {header.name} is no image in 32-bit floats; write the file again.")
    return np.frombuffer(data, ">f4", count=math.prod(shape)).reshape(shape).astype(np.float32)


def _data(path: Path, header: Header) -> bytes:
    """The bytes of an HDU, after their checksum."""
    with open(path, "rb") as stream:
        stream.seek(header.start)
        data = stream.read(header.end - header.start)
    if int(header.cards.get("DATASUM", -1)) != ones_complement_sum(data):
        raise InputError(f"{path}: {header.name} fails its checksum (DATASUM); the file is damaged, write it again.")
    return data


def read_columns(path: Path, header: Header) -> dict[str, np.ndarray]:
    """The columns of a table HDU as native-endian arrays, text as str.

    Raises: InputError if they fail their checksum, or a column's format is none that this package writes.
    """
    cards, data = header.cards, _data(path, header)
    names = [str(cards[f"TTYPE{k + 1}"]) for k in range(int(cards["TFIELDS"]))]
    row = np.dtype([(name, _format(path, str(cards[f"TFORM{k + 1}"]))) for k, name in enumerate(names)])
    if row.itemsize != cards["NAXIS1"]:
        raise InputError(f"{path}: rows of {header.name} have {cards['NAXIS1']} bytes, its columns {row.itemsize}.")
    table = np.frombuffer(data, row, count=int(cards["NAXIS2"]))
    return {name: _native(table[name]) for name in names}


def _format(path: Path, text: str) -> str | tuple[str, int]:
    found = re.fullmatch(r"(\d*)([A-Z])", text)
    if found is None or found[2] not in (*_FORMATS, "A"):
        raise InputError(f"{path}: a column has the format {text!r}; expected one of A, {', '.join(_FORMATS)}.")
    count = int(found[1] or 1)
    if found[2] == "A":
        return f"S{count}"
    return _FORMATS[found[2]] if count == 1 else (_FORMATS[found[2]], count)


def _native(column: np.ndarray) -> np.ndarray:
    if column.dtype.kind == "S":
        return np.char.decode(column, "ascii", "replace")
    return column.astype(column.dtype.newbyteorder("="))
